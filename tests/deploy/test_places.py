"""A deployed model learns another place: in a branch of its own, or in one that it has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from PIL import Image
from untrained import picture

import everseg
from everseg.deploy import asked as asked_module
from everseg.deploy import export as export_module
from everseg.deploy.asked import Asked, Place
from everseg.deploy.bundle import Contents, open_bundle, write_bundle
from everseg.deploy.feature_sketch import as_inputs
from everseg.deploy.precisions import trials_of_run
from everseg.errors import ConfigError, DataError
from everseg.labels import LabelSpace
from everseg.models.branch_choice import features_of, infer_branch
from everseg.models.build import deeplabv3_tiny
from everseg.models.erfnet import erfnet
from everseg.models.stored import Sizes
from everseg.progress import Progress
from everseg.reports.extension import NOT_MEASURED, Told, kept_rows
from everseg.runs.commit import load_tensors
from everseg.runs.model_edits import own_norms, with_branch, with_own_norms
from everseg.runs.model_folder import load_model
from everseg.runs.results import Results
from everseg.runs.run_folder import RunFolder
from saying import must_say

FEW = ["data.workers=0", "train.max_iterations=3", "train.lr=0.02", "report=false", "--no-onnx"]


@pytest.fixture
def at(tmp_path, monkeypatch, deployed) -> Path:
    """A working folder with a copy of the deployed bundle, which knows red and green."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(deployed, tmp_path / "bundle")
    return tmp_path / "bundle"


def run_of(deployed: Path) -> Path:
    return next(deployed.parent.glob("*/run.json")).parent


@pytest.fixture(scope="session")
def two_branches(deployed, tmp_path_factory) -> Path:
    """The deployed bundle with a second branch, whose classifier gives red where the first gives green."""
    model, about = load_model(deployed)
    about = with_branch(model, about, "line", "default")
    head = model.head("line").classifiers[0]
    with torch.no_grad():
        for weight in (head.weight, head.bias):
            weight.copy_(weight[[0, 2, 1]])
    contents = Contents(
        model, about.spaces, form=about.form, domains=about.domains, steps=[0, 0], before=about.registry,
        lineage={"steps": 1},
    )  # fmt: skip
    return write_bundle(tmp_path_factory.mktemp("several") / "bundle", contents, onnx=False).path


@pytest.mark.parametrize("per_branch", ["head", "norm", "decoder"])
def test_a_branch_begins_as_a_copy(tmp_path, per_branch):
    """Every weight and statistic of the origin, so the logits are bit-equal; random numbers stay as they were."""
    model = deeplabv3_tiny(widths=[8, 8, 8, 8], per_branch=per_branch)
    model.grow({"day": 3})
    model.grow({"day": 1})
    image = torch.from_numpy(picture(48, 64).transpose(2, 0, 1).copy())[None] / 255.0
    model.train()(
        torch.cat([image, image.flip(3)])
    )  # the running statistics move away from those of a fresh norm
    model.eval()
    spaces = {"day": LabelSpace(((0, 1, 2), (3,)), ("background", "road", "sky", "car"))}
    about = load_model(write_bundle(tmp_path / "one", Contents(model, spaces), onnx=False).path)[1]
    drawn = torch.get_rng_state()
    two = with_branch(model, about, "dusk", "day")
    assert torch.equal(torch.get_rng_state(), drawn)
    day, dusk = (out.logits for out in model(image).values())
    assert torch.equal(day, dusk)
    assert two.spaces["dusk"] == two.spaces["day"]
    assert two.domains == {"day": "day", "dusk": "dusk"}
    assert two.registry is not None
    assert {one.branches for one in two.registry.classes} == {("day", "dusk")}
    # and it is read back as it is
    contents = Contents(model, two.spaces, domains=two.domains, before=two.registry, steps=[0] * 4)
    path = write_bundle(tmp_path / "two", contents, onnx=False).path
    assert torch.equal(load_model(path)[0].eval()(image)["dusk"].logits, dusk)


