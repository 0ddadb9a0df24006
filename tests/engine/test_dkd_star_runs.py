"""Whole runs of DKD and STAR, with and without memory: kills, two processes, refusals, ONNX, extension."""

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

MEMORY = {"size": 4, "mix": "append", "selection": "ssul", "labels": "current", "pseudo": 0.6}
METHODS: dict[str, dict[str, Any]] = {"dkd": {"name": "dkd"}, "star": {"name": "star", "new_lr_scale": 1.0}}
SHORT = {"epochs": 2, "epochs_next": 1, "log_every": 1}
RATES = {"lr_factors": {"decoder": 2.0, "heads": 2.0}}


def run_of(out: Path, method: str, *, memory: bool = True, **changes: Any) -> dict[str, Any]:
    """Three steps of one class each."""
    scenario: dict[str, Any] = {"task": "1-1"} | ({"memory": MEMORY} if memory else {})
    config = settings(out, method=METHODS[method], scenario=scenario, **changes)
    config["model"] = config["model"] | {"options": {**config["model"]["options"], "last_conv": True}}
    return config


def terms(folder: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (folder / "journal.jsonl").read_text().splitlines())
    return [line["terms"] for line in lines if "terms" in line]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_with_memory_has_its_terms_and_its_record(tmp_path, method):
    config = run_of(tmp_path, method, train=SHORT | RATES)
    config["data"] |= {"options": {"train": 12, "val": 4}}
    run = everseg.run(config, quiet=True)
    found = terms(run.path)
    assert all(math.isfinite(value) for logged in found for value in logged.values())
    first = {"dkd": {"mbce", "auxiliary"}, "star": {"mbce"}}[method]
    later = {"dkd": {"kd", "positive", "negative"}, "star": {"background", "features", "contrast"}}[method]
    assert set(found[0]) == first
    assert set(found[-1]) - {"drawn"} == first | later
    kept = json.loads((run.folder.final(1) / "memory.json").read_text())
    assert 0 < len(kept["images"]) <= 4
    bundle = everseg.export(run.path, tmp_path / "bundle", onnx=False)
    about = json.loads((tmp_path / "bundle" / "classes.json").read_text())
    assert about["architecture"]["growth"][0]["default"]["head"]["background"] == "constant"
    assert "readout" not in about
    assert bundle.path.is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "memory"), [("dkd", False), ("star", True)])
def test_killed_runs_continue_to_the_same_bytes(tmp_path, method, memory):
    """In the second step, before and while it is saved: STAR's passes and what it draws begin again from the same."""
    rates = {"lr": 0.02, "lr_next": 0.005}
    undisturbed, disturbed = (run_of(tmp_path / name, method, memory=memory, train=rates) for name in "ab")
    assert complete(undisturbed) == 0
    expected = results(tmp_path / "a" / "toy")
    assert any(name.endswith("memory.json") for name in expected) == memory
    killed(disturbed, "iteration", 24)
    killed(disturbed, "flush", 3)
    killed(disturbed, "name", 0, "*/01/final")
    assert complete(disturbed) == 0
    assert results(tmp_path / "b" / "toy") == expected


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_find_what_one_finds(tmp_path, method):
    """Norms rest from the start. STAR draws other features in each process, so its weights agree no further."""
    folders = []
    for world in (1, 2):
        config = run_of(tmp_path / str(world), method, train=SHORT)
        config["method"] = METHODS[method] | {"freeze_norm": True, "freeze_from": 0}
        config["model"] = {"name": f"{Path(__file__).with_name('plain_model.py')}:build"}
        assert (ranks(config, world) if world > 1 else [complete(config)]) == [0] * world
        folders.append(RunFolder(tmp_path / str(world) / "toy"))
    for step in (0, 1) if method == "star" else (0, 1, 2):
        kept = [json.loads((folder.final(step) / "memory.json").read_text()) for folder in folders]
        assert kept[0]["images"]
        assert step or kept[0] == kept[1]
        for file in ("model", "method_state"):
            paths = [folder.final(step) / f"{file}.safetensors" for folder in folders]
            one, two = (load_file(path) if path.exists() else {} for path in paths)
            assert one.keys() == two.keys()
            assert bool(one) or (file, method) == ("method_state", "dkd")
            drawn = method == "star" and step
            for name, value in one.items():
                if not drawn:
                    torch.testing.assert_close(two[name], value, rtol=2e-3, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_an_onnx_file_gives_the_models_masks(tmp_path, method):
    onnxruntime = pytest.importorskip("onnxruntime")
    train = {"epochs": 40, "epochs_next": 2, "lr": 0.2}
    run = everseg.run(run_of(tmp_path, method, memory=False, train=train), quiet=True)
    everseg.export(run.path, tmp_path / "bundle")
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


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_is_told_before_anything_is_trained(tmp_path, method):
    with pytest.raises(ConfigError) as error:
        everseg.run("demo-day-dusk-ft", quiet=True, out=str(tmp_path), method={"name": method})
    must_say(error.value, f"'{method}'", "one domain")
    config = run_of(tmp_path, method)
    config["method"] = METHODS[method] | {"pretune": 1}
    with pytest.raises(ConfigError) as error:
        everseg.run(config, quiet=True)
    must_say(error.value, "method.pretune", "1x1")
    assert not list(tmp_path.rglob("*.safetensors"))
