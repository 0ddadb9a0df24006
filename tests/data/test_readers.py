"""Readers on miniature data sets in the real layouts: what they return, and every fault they must name."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import trees
from PIL import Image

from everseg.config.fields import DataConfig
from everseg.data.base import Dataset
from everseg.data.datasets import ade, camvid, folder, load_dataset, voc
from everseg.data.datasets.files import FileSplit
from everseg.errors import ConfigError, DataError
from saying import must_say


def _ids(split) -> list[str]:
    return [split.id(i) for i in range(len(split))]


# --- layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_is_found_as_devkit_and_as_torchvision_lay_it(tmp_path: Path, place: str) -> None:
    trees.voc(tmp_path / place)
    data = voc.build(tmp_path)
    assert _ids(data.splits["train"]) == ["2007_000032", "2007_000039"]
    assert _ids(data.splits["val"]) == ["2007_000033"]
    assert data.labels.background == 0
    assert data.labels.void == (255,)
    assert [data.labels.names[i] for i in (0, 1, 15, 20)] == [
        "background",
        "aeroplane",
        "person",
        "tvmonitor",
    ]
    assert data.labels.classes == tuple(range(1, 21))
    image, mask = data.splits["train"].read(0)
    np.testing.assert_array_equal(mask, trees.mask_of([0, 1, 255, 15]))
    assert mask.dtype == image.dtype == np.uint8
    assert np.abs(image.astype(int) - trees.image_of(0)).max() < 12  # JPEG


def test_voc_masks_with_palette_are_read_as_indices(tmp_path: Path) -> None:
    data = voc.build(trees.voc(tmp_path, aug=False))
    np.testing.assert_array_equal(data.splits["train"].read_mask(1), trees.mask_of([0, 20]))
    assert data.splits["train"].mask_path(1).parent.name == "SegmentationClass"


def test_voc_of_the_original_repository_uses_its_own_lists_in_their_order(tmp_path: Path) -> None:
    data = voc.build(trees.voc_mib(tmp_path))
    assert _ids(data.splits["train"]) == ["2008_000015", "2007_000032", "2007_000039", "2008_000008"]
    assert data.splits["train"].mask_path(0).parent.name == "SegmentationClassAug"
    np.testing.assert_array_equal(data.splits["train"].read_mask(0), trees.mask_of([0, 5]))
    assert _ids(voc.build(tmp_path, train_list="train").splits["train"]) == ["2007_000032", "2007_000039"]


def test_voc_sbd_list_without_its_masks_names_them(tmp_path: Path) -> None:
    base = trees.voc(tmp_path, aug=False)
    trees.write(base / "ImageSets/Segmentation/train_aug.txt", "2007_000032\n2008_000008\n2008_000015\n")
    with pytest.raises(DataError, match=r"2 files.*2008_000008, mask of 2008_000015"):
        voc.build(base)


def test_ade_is_sorted_by_name_with_150_classes_after_other(tmp_path: Path) -> None:
    trees.ade(tmp_path / "ADEChallengeData2016")
    data = ade.build(tmp_path)
    assert _ids(data.splits["train"]) == [f"ADE_train_{i:08d}" for i in range(1, 5)]
    assert len(data.splits["val"]) == 2
    assert len(data.labels.classes) == 150
    assert [data.labels.names[i] for i in (1, 2, 13, 21, 55, 127, 150)] == [
        "wall", "building", "person", "car", "runway", "animal", "flag",
    ]  # fmt: skip
    np.testing.assert_array_equal(data.splits["train"].read_mask(2), trees.mask_of([0, 3, 150]))


def test_camvid_has_no_background_and_void_11(tmp_path: Path) -> None:
    data = camvid.build(trees.camvid(tmp_path))
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 2, "val": 1, "test": 2}
    assert data.labels.background is None
    assert data.labels.classes == tuple(range(11))
    assert data.labels.declared == frozenset(range(12))
    assert [data.labels.names[i] for i in (0, 8, 10)] == ["sky", "car", "bicyclist"]
    image, mask = data.splits["train"].read(1)
    np.testing.assert_array_equal(image, trees.image_of(1))
    np.testing.assert_array_equal(mask, trees.mask_of([0, 3, 11, 5]))


def test_camvid_lists_with_another_machines_prefix_give_their_order(tmp_path: Path) -> None:
    data = camvid.build(trees.camvid(tmp_path), lists=True)
    assert _ids(data.splits["train"]) == ["0006R0_f00930", "0001TP_006690"]


def test_camvid_sequence_filter_keeps_the_splits_that_have_frames(tmp_path: Path) -> None:
    trees.camvid(tmp_path)
    dusk = camvid.build(tmp_path, sequence="dusk").splits
    assert {k: _ids(v) for k, v in dusk.items()} == {"train": ["0001TP_006690"], "test": ["0001TP_008550"]}
    day = camvid.build(tmp_path, sequence=["day"]).splits
    assert {k: len(v) for k, v in day.items()} == {"train": 1, "val": 1, "test": 1}
    with pytest.raises(DataError, match=r"no frame .*sequence 0002XX"):
        camvid.build(tmp_path, sequence="0002XX")


def test_camvid_real_images_all_pair(camvid: Path) -> None:
    data = load_dataset(DataConfig(dataset="camvid", root=str(camvid)))
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 367, "val": 101, "test": 233}
    for split in data.splits.values():
        image, mask = split.read(len(split) - 1)
        assert image.shape == (360, 480, 3)
        assert mask.shape == (360, 480)
        assert set(np.unique(mask).tolist()) <= data.labels.declared


# --- plain folders -------------------------------------------------------------------------------------------


def test_folder_reads_a_descriptor_relative_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trees.folder(tmp_path / "d")
    monkeypatch.chdir(tmp_path)
    data = load_dataset(DataConfig(dataset="d/data.yaml"))
    assert data.name == "data"
    assert {k: _ids(v) for k, v in data.splits.items()} == {"train": ["a_0", "a_1", "a_2"], "val": ["a_0"]}
    assert data.labels.background == 0
    assert data.labels.void == (9,)
    np.testing.assert_array_equal(data.splits["train"].read_mask(0), trees.mask_of([0, 1, 2, 9]))
    moved = shutil.copytree(path.parent, tmp_path / "e")
    elsewhere = load_dataset(DataConfig(dataset="d/data.yaml", root=str(moved)))
    assert elsewhere.splits["train"].root == moved


def test_folder_pairs_suffixes_in_one_tree_with_subfolders(tmp_path: Path) -> None:
    for city in ("aachen", "bochum"):
        trees.save(tmp_path / "all" / city / "1_left.jpg", trees.image_of(1))
        trees.save(tmp_path / "all" / city / "1_ids.png", trees.mask_of([1, 2]))
        trees.save(tmp_path / "all" / city / "1_colour.png", trees.image_of(3))
    data = (
        folder.build(
            tmp_path,
            images="all",
            masks="all",
            splits={"train": "train.txt"},
            pair={"image_suffix": "_left", "mask_suffix": "_ids"},
            classes={1: "a", 2: "b"},
        )
        if (trees.write(tmp_path / "train.txt", "bochum/1\naachen/1_left.jpg\n"))
        else None
    )
    assert data is not None
    assert _ids(data.splits["train"]) == ["bochum/1", "aachen/1"]
    assert data.labels.background is None
    split = folder.build(
        tmp_path,
        images="{split}",
        masks="{split}",
        splits={"train": "all"},
        pair={"image_suffix": "_left", "mask_suffix": "_ids"},
        classes={1: "a", 2: "b"},
    ).splits["train"]
    assert _ids(split) == ["aachen/1", "bochum/1"]


def test_folder_mask_beside_image_with_suffix(tmp_path: Path) -> None:
    for i in range(2):
        trees.save(tmp_path / "train" / f"x{i}.png", trees.image_of(i))
        trees.save(tmp_path / "train" / f"x{i}_mask.png", trees.mask_of([i]))
    data = folder.build(
        tmp_path, images="{split}", masks="{split}", pair={"mask_suffix": "_mask"}, classes=["a", "b"]
    )
    assert _ids(data.splits["train"]) == ["x0", "x1"]
    assert set(np.unique(data.splits["train"].read_mask(1))) == {1}


def test_folder_decodes_colour_masks_by_palette(tmp_path: Path) -> None:
    colours = {1: (10, 20, 30), 2: (200, 0, 0), 255: (0, 0, 0)}
    ids = trees.mask_of([2, 1, 255, 1])
    rgb = np.zeros((*ids.shape, 3), np.uint8)
    for raw, colour in colours.items():
        rgb[ids == raw] = colour
    trees.save(tmp_path / "images/train/a.png", trees.image_of(0))
    trees.save(tmp_path / "masks/train/a.png", rgb)
    text = "classes: {1: road, 2: car}\nlabels:\n  palette:\n    road: [10, 20, 30]\n"
    text += "    car: [[200, 0, 0], [1, 1, 1]]\n    ignore: [0, 0, 0]\n"
    path = trees.write(tmp_path / "data.yaml", text)
    data = folder.build(descriptor=path)
    np.testing.assert_array_equal(data.splits["train"].read_mask(0), ids)
    rgb[0, 0] = (9, 9, 9)
    trees.save(tmp_path / "masks/train/a.png", rgb)
    with pytest.raises(DataError, match=r"a\.png.*labels\.palette.*\[9, 9, 9\] on 1 pix"):
        data.splits["train"].read_mask(0)


def test_folder_maps_stored_ids_beyond_a_byte(tmp_path: Path) -> None:
    stored = np.tile(np.array([7, 26001, 0, 255], np.uint16), (12, 4))
    trees.save(tmp_path / "images/train/a.png", trees.image_of(0))
    trees.save(tmp_path / "masks/train/a.png", stored)
    options = {
        "classes": ["road", "car"],
        "labels": {"map": {7: "road", 26001: 1, 0: "ignore", -1: "ignore"}},
    }
    split = folder.build(tmp_path, **options).splits["train"]
    np.testing.assert_array_equal(split.read_mask(0), np.tile(np.array([0, 1, 255, 255], np.uint8), (12, 4)))
    options["labels"] = {"map": {7: "road", 0: "ignore"}}
    with pytest.raises(DataError, match=r"a\.png.*\[26001\].*labels\.map"):
        folder.build(tmp_path, **options).splits["train"].read_mask(0)


def test_folder_descriptor_lists_all_its_faults_with_near_misses(tmp_path: Path) -> None:
    text = (
        "clases: [a]\nclasses: [road, Road, 3]\nignore: 0\nbackground: raod\nimages: ../x\n"
        "labels: {palette: {road: [0, 0, 300], tree: [1, 2, 3]}}\npair: {mask_sufix: x}\nsplits: 5\n"
    )
    path = trees.write(tmp_path / "data.yaml", text)
    with pytest.raises(ConfigError) as caught:
        folder.build(descriptor=path)
    must_say(caught.value, "problems in", path)
    for facts in (
        ("clases", "unknown", "'classes'"),
        ("classes.1", "'Road'", "id 0"),
        ("classes.2", "other than 'ignore'", "got 3"),
        ("ignore:", "id 0", "'road'"),
        ("background", "'raod'", "'road'"),
        ("images: '../x'", "leads out"),
        ("labels.palette.road", "[red, green, blue]", "0 to 255", "[0, 0, 300]"),
        ("labels.palette.tree: 'tree'", "neither", "'ignore'"),
        ("pair.mask_sufix", "unknown", "'mask_suffix'"),
        ("splits", "list of names"),
    ):
        must_say(caught.value, *facts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "classes: .*list of names"),
        ({"classes": ["a"], "images": "im"}, r"splits: needed"),
        ({"classes": ["a"], "images": "im", "splits": ["train"]}, "an image list"),
        ({"classes": {65535: "a"}}, "0 to 65534, got 65535"),
        ({"classes": ["a"], "images": "x/{split}", "masks": "x/{split}"}, "same folder as images"),
        (
            {"classes": ["a"], "labels": {"palette": {"a": [0, 0, 0]}, "map": {0: "a"}}},
            "palette or map",
        ),
        ({"classes": ["a", "b"], "labels": {"palette": {"a": [0, 0, 0]}}}, "colour for b"),
        (
            {"classes": ["a", "b"], "labels": {"palette": {"a": [0, 0, 0], "b": [0, 0, 0]}}},
            "another class already",
        ),
        ({"classes": ["a"], "max_pixels": 0}, "max_pixels: expected a positive"),
        ({"classes": ["a"], "ignore": "x"}, "ignore: expected ids"),
    ],
)
def test_folder_options_are_checked(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        folder.build(tmp_path, **options)


def test_class_id_255_is_possible_when_it_is_not_ignored(tmp_path: Path) -> None:
    trees.save(tmp_path / "images/train/a.png", trees.image_of(0))
    trees.save(tmp_path / "masks/train/a.png", trees.mask_of([0, 255]))
    data = folder.build(tmp_path, classes={0: "background", 255: "vessel"})
    assert data.labels.void == ()
    assert data.labels.classes == (255,)


# --- loading by configuration --------------------------------------------------------------------------------


def test_missing_root_says_how_to_pass_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.root: .*pass data\.root=DIR"):
        load_dataset(DataConfig(dataset="voc"))
    with pytest.raises(ConfigError, match=r"data\.root: /no/such/place.*data\.root=DIR"):
        load_dataset(DataConfig(dataset="ade", root="/no/such/place"))
    file = trees.write(tmp_path / "x.zip", "")
    with pytest.raises(ConfigError, match=r"x\.zip is a file"):
        load_dataset(DataConfig(dataset="camvid", root=str(file)))


def test_unknown_options_are_all_reported_with_near_misses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_dataset(DataConfig(dataset="camvid", root=str(tmp_path), options={"sequense": 1, "zzz": 2}))
    must_say(caught.value, "data.options.sequense", "'camvid'", "did you mean 'sequence'")
    must_say(caught.value, "data.options.zzz")


def test_unknown_names_and_foreign_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'camvid'"):
        load_dataset(DataConfig(dataset="camvod"))
    with pytest.raises(ConfigError, match="no such file"):
        load_dataset(DataConfig(dataset=str(tmp_path / "none.yaml")))
    own = trees.write(tmp_path / "own.py", "def build(root=None, *, n):\n    return n\n")
    with pytest.raises(ConfigError, match=r"data\.options\.n: .* needs this option"):
        load_dataset(DataConfig(dataset=f"{own}:build"))
    with pytest.raises(ConfigError, match="returned int, expected"):
        load_dataset(DataConfig(dataset=f"{own}:build", options={"n": 3}))


def test_own_file_can_build_a_data_set(tmp_path: Path) -> None:
    own = trees.write(
        tmp_path / "own.py",
        "from everseg.data.datasets import camvid\ndef build(root=None):\n    return camvid.build(root)\n",
    )
    trees.camvid(tmp_path / "data")
    data = load_dataset(DataConfig(dataset=f"{own}:build", root=str(tmp_path / "data")))
    assert isinstance(data, Dataset)


@pytest.mark.parametrize("reader", [voc, ade, camvid])
def test_wrong_folder_is_named_with_what_was_looked_for(tmp_path: Path, reader) -> None:
    with pytest.raises(DataError, match=r"not a .* folder: no .*data\.root=DIR"):
        reader.build(tmp_path)


# --- pairing and lists ---------------------------------------------------------------------------------------


def test_all_missing_partners_are_counted_and_twenty_named(tmp_path: Path) -> None:
    base = trees.camvid(tmp_path)
    for i in range(25):
        trees.save(base / "train" / f"lonely_{i:02d}.png", trees.image_of(i))
    trees.save(base / "trainannot" / "orphan.png", trees.mask_of([1]))
    with pytest.raises(DataError) as caught:
        camvid.build(base)
    message = str(caught.value)
    assert "25 images without mask" in message
    assert "lonely_19.png" in message
    assert "lonely_20.png" not in message
    assert "and 5 more" in message
    assert "1 mask without image: trainannot/orphan.png" in message


def test_files_pair_by_stem_whatever_the_case_of_their_endings(tmp_path: Path) -> None:
    base = trees.camvid(tmp_path)
    (base / "train" / "0001TP_006690.png").rename(base / "train" / "0001TP_006690.PNG")
    (base / "trainannot" / "0006R0_f00930.png").rename(base / "trainannot" / "0006R0_f00930.Png")
    for junk in ("._0001TP_006690.png", "Thumbs.db", ".DS_Store", ".hidden.png", "notes.txt"):
        trees.write(base / "train" / junk, "junk")
    assert _ids(camvid.build(base).splits["train"]) == ["0001TP_006690", "0006R0_f00930"]


def test_two_files_of_one_stem_are_ambiguous(tmp_path: Path) -> None:
    base = trees.camvid(tmp_path)
    trees.save(base / "train" / "0001TP_006690.jpg", trees.image_of(0))
    with pytest.raises(DataError, match=r"train/0001TP_006690\.jpg and train/0001TP_006690\.png"):
        camvid.build(base)


def test_missing_mask_folder_is_a_data_error(tmp_path: Path) -> None:
    base = trees.camvid(tmp_path)
    shutil.rmtree(base / "valannot")
    with pytest.raises(DataError, match=r"valannot: .*\(No such file"):
        camvid.build(base)


def test_empty_split_is_refused(tmp_path: Path) -> None:
    base = trees.camvid(tmp_path)
    for place in ("val", "valannot"):
        shutil.rmtree(base / place)
        (base / place).mkdir()
    with pytest.raises(DataError, match=r"split 'val' of .* is empty"):
        camvid.build(base)


def test_untidy_lists_are_understood(tmp_path: Path) -> None:
    base = trees.voc(tmp_path)
    text = (
        "\ufeff# made by hand\r\n\r\n2007_000039  \r\n/JPEGImages/2007_000032.jpg\r\n"
        "\\JPEGImages\\2008_000008.JPG /elsewhere/SegmentationClassAug/2008_000008.png\r\n2007_000039\r\n2008_000015"
    )
    trees.write(base / "ImageSets/Segmentation/train.txt", text)
    split = voc.build(base).splits["train"]
    assert _ids(split) == ["2007_000039", "2007_000032", "2008_000008", "2008_000015"]
    assert split.mask_path(1).name == "2007_000032.png"
    assert len(split.warnings) == 1
    assert "1 duplicate entry" in split.warnings[0]


@pytest.mark.parametrize(
    "entry", ["../../etc/passwd", "/JPEGImages/../../x.jpg", "file:///etc/passwd", "https://x/y.jpg", "a\0b"]
)
def test_list_entries_that_leave_the_folder_are_refused(tmp_path: Path, entry: str) -> None:
    base = trees.voc(tmp_path)
    trees.write(base / "ImageSets/Segmentation/train.txt", f"2007_000032\n{entry}\n")
    with pytest.raises(DataError, match="1 entry leads out"):
        voc.build(base)


def test_list_faults_name_file_and_line(tmp_path: Path) -> None:
    base = trees.voc(tmp_path)
    target = base / "ImageSets/Segmentation/train.txt"
    trees.write(target, "2007_000032\na\tb\tc\n")
    with pytest.raises(DataError, match=r"train\.txt, line 2: 3 fields"):
        voc.build(base)
    trees.write(target, "2007_000032\n2007_999999\nJPEGImages/none.jpg\n")
    with pytest.raises(DataError, match=r"2 files.*2007_999999, image JPEGImages/none\.jpg"):
        voc.build(base)
    target.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match=r"train\.txt: .*UTF-8"):
        voc.build(base)
    target.unlink()
    with pytest.raises(DataError, match=r"train_aug\.txt.*trainaug\.txt.*train\.txt"):
        voc.build(base)


# --- the split ----------------------------------------------------------------------------------------------


def test_split_survives_pickling_and_checks_its_bounds(tmp_path: Path) -> None:
    split = pickle.loads(pickle.dumps(voc.build(trees.voc_mib(tmp_path)).splits["train"]))
    assert split.id(3) == "2008_000008"
    assert split.image_path(3).is_file()
    for index in (-1, 4):
        with pytest.raises(IndexError):
            split.id(index)
    with pytest.raises(DataError, match="sample twice"):
        FileSplit("train", tmp_path, [("a", "b", "c"), ("a", "d", "e")])


def test_fingerprint_follows_masks_ids_and_decoding_but_not_the_place(tmp_path: Path) -> None:
    first = trees.camvid(tmp_path / "one")
    second = shutil.copytree(first, tmp_path / "two" / "deep")

    def value() -> str:
        return camvid.build(second).splits["train"].fingerprint()

    original = camvid.build(first).splits["train"].fingerprint()
    assert len(original) == 64
    assert value() == original
    trees.save(second / "train" / "0001TP_006690.png", trees.image_of(9))
    assert value() == original  # images do not count
    trees.save(second / "trainannot" / "0001TP_006690.png", trees.mask_of([0, 1]))
    assert value() != original
    shutil.copy(first / "trainannot" / "0001TP_006690.png", second / "trainannot")
    assert value() == original
    for kind in ("train", "trainannot"):
        (second / kind / "0006R0_f00930.png").rename(second / kind / "0006R0_f00931.png")
    assert value() != original
    samples = [("a", "train/0001TP_006690.png", "trainannot/0001TP_006690.png")]
    tables = [None, {i: i for i in range(12)}]
    assert len({FileSplit("train", first, samples, id_table=t).fingerprint() for t in tables}) == 2


def test_root_may_be_a_link(tmp_path: Path) -> None:
    trees.camvid(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    camvid.build(tmp_path / "link").splits["train"].read(0)


def test_image_arrays_of_all_modes_become_rgb(tmp_path: Path) -> None:
    grey = trees.image_of(4)[..., 0]
    pictures = {
        "l": Image.fromarray(grey),
        "la": Image.fromarray(grey).convert("LA"),
        "rgba": Image.fromarray(trees.image_of(4)).convert("RGBA"),
        "one": Image.fromarray(grey > 60),
        "p": Image.fromarray(grey).convert("P"),
    }
    trees.save(tmp_path / "m.png", trees.mask_of([0]))
    for name, picture in pictures.items():
        if picture.mode == "RGBA":
            picture.putalpha(77)
        picture.save(tmp_path / f"{name}.png")
        image, _ = FileSplit("x", tmp_path, [("a", f"{name}.png", "m.png")]).read(0)
        expected = {"rgba": trees.image_of(4), "one": np.where(grey > 60, 255, 0)[..., None]}.get(
            name, grey[..., None]
        )
        np.testing.assert_array_equal(image, np.broadcast_to(expected, (12, 16, 3)))