@pytest.mark.parametrize("per_branch", ["head", "decoder"])
@pytest.mark.parametrize("build", [deeplabv3_tiny, erfnet])
def test_norms_that_branches_share_become_their_own(build, per_branch):
    """Both branches give the same outputs, to the bit, and share no norm any more."""
    small = {"widths": [8, 8, 8, 8]} if build is deeplabv3_tiny else {"widths": [6, 8, 12], "blocks": [1, 1]}
    model = build(per_branch=per_branch, **small)
    for grows in ({"day": 3}, {"dusk": 2}, {"day": 1}):
        model.grow(grows)
    image = torch.from_numpy(picture(48, 64).transpose(2, 0, 1).copy())[None] / 255.0
    model.train()(torch.cat([image, image.flip(3)]))
    model.eval()
    drawn = torch.get_rng_state()
    sizes = Sizes.of(model.state_dict())
    own = with_own_norms(model, own_norms(model.describe(), sizes))
    assert torch.equal(torch.get_rng_state(), drawn)
    for branch, output in model(image).items():
        assert torch.equal(own(image)[branch].logits, output.logits)
    shared = {id(weight) for weight in own.shared_parameters()}
    assert not [n for n, w in own.named_parameters() if id(w) in shared and ("bn" in n or "norm" in n)]
    assert own_norms(own.describe(), sizes) is None
    assert own_norms(deeplabv3_tiny(compensation=True).describe(), sizes) is None
    assert own_norms({"name": "mine", "options": {"per_branch": "head"}, "growth": []}, sizes) is None


def test_the_old_branch_keeps_its_answers_whatever_the_new_images_look_like(at, old_data, call):
    """By default. A branch gets norms of its own, or shared ones keep their statistics."""
    for file in (old_data.parent / "images").rglob("*.png"):
        dark = at.parent / "dark" / file.relative_to(old_data.parent)
        dark.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(Image.open(file)) // 2).save(dark)
    shutil.copytree(old_data.parent / "masks", at.parent / "dark" / "masks")
    shutil.copy(old_data, at.parent / "dark" / "data.yaml")
    image = torch.from_numpy(picture(40, 40).transpose(2, 0, 1).copy())[None] / 255.0

    def answers(bundle: Path | str) -> torch.Tensor:
        with torch.no_grad():
            return load_model(Path(bundle))[0](image, ("default",))["default"].logits.softmax(1)

    for out, shared in (("own", []), ("shared", ["model.options.per_branch=head"])):
        line = ("extend", at, "--data", "dark/data.yaml", "--domain", "dusk", "-o", out, "--json", *FEW)
        code, told, err = call(*line, "train.max_iterations=6", "--old-val", f"default={old_data}", *shared)
        assert code == 0, err
        moved = (answers(out) - answers(at)).abs().max()
        assert 0 < moved < 0.02
        assert json.loads(told)["kept"]["share"] > 0.97
        weights = load_tensors(Path(out) / "model.safetensors")
        assert any(".bn1.dusk." in name for name in weights) is not bool(shared)


def test_a_new_place_gets_a_branch_and_the_old_one_stays(at, old_data, call):
    """The data label forklifts and red. With --how quick no weight of the old branch moves."""
    line = ("extend", at, "--data", old_data, "--add", "forklift", "--domain", "dusk", "--how", "quick", *FEW)
    code, out, err = call(*line, "--json", "--keep-each-at-least", "1")
    assert code == 0, err
    must_say(err, "dusk", "branch of its own", "'default'")
    told = json.loads(out)
    old, new = open_bundle(at), open_bundle("bundle-v2")
    before, after = (load_tensors(one.path / "model.safetensors") for one in (old, new))
    # what was shared is the branch's own now: encoder.bn1.weight is encoder.bn1.default.weight
    plain = {
        name.replace(".paths", "").replace(".default", ""): v
        for name, v in after.items()
        if "dusk" not in name
    }
    assert all(torch.equal(v, plain[name.replace(".default", "")]) for name, v in before.items())
    assert told["kept"]["share"] == pytest.approx(1)
    assert {one.split(":")[0] for one in told["kept"]["classes"]} == {"background", "red", "green"}
    assert new.spaces["default"] == old.spaces["default"]
    assert new.spaces["dusk"].names == (*old.spaces["default"].names, "forklift")
    assert new.about.domains == {"default": "default", "dusk": "dusk"}
    assert [(one.name, one.id, one.branches) for one in new.registry.classes][1:] == [
        ("red", 1, ("default", "dusk")),
        ("green", 2, ("default", "dusk")),
        ("forklift", 3, ("dusk",)),
    ]
    assert new.registry.classes[3].step == 1
    (red, green) = told["on_new"]  # before: the old branch on the images of the new place
    assert (red["name"], red["pixels"] > 0, green["pixels"]) == ("red", True, 0)
    split = everseg.load(at)
    assert red["before"] is not None
    assert [one["name"] for one in told["taught"]] == ["forklift"]
    must_say(call("history", "bundle-v2")[1], "forklift (dusk)")
    # the model takes the name, and each branch predicts its own
    model = everseg.load("bundle-v2")
    image = picture(40, 40)
    assert np.array_equal(model.predict(image, branch="default").ids, split.predict(image).ids)
    assert model.predict(image, branch="dusk").ids.shape == (40, 40)


