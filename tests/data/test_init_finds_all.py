"""What `data init` sees below a folder: splits that exist, data sets side by side, links, and what it leaves unused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trees

from everseg.config.fields import DataConfig
from everseg.config.loading import load
from everseg.data.datasets import load_dataset
from saying import must_say

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sample(number: int, image: str, mask: str) -> None:
    """An image and its mask, whose column `number` is of class 1; there is a class 2 as well."""
    trees.save(Path(image), trees.image_of(number))
    pixels = np.zeros(trees.SIZE, np.uint8)
    pixels[:, number] = 1
    pixels[-1] = 2
    trees.save(Path(mask), pixels)


def numbers(dataset: Any) -> dict[str, list[int]]:
    """Split -> the numbers of its images, read from the masks."""
    return {
        name: sorted(int(np.flatnonzero((s.read(i)[1] == 1).any(axis=0))[0]) for i in range(len(s)))
        for name, s in dataset.splits.items()
    }


def opened(path: str = "data.yaml") -> dict[str, list[int]]:
    return numbers(load_dataset(DataConfig(dataset=path)))


def every(splits: dict[str, list[int]]) -> list[int]:
    return sorted(number for of in splits.values() for number in of)


NAMES = "background,road,tree"


@pytest.mark.parametrize(
    ("place", "lines"),
    [
        ("Train.txt Validation.txt", "{}"), ("train.txt val.txt", "images/{}.png masks/{}.png"),
        ("ImageSets/Segmentation/Train.txt ImageSets/Segmentation/Validation.txt", "{}"),
        ("ImageSets/train.txt ImageSets/dev.txt", "images/{}.png"), ("splits/TRAINING.LST splits/valid.lst", "{}.png"),
        ("train.csv val.csv", "images/{}.png,masks/{}.png"),
    ],
)  # fmt: skip
def test_lists_are_the_splits_wherever_they_lie(call: Call, place: str, lines: str) -> None:
    for number in range(8):
        sample(number, f"d/images/{number}.png", f"d/masks/{number}.png")
    train, val = place.split()
    for path, of in ((train, (5, 0, 7, 2)), (val, (1, 3))):
        trees.write(Path("d", path), "".join(lines.format(n, n) + "\n" for n in of))
    code, _, err = call("data", "init", "d", "--classes", NAMES)
    assert code == 0, err
    assert opened() == {"train": [0, 2, 5, 7], "val": [1, 3]}
    must_say(err, "not used", 2, "images/4.png", "images/6.png")


def test_a_table_with_a_column_of_splits(call: Call) -> None:
    rows = ["image,fold,camera"]
    for number in range(6):
        sample(number, f"d/images/{number}.png", f"d/masks/{number}.png")
        rows.append(f"{number}.png,{('Train', 'valid', 'Test')[number % 3]},a")
    trees.write(Path("d/frames.csv"), "\n".join(rows))
    code, _, err = call("data", "init", "d", "--classes", NAMES)
    assert code == 0, err
    assert opened() == {"train": [0, 3], "val": [1, 4], "test": [2, 5]}


def test_lists_without_one_for_training_are_refused_and_nothing_is_left(call: Call) -> None:
    for number in range(6):
        sample(number, f"d/images/{number}.png", f"d/masks/{number}.png")
    trees.write(Path("d/val.txt"), "1\n2\n")
    code, _, err = call("data", "init", "d", "--classes", NAMES)
    assert code == 3
    must_say(err, "val.txt", "train.txt")
    assert not list(Path().glob("*.*"))


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("{}/images", "{}/masks"), ("images/{}", "masks/{}"), ("Images/{}", "Labels/{}"), ("{}", "{}_labels"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "names", [("Train", "Valid"), ("training", "validation"), ("TRAIN", "DEV"), ("train", "test")]
)
def test_folders_are_the_splits_under_their_usual_names(
    call: Call, images: str, masks: str, names: tuple[str, str]
) -> None:
    for number in range(6):
        split = names[number % 2]
        sample(number, f"d/{images.format(split)}/{number}.png", f"d/{masks.format(split)}/{number}.png")
    code, _, err = call("data", "init", "d", "--classes", NAMES)
    assert code == 0, err
    assert opened() == {"train": [0, 2, 4], "test" if names[1] == "test" else "val": [1, 3, 5]}


def test_a_split_may_be_called_otherwise_beside_the_masks(call: Call) -> None:
    for number in range(6):
        split = ("Train", "Validation")[number % 2]
        other = {"Train": "train", "Validation": "val"}[split]
        sample(number, f"d/images/{split}/{number}.png", f"d/masks/{other}/{number}.png")
    code, _, err = call("data", "init", "d", "--classes", NAMES)
    assert code == 0, err
    assert opened() == {"train": [0, 2, 4], "val": [1, 3, 5]}


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("{}.jpg", "{}_labelIds.png"), ("{}.jpg", "{}-seg.png"), ("{}.JPG", "{}_Mask.PNG"), ("{}.png", "{}_gt.png"),
        ("{}.jpg", "{}.jpg.png"), ("{} (1).jpg", "{} (1)_mask.png"), ("{}_leftImg8bit.png", "{}_gtFine_labelIds.png"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("beside", [True, False])
def test_masks_are_found_by_their_endings(call: Call, image: str, mask: str, beside: bool) -> None:
    if beside and "leftImg8bit" in image:
        pytest.skip("two endings in one folder")
    images, masks = ("d", "d") if beside else ("d/images", "d/masks")
    for number in range(6):
        name = f"frame {number}"
        sample(number, f"{images}/{image.format(name)}", f"{masks}/{mask.format(name)}")
    code, _, err = call("data", "init", "d", "--classes", NAMES)
    assert code == 0, err
    assert every(opened()) == list(range(6))


def test_folders_of_masks_and_images_that_are_not_used_are_named(call: Call) -> None:
    for number in range(6):
        sample(number, f"d/images/{number}.png", f"d/masks/{number}.png")
        if number < 3:
            trees.save(Path(f"d/masks_old/{number}.png"), trees.mask_of([0, 1]))
            trees.save(Path(f"d/more images/x{number}.png"), trees.image_of(number))
    code, out, err = call("data", "init", "d", "--classes", NAMES, "--json")
    assert code == 0, err
    must_say(json.loads(out)["notes"], "not used", "masks_old/", "more images/")


# ---------------------------------------------------------------- several data sets


def three_domains(root: str = "d") -> None:
    for place, domain in enumerate(("berlin", "new delhi", "oslo")):
        for number in range(6):
            where = f"{root}/{domain}"
            sample(number + place, f"{where}/images/{number}.png", f"{where}/masks/{number}.png")


def test_data_sets_side_by_side_are_all_seen_and_a_run_over_them_is_proposed(call: Call) -> None:
    three_domains()
    code, out, err = call("data", "init", "d", "--classes", NAMES)
    assert code == 0, err
    for name in ("berlin", "new-delhi", "oslo"):
        assert Path(f"{name}.yaml").is_file()
        assert Path(f"{name}_preview.html").is_file()
        must_say(out, f"everseg data check {name}.yaml")
    must_say(out, "everseg run domains.yaml")
    must_say(out, "everseg sweep domains.yaml", "single,multi,fe,mdil-authors,ft")
    assert every(opened("new-delhi.yaml")) == list(range(1, 7))
    config = load("domains.yaml")
    assert config.scenario.kind == "domain-incremental"
    assert list(config.data.domains) == ["berlin", "new-delhi", "oslo"]
    code, out, err = call("run", "domains.yaml", "--dry-run")
    assert code == 0, err
    code, out, err = call(
        "sweep", "domains.yaml", "--methods", "single,multi,fe,mdil-authors,ft", "--dry-run"
    )
    assert code == 0, err
    for method in ("single", "multi", "fe", "mdil-authors", "ft"):
        must_say(out, f"domains-{method}-s0")


def test_coco_sets_side_by_side_are_domains_and_numbered_jobs_are_one_set(call: Call) -> None:
    for place, root in ((0, "d/berlin"), (3, "d/oslo"), (0, "e/job_1"), (3, "e/job_2")):
        content: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "road"}]}
        for number in range(place, place + 3):
            trees.save(Path(f"{root}/images/{number}.png"), trees.image_of(number))
            content["images"].append({"id": number, "file_name": f"{number}.png", "height": 12, "width": 16})
            shape = [[number, 2, number + 1, 2, number + 1, 9, number, 9]]
            content["annotations"].append({"image_id": number, "category_id": 1, "segmentation": shape})
        trees.write(Path(f"{root}/annotations.json"), json.dumps(content))
    code, _, err = call("data", "init", "d")
    assert code == 0, err
    assert list(load("domains.yaml").data.domains) == ["berlin", "oslo"]
    assert every(opened("oslo.yaml")) == [3, 4, 5]
    code, _, err = call("data", "init", "e")
    assert code == 0, err
    assert every(opened()) == list(range(6))


def test_a_fault_in_one_of_several_sets_leaves_nothing_behind(call: Call) -> None:
    three_domains()
    for number in range(6):
        Path(f"d/oslo/masks/{number}.png").write_bytes(b"no picture")
    trees.write(Path("berlin.yaml"), "mine")
    code, _, err = call("data", "init", "d", "--classes", NAMES, "--force")
    assert code == 3
    must_say(err, "oslo")
    assert sorted(str(p) for p in Path().glob("*")) == ["berlin.yaml", "d"]
    assert Path("berlin.yaml").read_text() == "mine"


def test_existing_files_of_several_sets_are_all_named(call: Call) -> None:
    three_domains()
    for name in ("berlin.yaml", "domains.yaml"):
        trees.write(Path(name), "mine")
    code, _, err = call("data", "init", "d", "--classes", NAMES)
    assert code == 2
    must_say(err, "berlin.yaml", "--force")
    must_say(err, "domains.yaml", "--force")


# ---------------------------------------------------------------- links and failures


@pytest.mark.parametrize("linked", ["folder", "inner", "files"])
def test_one_option_follows_links(call: Call, tmp_path: Path, linked: str) -> None:
    for number in range(6):
        inside = "cam/" if linked == "inner" else ""
        sample(number, f"store/images/{inside}{number}.png", f"store/masks/{inside}{number}.png")
    for kind in ("images", "masks"):
        if linked == "folder":
            Path("d").mkdir(exist_ok=True)
            Path("d", kind).symlink_to(tmp_path / "store" / kind)
        elif linked == "inner":
            Path("d", kind).mkdir(parents=True)
            Path("d", kind, "cam").symlink_to(tmp_path / "store" / kind / "cam")
        else:
            Path("d", kind).mkdir(parents=True)
            for number in range(6):
                Path("d", kind, f"{number}.png").symlink_to(tmp_path / "store" / kind / f"{number}.png")
    code, _, err = call("data", "init", "d", "--classes", NAMES)
    assert code == 3
    must_say(err, "--follow-links")
    assert not list(Path().glob("data*"))
    code, _, err = call("data", "init", "d", "--classes", NAMES, "--follow-links")
    assert code == 0, err
    assert every(opened()) == list(range(6))
    code, out, _ = call("data", "check", "data.yaml")
    assert code == 0, out


def test_links_in_a_circle_are_refused(call: Call, tmp_path: Path) -> None:
    for number in range(3):
        sample(number, f"d/images/{number}.png", f"d/masks/{number}.png")
    Path("d/images/again").symlink_to(tmp_path / "d")
    code, _, err = call("data", "init", "d", "--classes", NAMES, "--follow-links")
    assert code == 3
    must_say(err, "again", "link")


@pytest.mark.parametrize("options", [("--classes", "road,road"), ("--background", "nobody")])
def test_a_failed_init_leaves_nothing_behind(call: Call, options: tuple[str, ...]) -> None:
    for number in range(3):
        sample(number, f"d/images/{number}.png", f"d/masks/{number}.png")
    code, _, _ = call("data", "init", "d", *options)
    assert code == 2
    assert [p.name for p in Path().iterdir()] == ["d"]


def test_an_init_that_fails_late_puts_back_what_was_there(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from everseg.data import verbs

    for number in range(3):
        sample(number, f"d/images/{number}.png", f"d/masks/{number}.png")

    def fail(*_: object) -> str:
        raise OSError("no space")

    monkeypatch.setattr(verbs, "preview", fail)
    call("data", "init", "d", "--classes", NAMES)
    assert [p.name for p in Path().iterdir()] == ["d"]
    trees.write(Path("data.yaml"), "mine")
    call("data", "init", "d", "--classes", NAMES, "--force")
    assert Path("data.yaml").read_text() == "mine"
