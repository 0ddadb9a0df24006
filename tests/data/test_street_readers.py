"""Readers of Cityscapes, BDD100K and IDD on miniature trees in the real layouts, and every fault they must name."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import trees

from everseg.config.fields import DataConfig
from everseg.data.batches.index import class_counts
from everseg.data.datasets import bdd100k, cityscapes, idd, load_dataset
from everseg.data.datasets.street_labels import CITYSCAPES, CITYSCAPES_CLASSES, IDD, IDD_CLASSES, VOID
from everseg.errors import ConfigError, DataError

# The benchmark's evaluated labels, from its paper and label policy: label id -> name, in the order of the trainIds.
EVALUATED = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car",
    27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
FRAMES = {"train": ["aachen_000001_000019", "bochum_000000_000313"], "val": ["lindau_000002_000019"]}
BDD_FRAMES = {"train": ["0a0a0b1a-7c39d841", "0a0d1f2b-00000000"], "val": ["7d2f7975-e0c1c5a7"]}


def _ids(split) -> list[str]:
    return [split.id(i) for i in range(len(split))]


def _cityscapes(base: Path, kind: str = "labelTrainIds", ids: tuple[int, ...] = (0, 13, 255, 18)) -> Path:
    for split, names in FRAMES.items():
        for number, name in enumerate(names):
            city = name.split("_")[0]
            trees.save(
                base / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", trees.image_of(number)
            )
            folder = base / "gtFine" / split / city
            trees.write(folder / f"{name}_gtFine_polygons.json", "{}")
            trees.save(folder / f"{name}_gtFine_color.png", trees.image_of(number))
            trees.save(folder / f"{name}_gtFine_instanceIds.png", trees.mask_of([3, 4]))
            if kind:
                trees.save(folder / f"{name}_gtFine_{kind}.png", trees.mask_of([*ids, number]))
    trees.save(
        base / "leftImg8bit/test/berlin/berlin_000000_000019_leftImg8bit.png", trees.image_of(0)
    )  # no labels
    return base


def _bdd(base: Path, generation: str) -> Path:
    for split, names in BDD_FRAMES.items():
        for number, name in enumerate(names):
            old = generation == "old"
            image = f"images/{split}/{name}.jpg" if old else f"images/10k/{split}/{name}.jpg"
            mask = (
                f"labels/{split}/{name}_train_id.png" if old else f"labels/sem_seg/masks/{split}/{name}.png"
            )
            trees.save(base / image, trees.image_of(number), quality=95)
            trees.save(base / mask, trees.mask_of([0, 10, 255, number]))
            trees.save(
                base / ("color_labels" if old else "labels/sem_seg/colormaps") / split / f"{name}.png",
                trees.image_of(0),
            )
    return base


def _idd(base: Path, ending: str, *, masks: bool = True, sequence: str = "201") -> Path:
    for split, names in {"train": ["frame0029", "frame0299"], "val": ["frame1001"]}.items():
        for number, name in enumerate(names):
            trees.save(base / "leftImg8bit" / split / sequence / f"{name}_{ending}", trees.image_of(number))
            folder = base / "gtFine" / split / sequence
            trees.write(folder / f"{name}_gtFine_polygons.json", "{}")
            if masks:
                trees.save(
                    folder / f"{name}_gtFine_labellevel3Ids.png", trees.mask_of([0, 25, 255, 20 + number])
                )
    return base


# --- label tables --------------------------------------------------------------------------------------------


def test_cityscapes_table_has_the_evaluated_labels_in_the_order_of_the_train_ids() -> None:
    learnt = [label for label in CITYSCAPES if label.train_id != VOID]
    assert {label.id: label.name for label in learnt} == EVALUATED
    assert [label.train_id for label in learnt] == list(range(19))
    assert tuple(EVALUATED.values()) == CITYSCAPES_CLASSES
    assert {label.id for label in CITYSCAPES} == {-1, *range(34)}


def test_idd_table_joins_the_labels_of_a_level_3_class() -> None:
    assert [label.id for label in IDD] == list(range(40))
    joined = {
        name: {label.name for label in IDD if label.train_id == i} for i, name in enumerate(IDD_CLASSES)
    }
    assert {k: v for k, v in joined.items() if v != {k}} == {
        "drivable fallback": {"parking", "drivable fallback"},
        "non-drivable fallback": {"rail track", "non-drivable fallback"},
        "person": {"person", "animal"},
        "vehicle fallback": {"caravan", "trailer", "train", "vehicle fallback"},
        "pole": {"pole", "polegroup"},
        "bridge": {"bridge", "tunnel"},
        "sky": {"sky", "fallback background"},
    }
    assert len(IDD_CLASSES) == 26
    assert {label.name for label in IDD if label.train_id == VOID} == {
        "unlabeled", "ego vehicle", "rectification border", "out of roi", "license plate",
    }  # fmt: skip


# --- Cityscapes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "cityscapes"])
def test_cityscapes_reads_train_ids_and_leaves_the_test_split_out(tmp_path: Path, place: str) -> None:
    _cityscapes(tmp_path / place)
    data = load_dataset(DataConfig(dataset="cityscapes", root=str(tmp_path)))
    assert {k: _ids(v) for k, v in data.splits.items()} == {
        "train": ["aachen/aachen_000001_000019", "bochum/bochum_000000_000313"],
        "val": ["lindau/lindau_000002_000019"],
    }
    assert data.labels.background is None
    assert data.labels.void == (255,)
    assert data.labels.names == dict(enumerate(CITYSCAPES_CLASSES))
    image, mask = data.splits["train"].read(1)
    np.testing.assert_array_equal(image, trees.image_of(1))
    np.testing.assert_array_equal(mask, trees.mask_of([0, 13, 255, 18, 1]))


def test_cityscapes_makes_train_ids_of_label_ids_where_they_are_missing(tmp_path: Path) -> None:
    every = [*range(34), 255]
    base = _cityscapes(tmp_path, "labelIds")
    mask = base / "gtFine/train/aachen/aachen_000001_000019_gtFine_labelIds.png"
    stored = np.resize(np.array(every, np.uint8), trees.SIZE)
    trees.save(mask, stored)
    order = list(EVALUATED)
    expected = [order.index(v) if v in order else 255 for v in stored.ravel().tolist()]
    read = cityscapes.build(tmp_path).splits["train"].read_mask(0)
    assert read.ravel().tolist() == expected
    stored[0, 0] = 60
    trees.save(mask, stored)
    with pytest.raises(DataError, match=r"labelIds\.png.*\[60\].*repair"):
        cityscapes.build(tmp_path).splits["train"].read_mask(0)


def test_cityscapes_half_made_train_ids_give_way_to_complete_label_ids(tmp_path: Path) -> None:
    base = _cityscapes(tmp_path, "labelIds", (7, 26, 0, 33))
    done = base / "gtFine/train/aachen/aachen_000001_000019_gtFine_labelTrainIds.png"
    trees.save(done, trees.mask_of([0, 13, 255, 18, 255]))
    half = cityscapes.build(base).splits["train"]
    assert half.mask_path(0).name.endswith("_labelIds.png")
    before = [half.read_mask(i) for i in range(2)]
    trees.save(
        base / "gtFine/train/bochum/bochum_000000_000313_gtFine_labelTrainIds.png",
        trees.mask_of([0, 13, 255, 18, 255]),
    )
    whole = cityscapes.build(base).splits["train"]
    assert whole.mask_path(0) == done
    np.testing.assert_array_equal([whole.read_mask(i) for i in range(2)], before)


def test_cityscapes_without_masks_names_the_command_that_makes_them(tmp_path: Path) -> None:
    base = _cityscapes(tmp_path, "")
    with pytest.raises(DataError) as caught:
        cityscapes.build(base)
    assert f"{base / 'gtFine/train'}: 2 of 2" in str(caught.value)
    assert "polygons" in str(caught.value)
    assert f"everseg data prepare cityscapes {base}" in str(caught.value)


def test_cityscapes_label_ids_under_the_name_of_train_ids_are_recognised(tmp_path: Path) -> None:
    data = cityscapes.build(_cityscapes(tmp_path / "data", ids=(7, 26, 33)))
    with pytest.raises(DataError, match=r"(?s)2 of 2 masks.*labelIds \(0-33\).*trainIds"):
        class_counts(data.splits["train"], data.labels, cache_dir=tmp_path / "cache")


def test_cityscapes_unpaired_files_are_reported(tmp_path: Path) -> None:
    base = _cityscapes(tmp_path)
    name = "gtFine/train/aachen/aachen_000001_000019_gtFine"
    (base / f"{name}_labelTrainIds.png").rename(base / f"{name[:-11]}20_gtFine_labelTrainIds.png")
    (base / f"{name}_polygons.json").unlink()
    with pytest.raises(DataError) as caught:
        cityscapes.build(base)
    assert "1 image without mask: leftImg8bit/train/aachen/aachen_000001_000019_leftImg8bit.png" in str(
        caught.value
    )
    assert "1 mask without image: gtFine/train/aachen/" in str(caught.value)


def test_cityscapes_pairs_by_name_not_by_position(tmp_path: Path) -> None:
    base = _cityscapes(tmp_path)
    shutil.move(base / "leftImg8bit/train/aachen", base / "leftImg8bit/train/zurich")
    with pytest.raises(DataError, match="1 image without mask: leftImg8bit/train/zurich/aachen_000001"):
        cityscapes.build(base)


# --- BDD100K -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "place"),
    [("old", ""), ("old", "seg"), ("old", "bdd100k/seg"), ("new", ""), ("new", "bdd100k")],
)
def test_bdd100k_finds_its_generation(tmp_path: Path, generation: str, place: str) -> None:
    _bdd(tmp_path / place, generation)
    data = load_dataset(DataConfig(dataset="bdd100k", root=str(tmp_path)))
    assert {k: _ids(v) for k, v in data.splits.items()} == BDD_FRAMES
    assert data.labels.names == dict(enumerate(CITYSCAPES_CLASSES))
    assert (data.labels.background, data.labels.void) == (None, (255,))
    image, mask = data.splits["train"].read(1)
    np.testing.assert_array_equal(mask, trees.mask_of([0, 10, 255, 1]))
    assert np.abs(image.astype(int) - trees.image_of(1)).max() < 12  # JPEG


def test_bdd100k_with_both_generations_asks_which(tmp_path: Path) -> None:
    _bdd(tmp_path / "seg", "old")
    _bdd(tmp_path, "new")
    with pytest.raises(ConfigError, match=r"both generations.*data\.options\.generation=old or new"):
        bdd100k.build(tmp_path)
    for name, ending in (("old", "_train_id.png"), ("new", "841.png")):
        split = bdd100k.build(tmp_path, generation=name).splits["train"]
        assert split.mask_path(0).name.endswith(ending)
    with pytest.raises(ConfigError, match="expected 'old' or 'new', got 'v2'"):
        bdd100k.build(tmp_path, generation="v2")


def test_bdd100k_missing_partners_are_reported(tmp_path: Path) -> None:
    base = _bdd(tmp_path, "new")
    (base / f"images/10k/train/{BDD_FRAMES['train'][0]}.jpg").rename(
        base / "images/10k/train/0b000000-00000000.jpg"
    )
    with pytest.raises(DataError) as caught:
        bdd100k.build(base)
    assert "1 image without mask: images/10k/train/0b000000-00000000.jpg" in str(caught.value)
    assert "1 mask without image: labels/sem_seg/masks/train/0a0a0b1a-7c39d841.png" in str(caught.value)


def test_bdd100k_label_ids_are_recognised(tmp_path: Path) -> None:
    base = _bdd(tmp_path / "data", "old")
    trees.save(base / "labels/val/7d2f7975-e0c1c5a7_train_id.png", trees.mask_of([7, 26, 33]))
    data = bdd100k.build(base)
    with pytest.raises(DataError, match="Cityscapes labelIds"):
        class_counts(data.splits["val"], data.labels, cache_dir=tmp_path / "cache")


# --- IDD -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "ending"),
    [
        ("", "leftImg8bit.png"),
        ("IDD_Segmentation", "leftImg8bit.png"),
        ("idd20kII", "leftImg8bit.jpg"),
        ("idd-20k-II/idd20kII", "image.jpg"),
        ("idd20kII", "image.png"),
    ],
)
def test_idd_reads_either_part(tmp_path: Path, place: str, ending: str) -> None:
    _idd(tmp_path / place, ending)
    data = load_dataset(DataConfig(dataset="idd", root=str(tmp_path)))
    assert {k: _ids(v) for k, v in data.splits.items()} == {
        "train": ["201/frame0029", "201/frame0299"],
        "val": ["201/frame1001"],
    }
    assert data.labels.names == dict(enumerate(IDD_CLASSES))
    assert (data.labels.background, data.labels.void) == (None, (255,))
    np.testing.assert_array_equal(data.splits["train"].read(1)[1], trees.mask_of([0, 25, 255, 21]))


def test_idd_unites_both_parts_whose_names_may_coincide(tmp_path: Path) -> None:
    _idd(tmp_path / "IDD_Segmentation", "leftImg8bit.png")
    _idd(tmp_path / "idd20kII", "leftImg8bit.jpg")
    trees.save(tmp_path / "idd20kII/leftImg8bit/val/9/frame7_image.png", trees.image_of(7))
    trees.save(tmp_path / "idd20kII/gtFine/val/9/frame7_gtFine_labellevel3Ids.png", trees.mask_of([7]))
    data = idd.build(tmp_path)
    assert _ids(data.splits["train"]) == [
        "IDD_Segmentation/201/frame0029", "IDD_Segmentation/201/frame0299",
        "idd20kII/201/frame0029", "idd20kII/201/frame0299",
    ]  # fmt: skip
    assert _ids(data.splits["val"])[1:] == ["idd20kII/201/frame1001", "idd20kII/9/frame7"]
    assert data.splits["train"].image_path(2).suffix == ".jpg"
    assert set(np.unique(data.splits["val"].read(2)[1])) == {7}


def test_idd_of_both_endings_for_one_frame_is_ambiguous(tmp_path: Path) -> None:
    base = _idd(tmp_path, "leftImg8bit.jpg")
    trees.save(base / "leftImg8bit/train/201/frame0029_image.png", trees.image_of(0))
    with pytest.raises(DataError, match=r"1 name .*frame0029_image\.png and .*frame0029_leftImg8bit\.jpg"):
        idd.build(base)


def test_idd_without_masks_names_the_command_that_makes_them(tmp_path: Path) -> None:
    _idd(tmp_path / "IDD_Segmentation", "leftImg8bit.png")
    _idd(tmp_path / "idd20kII", "leftImg8bit.jpg", masks=False)
    with pytest.raises(DataError) as caught:
        idd.build(tmp_path)
    assert f"{tmp_path / 'idd20kII/gtFine/train'}: 2 of 2" in str(caught.value)
    assert "polygons" in str(caught.value)
    assert f"everseg data prepare idd {tmp_path}" in str(caught.value)


def test_idd_label_ids_under_the_name_of_level_3_ids_are_recognised(tmp_path: Path) -> None:
    base = _idd(tmp_path / "data", "leftImg8bit.png")
    trees.save(
        base / "gtFine/val/201/frame1001_gtFine_labellevel3Ids.png", trees.mask_of([0, 12, 32, 33, 36])
    )
    data = idd.build(base)
    with pytest.raises(DataError, match=r"IDD's label ids.*everseg data prepare idd DIR"):
        class_counts(data.splits["val"], data.labels, cache_dir=tmp_path / "cache")


# --- all -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", [cityscapes, bdd100k, idd])
def test_wrong_root_is_named_with_what_was_looked_for(tmp_path: Path, reader) -> None:
    with pytest.raises(DataError, match=r"not a .* folder: .*data\.root=DIR"):
        reader.build(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.root: .*pass data\.root=DIR"):
        reader.build(None)


def test_a_single_split_is_enough_but_not_none(tmp_path: Path) -> None:
    base = _cityscapes(tmp_path)
    shutil.rmtree(base / "leftImg8bit/train")
    assert list(cityscapes.build(base).splits) == ["val"]
    shutil.rmtree(base / "leftImg8bit/val")
    with pytest.raises(DataError, match="leftImg8bit: has neither train/ nor val/"):
        cityscapes.build(base)
