"""COCO exports as labelling tools write them: several files, names of other machines, objects without a shape."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trees
from pycocotools import mask as reference

from everseg.config.fields import DataConfig
from everseg.data.datasets import load_dataset
from everseg.errors import ConfigError, DataError
from saying import must_say

ROAD, TREE = 1, 2
Call = Callable[..., tuple[int, str, str]]


def box(left: int, top: int, width: int, height: int) -> list[int]:
    right, bottom = left + width, top + height
    return [left, top, right, top, right, bottom, left, bottom]


def export(
    root: Path,
    place: str,
    files: dict[int, str],
    *,
    names: dict[int, str] | None = None,
    categories: dict[int, str] | None = None,
) -> dict[str, Any]:
    """Annotations of some images: in image k, a road of 4 x 4 pixels at column k. The images are saved at `files`.

    Args:
        files: number -> path of the image below the root.
        names: how the annotations call the images; default the names of the files.
    """
    categories = categories or {ROAD: "road", TREE: "tree"}
    road = next(key for key, name in categories.items() if name == "road")
    content = {
        "images": [
            {"id": k, "file_name": (names or {}).get(k, Path(path).name), "height": 12, "width": 16}
            for k, path in files.items()
        ],
        "categories": [{"id": key, "name": name} for key, name in categories.items()],
        "annotations": [
            {"id": 100 + k, "image_id": k, "category_id": road, "segmentation": [box(k, 2, 4, 4)]}
            for k in files
        ],
    }
    for k, path in files.items():
        trees.save(root / path, trees.image_of(k))
    trees.write(root / place, json.dumps(content))
    return content


def load(root: Path, **options: Any) -> Any:
    return load_dataset(DataConfig(dataset="coco", root=str(root), options=options))


def ids(split: Any) -> list[str]:
    return [split.id(i) for i in range(len(split))]


def roads(dataset: Any) -> dict[str, dict[str, int]]:
    """Split -> sample -> the column at which its road begins, which is the number of its image."""
    return {
        name: {s.id(i): int(np.flatnonzero((s.read(i)[1] == 1).any(axis=0))[0]) for i in range(len(s))}
        for name, s in dataset.splits.items()
    }


# ---------------------------------------------------------------- several files


@pytest.mark.parametrize(
    ("train", "val", "folders"),
    [
        (
            "annotations/instances_Train.json", "annotations/instances_Validation.json",
            ("images/Train", "images/Validation"),
        ),
        ("annotations/instances_TRAIN.json", "annotations/instances_VAL.json", ("images/train", "images/val")),
        ("Annotations/training.json", "Annotations/dev.json", ("images", "images")),
        ("train/_annotations.coco.json", "valid/_annotations.coco.json", ("train", "valid")),
        ("train.json", "validation.json", ("pictures/a", "pictures/b")),
    ],
)  # fmt: skip
def test_files_of_subsets_are_splits_under_any_capitals(
    tmp_path: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
    train: str,
    val: str,
    folders: tuple[str, str],
) -> None:
    monkeypatch.chdir(tmp_path)
    export(tmp_path / "d", train, {k: f"{folders[0]}/{k}.png" for k in range(4)})
    export(tmp_path / "d", val, {k: f"{folders[1]}/{k}.png" for k in range(4, 7)})
    code, _, err = call("data", "init", "d")
    assert code == 0, err
    dataset = load_dataset(DataConfig(dataset="data.yaml"))
    found = {name: list(of.values()) for name, of in roads(dataset).items()}
    assert found == {"train": [0, 1, 2, 3], "val": [4, 5, 6]}
    assert dataset.notes == ()


def test_batches_of_one_job_are_read_together_by_the_names_of_their_categories(tmp_path: Path) -> None:
    """The second batch numbers its categories otherwise, and its images have the names of the first one's."""
    export(tmp_path, "job_1/annotations.json", {k: f"job_1/images/{k}.png" for k in range(3)})
    other = {1: "tree", 2: "road"}
    export(
        tmp_path,
        "job_2/annotations.json",
        {k: f"job_2/images/{k}.png" for k in range(2, 6)},
        categories=other,
    )
    dataset = load(tmp_path, split={"val": 0})
    assert dataset.labels.names == {0: "background", 1: "road", 2: "tree"}
    expected = {f"job_{1 if k < 3 else 2}/images/{k}": k for k in range(6) if k != 2}
    assert roads(dataset)["train"] == {**expected, "job_1/images/2": 2, "job_2/images/2": 2}
    assert [text for text in dataset.notes if "'tree'" in text]