def test_an_image_of_an_unknown_place_finds_a_branch_after_an_extension(
    deployed, old_data, tmp_path, call, monkeypatch
):
    """The export of the only branch has kept what the choice compares, where branches share the norms."""
    monkeypatch.chdir(tmp_path)  # the run of an extension stands in runs/
    named = [f"data.dataset={toy.HERE}"]
    bundle = everseg.export(run_of(deployed), tmp_path / "one", onnx=False, overrides=named).path
    new = (
        "--domain",
        "dusk",
        "--how",
        "quick",
        "-o",
        tmp_path / "two",
        "model.options.per_branch=head",
        *FEW[:-1],
    )
    code, _, err = call("extend", bundle, "--data", old_data, *new, "--no-onnx", "train.max_iterations=1")
    assert code == 0, err
    one, two = everseg.load(bundle), everseg.load(tmp_path / "two")
    seen = two.model.domain_statistics
    assert {branch: found.count for branch, found in seen.items()} == {"default": 24, "dusk": 12}
    images = [toy.build().splits["train"].read(index)[0] for index in range(24)]
    of_each = torch.cat([features_of(one.model, image) for image in as_inputs(images, one.form)])
    torch.testing.assert_close(seen["default"].mean, of_each.mean(0))
    torch.testing.assert_close(seen["default"].covariance, of_each.T.cov(correction=0))
    assert two.predict(images[0], infer_domain=True).branch in ("default", "dusk")


def test_an_export_without_the_images_does_without_statistics(deployed, tmp_path, monkeypatch):
    """They need a choice only later; what is told then says the way out."""

    def gone(*_: object) -> None:
        raise DataError("gone")

    monkeypatch.setattr(export_module, "shown_in_training", gone)
    named = [f"data.dataset={toy.HERE}"]
    model = everseg.load(
        everseg.export(run_of(deployed), tmp_path / "bundle", onnx=False, overrides=named).path
    ).model
    assert model.domain_statistics == {}
    with pytest.raises(ConfigError) as caught:
        infer_branch(model, torch.zeros(1, 3, 32, 32))
    must_say(caught.value, "default", "export")


def test_images_of_later_domains_say_nothing_of_the_only_branch(deployed, tmp_path, monkeypatch):
    """A run over domains that was made before they were measured, exported after its first step."""
    shown = {name: [picture(40, 40)] for name in ("day", "dusk")}
    monkeypatch.setattr(export_module, "shown_in_training", lambda *_: shown)
    named = [f"data.dataset={toy.HERE}"]
    bundle = everseg.export(run_of(deployed), tmp_path / "bundle", onnx=False, overrides=named).path
    assert everseg.load(bundle).model.domain_statistics == {}


