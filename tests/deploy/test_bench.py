"""everseg bench: each form of a bundle in a process of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from everseg.deploy import bench as bench_module
from everseg.deploy.bench_one import measure
from saying import must_say

pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
BUNDLE = Path(__file__).parent.parent / "fixtures/bundle-format-1"


def job(**more: object) -> dict[str, object]:
    return {
        "bundle": str(BUNDLE), "branch": "default", "threads": 1, "runs": 5, "builder": None, "kind": "uint8",
        "shape": [2, 32, 48, 3], "file": "model.onnx", **more,
    }  # fmt: skip


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_a_form_is_run_from_pixels_to_masks(engine: str) -> None:
    found = measure(job(engine=engine))
    assert len(found["latency"]) == len(found["batches"]) == 5
    assert all(seconds > 0 for seconds in (found["load"], *found["latency"]))
    assert found["memory"] >= 0


def test_openvino_runs_the_same_file() -> None:
    pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    assert len(measure(job(engine="openvino"))["latency"]) == 5


def test_the_command_tables_medians_and_says_what_failed(call: Callable, monkeypatch) -> None:
    jobs = []

    def told(given: dict[str, object]) -> object:
        jobs.append(given)
        if given["engine"] == "torch":
            return "ValueError: no"
        return {"load": 0.5, "latency": [0.1, 0.3, 0.2, 9.0, 0.2], "batches": [0.5] * 5, "memory": 2**20}

    monkeypatch.setattr(bench_module, "_in_a_process", told)
    code, out, err = call("bench", BUNDLE, "--size", "32x64", "--threads", "3", "--quiet")
    assert code == 0, err
    must_say(err, "PyTorch", "ValueError")
    must_say(out, "onnxruntime fp32", "200.0", "8.0", "1.00", "0.50")
    must_say(out, "32", "64", "3")
    assert [one["engine"] for one in jobs][:2] == ["torch", "onnxruntime"]
    assert jobs[0]["shape"] == [4, 32, 64, 3]
    code, out, _ = call("bench", BUNDLE, "--json")
    (form,) = (one for one in json.loads(out)["forms"] if one["name"] == "onnxruntime fp32")
    assert form["latency"] == 0.2
    assert form["bytes"] == (BUNDLE / "model.onnx").stat().st_size
    assert form["slowest"] == pytest.approx(np.quantile([0.1, 0.3, 0.2, 9.0, 0.2], 0.9))
    code, _, err = call("bench", BUNDLE, "--size", "32")
    assert code == 2
    must_say(err, "--size", "HEIGHTxWIDTH")
    code, _, err = call("bench", BUNDLE, "--domain", "moon")
    assert code == 2
    must_say(err, "moon", "default")


@pytest.mark.slow
def test_the_processes_are_started(call: Callable) -> None:
    assert sys.executable
    code, out, err = call("bench", BUNDLE, "--size", "32x48", "--runs", "5", "--json")
    assert code == 0, err
    assert {"PyTorch", "onnxruntime fp32"} <= {one["name"] for one in json.loads(out)["forms"]}
