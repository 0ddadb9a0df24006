"""A deployed model goes on with more images of its own classes; and models without background."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import everseg
from everseg.data.datasets.folder import build as folder_data
from everseg.deploy.bundle import Contents, open_bundle, write_bundle
from everseg.display import percent, share
from everseg.labels import LabelSpace
from everseg.models.build import deeplabv3_tiny
from everseg.runs.input_form import InputForm
from everseg.runs.run_folder import RunFolder
from saying import must_say

FEW = ["data.workers=0", "train.max_iterations=4", "--no-onnx"]


@pytest.fixture
def at(tmp_path, monkeypatch, deployed) -> Path:
    """A working folder with a copy of the deployed bundle, which knows red and green."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(deployed, tmp_path / "bundle")
    return tmp_path / "bundle"


def test_more_images_of_known_classes_refine_the_model(at, old_data, call):
    """The data label red. Green is visible in them and has no label."""
    code, out, err = call("extend", at, "--data", old_data, "--json", *FEW, "train.lr=0.01")
    assert code == 0, err
    told = json.loads(out)
    assert told["new"] == {}
    red, green = told["on_new"]
    assert (red["name"], green["name"], green["pixels"]) == ("red", "green", 0)
    split = folder_data(None, descriptor=str(old_data)).splits["val"]
    for key, bundle in (("before", at), ("after", "bundle-v2")):
        model = everseg.load(bundle)
        pairs = [
            (model.predict(image).ids == 1, mask == 2) for image, mask in map(split.read, range(len(split)))
        ]
        hit, either = (
            sum(map(np.sum, ones)) for ones in zip(*((a & b, a | b) for a, b in pairs), strict=True)
        )
        assert red[key] == pytest.approx(hit / either, abs=1e-6)
    old, new = open_bundle(at), open_bundle("bundle-v2")
    assert new.registry == old.registry
    assert new.steps == old.steps + 1
    assert new.lineage["parent"] == old.digest
    assert (new.lineage["history"][-1]["method"], new.lineage["history"][-1]["classes"]) == ("complete", [])
    page = Path("runs/bundle-v2/report.html").read_text()
    must_say(page, "Step 1", "more images", "red", percent(red["before"]), percent(red["after"]))
    must_say(page, "missing", "sure", "never", "background")  # how green was treated
    must_say(page, "not label green")
    code, out, err = call("extend", at, "--data", old_data, *FEW, "train.lr=0.01", "--quiet")
    must_say(out, "red", percent(red["before"]), percent(red["after"]))
    must_say(Path("bundle-v2/MODEL_CARD.md").read_text(), "red", f"{percent(red['after'])} after")
    # scored again, the run has no new class either
    again = everseg.evaluate("runs/bundle-v2", quiet=True).branches["default"]
    assert (again.new_classes, again.miou["new"]) == ((), None)


def test_green_that_is_not_labelled_stays(at, old_data):
    """Training hard on images that never label green does not forget it."""
    options = {"data": old_data, "quiet": True, "onnx": False}
    changes = ["data.workers=0", "train.epochs=8", "train.lr=0.02", "report=false"]
    shares = {}
    for method in ("complete", "ft"):
        done = everseg.extend(at, method=method, out=f"by-{method}", overrides=changes, **options)
        shares[method] = done.kept.classes["green"]["agreement"]
    assert shares["complete"] > 0.8
    assert shares["ft"] < 0.5


def test_nothing_to_refine_is_said_at_once(at, new_data, call, tmp_path):
    other = shutil.copytree(new_data.parent, tmp_path / "other") / "data.yaml"
    other.write_text(other.read_text().replace("red", "bus"))
    code, _, err = call("extend", at, "--data", other, *FEW)
    assert code == 3
    must_say(err, "no class", "red", "--add", "forklift")
    assert not Path("runs").exists()


@pytest.fixture
def street(tmp_path) -> Path:
    """A bundle without background: every pixel is road or car."""
    model = deeplabv3_tiny(widths=[8, 8, 8, 8])
    model.grow({"default": 2})
    spaces = {"default": LabelSpace(((0, 1),), ("road", "car"), None)}
    form = InputForm(evaluation="whole")
    return write_bundle(tmp_path / "street", Contents(model.eval(), spaces, form=form), onnx=False).path


def test_a_model_without_background_learns_a_class(street, new_data, call, monkeypatch):
    """The data label forklifts; everything else is no background of this model, and no forklift either."""
    monkeypatch.chdir(street.parent)
    line = ("extend", street, "--data", new_data, "--add", "forklift", *FEW, "data.crop=32", "train.batch=4")
    code, out, err = call(*line, "train.lr=0.03", "--json")
    assert code == 0, err
    (told,) = json.loads(out)["taught"]
    run = RunFolder(Path("runs/street-v2"))
    assert run.config().method.name == "complete"
    (step,) = json.loads((run.path / "scenario.json").read_text())["steps"]
    assert step["train"][0]["lut"][:4] == [255, 2, 255, 255]
    split = folder_data(None, descriptor=str(new_data)).splits["val"]
    model = everseg.load("street-v2")
    pairs = [(model.predict(image).ids == 2, mask == 1) for image, mask in map(split.read, range(len(split)))]
    found, truth = (np.stack(ones) for ones in zip(*pairs, strict=True))
    assert (found & ~truth).sum() > 0
    assert told["iou"] == pytest.approx((found & truth).sum() / (found | truth).sum(), abs=1e-6)
    assert told["false_share"] == pytest.approx(found[~truth].mean())
    card = Path("street-v2/MODEL_CARD.md").read_text()
    must_say(card, "forklift", percent(told["iou"]), share(told["false_share"]))
    page = (run.path / "report.html").read_text()
    must_say(page, "missing", "sure", "never", "background")
    code, _, err = call(*line, "--method", "mib", "-o", "other")
    assert code == 2
    must_say(err, "mib", "no background", "method=complete")
