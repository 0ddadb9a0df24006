"""Images of a run's memory travel with its bundle, if asked, and the next step is trained on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import toy
from PIL import Image

import everseg
from everseg import registry
from everseg.deploy.bundle import open_bundle
from everseg.deploy.export import export
from everseg.deploy.extend import extend
from everseg.errors import CheckpointError, ConfigError
from everseg.runs.commit import MANIFEST
from everseg.runs.memory import read_memory
from everseg.runs.run_folder import RunFolder
from saying import must_say

QUICK = ["data.workers=0", "train.max_iterations=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps, red and then green; blue is never taught."""
    out = tmp_path_factory.mktemp("run")
    memory = {"size": 5, "keep": "files"}
    config = toy.settings(
        out, scenario={"task": [["red"], ["green"]], "memory": memory}, train={"epochs": 2, "epochs_next": 1}
    )
    return everseg.run(config, quiet=True).path


@pytest.fixture(scope="module")
def bundle(run, tmp_path_factory):
    return export(run, tmp_path_factory.mktemp("bundle") / "b", onnx=False, memory=True).path


def test_masks_hold_the_lasting_ids_of_what_was_annotated_and_nothing_else(run, bundle):
    memory = read_memory(bundle)
    assert memory is not None
    assert len(memory.images) == 5
    ids = {entry.name: entry.id for entry in open_bundle(bundle).registry.classes}
    split = toy.build().splits["train"]
    for kept in memory.images:
        raw = split.read_mask(int(kept.image.id.split("-")[1]))
        expected = np.full(raw.shape, ids["background"])
        for name, value, step in (("red", 1, 0), ("green", 2, 1)):
            if step in kept.image.steps:
                expected[raw == value] = ids[name]
        assert kept.copy is not None
        assert kept.copy.lasting
        assert np.array_equal(np.asarray(Image.open(bundle / kept.copy.mask)), expected)
        image = np.asarray(Image.open(bundle / kept.copy.image))
        assert np.array_equal(image, split.read(int(kept.image.id.split("-")[1]))[0])
    assert "5 images" in (bundle / "MODEL_CARD.md").read_text()


def test_without_asking_a_bundle_holds_no_image(run, tmp_path):
    made = export(run, tmp_path / "plain", onnx=False).path
    assert read_memory(made) is None
    assert not list(made.glob("memory*"))
    assert "no image" in (made / "MODEL_CARD.md").read_text()