def test_files_that_are_not_used_are_named_by_init_and_check(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for split, numbers in (("train", range(3)), ("val", range(3, 5))):
        files = {k: f"d/{split}2017/{k}.png" for k in numbers}
        for kind in ("instances", "person_keypoints"):
            export(tmp_path, f"d/annotations/{kind}_{split}2017.json", files)
    export(tmp_path, "d/annotations/all.json", {k: f"d/more/{k}.png" for k in range(5, 9)})
    code, _, err = call("data", "init", "d")
    assert code == 0, err
    for name in ("person_keypoints_train2017.json", "person_keypoints_val2017.json", "all.json"):
        must_say(err, f"annotations/{name}", "not used")
    code, out, _ = call("data", "check", "data.yaml")
    assert code == 0
    must_say(out, "annotations/all.json", "not used")
    dataset = load(tmp_path / "d", annotations=["annotations/all.json"], split={"val": 0})
    assert ids(dataset.splits["train"]) == [f"more/{k}" for k in range(5, 9)]
    assert dataset.notes == ()


def test_an_only_split_stays_what_it_is(tmp_path: Path) -> None:
    export(tmp_path, "annotations/instances_val2017.json", {k: f"val2017/{k}.png" for k in range(6)})
    assert {name: len(split) for name, split in load(tmp_path).splits.items()} == {"val": 6}


def test_an_image_in_two_files_is_refused_until_the_user_says_which_counts(tmp_path: Path) -> None:
    files = {k: f"images/{k}.png" for k in range(3)}
    export(tmp_path, "anna.json", files)
    content = export(tmp_path, "ben.json", files)
    for item in content["annotations"]:
        item |= {"category_id": TREE, "segmentation": [box(item["image_id"] + 2, 2, 4, 4)]}
    trees.write(tmp_path / "ben.json", json.dumps(content))
    with pytest.raises(DataError) as stop:
        load(tmp_path)
    must_say(stop.value, 3, "images/0.png", "annotations=anna.json", "annotations=[anna.json, ben.json]")
    one = load(tmp_path, annotations="anna.json", split={"val": 0}).splits["train"].read_mask(0)
    assert one[3].tolist() == [1] * 4 + [0] * 12
    for order, row in (
        (["anna.json", "ben.json"], [1, 1, 2, 2, 2, 2]),
        (["ben.json", "anna.json"], [1, 1, 1, 1, 2, 2]),
    ):
        mask = load(tmp_path, annotations=order, split={"val": 0}).splits["train"].read_mask(0)
        assert mask[3].tolist() == row + [0] * 10


# ---------------------------------------------------------------- names of other machines

NFC, NFD = (unicodedata.normalize(form, "straße_übung") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    "written",
    [
        "images\\{}.png", "C:\\Users\\ann\\labels\\images\\{}.png", "/srv/label/media/{}.png", "./images/{}.png",
        "http://localhost:8080/data/upload/3/{}.png", "/data/local-files/?d=images/{}.png",
        "images/{}.PNG", "{}.jpg",
    ],
)  # fmt: skip
def test_names_as_other_machines_wrote_them_find_their_images(tmp_path: Path, written: str) -> None:
    numbers = range(6)
    files = {k: f"images/{k} (copy) [1].png" for k in numbers}
    names = {k: written.format(f"{k} (copy) [1]") for k in numbers}
    export(tmp_path, "result.json", files, names=names)
    dataset = load(tmp_path, split={"val": 0})
    assert sorted(roads(dataset)["train"].values()) == list(numbers)


@pytest.mark.parametrize(("on_disk", "written"), [(NFC, NFD), (NFD, NFC)])
def test_letters_composed_and_taken_apart_are_one_name(tmp_path: Path, on_disk: str, written: str) -> None:
    export(
        tmp_path, "result.json", {1: f"images/{on_disk}.png", 2: "images/2.png"}, names={1: f"{written}.png"}
    )
    assert roads(load(tmp_path, split={"val": 0}))["train"] == {NFC: 1, "2": 2}


def test_the_same_name_in_two_folders_is_told_apart_or_refused(tmp_path: Path) -> None:
    files = {1: "images/north/a.png", 2: "images/south/a.png"}
    export(tmp_path, "result.json", files, names={1: "D:/x/north/a.png", 2: "D:/x/south/a.png"})
    assert sorted(roads(load(tmp_path, split={"val": 0}))["train"].values()) == [1, 2]
    export(tmp_path, "result.json", {**files, 3: "images/north/b.png"}, names={1: "/x/a.png", 2: "/y/a.png"})
    with pytest.raises(DataError) as stop:
        load(tmp_path)
    must_say(stop.value, "result.json", "x/a.png", "images/north/a.png", "images/south/a.png")


@pytest.mark.parametrize("gone", [0, 3])
def test_a_missing_image_costs_itself_only(tmp_path: Path, gone: int) -> None:
    export(tmp_path, "annotations/instances_default.json", {k: f"images/{k}.png" for k in range(6)})
    (tmp_path / f"images/{gone}.png").unlink()
    # A file of its name elsewhere is another picture.
    trees.save(tmp_path / f"other/{gone}.png", trees.image_of(9))
    with pytest.raises(DataError) as stop:
        load(tmp_path)
    must_say(stop.value, gone, tmp_path / "images", "on_missing=skip")
    dataset = load(tmp_path, on_missing="skip", split={"val": 0})
    assert roads(dataset)["train"] == {str(k): k for k in range(6) if k != gone}
    assert [w.sample for w in dataset.splits["train"].warnings] == [str(gone)]


# ---------------------------------------------------------------- objects


def one_image(root: Path, objects: list[dict[str, Any]], **image: Any) -> None:
    content = export(root, "annotations.json", {0: "images/0.png", 1: "images/1.png"})
    content["images"][0] |= image
    content["annotations"] = [
        {"id": 7 + n, "image_id": 0, "category_id": ROAD, "iscrowd": 0, **item}
        for n, item in enumerate(objects)
    ]
    trees.write(root / "annotations.json", json.dumps(content))


def first(root: Path, **options: Any) -> np.ndarray:
    return load(root, split={"val": 0}, **options).splits["train"].read(0)[1]


HOLE = np.zeros((12, 16), np.uint8)
HOLE[1:9, 2:12] = 1
HOLE[3:6, 4:8] = 0
COUNTS = np.diff(np.flatnonzero(np.diff(HOLE.T.reshape(-1), prepend=0)), prepend=0, append=HOLE.size).tolist()
PACKED = reference.encode(np.asfortranarray(HOLE))["counts"].decode()


@pytest.mark.parametrize(
    ("segmentation", "crowd"),
    [
        ({"size": [12, 16], "counts": COUNTS}, 1), ({"size": [12, 16], "counts": PACKED}, 0),
        ({"size": [12.0, 16.0], "counts": [float(n) for n in COUNTS]}, 1), ([{"size": [12, 16], "counts": PACKED}], 0),
    ],
)  # fmt: skip
def test_run_lengths_with_a_hole_as_list_as_text_and_as_floats(
    tmp_path: Path, segmentation: Any, crowd: int
) -> None:
    one_image(tmp_path, [{"segmentation": segmentation, "iscrowd": crowd}], height=12.0, width=16.0)
    np.testing.assert_array_equal(first(tmp_path), HOLE)


@pytest.mark.parametrize(
    "segmentation",
    [
        [box(1, 1, 4, 4), box(8, 2, 5, 3)], [box(1, 1, 4, 4), box(8, 2, 5, 3), [3, 3, 9, 9], []],
        [[[1, 1], [5, 1], [5, 5], [1, 5]], [[8, 2], [13, 2], [13, 5], [8, 5]]],
        [box(1, 1, 4, 4), box(8, 2, 5, 3), box(100, 100, 5, 5)],
    ],
)  # fmt: skip
def test_objects_of_several_parts(tmp_path: Path, segmentation: Any) -> None:
    expected = np.zeros((12, 16), np.uint8)
    expected[1:5, 1:5] = expected[2:5, 8:13] = 1
    one_image(tmp_path, [{"segmentation": segmentation}])
    np.testing.assert_array_equal(first(tmp_path), expected)


def test_one_polygon_without_the_list_around_it_and_a_size_that_is_not_given(tmp_path: Path) -> None:
    one_image(tmp_path, [{"segmentation": box(1, 1, 4, 4)}])
    content = json.loads((tmp_path / "annotations.json").read_text())
    del content["images"][0]["height"], content["images"][0]["width"]
    trees.write(tmp_path / "annotations.json", json.dumps(content))
    mask = first(tmp_path)
    assert (mask.shape, int(mask.sum())) == ((12, 16), 16)


@pytest.mark.parametrize(
    "segmentation",
    [
        [box(30, 30, 5, 5)], [box(-9, 2, 4, 4)], [[3, 3, 9, 3, 9, 3]], [[5, 5]],
        {"size": [12, 16], "counts": [192]},
    ],
)  # fmt: skip
def test_an_object_without_pixels_is_named_and_costs_no_other(
    tmp_path: Path, call: Call, segmentation: Any
) -> None:
    one_image(tmp_path, [{"segmentation": [box(1, 1, 4, 4)]}, {"segmentation": segmentation}])
    assert int((first(tmp_path) == 1).sum()) == 16
    code, out, _ = call("data", "check", "coco", f"root={tmp_path}", "data.options.split={val: 0}")
    assert code == 0
    must_say(out, "annotation 8", "no pixel")


@pytest.mark.parametrize("segmentation", [[], [[]], None, {}, {"size": [12, 16], "counts": []}])
def test_an_object_with_a_box_and_no_shape_is_void_and_named_never_background(
    tmp_path: Path, call: Call, segmentation: Any
) -> None:
    one_image(
        tmp_path, [{"segmentation": segmentation, "bbox": [3, 3, 6, 6]}, {"segmentation": [box(1, 1, 4, 4)]}]
    )
    expected = np.zeros((12, 16), np.uint8)
    expected[3:9, 3:9] = 255
    expected[1:5, 1:5] = 1
    np.testing.assert_array_equal(first(tmp_path), expected)
    expected[3:9, 3:9] = expected[1:5, 1:5] = 1
    np.testing.assert_array_equal(first(tmp_path, boxes="fill"), expected)
    code, out, _ = call("data", "check", "coco", f"root={tmp_path}", "data.options.split={val: 0}")
    assert code == 0
    must_say(out, "0", "annotation 7", "box", "void")


def test_an_object_with_neither_shape_nor_box_is_named(tmp_path: Path, call: Call) -> None:
    one_image(tmp_path, [{"segmentation": [box(1, 1, 4, 4)]}, {}])
    assert int(first(tmp_path).sum()) == 16
    _, out, _ = call("data", "check", "coco", f"root={tmp_path}", "data.options.split={val: 0}")
    must_say(out, "annotation 8", "neither")


def test_a_set_of_boxes_only_is_refused_or_drawn_on_request(tmp_path: Path) -> None:
    one_image(tmp_path, [{"segmentation": [], "bbox": [3, 3, 6, 6]}])
    with pytest.raises(DataError) as stop:
        load(tmp_path)
    must_say(stop.value, "detection", "boxes=fill")
    assert int(first(tmp_path, boxes="fill").sum()) == 36
    with pytest.raises(ConfigError, match=r"boxes.*void.*fill"):
        load(tmp_path, boxes="ignore")


def test_annotations_of_unlisted_images_stop_or_are_left_out_with_a_warning(tmp_path: Path) -> None:
    one_image(
        tmp_path, [{"segmentation": [box(1, 1, 4, 4)]}, {"segmentation": [box(1, 1, 4, 4)], "image_id": 99}]
    )
    with pytest.raises(DataError) as stop:
        load(tmp_path)
    must_say(stop.value, "annotations[1]", "no image")
    dataset = load(tmp_path, on_missing="skip", split={"val": 0})
    assert len(dataset.splits["train"]) == 2
    must_say(dataset.splits["train"].warnings, "annotations[1]")


def test_categories_named_like_void_are_void(tmp_path: Path) -> None:
    content = export(tmp_path, "annotations.json", {0: "images/0.png"}, categories={1: "road", 2: "ignore"})
    content["annotations"].append({"image_id": 0, "category_id": 2, "segmentation": [box(8, 2, 4, 4)]})
    trees.write(tmp_path / "annotations.json", json.dumps(content))
    dataset = load(tmp_path, split={"val": 0})
    assert dataset.labels.names == {0: "background", 1: "road"}
    assert dataset.splits["train"].read_mask(0)[3].tolist() == [1] * 4 + [0] * 4 + [255] * 4 + [0] * 4
    must_say(dataset.notes, "'ignore'", "void")
