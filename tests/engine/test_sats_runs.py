"""Whole runs of SATS: what it logs, kills, bf16."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from encoders import need_transformers
from processes import complete, killed, results
from toy import settings

import everseg

HERE = Path(__file__).parent
METHOD = {"name": "sats", "entropy_norm": "paper", "threshold": 0.3}


def test_two_steps_log_every_term(tmp_path):
    config = settings(tmp_path, method=METHOD, train={"epochs": 1, "epochs_next": 1, "log_every": 1})
    config["model"] = {"name": f"{HERE / 'attentive_model.py'}:attentive", "norm": None, "options": {}}
    config["data"] |= {"options": {"train": 8, "val": 2}}
    run = everseg.run(config, quiet=True)
    lines = map(json.loads, (run.path / "journal.jsonl").read_text().splitlines())
    found = [line["terms"] for line in lines if "terms" in line]
    assert set(found[0]) == {"ce"}
    assert set(found[-1]) == {"ce", "kd", "attention"}
    assert all(math.isfinite(value) for terms in found for value in terms.values())
    assert found[-1]["attention"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16"])
def test_killed_runs_on_a_segformer_continue_to_the_same_bytes(tmp_path, precision):
    """A kill in the second step, whose thresholds are in its checkpoint by then, and one while a file is saved."""
    need_transformers()
    train = {"precision": precision, "epochs": 2, "epochs_next": 2, "checkpoint_every": 2, "log_every": 1}
    # MiT's keys are cells of 32 pixels: a smaller crop has one alone, and nothing to attend to.
    data = {"crop": 64, "options": {"size": 72, "val": 2}}
    undisturbed, disturbed = (
        settings(tmp_path / name, method=METHOD, train=train, data=data) for name in "ab"
    )
    assert complete(undisturbed) == 0
    lines = map(json.loads, (tmp_path / "a" / "toy" / "journal.jsonl").read_text().splitlines())
    found = [line["terms"] for line in lines if "terms" in line]
    assert all(math.isfinite(value) for terms in found for value in terms.values())
    assert found[-1]["attention"] > 0
    killed(disturbed, "iteration", 15)
    assert list((tmp_path / "b" / "toy" / "steps" / "01" / "ckpt").iterdir())  # it is in the second step
    killed(disturbed, "flush", 2)
    assert complete(disturbed) == 0
    assert results(tmp_path / "b" / "toy") == results(tmp_path / "a" / "toy")
