"""Whole runs of PLOP and REMINDER: kills, two processes, domains, an encoder of another library, a bad setting."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from encoders import TYPES, need_transformers
from processes import complete, killed, ranks, results
from safetensors.torch import load_file
from toy import settings

import everseg
from everseg.runs.run_folder import RunFolder
from everyday import some

SHORT = {"epochs": 2, "epochs_next": 1, "log_every": 1}
METHODS = {
    "plop": {"name": "plop", "pod_weight": 0.001, "entropy_norm": "paper", "threshold": 0.3},
    "reminder": {"name": "reminder", "pod_weight": 0.001, "entropy_norm": "paper", "threshold": 0.3},
}


def terms(folder: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (folder / "journal.jsonl").read_text().splitlines())
    return [line["terms"] for line in lines if "terms" in line]


@pytest.mark.parametrize("method", some(METHODS, "plop"))
def test_killed_runs_continue_to_the_same_bytes(tmp_path, method):
    """Kills in the second step, whose thresholds are in its checkpoint by then, and while a file is saved."""
    undisturbed, disturbed = (settings(tmp_path / name, method=METHODS[method]) for name in "ab")
    assert complete(undisturbed) == 0
    expected = results(tmp_path / "a" / "toy")
    killed(disturbed, "iteration", 24)
    assert list((tmp_path / "b" / "toy" / "steps" / "01" / "ckpt").iterdir())  # it is in the second step
    killed(disturbed, "flush", 2)
    assert complete(disturbed) == 0
    assert results(tmp_path / "b" / "toy") == expected


@pytest.mark.parametrize("method", some(METHODS, "plop"))
def test_two_processes_find_what_one_finds(tmp_path, method):
    """Norms without batch statistics, so that both can agree; prototypes and weights at the end of each step."""
    folders = []
    for world in (1, 2):
        config = settings(
            tmp_path / str(world), method=METHODS[method], train=SHORT, scenario={"validation": "none"}
        )
        config["model"] = {"name": f"{Path(__file__).with_name('plain_model.py')}:build"}
        assert (ranks(config, world) if world > 1 else [complete(config)]) == [0] * world
        folders.append(RunFolder(tmp_path / str(world) / "toy"))
    for step in (0, 1):
        for file in ("model", "method_state"):
            paths = [folder.final(step) / f"{file}.safetensors" for folder in folders]
            one, two = (load_file(path) for path in paths) if all(p.exists() for p in paths) else ({}, {})
            assert one.keys() == two.keys()
            assert file == "method_state" or one
            assert file == "model" or bool(one) is (method == "reminder")
            for name, value in one.items():
                torch.testing.assert_close(two[name], value, rtol=2e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("method", some(METHODS, "plop"))
def test_an_encoder_of_another_library(tmp_path, method):
    need_transformers()
    config = settings(tmp_path, method=METHODS[method], train=SHORT)
    config["data"] |= {"options": {"train": 16, "val": 4}}
    options = {"config": TYPES["segformer"], "hidden": 8}
    config["model"] = {"name": "mlp", "encoder": "hf:segformer", "options": options}
    run = everseg.run(config, quiet=True)
    found = terms(run.path)
    assert all(math.isfinite(value) for logged in found for value in logged.values())
    assert set(found[-1]) == {"ce", "pod"} | ({"csw"} if method == "reminder" else set())
    assert found[-1]["pod"] > 0


@pytest.mark.parametrize("method", some(METHODS, "plop"))
def test_domains_are_held_by_pod(tmp_path, method):
    config = {"out": str(tmp_path), "report": False, "method": METHODS[method]}
    config |= {"train": {"epochs": 1, "log_every": 1}}
    config["data"] = {
        "domains": {
            light: {"options": {"light": light, "num_train": 8, "num_val": 2}} for light in ("day", "dusk")
        }
    }
    run = everseg.run("demo-day-dusk-ft", quiet=True, **config)
    found = terms(run.path)
    assert all(math.isfinite(value) for logged in found for value in logged.values())
    assert set(found[0]) == {"ce"}
    assert set(found[-1]) == {"ce", "pod"}
