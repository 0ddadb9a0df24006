"""Whole runs of MiB with a memory: kills, and the files of a run of `mbs`."""

from __future__ import annotations

import json

import pytest
from encoders import need_transformers
from processes import complete, killed, results
from toy import settings

import everseg

MIB = {"name": "mib", "later_rate": 2.0, "decay_encoder": False}
MEMORY = {"size": 4, "selection": "reservoir", "pseudo": 0.5}


def run_of(out, method):
    scenario = {"task": "1-1", **({"memory": MEMORY} if method is MIB else {})}
    return settings(out, method=method, scenario=scenario)


def test_memory_images_have_a_term_of_their_own(tmp_path):
    done = everseg.run(
        {**run_of(tmp_path, MIB), "train": {**settings(tmp_path)["train"], "log_every": 1}}, quiet=True
    )
    lines = [json.loads(line) for line in (done.path / "journal.jsonl").read_text().splitlines()]
    later = [line["terms"] for line in lines if "terms" in line and line.get("step")]
    assert later
    assert all({"ce", "memory", "kd"} <= terms.keys() for terms in later)


@pytest.mark.slow
@pytest.mark.parametrize("method", [MIB, {"name": "mbs"}], ids=lambda method: method["name"])
def test_killed_runs_continue_to_the_same_bytes(tmp_path, method):
    if method is not MIB:
        need_transformers()
    undisturbed, disturbed = (run_of(tmp_path / name, method) for name in "ab")
    assert complete(undisturbed) == 0
    expected = results(tmp_path / "a" / "toy")
    killed(disturbed, "iteration", 24)
    killed(disturbed, "flush", 3)
    assert complete(disturbed) == 0
    assert results(tmp_path / "b" / "toy") == expected
