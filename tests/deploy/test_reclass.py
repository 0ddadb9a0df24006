"""Classes of a deployed model dropped, merged and renamed without training, by the values that are predicted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from untrained import SMALL, make_bundle, picture

import everseg
from everseg.data.batches.transforms import normalise
from everseg.deploy.bundle import Contents, open_bundle, write_bundle
from everseg.deploy.reclass import ClassEdits, with_classes
from everseg.errors import ConfigError
from everseg.labels import LabelPolicy, LabelSpace, RawLabels, shared_classes
from everseg.models.build import deeplabv3_tiny, erfnet
from everseg.models.domain_statistics import DomainStatistics
from everseg.models.heads import Head
from everseg.runs.model_folder import BundleClass, Registry, load_model
from saying import must_say

NAMES = ["background", "road", "car", "truck", "sky"]


@pytest.fixture
def at(tmp_path, monkeypatch) -> Path:
    """A working folder with an untrained bundle of five classes, each of which it predicts."""
    monkeypatch.chdir(tmp_path)
    return make_bundle(tmp_path / "bundle", {"default": NAMES})


def image() -> torch.Tensor:
    return normalise(torch.from_numpy(picture().transpose(2, 0, 1).copy())[None], "imagenet")


def logits(bundle: str | Path, branch: str = "default") -> torch.Tensor:
    """(C, h, w) float64."""
    with torch.no_grad():
        return everseg.load(bundle).model(image(), (branch,))[branch].logits[0].double()


def test_a_merged_class_has_the_sum_of_the_probabilities(at, call):
    code, out, err = call("extend", at, "--merge", "truck,car=vehicle", "--no-onnx")
    assert code == 0, err
    must_say(out, "truck (3), car (2)", "vehicle (id 5)", "sum")
    must_say(out, "bundle-v2", "nothing was trained")
    before, after = logits(at), logits("bundle-v2")
    new = open_bundle("bundle-v2")
    assert new.spaces["default"].names == ("background", "road", "vehicle", "sky")
    one = before.softmax(0)
    expected = torch.stack([one[0], one[1], one[2] + one[3], one[4]])
    torch.testing.assert_close(after.softmax(0), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 4]])
    # ids: the others keep theirs, the merged class gets a new one, the parts are in no branch any more
    ids = {entry.name: (entry.id, entry.branches) for entry in new.registry.classes}
    assert ids == {
        "background": (0, ("default",)), "road": (1, ("default",)), "car": (2, ()), "truck": (3, ()),
        "sky": (4, ("default",)), "vehicle": (5, ("default",)),
    }  # fmt: skip
    assert set(np.unique(everseg.load("bundle-v2").predict(picture()).ids)) <= {0, 1, 2, 3}
    assert new.spaces["default"].order == (0, 1, 5, 4)


def test_a_dropped_class_leaves_its_pixels_to_the_next(at, call):
    assert call("extend", at, "--drop", "Car, sky", "--no-onnx")[0] == 0
    before, after = logits(at), logits("bundle-v2")
    assert torch.equal(after, before[[0, 1, 3]])
    new = open_bundle("bundle-v2")
    assert new.registry.next_id == 5
    assert len(load_model(new.path)[0].state_dict()["heads.default.classifiers.0.bias"]) == 3
    card = (new.path / "MODEL_CARD.md").read_text()
    must_say(card, "2", "car (not in")
    must_say(card, "1", "without car; without sky")


def test_a_renamed_class_keeps_its_id_and_its_bytes(at, call):
    assert call("extend", at, "--rename", "car=automobile", "--rename", "road=car", "--no-onnx")[0] == 0
    assert torch.equal(logits(at), logits("bundle-v2"))
    new = open_bundle("bundle-v2")
    assert [(entry.id, entry.name) for entry in new.registry.classes][1:3] == [(1, "car"), (2, "automobile")]
    assert new.spaces["default"].names == ("background", "car", "automobile", "truck", "sky")
    # "car" is the name of another class now; "road" still means the class that was called so
    assert new.spaces["default"].formerly == (("road", "car"),)


def test_data_may_use_the_earlier_names():
    space = LabelSpace(
        ((0, 1, 5),), ("background", "road", "vehicle"), formerly=(("car", "vehicle"), ("truck", "vehicle"))
    )
    labels = RawLabels({0: "background", 4: "Truck", 7: "car", 8: "tree", 9: "road"})
    found = shared_classes(labels, space)
    assert found.train_ids == {9: 1, 4: 2, 7: 2}
    assert found.respelt == {"Truck": "vehicle", "car": "vehicle"}
    assert (found.only_data, found.only_space) == ({8: "tree"}, {})
    table = space.lut_for(labels, found.train_ids, LabelPolicy())
    assert [table[raw] for raw in (0, 4, 7, 8, 9)] == [0, 2, 2, 0, 1]


def test_the_next_step_knows_the_earlier_names(at, tmp_path, old_data, call):
    """The data label red and forklifts: red is called car in the bundle, and later vehicle."""
    data = shutil.copytree(old_data.parent, tmp_path / "site") / "data.yaml"
    data.write_text(data.read_text().replace("red", "car"))
    line = ("extend", at, "--merge", "car,truck=vehicle", "--data", data, "--add", "forklift", "--no-onnx")
    few = ("data.workers=0", "train.max_iterations=1", "report=false", "data.crop=32", "train.batch=4")
    code, out, err = call(*line, *few, "--json")
    assert code == 0, err
    must_say(err, "vehicle", "probability")
    new = open_bundle("bundle-v2")
    assert new.spaces["default"].names == ("background", "road", "vehicle", "sky", "forklift")
    assert [entry["pixels"] > 0 for entry in json.loads(out)["on_new"]] == [False, True, False]
    (step,) = json.loads(Path("runs/bundle-v2/scenario.json").read_text())["steps"]
    assert step["train"][0]["lut"][:4] == [0, 4, 2, 0]
    # the history has both steps, and the line goes back over both
    code, out, err = call("history", "bundle-v2", "--json")
    told = json.loads(out)
    assert [(entry["step"], entry["method"]) for entry in told["steps"]] == [(1, "classes"), (2, "mib")]
    assert [one["path"] for one in told["ancestors"]] == [str(tmp_path / "bundle-v2-classes"), str(at)]
    must_say(call("history", "bundle-v2")[1], "car + truck = vehicle")
    # the same command again finds everything
    code, _, err = call(*line, *few)
    assert code == 0, err
    # and the name is taken
    code, _, err = call("extend", "bundle-v2", "--data", data, "--add", "car", *few, "--no-onnx")
    assert code == 2
    must_say(err, "car", "already as 'vehicle'")


def test_a_preview_writes_nothing(at, call):
    line = ("extend", at, "--drop", "sky", "--merge", "car,truck=car", "--rename", "road=street", "--dry-run")
    code, out, err = call(*line)
    assert code == 0, err
    for facts in (
        ("drop", "sky (id 4)"),
        ("car (2), truck (3)", "car (id 2)"),
        ("road (id 1)", "street"),
        ("dry run",),
    ):
        must_say(out, *facts)
    assert [path.name for path in at.parent.iterdir()] == ["bundle"]
    (at.parent / "bundle-v2").mkdir()  # whatever lies at the next name
    assert call(*line)[0] == 0


def test_what_cannot_be_is_said_at_once(at, call):
    code, _, err = call(
        "extend", at, "--drop", "bus,car,background", "--merge", "car,sky=road", "--merge", "truck=lorry",
        "--rename", "sky=blue",
    )  # fmt: skip
    assert code == 2
    twice = ("'car'", "twice"), ("'sky'", "twice")
    for each in (("--drop", "bus"), ("'background'",), ("'road'", "already"), ("lorry", "two"), *twice):
        must_say(err, *each)
    for wrong in (("--merge", "car,truck"), ("--rename", "a=b", "--rename", "a=c")):
        assert call("extend", at, *wrong)[0] == 2
    code, _, err = call("extend", at)
    assert code == 2
    must_say(err, "--data", "--drop")
    code, _, err = call("extend", at, "--drop", "sky", "--add", "bus")
    assert code == 2
    must_say(err, "--add", "--data")
    for more in (
        ("--keep-at-least", "0.9"),
        ("--old-val", "d.yaml"),
        ("--how", "quick"),
        ("--shared",),
        ("a.b=1",),
    ):
        for dry in ((), ("--dry-run",)):
            code, _, err = call("extend", at, "--drop", "sky", *more, *dry)
            assert code == 2, (more, dry)
            must_say(err, more[0], "--data")
    assert [path.name for path in at.parent.iterdir()] == ["bundle"]


def edited(tmp_path: Path, model: torch.nn.Module, spaces: dict[str, LabelSpace], edits: ClassEdits) -> tuple:
    """Write a model, change its classes, read it back: the two models and the new bundle."""
    old = write_bundle(tmp_path / "old", Contents(model.eval(), spaces), onnx=False)
    new, after, registry = with_classes(model, old.about, edits, 3)
    contents = Contents(new, after, before=registry, steps=[0] * len(new.growth))
    bundle = write_bundle(tmp_path / "new", contents, onnx=False)
    return model, bundle.model(), bundle


@torch.no_grad()
def test_classes_of_several_steps_and_branches(tmp_path):
    """A class merged over two growths, a growth that vanishes, and a branch that has one part only."""
    torch.manual_seed(0)
    model = deeplabv3_tiny(**SMALL)
    for grown in ({"day": 3}, {"day": 2}, {"dusk": 3}, {"day": 1}):
        model.grow(grown)
    spaces = {
        "day": LabelSpace(((0, 1, 2), (3, 4), (5,)), ("background", "road", "car", "tree", "truck", "bus")),
        "dusk": LabelSpace(((0, 1, 2),), ("background", "road", "truck")),
    }
    edits = ClassEdits(drop=("bus",), merge={"car": ("car", "truck")})
    seen = model.domain_statistics["day"] = DomainStatistics(
        2, torch.zeros(8).double(), torch.eye(8).double()
    )
    old, new, bundle = edited(tmp_path, model, spaces, edits)
    assert bundle.spaces["day"].names == ("background", "road", "car", "tree")
    assert bundle.spaces["dusk"].names == ("background", "road", "car")
    assert new.growth == [{"day": {"classes": 3, "head": {"sums": [1, 1, 2]}}}, {"day": 1}, {"dusk": 3}]
    a, b = old(image()), new(image())
    assert torch.equal(b["dusk"].logits, a["dusk"].logits)
    day, after = a["day"].logits, b["day"].logits
    expected = torch.cat([day[:, :2], day[:, [2, 4]].logsumexp(1, keepdim=True), day[:, 3:4]], 1)
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-6)
    # what the images of a branch look like is of the encoder, which is the same
    assert list(new.domain_statistics) == ["day"]
    assert torch.equal(new.domain_statistics["day"].covariance, seen.covariance)
    # a later growth goes on
    new.grow({"day": 2})
    assert new(image())["day"].logits.shape[1] == 6


@torch.no_grad()
def test_the_background_is_what_the_class_space_says():
    """Not what a class is called: a model may have a background named ground, or none and a class named background."""
    names = ["ground", "a", "b"]
    registry = Registry(tuple(BundleClass(i, one, (i, 0, 0), 0, ("day",)) for i, one in enumerate(names)), 3)
    order = ((0, 1, 2),)
    ground = {"day": LabelSpace(order, ("ground", "a", "b"), background=0)}
    with pytest.raises(ConfigError, match="'ground' is the background"):
        ClassEdits.of(["Ground"]).known_in(registry, ground)
    with pytest.raises(ConfigError, match="background takes up"):
        ClassEdits.of(merge={"c": ["ground", "a"]}).known_in(registry, ground)
    kept = ClassEdits.of(merge={"ground": ["ground", "a"]})
    assert kept.known_in(registry, ground) == kept
    none = {"day": LabelSpace(order, ("ground", "a", "b"), background=None)}
    assert ClassEdits.of(["ground"]).known_in(registry, none) == ClassEdits.of(["ground"])


@pytest.mark.parametrize("kind", ["transposed", "trunk", "background"])
def test_other_classifiers(tmp_path, kind):
    torch.manual_seed(0)
    if kind == "transposed":
        model = erfnet(widths=[8, 12, 16], blocks=[1, 1])
        head = Head()
    else:
        model = deeplabv3_tiny(**SMALL)
        head = Head(hidden=4) if kind == "trunk" else Head(background="own")
    model.grow({"default": 4}, heads={"default": head})
    space = {"default": LabelSpace(((0, 1, 2, 3),), ("background", "a", "b", "c"))}
    old, new, _ = edited(tmp_path, model, space, ClassEdits(drop=("a",), merge={"d": ("b", "c")}))
    before, after = (m(image())["default"].logits for m in (old, new))
    expected = torch.cat([before[:, :1], before[:, 2:].logsumexp(1, keepdim=True)], 1)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)


def test_heads_whose_outputs_cannot_be_joined_are_refused(tmp_path):
    model = deeplabv3_tiny(**SMALL)
    model.grow({"default": 2}, heads={"default": Head(hidden=4)})
    model.grow({"default": 1}, heads={"default": Head(hidden=4)})
    space = {"default": LabelSpace(((0, 1), (2,)), ("background", "a", "b"))}
    old = write_bundle(tmp_path / "old", Contents(model.eval(), space), onnx=False)
    with pytest.raises(ConfigError, match="different steps"):
        with_classes(model, old.about, ClassEdits(merge={"c": ("a", "b")}), 1)