def test_an_extension_trains_on_the_images_that_came_along_and_passes_them_on(
    bundle, new_data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    looks = tmp_path / "looks.py"
    looks.write_text(
        "from dataclasses import dataclass\nfrom everseg.methods.mib import MiB\nSEEN = []\n"
        "@dataclass(kw_only=True)\nclass Looks(MiB):\n"
        "    def losses(self, batch, ctx):\n"
        "        for name, old, label in zip(batch.ids, batch.memory, batch.label):\n"
        "            if old: SEEN.append((name, label.unique().tolist()))\n"
        "        yield from super().losses(batch, ctx)\n"
    )
    name = f"{looks}:Looks"
    done = extend(
        bundle, data=new_data, add=["forklift"], method=name, overrides=QUICK, onnx=False, quiet=True
    )
    seen = registry.resolve("method", name).losses.__globals__["SEEN"]
    known = {kept.image.id for kept in read_memory(bundle).images}
    assert {one for one, _ in seen} <= known
    assert len(seen) == 4  # half of two batches of four
    assert {c for _, labels in seen for c in labels} <= {0, 1, 2}
    after = read_memory(done.bundle.path)
    assert after is not None
    old = [kept for kept in after.images if kept.image.dataset == "toy"]
    assert 0 < len(old) < len(after.images) == 5
    assert open_bundle(done.bundle.path).steps == 3
    for kept in after.images:
        assert kept.copy is not None
        ids = set(np.unique(np.asarray(Image.open(done.bundle.path / kept.copy.mask))).tolist())
        assert ids <= ({0, 1, 2} if kept in old else {0, 3})


@pytest.mark.slow
def test_a_second_extension_trains_on_images_of_both_steps_before_it(tmp_path, new_data, call, monkeypatch):
    """By the command line: red, then forklifts (blue), then crates (green), each from the bundle before alone."""
    monkeypatch.chdir(tmp_path)
    config = toy.settings(
        tmp_path, scenario={"task": [["red"]], "memory": {"size": 6, "keep": "files"}}, train={"epochs": 1}
    )
    first = export(everseg.run(config, quiet=True).path, "one", onnx=False, memory=True)
    crates = Path(shutil.copytree(new_data.parent, tmp_path / "yard")) / "data.yaml"
    crates.write_text(crates.read_text().replace("site", "yard"))
    for mask in (tmp_path / "yard" / "masks").rglob("*.png"):
        split = toy.build().splits[mask.parent.name]
        Image.fromarray(np.array([0, 0, 3, 0], np.uint8)[split.read_mask(int(mask.stem))]).save(mask)
    shutil.rmtree(tmp_path / "toy")  # the run that the images come from
    looks = tmp_path / "looks.py"
    looks.write_text(
        "from dataclasses import dataclass\nfrom everseg.methods.mib import MiB\nSEEN = []\n"
        "@dataclass(kw_only=True)\nclass Looks(MiB):\n"
        "    def losses(self, batch, ctx):\n"
        "        for name, old, label in zip(batch.ids, batch.memory, batch.label):\n"
        "            SEEN.append((ctx.step.index, bool(old), name, frozenset(label.unique().tolist()) - {255}))\n"
        "        yield from super().losses(batch, ctx)\n"
    )
    for number, (data, name) in enumerate([(new_data, "forklift"), (crates, "crate")], 1):
        code, _, err = call(
            "extend", first.path if number == 1 else f"b{number}", "--data", data, "--add", name, "--no-onnx",
            "--method", f"{looks}:Looks", "--out", f"b{number + 1}", "data.workers=0", "train.max_iterations=3",
        )  # fmt: skip
        assert code == 0, err
    seen = registry.resolve("method", f"{looks}:Looks").losses.__globals__["SEEN"]
    given = {number: read_memory(tmp_path / name) for number, name in ((1, "one"), (2, "b2"), (3, "b3"))}
    origin = {kept.image.id: kept.image.dataset for kept in given[2].images}
    assert [{kept.image.dataset for kept in given[number].images} for number in (1, 2, 3)] == [
        {"toy"}, {"toy", "site"}, {"toy", "site", "yard"},
    ]  # fmt: skip
    shown = [(name, labels) for step, old, name, labels in seen if step == 2 and old]
    assert len(shown) == 6
    assert {origin[name] for name, _ in shown} == {"toy", "site"}
    # As stored: red on the first images, forklifts on the others, nothing else; crates on the step's own alone.
    for name, labels in shown:
        assert labels <= ({0, 1} if origin[name] == "toy" else {0, 2})
    assert {c for _, labels in shown for c in labels} == {0, 1, 2}
    own = [labels for step, old, _, labels in seen if step == 2 and not old]
    assert set().union(*own) == {0, 3}
    ids = {entry.name: entry.id for entry in open_bundle(tmp_path / "b3").registry.classes}
    for kept in given[3].images:
        allowed = {"toy": "red", "site": "forklift", "yard": "crate"}[kept.image.dataset]
        assert set(np.unique(np.asarray(Image.open(tmp_path / "b3" / kept.copy.mask)))) <= {0, ids[allowed]}
    assert "6 images" in (tmp_path / "b3" / "MODEL_CARD.md").read_text()


def test_a_run_with_names_only_or_without_memory_cannot_give_its_images_away(tmp_path):
    for name, memory, fact in (("names", {"size": 3}, "keep=files"), ("none", {"size": 0}, "memory.size")):
        config = toy.settings(
            tmp_path / name,
            scenario={"task": [["red"]], "memory": memory},
            train={"epochs": 1, "epochs_next": 1},
        )
        folder = everseg.run(config, quiet=True).path
        with pytest.raises(ConfigError) as error:
            export(folder, tmp_path / f"{name}-bundle", onnx=False, memory=True)
        must_say(error.value, fact)
        assert not (tmp_path / f"{name}-bundle").exists()


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda d: d["images"][0]["files"].update(image="../secret.png"), ["images[0].files"]),
        (lambda d: d["images"][0].update(classes=[2, 1]), ["images[0].classes"]),
        (lambda d: d["images"].append(d["images"][0]), ["images"]),
        (lambda d: d.update(format=9), ["format 9"]),
        (lambda d: d.update(size="many", images=3), ["size"]),
    ],
)
def test_a_damaged_memory_is_refused_with_its_place(bundle, tmp_path, change, facts, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    document = json.loads((copy / "memory.json").read_text())
    change(document)
    (copy / "memory.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError) as error:  # the manifest knows its hash
        read_memory(copy)
    must_say(error.value, "memory.json")
    assert (copy / MANIFEST).is_file()
    monkeypatch.setattr(
        "everseg.runs.commit.Committed.read", lambda self, name: (self.folder / name).read_bytes()
    )
    with pytest.raises(CheckpointError) as error:
        read_memory(copy)
    must_say(error.value, *facts)


def test_old_pictures_may_go_where_the_run_keeps_copies(tmp_path):
    """Between two steps the pictures that only the first one trained are deleted; the masks stay."""
    root = tmp_path / "data"
    for split, count in (("train", 12), ("val", 4)):
        source = toy.build().splits[split]
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            image, mask = source.read(index)
            Image.fromarray(image).save(root / "images" / split / f"{index}.png")
            Image.fromarray(mask).save(root / "masks" / split / f"{index}.png")
    (root / "data.yaml").write_text("name: toys\nclasses: [background, red, green, blue]\n")
    config = toy.settings(
        tmp_path, scenario={"task": [["red"], ["blue"]], "memory": {"size": 4, "keep": "files"}},
        data={"dataset": str(root / "data.yaml")}, train={"epochs": 1, "epochs_next": 1},
    )  # fmt: skip
    everseg.run({**config, "name": "whole"}, quiet=True)
    everseg.run(config, quiet=True)
    run = RunFolder(tmp_path / "toy")
    shutil.rmtree(run.step(1))
    taught = {kept for kept in range(12) if 3 not in toy.build().splits["train"].read_mask(kept)}
    kept = {int(one.image.id) for one in read_memory(run.final(0)).images}
    assert taught & kept, "the deleted pictures are to be some of the memory's"
    for index in taught:
        (root / "images" / "train" / f"{index}.png").write_bytes(b"")
    everseg.run(config, quiet=True)
    one, two = (RunFolder(tmp_path / name).final(1) / "model.safetensors" for name in ("whole", "toy"))
    assert one.read_bytes() == two.read_bytes()
