"""Whole runs of SSUL and MicroSeg with memory: kills, two processes, maps beside the images, refusals, ONNX."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import complete, killed, ranks, results
from safetensors.torch import load_file
from toy import HERE, build, maps, settings

import everseg
from everseg.data.batches.extra import read_map
from everseg.data.batches.transforms import normalise
from everseg.deploy.diff import diff
from everseg.deploy.serve import Served
from everseg.errors import ConfigError, DataError, EversegError
from everseg.losses.reading import read_ids
from everseg.runs.run_folder import RunFolder
from saying import must_say

MEMORY = {"size": 4, "selection": "ssul", "pseudo": 0.5}
SSUL = {"name": "ssul", "unknown": "all", "head_width": 8, "threshold": 0.5}
MICROSEG = {"name": "microseg", "head_width": 8, "clusters": 2, "proposals": 4, "threshold": 0.5}


def run_of(out: Path, method: dict, **changes) -> dict:
    """Three steps of one class each, with a memory."""
    config = settings(out, method=method, scenario={"task": "1-1", "memory": MEMORY}, **changes)
    if method["name"] == "microseg":
        config["data"] = config["data"] | {"extra": {"proposals": maps(out.parent / "maps", "proposals")}}
    return config


def terms(folder: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (folder / "journal.jsonl").read_text().splitlines())
    return [line["terms"] for line in lines if "terms" in line]


@pytest.mark.slow
@pytest.mark.parametrize("method", [SSUL, MICROSEG], ids=lambda method: method["name"])
def test_killed_runs_continue_to_the_same_bytes_memory_included(tmp_path, method):
    undisturbed, disturbed = (run_of(tmp_path / name, method) for name in "ab")
    assert complete(undisturbed) == 0
    expected = results(tmp_path / "a" / "toy")
    assert any(name.endswith("memory.json") for name in expected)
    killed(disturbed, "iteration", 24)
    killed(disturbed, "flush", 3)
    killed(disturbed, "name", 0, "*/01/final")
    assert complete(disturbed) == 0
    assert results(tmp_path / "b" / "toy") == expected


@pytest.mark.slow
def test_two_processes_keep_the_same_images_as_one(tmp_path):
    """Norms rest from the start, so that both can agree on weights and on what these see in the background."""
    folders = []
    for world in (1, 2):
        config = run_of(tmp_path / str(world) / "out", SSUL | {"freeze_norm": True, "freeze_from": 0})
        config["model"] = {"name": f"{Path(__file__).with_name('plain_model.py')}:build"}
        assert (ranks(config, world) if world > 1 else [complete(config)]) == [0] * world
        folders.append(RunFolder(tmp_path / str(world) / "out" / "toy"))
    for step in (0, 1, 2):
        kept = [json.loads((folder.final(step) / "memory.json").read_text()) for folder in folders]
        assert kept[0]["images"]
        assert kept[0] == kept[1]
        one, two = (load_file(folder.final(step) / "model.safetensors") for folder in folders)
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=2e-3, atol=1e-4, msg=name)


def test_saliency_is_read_and_a_missing_map_is_told_before_training(tmp_path):
    saliency = maps(tmp_path, "saliency")
    short = {"epochs": 1, "epochs_next": 1, "log_every": 1}
    method = SSUL | {"unknown": "salient"}
    losses = []
    for name, options in (("salient", method), ("none", method | {"unknown": "none"})):
        config = settings(tmp_path / name, method=options, train=short)
        config["data"] = config["data"] | {"extra": {"saliency": saliency}}
        losses.append([logged["bce"] for logged in terms(everseg.run(config, quiet=True).path)])
    assert losses[0] != losses[1]
    bare = settings(tmp_path / "bare", method=method, train=short)
    with pytest.raises(ConfigError) as error:
        everseg.run(bare, quiet=True)
    must_say(error.value, "data.extra.saliency", "'ssul'")
    assert not (tmp_path / "bare" / "toy" / "steps").exists()
    shutil.rmtree(Path(saliency) / "train")
    (Path(saliency) / "train").mkdir()
    bare["data"] = bare["data"] | {"extra": {"saliency": saliency}}
    with pytest.raises((ConfigError, DataError)) as error:
        everseg.run(bare, quiet=True)
    must_say(error.value, "data.extra.saliency", 24)


@pytest.mark.slow
def test_an_onnx_file_of_ssul_reads_out_as_the_model_does(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    train = {"epochs": 40, "epochs_next": 2, "lr": 0.2}
    run = everseg.run(settings(tmp_path, method=SSUL | {"encoder_rate": 1.0}, train=train), quiet=True)
    everseg.export(run.path, tmp_path / "bundle")
    about = json.loads((tmp_path / "bundle" / "classes.json").read_text())
    assert about["readout"] == {"activation": "sigmoid", "merge": ["unknown"]}
    model = everseg.load(tmp_path / "bundle")
    data = build()
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


def test_microseg_needs_its_regions_in_tests_too_and_refuses_images_alone(tmp_path):
    proposals = maps(tmp_path, "proposals")
    short = {"epochs": 1, "epochs_next": 1, "log_every": 1}
    config = settings(tmp_path / "out", method=MICROSEG, train=short, report=True)
    config["data"] = config["data"] | {"extra": {"proposals": proposals}, "evaluation": "whole"}
    run = everseg.run(config, quiet=True)
    found = terms(run.path)
    assert set(found[0]) == {"bce", "unseen", "bce_pixel"}
    assert set(found[-1]) == {"bce", "unseen"}
    assert (run.path / "report.html").is_file()
    image, _ = build().splits["val"].read(0)
    with pytest.raises(EversegError) as error:
        everseg.export(run.path, tmp_path / "bundle")
    must_say(error.value, "proposals", "--no-onnx")
    bundle = everseg.export(run.path, tmp_path / "bundle", onnx=False).path
    missing = tmp_path / "no-such-image.png"  # told before any image is read
    for refused in (
        lambda: everseg.load(run.path).predict(image),
        lambda: everseg.predict(bundle, [missing], tmp_path / "masks", quiet=True),
        lambda: Served(bundle),
        lambda: diff(bundle, run.path, missing),
    ):
        with pytest.raises(EversegError) as error:
            refused()
        must_say(error.value, "proposals", "--extra")
    assert not (tmp_path / "masks").exists()
    the_masks_of_predict_are_those_of_the_test(tmp_path, run, bundle, Path(proposals) / "val")
    again = ["data.extra.proposals=" + proposals, f"data={HERE}"]
    assert everseg.evaluate(run.path, overrides=again, quiet=True).images == 10
    shutil.rmtree(Path(proposals) / "val")
    (Path(proposals) / "val").mkdir()
    again = settings(tmp_path / "again", method=MICROSEG, train=short)
    again["data"] = again["data"] | {"extra": {"proposals": proposals}}
    with pytest.raises(EversegError) as error:
        everseg.run(again, quiet=True)
    must_say(error.value, "data.extra.proposals", 10)


@pytest.mark.parametrize("method", [SSUL, MICROSEG], ids=lambda method: method["name"])
def test_half_precision_runs(tmp_path, method):
    train = {"epochs": 1, "epochs_next": 1, "log_every": 1, "precision": "bf16"}
    found = terms(everseg.run(run_of(tmp_path / "out", method, train=train), quiet=True).path)
    assert all(np.isfinite(value) for logged in found for value in logged.values())
    assert set(found[-1]) == {"bce"} | ({"unseen"} if method is MICROSEG else set())


def the_masks_of_predict_are_those_of_the_test(
    tmp_path: Path, run: everseg.RunResult, bundle: Path, maps: Path
) -> None:
    """Predict the test images from files with their maps, and compare with the confusion matrix of the last step."""
    split, photos = build().splits["val"], tmp_path / "photos"
    photos.mkdir()
    for index in range(len(split)):
        Image.fromarray(split.read(index)[0]).save(photos / f"{split.id(index)}.png")
    written = everseg.predict(bundle, [photos], tmp_path / "masks", extra={"proposals": maps}, quiet=True)
    confusion = np.load(run.path / "steps" / "01" / "confusion.npz")["default"]
    found = np.zeros_like(confusion)
    for index, files in enumerate(written):
        np.add.at(found, (split.read(index)[1], np.asarray(Image.open(files.mask))), 1)
    np.testing.assert_array_equal(found, confusion)

    loaded = everseg.load(bundle)  # it calls everything background; now every region the last class
    last = loaded.model.head("default").classifiers[-1].of_regions.bias
    with torch.no_grad():
        last += 1000
    image, regions = split.read(0)[0], read_map(maps, f"{split.id(0)}.png")
    normalised = normalise(torch.from_numpy(image.transpose(2, 0, 1).copy()), loaded.form.normalisation)
    with torch.no_grad():
        seen = loaded.model(
            normalised[None], extra={"proposals": torch.from_numpy(regions.astype(int))[None]}
        )
    expected = read_ids(seen["default"], loaded.model.readout, image.shape[:2])[0].numpy()
    assert len(np.unique(expected)) == 2
    np.testing.assert_array_equal(loaded.predict(image, extra={"proposals": regions}).ids, expected)
    with pytest.raises(DataError) as error:
        loaded.predict(image, extra={"proposals": regions + 0.5})
    must_say(error.value, "proposals", "float64")
    loaded.form = replace(
        loaded.form, evaluation="resize", size=(24, 16)
    )  # each pixel looks up the region of the map as given
    np.testing.assert_array_equal(loaded.predict(image, extra={"proposals": regions}).ids, expected)

    wrong = tmp_path / "wrong"
    shutil.copytree(maps, wrong)
    Image.fromarray(np.zeros((3, 5), np.uint8)).save(wrong / f"{split.id(0)}.png")
    (wrong / f"{split.id(1)}.png").unlink()
    for extra, facts in (
        ({"proposals": wrong}, ("proposals", "1 image", f"{split.id(1)}.png")),
        ({"proposals": maps, "depth": maps}, ("depth", "proposals")),
    ):
        with pytest.raises(EversegError) as error:
            everseg.predict(bundle, [photos], tmp_path / "none", extra=extra, quiet=True)
        must_say(error.value, *facts)
    assert not (tmp_path / "none").exists()
    with pytest.raises(DataError) as error:
        everseg.predict(
            bundle, [photos / f"{split.id(0)}.png"], tmp_path / "none", extra={"proposals": wrong}, quiet=True
        )
    must_say(error.value, "proposals", "5x3")


@pytest.mark.parametrize("method", ["ssul", "microseg"])
def test_domains_are_refused_before_anything_is_trained(tmp_path, method):
    config = {
        "out": str(tmp_path),
        "method": {"name": method} | ({"unknown": "all"} if method == "ssul" else {}),
    }
    with pytest.raises(ConfigError) as error:
        everseg.run("demo-day-dusk-ft", quiet=True, **config)
    must_say(error.value, f"'{method}'", "one domain")