def test_the_next_steps_name_the_place(two_branches, old_data, new_data, tmp_path, monkeypatch, call):
    """Without a name it is open which branch the images take."""
    monkeypatch.chdir(tmp_path)
    line = ("extend", two_branches, "--data", old_data, *FEW, "-o", "next")
    code, _, err = call(*line)
    assert code == 2
    must_say(err, "several branches", "default, line", "--domain")
    code, _, err = call(*line, "--domain", "line", "--old-val", old_data)
    assert code == 2
    must_say(err, "--old-val", "NAME=", "default", "line")
    code, _, err = call(*line, "--domain", "line", "--shared")
    assert code == 2
    must_say(err, "--shared", "'line'", "already")
    code, _, err = call(*line, "--domain", "a.b")
    assert code == 2
    must_say(err, "a.b", "dots")
    code, _, err = call(*line, "--domain", "line", "train.shard=true")
    assert code == 2
    must_say(err, "train.shard", "branches")
    assert list(tmp_path.iterdir()) == []
    code, out, err = call(*line, "--domain", "line", "--old-val", f"line={old_data}", "--json")
    assert code == 0, err
    told = json.loads(out)["kept"]
    assert told["how"] == "estimated"  # one of the two is
    names = set(told["classes"])
    assert {"default: green", "line: red"} <= names
    must_say(told["text"], "2 branches", "'default'", "estimated", "'line'", "measured")
    shares = [
        [one["share"] for key, one in told["classes"].items() if key.startswith(branch) and one.get("share")]
        for branch in ("default", "line")
    ]
    assert told["share"] <= min(np.mean(shares[0]), 1.0) + 1e-9
    # the report tells of each branch, not of the trained one alone
    results = Results(RunFolder(Path("runs/next")))
    rows = kept_rows(Told.of(results, next(iter(results.steps[-1].scores))))
    assert {(row["branch"], row["class"]) for row in rows} >= {("default", "green"), ("line", "red")}
    (red,) = [row for row in rows if (row["branch"], row["class"]) == ("line", "red")]
    assert red["kept"] == NOT_MEASURED or red["IoU before"] is not None
    page = everseg.report("runs/next").path.read_text()
    assert "branches keep" in page
    assert "in the place &#39;line&#39;" in page
    config = RunFolder(Path("runs/next")).config()
    assert (config.scenario.domain, config.scenario.branch, config.method.name) == (
        "line",
        "line",
        "complete",
    )


def test_overrides_may_name_a_method_that_knows_no_rate_of_shared_weights(
    two_branches, old_data, monkeypatch
):
    """Where the branches cannot have norms of their own, the usual method gets a lower one."""
    monkeypatch.setattr(asked_module, "own_norms", lambda *_: None)
    source, place = open_bundle(two_branches), Place("line", "line")
    usual = asked_module.configuration(source, old_data, (), None, "next", place=place)
    assert usual.method.options["shared_lr_scale"] == 0.001
    named = asked_module.configuration(source, old_data, (), None, "next", ("method=lwf",), place=place)
    assert named.method.name == "lwf"


def test_the_nearest_branch_is_the_one_that_labels_the_new_images_best(two_branches, old_data):
    """The data label red: the first branch finds it, the second calls it green."""
    changes = ("data.workers=0",)
    source, told = open_bundle(two_branches), Progress(quiet=True)

    def place(data: Path, *wanted: object) -> Place:
        return Asked(source, data, (), None, None, changes, None).at(*wanted, told).place

    assert place(old_data, "dusk", None, False) == Place("dusk", "dusk", "default")
    assert place(old_data, "dusk", "line", False) == Place("dusk", "dusk", "line")
    assert place(old_data, "dusk", None, True) == Place("dusk", "default")
    # a method with options that no other one has
    changes = ("data.workers=0", "method.kl=probabilities")
    asked = Asked(source, old_data, (), "mdil", None, changes, None).at("dusk", None, False, told)
    assert asked.place == Place("dusk", "dusk", "default")
    assert asked.overrides == changes
    green = (
        shutil.copytree(old_data.parent, old_data.parent.with_name("green"), dirs_exist_ok=True) / "data.yaml"
    )
    green.write_text(green.read_text().replace("red", "green"))
    assert place(green, "dusk", None, False) == Place("dusk", "dusk", "line")


def test_a_place_that_shares_a_branch(at, old_data, call):
    code, out, err = call("extend", at, "--data", old_data, "--domain", "dusk", "--shared", *FEW, "--json")
    assert code == 0, err
    new = open_bundle("bundle-v2")
    assert list(new.spaces) == ["default"]
    assert new.about.domains == {"default": "default", "dusk": "default"}
    model = everseg.load("bundle-v2")
    image = picture(40, 40)
    one, other = (model.predict(image, branch=name).ids for name in ("default", "dusk"))
    assert np.array_equal(one, other)
    assert json.loads(out)["on_new"][0]["after"] is not None
    # its own images measure smaller files, of this branch and of no other
    run = RunFolder(Path("runs/bundle-v2"))
    trials = trials_of_run(run, new.spaces, new.about.domains, [])
    assert [label.shape for _, label in trials["default"].measured()] == [(40, 40)] * 6
    with pytest.raises(ConfigError, match=r"line.*--calibrate"):
        trials_of_run(run, {**new.spaces, "line": new.spaces["default"]}, new.about.domains, [])
