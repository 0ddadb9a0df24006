"""Bad data that only a scenario, a description or an archive can show: entries 50 to 53, 59 and 60 of the catalogue.

The other entries are those of tests/data/test_doctor_catalogue.py.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from everseg.config.loading import load
from everseg.engine.prepare import prepare
from everseg.errors import ConfigError, DataError
from everseg.progress import Progress
from saying import must_say

Call = Callable[..., tuple[int, str, str]]
YAML = "classes: [background, road, tree, car]\nimages: images/{split}\nmasks: masks/{split}\n"
SHOWN = {"train": ((1,), (1, 2), (2,), (3,), (2, 3)), "val": ((1, 2, 3),)}
"""Classes of each image, in the order of the splits."""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, images in SHOWN.items():
        for number, classes in enumerate(images):
            mask = np.zeros((16, 16), np.uint8)
            for column, raw in enumerate(classes):
                mask[:, 4 * column : 4 * column + 4] = raw
            for kind, pixels in (
                ("images", rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)),
                ("masks", mask),
            ):
                path = tmp_path / kind / split / f"{split}{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    (tmp_path / "data.yaml").write_text(YAML)
    return tmp_path


def steps(tree: Path, **scenario) -> list[list[int]]:
    """Training images of each step."""
    settings = {"task": [["road"], ["tree"], ["car"]], **scenario}
    config = load({"data": {"dataset": str(tree / "data.yaml"), "crop": 16}, "scenario": settings})
    return [
        list(step.train[0].indices)
        for step in prepare(config.data, config.scenario, Progress(quiet=True), seed=config.seed).steps
    ]


def own_lists(tree: Path, *lists: str) -> str:
    for step, text in enumerate(lists):
        (tree / f"train-{step}.txt").write_text("\n".join(text.split()))
    return str(tree)


def test_50_images_in_two_steps_are_told_where_the_protocol_allows_them(tree: Path, call: Call) -> None:
    data = [f"data={tree / 'data.yaml'}", "task=1-1"]
    code, out, _ = call("show", "demo-mib", *data, "scenario.protocol=overlapped")
    assert code == 0
    assert re.search(r"scenario\.protocol +overlapped ", out)
    assert re.search(r" 0  road .* 1 with step 1 *\n +1  tree .* 1 with step 0, 1 with step 2", out)
    code, out, _ = call("show", "demo-mib", *data, "scenario.protocol=partitioned")
    assert code == 0
    assert "with step" not in out


@pytest.mark.parametrize("protocol", ["disjoint", "sequential"])
def test_51_future_classes_in_ones_own_disjoint_lists_are_refused(tree: Path, protocol: str) -> None:
    wrong = own_lists(tree, "train0 train1", "train2 train4", "train3")
    with pytest.raises(DataError) as caught:
        steps(tree, lists=wrong, protocol=protocol)
    message = str(caught.value)
    must_say(message, "step 0: 1 image", "later steps (tree): train1")
    must_say(message, "step 1: 1 image", "later steps (car): train4")
    assert "step 2" not in message
    assert "scenario.protocol=overlapped" in message
    assert steps(tree, lists=wrong, protocol="overlapped") == [[0, 1], [2, 4], [3]]
    right = own_lists(tree, "train0", "train1 train2", "train3 train4")
    assert steps(tree, lists=right, protocol=protocol) == [[0], [1, 2], [3, 4]]


def test_51_the_rule_itself_takes_no_image_with_a_future_class(tree: Path) -> None:
    assert steps(tree, protocol="disjoint") == [[0], [1, 2], [3, 4]]


@pytest.mark.parametrize("name", ["road", "Road", " road", "ro-ad"])
def test_52_one_name_in_two_spellings_is_refused_in_a_set(tree: Path, call: Call, name: str) -> None:
    (tree / "data.yaml").write_text(YAML.replace("tree", f'"{name}"'))
    code, _, err = call("data", "check", tree / "data.yaml")
    assert code == 2
    assert f"classes.2: the name '{name}' stands for id 1 already" in err


def test_52_and_joined_between_domains_that_share_a_path(tree: Path) -> None:
    (tree / "other.yaml").write_text("name: other\n" + YAML.replace("road", "Road"))
    domains = {name: {"dataset": str(tree / f"{name}.yaml")} for name in ("data", "other")}
    shared = [{"domain": "data", "branch": "all"}, {"domain": "other", "branch": "all"}]
    scenario = {"kind": "domain-incremental", "steps": shared}
    config = load({"data": {"domains": domains, "crop": 16}, "scenario": scenario})
    prepared = prepare(config.data, config.scenario, Progress(quiet=True), seed=config.seed)
    assert prepared.steps[1].spaces["all"].names == prepared.steps[0].spaces["all"].names
    assert any("'Road' of data set 'other'" in note and "'road'" in note for note in prepared.notes)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ([["road"], ["road"]], "road"),
        ([["road"], [1]], "road"),
        ([["road"], ["background"]], "background"),
        ([["road"], [9]], "9"),
        ("3-2", r"N \+ k\*M = 3"),
    ],
)
def test_53_classes_that_collide_with_taught_ones_or_do_not_exist(
    tree: Path, task: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        steps(tree, task=task)


def test_53_another_number_of_names_than_values(tree: Path, call: Call) -> None:
    (tree / "data.yaml").unlink()
    code, _, err = call("data", "init", tree, "--classes", "road,tree", "--out", tree / "new.yaml", "--yes")
    assert code == 2
    assert "2 names for 3 classes" in err
    assert not (tree / "new.yaml").exists()


DESCRIPTIONS = {
    "no mapping": ("- a\n- b\n", "expected keys"),
    "empty": ("", "classes"),
    "no classes": (YAML.replace("classes", "clases"), "did you mean 'classes'"),
    "classes of another type": (YAML.replace("[background, road, tree, car]", "4"), "classes: expected a list"),
    "class twice": (YAML.replace("tree", "road"), "stands for id 1 already"),
    "class without name": (YAML.replace("tree", "''"), "classes.2: expected a name"),
    "class called ignore": (YAML.replace("tree", "ignore"), "other than 'ignore'"),
    "id beyond 16 bits": (YAML.replace("[background, road, tree, car]", "{70000: road}"), "65534, got 70000"),
    "negative id": (YAML.replace("[background, road, tree, car]", "{-1: road}"), "65534, got -1"),
    "id twice": ("classes:\n  1: road\n  1: tree\n", "data.yaml:3"),
    "key twice": (YAML + "images: x\n", "data.yaml:4"),
    "unknown background": (YAML + "background: sky\n", "background: 'sky' is not one of the classes"),
    "ignored class": (YAML + "ignore: 1\n", "ignore: id 1 is the class 'road'"),
    "leads out": (YAML.replace("images/", "../images/"), "leads out of the data folder"),
    "absolute": (YAML.replace("masks/", "/masks/"), "leads out of the data folder"),
    "images are masks": (YAML.replace("masks/", "images/"), "the same folder as images"),
    "colour out of range": (
        YAML + "labels: {palette: {road: [0, 0, 999]}}\n", "expected [red, green, blue] from 0 to 255"),
    "map to nothing": (YAML + "labels: {map: {7: lake}}\n", "'lake' is neither a class nor"),
    "palette and map": (YAML + "labels: {map: {}, palette: {}}\n", "either palette or map"),
    "no such layout": (YAML + "layout: vok\n", "did you mean 'voc'"),
    "no pixels": (YAML + "max_pixels: 0\n", "max_pixels: expected a positive"),
    "code": (YAML + "name: !!python/object/apply:os.system [id]\n", "data.yaml:4"),
    "alias": (YAML + "a: &a [1]\nb: *a\n", "data.yaml:4"),
    "tab": (YAML + "pair:\n\tmask_suffix: x\n", "data.yaml:5"),
    "cut off": (YAML + "labels: {map: [\n", "data.yaml:"),
    "not UTF-8": ("classes: [stra\udcdfe]\n", "not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("entry", DESCRIPTIONS)
def test_59_a_wrong_description_is_refused_with_its_place(tree: Path, call: Call, entry: str) -> None:
    text, message = DESCRIPTIONS[entry]
    (tree / "data.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    code, _, err = call("data", "check", tree / "data.yaml")
    assert code == 2
    assert message in err
    assert "data.yaml" in err
    assert "Traceback" not in err


def pack(target: Path, folder: Path) -> None:
    with zipfile.ZipFile(target, "w") as bundle:
        for path in sorted(folder.rglob("*.png")):
            bundle.write(path, path.relative_to(folder.parent))
            path.unlink()


def test_60_an_archive_in_place_of_the_folder_is_named(tree: Path, call: Call) -> None:
    for kind in ("images", "masks"):
        pack(tree / f"{kind}.zip", tree / kind)
        for split in SHOWN:
            (tree / kind / split).rmdir()
        (tree / kind).rmdir()
    told = "unpack images.zip, masks.zip first"
    assert told in call("data", "check", tree / "data.yaml")[1]
    assert told in call("data", "init", tree, "--yes")[2]
    assert told in call("data", "check", "voc", f"root={tree}")[1]
    code, _, err = call("data", "check", "voc", f"root={tree / 'images.zip'}")
    assert code == 2
    must_say(err, "images.zip", "unpacked")
    (tree / "data.yaml").write_text(
        YAML.replace("images/{split}", "images.zip/{split}") + "splits: [train]\n"
    )
    code, out, _ = call("data", "check", tree / "data.yaml")
    assert (code, "unpack images.zip first" in out) == (3, True)
