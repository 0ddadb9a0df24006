"""A bad data set: one message (what, where, what to do), its exit code, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import trees
from miniature import Everseg, cut, everything, refused
from PIL import Image


def test_the_healthy_miniature_trains(everseg: Everseg, here: Path) -> None:
    outcome = everseg("run", "run.yaml", "--quiet", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert [step["classes"] for step in json.loads(outcome.out)["steps"]] == [["road"], ["tree"]]


def _no_folder(base: Path) -> None:
    shutil.rmtree(base / "data")


def _no_image_folder(base: Path) -> None:
    shutil.rmtree(base / "data/images")


def _no_mask_folder(base: Path) -> None:
    shutil.rmtree(base / "data/masks/train")


def _without_mask(base: Path) -> None:
    (base / "data/masks/train/a_1.png").unlink()


def _without_image(base: Path) -> None:
    (base / "data/images/val/a_0.png").unlink()
    trees.save(base / "data/images/val/b_0.png", trees.image_of(1))


def _empty_split(base: Path) -> None:
    for kind in ("images", "masks"):
        (base / f"data/{kind}/val/a_0.png").unlink()


def _empty_mask(base: Path) -> None:
    (base / "data/masks/train/a_2.png").write_bytes(b"")


def _text_mask(base: Path) -> None:
    (base / "data/masks/train/a_2.png").write_text("not a picture at all")


def _cut_mask(base: Path) -> None:
    cut(base / "data/masks/train/a_1.png", 0.7)


def _mask_is_folder(base: Path) -> None:
    (base / "data/masks/train/a_1.png").unlink()
    (base / "data/masks/train/a_1.png").mkdir()


def _colour_mask(base: Path) -> None:
    trees.save(base / "data/masks/train/a_1.png", trees.image_of(3))


def _undeclared(base: Path) -> None:
    trees.save(base / "data/masks/train/a_0.png", trees.mask_of([0, 1, 2, 7]))


def _class_of_no_image(base: Path) -> None:
    (base / "data/data.yaml").write_text("classes: [background, road, tree, ghost]\nignore: 9\n")


def _cut_image(base: Path) -> None:
    cut(base / "data/images/train/a_1.png", 0.7)


def _empty_image(base: Path) -> None:
    (base / "data/images/train/a_1.png").write_bytes(b"")


def _text_image(base: Path) -> None:
    (base / "data/images/train/a_1.png").write_text("<html>404</html>")


def _image_is_fifo(base: Path) -> None:
    (base / "data/images/train/a_1.png").unlink()
    os.mkfifo(base / "data/images/train/a_1.png")


def _other_size(base: Path) -> None:
    trees.save(base / "data/masks/train/a_1.png", trees.mask_of([0, 1, 2], (6, 8)))


BEFORE: list[tuple[Callable[[Path], None], int, tuple[str, ...]]] = [
    (_no_folder, 2, ("data/data.yaml", "no such file")),
    (_no_image_folder, 3, ("images/train", "data.yaml")),
    (_no_mask_folder, 3, ("masks/train", "check the folder")),
    (_without_mask, 3, ("1 image without mask: images/train/a_1.png", "Add the missing files")),
    (_without_image, 3, ("1 image without mask: images/val/b_0.png", "1 mask without image: masks/val/a_0.png")),
    (_empty_split, 3, ("split 'val'", "is empty", "check the folder")),
    (_empty_mask, 3, ("masks/train/a_2.png", "is empty (0 bytes)", "restore the file")),
    (_text_mask, 3, ("masks/train/a_2.png", "is text, not a picture", "restore the file")),
    (_cut_mask, 3, ("masks/train/a_1.png", "damaged or cut off", "restore the file")),
    (_mask_is_folder, 3, ("a_1.png", "without mask")),
    (_colour_mask, 3, ("masks/train/a_1.png", "a colour mask where ids are expected", "palette")),
    (_undeclared, 3, ("a_0", "id 7 (48 pixels)", "declared: 0-2, 9", "Declare these ids")),
    (_class_of_no_image, 3, ("step 2 (ghost)", "no image of split 'train' has ghost", "check the masks")),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "code", "parts"), BEFORE, ids=[case[0].__name__[1:] for case in BEFORE])
def test_faults_of_layout_and_masks_stop_a_run_before_it_writes(
    everseg: Everseg, here: Path, spoil: Callable[[Path], None], code: int, parts: tuple[str, ...]
) -> None:
    spoil(here)
    before = everything(here)
    refused(everseg("run", "run.yaml", "--quiet"), code, *parts)
    assert everything(here) == before


DURING: list[tuple[Callable[[Path], None], tuple[str, ...]]] = [
    (_cut_image, ("images/train/a_1.png", "damaged or cut off", "restore the file")),
    (_empty_image, ("images/train/a_1.png", "is empty (0 bytes)", "restore the file")),
    (_text_image, ("images/train/a_1.png", "is a web page", "fetch it again")),
    (_image_is_fifo, ("images/train/a_1.png", "not a regular file", "put the picture in its place")),
    (_other_size, ("masks/train/a_1.png", "16x12 but the mask 8x6", "export the mask")),
]


@pytest.mark.parametrize(("spoil", "parts"), DURING, ids=[case[0].__name__[1:] for case in DURING])
def test_faults_of_images_stop_the_run_and_the_repaired_data_continue_it(
    everseg: Everseg, here: Path, spoil: Callable[[Path], None], parts: tuple[str, ...]
) -> None:
    whole = {
        name: (here / "data" / name).read_bytes() for name in ("images/train/a_1.png", "masks/train/a_1.png")
    }
    spoil(here)
    refused(everseg("run", "run.yaml", "train.epochs=2", "--quiet"), 3, *parts)
    assert list((here / "runs").rglob("final")) == []
    for name, data in whole.items():
        (here / "data" / name).unlink()
        (here / "data" / name).write_bytes(data)
    again = everseg("run", "run.yaml", "train.epochs=2", "--quiet")
    if spoil is _other_size:  # the run has recorded the masks it was started with
        refused(again, 3, "have changed", "restore them", "name=")
    else:
        assert (again.code, again.err) == (0, "")


def test_a_bad_file_in_a_loader_process_is_reported_the_same_way(everseg: Everseg, here: Path) -> None:
    _cut_image(here)
    outcome = everseg("run", "run.yaml", "data.workers=1", "train.epochs=2", "--quiet")
    refused(outcome, 3, "images/train/a_1.png", "damaged or cut off")


def test_a_wrong_data_root_is_named(everseg: Everseg, tmp_path: Path) -> None:
    refused(everseg("run", "camvid-6-5-mib"), 2, "data.root", "pass data.root=DIR")
    refused(
        everseg("run", "camvid-6-5-mib", "data.root=nowhere"),
        2,
        "nowhere does not exist",
        "pass data.root=DIR",
    )
    (tmp_path / "file").write_text("")
    refused(everseg("run", "voc-15-5-mib", "data.root=file"), 2, "file is a file", "pass the folder")
    (tmp_path / "empty").mkdir()
    for preset, wanted in (
        ("camvid-6-5-mib", "train"),
        ("voc-15-5-mib", "JPEGImages"),
        ("ade-100-50-mib", "images"),
    ):
        refused(everseg("run", preset, "data.root=empty"), 3, "empty", wanted, "data.root=DIR")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_lists_that_name_missing_files_are_refused(everseg: Everseg, tmp_path: Path) -> None:
    base = trees.voc(tmp_path / "voc", aug=False)
    (base / "ImageSets/Segmentation/train.txt").write_text("2007_000032\n2099_000001\n")
    refused(
        everseg("run", "voc-15-5-mib", "data.root=voc"),
        3,
        "train.txt",
        "image 2099_000001",
        "Correct the list",
    )
    base = trees.camvid(tmp_path / "camvid")
    (base / "trainannot/0001TP_006690.png").unlink()
    refused(
        everseg("run", "camvid-6-5-mib", "data.root=camvid"),
        3,
        "1 image without mask: train/0001TP_006690.png",
    )
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- data check


def test_data_check_lists_every_fault_of_a_tree_at_once(everseg: Everseg, tmp_path: Path) -> None:
    trees.write(tmp_path / "data/data.yaml", "classes: [background, road, tree, ghost, rare]\nignore: 9\n")
    for number in range(9):
        trees.save(tmp_path / f"data/images/train/a_{number}.png", trees.image_of(number, (12, 16 + number)))
        trees.save(
            tmp_path / f"data/masks/train/a_{number}.png", trees.mask_of([0, 1, 2, 9], (12, 16 + number))
        )
    for split, number in (("val", 0), ("val", 8)):
        for kind in ("images", "masks"):
            (tmp_path / f"data/{kind}/{split}").mkdir(exist_ok=True)
            name = f"a_{number}.png"
            shutil.copy(tmp_path / f"data/{kind}/train/{name}", tmp_path / f"data/{kind}/{split}/{name}")
    images, masks = tmp_path / "data/images/train", tmp_path / "data/masks/train"
    (images / "a_0.png").write_bytes(b"")
    cut(images / "a_1.png")
    (masks / "a_2.png").write_text("text")
    trees.save(masks / "a_3.png", trees.mask_of([0, 1], (5, 5)))
    trees.save(masks / "a_4.png", trees.image_of(1, (12, 20)))
    trees.save(masks / "a_5.png", trees.mask_of([0, 7, 200], (12, 21)))
    Image.fromarray(trees.mask_of([0, 1], (12, 22))).save(masks / "a_6.png", format="JPEG")
    trees.save(masks / "a_7.png", trees.mask_of([0, 4], (12, 23)))
    expected = {
        ("unreadable-image", "train", "a_0"), ("unreadable-image", "train", "a_1"),
        ("unreadable-mask", "train", "a_2"), ("size-mismatch", "train", "a_3"), ("colour-mask", "train", "a_4"),
        ("undeclared-id", "train", "a_5"), ("lossy-mask", "train", "a_6"), ("same-image", "val", "a_8"),
    }  # fmt: skip
    before = everything(tmp_path)
    outcome = everseg("data", "check", "data/data.yaml", "--json")
    assert (outcome.code, outcome.err) == (3, "")
    report = json.loads(outcome.out)
    errors = [f for f in report["findings"] if f["level"] == "error"]
    assert {(f["code"], f["split"], f["sample"]) for f in errors} == expected
    assert all(f["message"] and f["remedy"] for f in report["findings"])
    warnings = {(f["code"], f["message"].split("'")[1]) for f in report["findings"] if "class" in f["code"]}
    assert warnings >= {("class-missing", "ghost"), ("class-rare", "rare")}
    text = everseg("data", "check", "data/data.yaml", "--write-skiplist", "skip.txt")
    assert text.code == 3
    for code, split, sample in expected:
        assert f"ERROR {code}" in text.out
        assert f"{split}/{sample}: " in text.out
    assert {*(tmp_path / "skip.txt").read_text().splitlines()} == {f"{s}\t{n}" for _, s, n in expected}
    (tmp_path / "skip.txt").unlink()
    assert everything(tmp_path) == before


def test_data_check_of_a_healthy_tree_is_0_and_of_no_tree_2_or_3(everseg: Everseg, here: Path) -> None:
    assert json.loads(everseg("data", "check", "data/data.yaml", "--json").out)["ok"] is True
    refused(everseg("data", "check", "camvid", "root=nowhere"), 2, "data.root: nowhere does not exist")
    refused(everseg("data", "check", "nowhere.yaml"), 2, "nowhere.yaml")
    _without_mask(here)
    outcome = everseg("data", "check", "data/data.yaml", "--json")
    assert outcome.code == 3
    assert "a_1.png" in json.loads(outcome.out)["findings"][0]["message"]
    for name in ("none/skip.txt", "data"):
        outcome = everseg("data", "check", "data/data.yaml", "--write-skiplist", name, "--json")
        refused(outcome, 2, "--write-skiplist", name, "name a file")
