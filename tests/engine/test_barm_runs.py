"""Whole runs of BARM: kills, two processes, refusals, ONNX, extension."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import complete, killed, ranks, results
from safetensors.torch import load_file
from toy import build, settings

import everseg
from everseg.errors import ConfigError
from everseg.runs.run_folder import RunFolder
from saying import must_say

METHOD = {"name": "barm", "head_width": 8, "threshold": 0.5}
SHORT = {"epochs": 2, "epochs_next": 1, "log_every": 1}
MEMORY = {"size": 4, "selection": "ssul", "pseudo": 0.5}


def run_of(out: Path, **changes: Any) -> dict[str, Any]:
    """Three steps of one class each."""
    return settings(out, **{"method": METHOD, "scenario": {"task": "1-1"}} | changes)


def terms(folder: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (folder / "journal.jsonl").read_text().splitlines())
    return [line["terms"] for line in lines if "terms" in line]


def test_a_run_has_its_terms_and_says_how_its_outputs_are_read(tmp_path):
    run = everseg.run(run_of(tmp_path, train=SHORT), quiet=True)
    found = terms(run.path)
    assert all(math.isfinite(value) for logged in found for value in logged.values())
    assert set(found[0]) == {"bce"}
    assert set(found[-1]) == {"bce", "triplet", "residual", "features", "kd"}
    everseg.export(run.path, tmp_path / "bundle", onnx=False)
    about = json.loads((tmp_path / "bundle" / "classes.json").read_text())
    assert about["readout"] == {"activation": "sigmoid", "before": True, "residual": "residual"}
    heads = [one["default"]["head"] for one in about["architecture"]["growth"]]
    assert heads == [{"hidden": 8}, *[{"hidden": 8, "beside": {"residual": 1}}] * 2]


def test_half_precision_trains(tmp_path):
    run = everseg.run(run_of(tmp_path, train=SHORT | {"precision": "bf16"}), quiet=True)
    assert all(math.isfinite(value) for logged in terms(run.path) for value in logged.values())


@pytest.mark.slow
@pytest.mark.parametrize("memory", [False, True])
def test_killed_runs_continue_to_the_same_bytes(tmp_path, memory):
    scenario = {"task": "1-1"} | ({"memory": MEMORY} if memory else {})
    undisturbed, disturbed = (run_of(tmp_path / name, scenario=scenario) for name in "ab")
    assert complete(undisturbed) == 0
    expected = results(tmp_path / "a" / "toy")
    assert any(name.endswith("memory.json") for name in expected) == memory
    killed(disturbed, "iteration", 24)
    killed(disturbed, "flush", 3)
    killed(disturbed, "name", 0, "*/01/final")
    assert complete(disturbed) == 0
    assert results(tmp_path / "b" / "toy") == expected


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    """Norms rest from the start. The two terms of the residual are means over the cells of each process, as in the
    authors' code, so they are off here."""
    folders = []
    for world in (1, 2):
        config = run_of(tmp_path / str(world), train=SHORT)
        off = {"triplet_weight": 0.0, "residual_weight": 0.0}
        config["method"] = METHOD | off | {"freeze_norm": True, "freeze_from": 0}
        config["model"] = {"name": f"{Path(__file__).with_name('plain_model.py')}:build"}
        assert (ranks(config, world) if world > 1 else [complete(config)]) == [0] * world
        folders.append(RunFolder(tmp_path / str(world) / "toy"))
    for step in (0, 1, 2):
        one, two = (load_file(folder.final(step) / "model.safetensors") for folder in folders)
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=2e-3, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Any:
    train = {"epochs": 40, "epochs_next": 6, "lr": 0.2}
    method = METHOD | {"triplet_weight": 1.0}
    return everseg.run(run_of(tmp_path_factory.mktemp("barm"), method=method, train=train), quiet=True)


@pytest.mark.slow
def test_an_onnx_file_gives_the_models_masks(trained, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    everseg.export(trained.path, tmp_path / "bundle")
    model, data = everseg.load(tmp_path / "bundle"), build()
    session = onnxruntime.InferenceSession(
        str(next(Path(tmp_path / "bundle").glob("*.onnx"))), providers=["CPUExecutionProvider"]
    )
    seen = set()
    for index in range(6):
        image, _ = data.splits["val"].read(index)
        ours = model.predict(image).ids
        [theirs] = session.run(["mask"], {"image": image[None]})
        assert ours.shape == theirs[0].shape
        assert (ours == theirs[0]).mean() > 0.999
        seen |= set(np.unique(ours).tolist())
    assert len(seen) > 1


@pytest.mark.slow
def test_a_bundle_is_extended_by_one_more_head(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the run of an extension stands in runs/
    pytest.importorskip("onnxruntime")
    everseg.export(trained.path, step=1, out=tmp_path / "bundle", onnx=False)
    toy = f"{Path(__file__).with_name('toy.py')}:build"
    longer = everseg.extend(
        tmp_path / "bundle", data=toy, add=["blue"], method="barm", out=tmp_path / "longer", quiet=True,
        overrides=["method.head_width=8", "train.max_iterations=3"], onnx=True,
    )  # fmt: skip
    assert longer.bundle.parity
    about = json.loads((tmp_path / "longer" / "classes.json").read_text())
    assert [one["default"]["head"].get("beside", {}) for one in about["architecture"]["growth"]] == [
        {}, {"residual": 1}, {"residual": 1},
    ]  # fmt: skip


def test_what_cannot_be_is_told_before_anything_is_trained(tmp_path):
    with pytest.raises(ConfigError) as error:
        everseg.run("demo-day-dusk-ft", quiet=True, out=str(tmp_path), method={"name": "barm"})
    must_say(error.value, "'barm'", "one domain")
    for option, told in (({"pretune": 1}, "method.pretune"), ({"freeze_heads": "all"}, "freeze_heads")):
        with pytest.raises(ConfigError) as error:
            everseg.run(run_of(tmp_path, method=METHOD | option), quiet=True)
        must_say(error.value, told)
    assert not list(tmp_path.rglob("*.safetensors"))
