"""COCO's JSON, label maps, windows of large pictures, one set cut into splits, Hugging Face sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trees
from PIL import Image

from everseg.config.fields import DataConfig
from everseg.data.datasets import load_dataset, tiles
from everseg.data.datasets.descriptor import Division
from everseg.data.datasets.tiles import Tiles
from everseg.data.doctor import doctor
from everseg.errors import ConfigError, DataError
from everseg.labels import RawLabels
from saying import must_say


def load(dataset: str | Path, root: Path | None = None, **options: Any) -> Any:
    data = DataConfig(dataset=str(dataset), root=None if root is None else str(root), options=options)
    return load_dataset(data)


def ids(split: Any) -> list[str]:
    return [split.id(i) for i in range(len(split))]


# ---------------------------------------------------------------- COCO


def square(left: int, top: int, right: int, bottom: int) -> list[list[int]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def coco(images: int = 4, **more: Any) -> dict[str, Any]:
    content = {
        "images": [{"id": i, "file_name": f"p{i}.png", "width": 16, "height": 12} for i in range(images)],
        "categories": [{"id": 7, "name": "car", "supercategory": "all"}, {"id": 3, "name": "sign"}],
        "annotations": [
            {"image_id": i, "category_id": 7, "segmentation": square(2, 2, 9, 9)} for i in range(images)
        ],
    }
    return {**content, **more}


def coco_tree(
    root: Path, content: dict[str, Any], place: str = "annotations.json", images: str = "images"
) -> Path:
    trees.write(root / place, json.dumps(content))
    for number, item in enumerate(content["images"]):
        trees.save(root / images / item["file_name"], trees.image_of(number, (item["height"], item["width"])))
    return root


def test_coco_polygons_become_ids_in_the_order_of_the_categories(tmp_path: Path) -> None:
    dataset = load("coco", coco_tree(tmp_path, coco()))
    assert dict(dataset.labels.names) == {0: "background", 1: "sign", 2: "car"}
    image, mask = dataset.splits["train"].read(0)
    expected = np.zeros((12, 16), np.uint8)
    expected[2:9, 2:9] = 2  # a box from 2 to 9 covers the pixels 2 to 8
    np.testing.assert_array_equal(mask, expected)
    assert image.shape == (12, 16, 3)
    assert sorted(ids(dataset.splits["train"]) + ids(dataset.splits["val"])) == ["p0", "p1", "p2", "p3"]


def test_coco_objects_lie_over_one_another_in_the_order_of_the_file(tmp_path: Path) -> None:
    content = coco(1)
    content["annotations"] = [
        {"image_id": 0, "category_id": 3, "segmentation": square(4, 4, 6, 6)},
        {"image_id": 0, "category_id": 7, "segmentation": square(0, 0, 12, 12)},
        {"image_id": 0, "category_id": 3, "segmentation": square(10, 2, 14, 4)},
    ]
    mask = load("coco", coco_tree(tmp_path, content)).splits["train"].read_mask(0)
    expected = np.zeros((12, 16), np.uint8)
    expected[:, :12] = 2  # over the first, smaller one
    expected[2:4, 10:14] = 1
    np.testing.assert_array_equal(mask, expected)


def test_coco_faults_of_single_objects_are_found_by_the_check_per_image(tmp_path: Path) -> None:
    content = coco(6)
    wrong = [[[1, 2, 3, 4]], {"size": [12, 16], "counts": [5]}, {"size": [1, 1], "counts": [1]}, "x"]
    for item, segmentation in zip(content["annotations"], wrong, strict=False):
        item["segmentation"] = segmentation
    coco_tree(tmp_path, content)
    report = doctor.check(load("coco", tmp_path, split={"val": 0}))
    said = {f.sample: f.message for f in report.findings if f.level == "error"}
    for name, text in (
        ("p0", "three points"), ("p1", "runs of 5 pixels"), ("p2", "for the size"), ("p3", "neither polygons"),
    ):  # fmt: skip
        assert text in said.pop(name)
    assert not said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": [{"image_id": 99, "category_id": 7}]}, "no image"),
        ({"annotations": [{"image_id": [1], "category_id": 7}]}, "no image"),
        ({"annotations": [{"image_id": 0, "category_id": 9}]}, "has the category 9"),
        ({"categories": [{"id": "a", "name": "x"}]}, "whole number"),
        ({"images": [{"id": 0, "file_name": "../x.png", "width": 1, "height": 1}]}, "leads out"),
        ({"images": [{"id": 0, "file_name": "x.png", "width": 1.5, "height": 1}]}, "a size of 1.5x1"),
        ({"images": [{"id": 0, "file_name": "x.png", "width": 0, "height": 1}]}, "a size of 0x1"),
        ({"images": 3}, "COCO annotations"),
    ],
)
def test_coco_files_of_another_form_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    coco_tree(tmp_path, coco())
    trees.write(tmp_path / "annotations.json", json.dumps({**coco(), **change}))
    with pytest.raises(DataError, match=message):
        load("coco", tmp_path)


def test_coco_splits_at_their_usual_places_and_roboflow(tmp_path: Path) -> None:
    root = tmp_path / "coco"
    for split in ("train", "val"):
        coco_tree(root, coco(3), f"annotations/instances_{split}2017.json", f"{split}2017")
    dataset = load("coco", root)
    assert {name: ids(split) for name, split in dataset.splits.items()} == {
        n: ["p0", "p1", "p2"] for n in ("train", "val")
    }
    root = tmp_path / "roboflow"
    content = coco(2)
    content["categories"] = [{"id": 0, "name": "all", "supercategory": "none"}, *content["categories"]]
    for folder in ("train", "valid"):
        coco_tree(root, content, f"{folder}/_annotations.coco.json", folder)
    dataset = load("coco", root)
    assert list(dataset.splits) == ["train", "val"]
    assert list(dataset.labels.names.values()) == ["background", "sign", "car"]


def test_a_category_that_coco_leaves_out_is_named_by_init_and_check_and_before_training(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = coco(2)
    content["categories"] = [{"id": 0, "name": "all", "supercategory": "none"}, *content["categories"]]
    for folder in ("train", "valid"):
        coco_tree(tmp_path / "roboflow", content, f"{folder}/_annotations.coco.json", folder)
    code, out, err = call("data", "init", "roboflow", "--json")
    assert code == 0, err
    (said,) = json.loads(out)["notes"]
    assert "'all'" in said
    assert f"note: {said}" in err
    _, out, _ = call("data", "check", "data.yaml", "--json")
    assert [f["message"] for f in json.loads(out)["findings"] if f["code"] == "class-left-out"] == [said]
    given = ("data=data.yaml", "task=[[car]]", "scenario.test_split=val")
    _, _, err = call("show", "camvid-6-5-mib", *given, "--scenario")
    assert f"note: {said}" in err
    # The parent of others stays if an object has it, and nothing is said of a background's name.
    content["annotations"][0]["category_id"] = 0
    used = load("coco", coco_tree(tmp_path / "used", content))
    assert "all" in used.labels.names.values()
    assert used.notes == ()


def test_coco_missing_images_are_all_named_or_left_out(tmp_path: Path) -> None:
    coco_tree(tmp_path, coco())
    (tmp_path / "images/p1.png").unlink()
    with pytest.raises(DataError, match=r"1 image.* exist.*p1"):
        load("coco", tmp_path)
    dataset = load("coco", tmp_path, on_missing="skip", split={"val": 0})
    assert ids(dataset.splits["train"]) == ["p0", "p2", "p3"]
    assert dataset.splits["train"].read_mask(1).max() == 2
    assert [w.sample for w in dataset.splits["train"].warnings] == ["p1"]


def test_a_data_yaml_may_name_another_layout(tmp_path: Path) -> None:
    coco_tree(tmp_path / "data", coco())
    file = trees.write(tmp_path / "data.yaml", "layout: coco\nroot: data\nsplit: {val: 0.5, seed: 1}\n")
    assert list(load(file).splits) == ["train", "val"]
    trees.write(file, "layout: cooc\n")
    with pytest.raises(ConfigError, match="did you mean 'coco'"):
        load(file)
    trees.write(file, "layout: coco\nroot: data\nspilt: {}\n")
    with pytest.raises(ConfigError, match="did you mean 'split'"):
        load(file)


# ---------------------------------------------------------------- label maps


def test_a_label_map_gives_classes_and_colours(tmp_path: Path) -> None:
    colours = np.array([[250, 50, 83], [0, 0, 0], [7, 8, 9], [1, 2, 3]], np.uint8)
    trees.write(
        tmp_path / "labelmap.txt",
        "# label:color_rgb:parts:actions\ncar:250,50,83::\nbackground:0,0,0::\nvoid:7,8,9::\ntree:1,2,3:a,b:\n",
    )
    for name in ("a", "b"):
        trees.save(tmp_path / f"JPEGImages/{name}.jpg", trees.image_of(1))
        trees.save(tmp_path / f"SegmentationClass/{name}.png", colours[trees.mask_of([0, 1, 2, 3])])
        trees.save(tmp_path / "SegmentationObject/a.png", trees.mask_of([0]))
    trees.write(tmp_path / "ImageSets/Segmentation/train.txt", "a\nb\n")
    file = trees.write(
        tmp_path / "data.yaml",
        "images: JPEGImages\nmasks: SegmentationClass\nsplits: {train: ImageSets/Segmentation/train.txt}\n"
        "labels: {palette: labelmap.txt}\n",
    )
    dataset = load(file)
    assert dict(dataset.labels.names) == {0: "background", 1: "car", 2: "tree"}
    assert dataset.labels.background == 0
    np.testing.assert_array_equal(dataset.splits["train"].read_mask(0), trees.mask_of([1, 0, 255, 2]))
    trees.write(tmp_path / "labelmap.txt", "car:250,50::\ntree:1,2,3::\ntree:3,2,1::\nroad:1,2,3::\n")
    with pytest.raises(ConfigError, match="3 problems") as caught:
        load(file)
    for text in ("line 1: expected", "line 3: 'tree' appears twice", "line 4: the colour [1, 2, 3]"):
        assert text in str(caught.value)


# ---------------------------------------------------------------- one set cut into splits


def test_a_sample_stays_in_its_split_whatever_else_is_added() -> None:
    names = [f"a{i}" for i in range(1000)]
    division = Division(0.2, 0.1, seed=3)
    parts = division.parts(names)
    assert sum(map(len, parts.values())) == 1000
    assert 150 < len(parts["val"]) < 250
    assert 60 < len(parts["test"]) < 140
    fewer = division.parts(names[::2])
    assert {names[::2][i] for i in fewer["val"]} == {names[i] for i in parts["val"]} & set(names[::2])
    assert Division(0.2, 0.1, seed=4).parts(names)["val"] != parts["val"]
    assert {k: len(v) for k, v in Division(0.01).parts(["a", "b"]).items()} == {"train": 1, "val": 1}


def test_folders_without_splits_are_cut(tmp_path: Path) -> None:
    for i in range(20):
        trees.save(tmp_path / f"images/a{i}.png", trees.image_of(i))
        trees.save(tmp_path / f"masks/a{i}.png", trees.mask_of([0, 1]))
    file = trees.write(
        tmp_path / "data.yaml", "images: images\nmasks: masks\nclasses: [a, b]\nsplit: {val: 0.3, seed: 0}\n"
    )
    dataset = load(file)
    before = {name: ids(split) for name, split in dataset.splits.items()}
    assert sorted(before["train"] + before["val"]) == sorted(f"a{i}" for i in range(20))
    out = before["val"][0]
    skip = trees.write(tmp_path / "skip.txt", f"val\t{out}\n")
    after = {name: ids(split) for name, split in load(file, skip=str(skip)).splits.items()}
    assert after == {"train": before["train"], "val": before["val"][1:]}
    for text, message in (
        ("split: {vla: 0.2}", "did you mean 'val'"), ("split: {val: 2}", "from 0 to below 1"),
        ("split: {val: 0.6, test: 0.4}", "nothing for train"), ("split: 3", "expected shares"),
        ("split: {val: 0.2}\nsplits: [train]", "it or splits"),
    ):  # fmt: skip
        trees.write(file, f"images: images\nmasks: masks\nclasses: [a, b]\n{text}\n")
        with pytest.raises(ConfigError, match=message):
            load(file)


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("length", [1, 8, 9, 15, 16, 17, 40])
def test_windows_cover_every_pixel_and_those_of_tests_share_none(length: int) -> None:
    for training in (True, False):
        count = np.zeros((length, 5), int)
        for top, left, bottom, right in Tiles(8, 3).windows(length, 5, training=training):
            assert bottom - top <= 8
            assert not training or bottom - top == min(8, length)
            count[top:bottom, left:right] += 1
        assert count.min() >= 1
        assert training or count.max() == 1


def test_windows_show_the_pixels_of_the_picture_and_large_ones_are_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    image, mask = (
        rng.integers(0, 256, (50, 40, 3), dtype=np.uint8),
        rng.integers(0, 3, (50, 40), dtype=np.uint8),
    )
    for split in ("train", "val"):
        trees.save(tmp_path / f"images/{split}/a.png", image)
        trees.save(tmp_path / f"masks/{split}/a.png", mask)
    file = trees.write(tmp_path / "data.yaml", "classes: [a, b, c]\ntiles: {size: 16, overlap: 4}\n")
    monkeypatch.setattr(tiles, "KEEP", 100)
    monkeypatch.setenv("EVERSEG_CACHE", str(tmp_path / "cache"))
    train = load(file).splits["train"]
    decoded = []
    really = type(train._split).read
    monkeypatch.setattr(type(train._split), "read", lambda self, i: (decoded.append(i), really(self, i))[1])
    assert ids(train)[:4] == ["a@0,0", "a@0,12", "a@0,24", "a@12,0"]
    for index in range(len(train)):
        top, left = map(int, train.id(index).split("@")[1].split(","))
        pixels, drawn = train.read(index)
        np.testing.assert_array_equal(pixels, image[top : top + 16, left : left + 16])
        np.testing.assert_array_equal(drawn, mask[top : top + 16, left : left + 16])
        np.testing.assert_array_equal(train.read_mask(index), drawn)
    assert decoded == [0]
    val = load(file).splits["val"]
    assert sum(val.read(i)[1].size for i in range(len(val))) == mask.size
    assert train.fingerprint() != load(file, tiles={"size": 16, "overlap": 0}).splits["train"].fingerprint()
    (tmp_path / "cache").rename(tmp_path / "gone")
    (tmp_path / "cache").write_text("in the way")  # no room for the cache: decoded every time
    np.testing.assert_array_equal(train.read(3)[0], image[12:28, :16])


def test_the_check_of_windows_names_the_window_and_the_skip_list_leaves_it_out(tmp_path: Path) -> None:
    mask = np.zeros((32, 32), np.uint8)
    mask[20:, 20:] = 9
    mask[0, 0] = 1
    for split in ("train", "val"):
        trees.save(tmp_path / f"images/{split}/a.png", trees.image_of(len(split), (32, 32)))
        trees.save(
            tmp_path / f"masks/{split}/a.png", mask if split == "train" else np.zeros((32, 32), np.uint8)
        )
    file = trees.write(tmp_path / "data.yaml", "classes: [a, b]\ntiles: {size: 16}\n")
    report = doctor.check(load(file))
    assert [(f.code, f.sample) for f in report.findings if f.level == "error"] == [
        ("undeclared-id", "a@16,16")
    ]
    skip = trees.write(tmp_path / "skip.txt", "train\ta@16,16\n")
    assert doctor.check(load(file, skip=str(skip))).ok


def test_wrong_windows_are_refused(tmp_path: Path) -> None:
    trees.folder(tmp_path)
    for given, message in (
        ({"size": 4}, "at least 8"), ({"size": 16, "overlap": 16}, "from 0 to below 16"),
        ({"sizes": 3}, "'size'"), (3, "expected"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            load(tmp_path / "data.yaml", tiles=given)


def test_a_problem_is_told_of_the_options_where_they_hold_it_and_else_of_the_file(tmp_path: Path) -> None:
    trees.folder(tmp_path)
    file = tmp_path / "data.yaml"
    with pytest.raises(ConfigError, match=r"^data\.options\.tiles") as caught:
        load(file, tiles={"size": 4})
    assert "data.yaml" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^data\.options\.exif: expected"):
        load(file, exif="no")
    with file.open("a") as text:
        text.write("bit_depth: 3\npair: {image: a}\n")
    with pytest.raises(ConfigError) as caught:
        load(file, tiles={"size": 4})
    assert str(caught.value).startswith(f"2 problems in {file}\n")
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "data.options.tiles.size",
        "pair.image",
    ]
    with pytest.raises(ConfigError) as caught:
        load(file, pair={}, skip=str(tmp_path / "none.txt"))
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["bit_depth", "data.options.skip"]


# ---------------------------------------------------------------- Hugging Face


def hf_tree(root: Path, *, splits: bool = True, parquet: bool = False) -> Path:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    rows = {
        "image": [Image.fromarray(trees.image_of(i)) for i in range(4)],
        "annotation": [Image.fromarray(trees.mask_of([0, 1, 255])) for _ in range(4)],
    }
    table = datasets.Dataset.from_dict(rows, features=features)
    if parquet:
        (root / "data").mkdir(parents=True)
        table.to_parquet(str(root / "data/train-00000-of-00001.parquet"))
        table.to_parquet(str(root / "data/validation-00000-of-00001.parquet"))
    elif splits:
        datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(str(root))
    else:
        table.save_to_disk(str(root))
    return root


@pytest.mark.parametrize("parquet", [False, True])
def test_hugging_face_sets_are_read_offline(
    tmp_path: Path, parquet: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    root = hf_tree(tmp_path / "set", parquet=parquet)
    dataset = load("hf", root, classes=["background", "road"])
    assert list(dataset.splits) == ["train", "val"]
    image, mask = dataset.splits["val"].read(2)
    np.testing.assert_array_equal(image, trees.image_of(2))
    np.testing.assert_array_equal(mask, trees.mask_of([0, 1, 255]))
    report = doctor.check(dataset)
    assert {f.code for f in report.findings} == {"same-image"}
    assert len(dataset.splits["train"].fingerprint()) == 64


def test_hugging_face_sets_without_splits_or_with_other_columns(tmp_path: Path) -> None:
    root = hf_tree(tmp_path / "set", splits=False)
    trees.write(root / "id2label.json", '{"0": "background", "1": "road"}')
    dataset = load("hf", root, split={"val": 0.5})
    assert sorted(ids(dataset.splits["train"]) + ids(dataset.splits["val"])) == [f"{i:06d}" for i in range(4)]
    with pytest.raises(DataError, match=r"'label'.*image, annotation"):
        load("hf", root, mask="label")
    (root / "id2label.json").unlink()
    with pytest.raises(ConfigError, match=r"data\.options\.classes"):
        load("hf", root)


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"everseg\[hf-data\]"):
        load("hf", tmp_path, classes=["a", "b"])


def test_coco_objects_of_the_background_are_background_whatever_its_name(tmp_path: Path) -> None:
    categories = [{"id": 1, "name": "__background__"}, {"id": 7, "name": "car"}, {"id": 9, "name": "sign"}]
    objects = [
        {"image_id": 0, "category_id": 7, "segmentation": square(2, 2, 9, 9)},
        {"image_id": 0, "category_id": 1, "segmentation": square(4, 4, 6, 6)},
    ]
    content = {**coco(1), "categories": categories, "annotations": objects}
    dataset = load("coco", coco_tree(tmp_path, content), split={"val": 0})
    assert dataset.labels.names == {0: "background", 1: "car", 2: "sign"}
    mask = dataset.splits["train"].read_mask(0)
    assert (mask[4, 4], mask[7, 7], set(np.unique(mask))) == (0, 1, {0, 1})


def test_coco_categories_of_one_name_are_refused_and_splits_may_spell_each_its_own_way(
    tmp_path: Path,
) -> None:
    twice = {**coco(), "categories": [{"id": 7, "name": "Traffic Light"}, {"id": 3, "name": "traffic_light"}]}
    trees.write(tmp_path / "a/annotations.json", json.dumps(twice))
    with pytest.raises(DataError, match=r"categories\[1\]: id 3 or name 'traffic_light' appears twice"):
        load("coco", tmp_path / "a")
    for split, name in (("train", "Car"), ("val", "car")):
        content = {**coco(3), "categories": [{"id": 7, "name": name}]}
        coco_tree(tmp_path / "b", content, f"annotations/instances_{split}2017.json", f"{split}2017")
    dataset = load("coco", tmp_path / "b")
    assert dataset.labels.names == {0: "background", 1: "Car"}
    assert all((split.read_mask(0) == 1).sum() > 40 for split in dataset.splits.values())
    content = {**coco(3), "categories": [{"id": 7, "name": "sign"}, {"id": 8, "name": "car"}]}
    coco_tree(tmp_path / "b", content, "annotations/instances_val2017.json", "val2017")
    dataset = load("coco", tmp_path / "b")  # id 7 is a sign here and a car there: the names count
    assert dataset.labels.names == {0: "background", 1: "Car", 2: "sign"}
    assert [set(np.unique(split.read_mask(0))) for split in dataset.splits.values()] == [{0, 1}, {0, 2}]
    (said,) = dataset.notes
    must_say(said, "'car'", "8", "7", "'Car'")


def test_label_maps_and_palettes_take_names_in_any_spelling(tmp_path: Path) -> None:
    trees.save(tmp_path / "images/train/a.png", trees.image_of(0))
    colours = np.array([[0, 0, 0], [0, 128, 0], [9, 9, 9], [1, 1, 1]], np.uint8)
    trees.save(tmp_path / "masks/train/a.png", colours[trees.mask_of([0, 1, 2, 3])])
    trees.write(
        tmp_path / "map.txt", "Tree:0,128,0::\n_background_:0,0,0::\n__IGNORE__:9,9,9::\nUnlabeled:1,1,1::\n"
    )
    head = "images: images/{split}\nmasks: masks/{split}\nsplits: [train]\n"
    trees.write(tmp_path / "data.yaml", head + "labels: {palette: map.txt}\n")
    by_map = load_dataset(DataConfig(dataset=str(tmp_path / "data.yaml")))
    assert by_map.labels == RawLabels({0: "_background_", 1: "Tree"}, 0, (255,))
    palette = "{tree: [0, 128, 0], BG: [0, 0, 0], Ignore: [[9, 9, 9], [1, 1, 1]]}"
    text = head + f"classes: [Background, TREE]\nlabels: {{palette: {palette}}}\n"
    trees.write(tmp_path / "data.yaml", text)
    by_name = load_dataset(DataConfig(dataset=str(tmp_path / "data.yaml")))
    assert by_name.labels.background == 0
    masks = [data.splits["train"].read_mask(0)[0, ::4].tolist() for data in (by_map, by_name)]
    assert masks == [[0, 1, 255, 255]] * 2
    trees.write(tmp_path / "data.yaml", text.replace("BG:", "Tree: [7, 7, 7], BG:"))
    with pytest.raises(ConfigError, match=r"labels\.palette: 'tree' and 'Tree' are one name"):
        load_dataset(DataConfig(dataset=str(tmp_path / "data.yaml")))
    trees.write(tmp_path / "map.txt", "Tree:0,128,0::\ntree:0,0,0::\n")
    trees.write(tmp_path / "data.yaml", head + "labels: {palette: map.txt}\n")
    with pytest.raises(ConfigError, match=r"line 2: 'tree'.* twice.* 'Tree'"):
        load_dataset(DataConfig(dataset=str(tmp_path / "data.yaml")))


def test_hugging_face_labels_name_the_background_in_any_usual_way(tmp_path: Path) -> None:
    root = hf_tree(tmp_path / "set")
    trees.write(root / "id2label.json", '{"0": "BG", "1": "road"}')
    assert load("hf", root).labels.background == 0
    trees.write(root / "id2label.json", '{"0": "Road", "1": "road"}')
    with pytest.raises(ConfigError, match=r"'road' stands for id 0 .*'Road'"):
        load("hf", root)
