"""The catalogue of bad data: what the check says of each kind, and that reading a training batch agrees.

Every entry spoils a healthy set of plain folders. "error" entries must stop an epoch's loader or the building of the
set, or make scores meaningless; after all others, and after the skip list of the errors, every sample must load.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trees
from PIL import Image, ImageDraw

from everseg.config.fields import DataConfig
from everseg.data.batches.loader import View, plain_batches, train_batches
from everseg.data.datasets import load_dataset
from everseg.data.doctor import doctor
from everseg.data.doctor import findings as check_files
from everseg.errors import EversegError
from saying import must_say

CLASSES = "classes: [background, road, tree]\n"
SIZE = (24, 32)


class Tree:
    """Healthy plain folders with five training and two validation images; entries spoil them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rng = np.random.default_rng(0)
        for split, count in (("train", 5), ("val", 2)):
            for number in range(count):
                self.add(split, f"{split[0]}{number}")
        self.describe()

    def describe(self, more: str = "", classes: str = CLASSES) -> None:
        trees.write(self.root / "data.yaml", classes + more)

    def pixels(self, size: tuple[int, int] = SIZE) -> np.ndarray:
        """Blocks of random colours, alike in no two images, that JPEG keeps well."""
        small = self.rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC))

    def add(
        self, split: str, name: str, ids: tuple[int, ...] = (0, 1, 2, 255), size: tuple[int, int] = SIZE
    ) -> None:
        trees.save(self.image(name, split), self.pixels(size))
        trees.save(self.mask(name, split), trees.mask_of(list(ids), size))

    def image(self, name: str, split: str = "", ending: str = "png") -> Path:
        return self.root / "images" / (split or {"t": "train", "v": "val"}[name[0]]) / f"{name}.{ending}"

    def mask(self, name: str, split: str = "", ending: str = "png") -> Path:
        return self.root / "masks" / (split or {"t": "train", "v": "val"}[name[0]]) / f"{name}.{ending}"

    def config(self, **options: object) -> DataConfig:
        return DataConfig(dataset=str(self.root / "data.yaml"), crop=16, workers=0, options=options)

    def check(self, *, cache: bool = False, **options: object) -> doctor.Report:
        return doctor.check_source(
            lambda: load_dataset(self.config(**options)),
            lenient=lambda: load_dataset(self.config(**{**options, "on_missing": "skip"})),
            cache=cache,
        )


def load_everything(config: DataConfig) -> int:
    """One epoch of training batches and one look at every sample, as a run sees them; the number of samples."""
    dataset, seen = load_dataset(config), 0
    for split in dataset.splits.values():
        lut = np.zeros(256, np.uint8)
        views = [View(split, np.arange(len(split)), lut)]
        for kind in ("crop", "whole"):
            data = config.model_copy(update={"evaluation": kind})
            seen += sum(len(batch.ids) for batch in plain_batches(views, data, batch=2))
        list(train_batches(views, config, seed=0, step=0, batch=1, start=0, stop=len(split)))
    return seen


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def resave(path: Path, ending: str, **options: object) -> Path:
    """Store a picture in another format under a fitting name."""
    picture = Image.open(path)
    picture.load()
    path.unlink()
    target = path.with_suffix(f".{ending}")
    picture.save(target, **options)
    return target


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def claim(path: Path, width: int, height: int) -> None:
    """Let a PNG's header state another size."""
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)


def swap_bytes(path: Path, form: str, mode: str | None = None) -> None:
    """Put another format under the name of the file."""
    picture = Image.open(path)
    picture.load()
    buffer = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(buffer, form)
    path.write_bytes(buffer.getvalue())


def tiff_of_bands(path: Path, bands: int) -> None:
    """A TIFF of 8-bit bands, which Pillow does not write."""
    width, height = SIZE[::-1]
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 200),
            (277, 3, 1, bands), (278, 3, 1, height), (279, 4, 1, width * height * bands)]  # fmt: skip
    body = (
        struct.pack("<H", len(tags))
        + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        + struct.pack("<I", 0)
    )
    data = (b"II*\0" + struct.pack("<I", 8) + body).ljust(200, b"\0") + bytes(width * height * bands)
    path.write_bytes(data)


def exif(path: Path, how: int) -> None:
    picture = Image.open(path)
    picture.load()
    block = Image.Exif()
    block[0x0112] = how
    picture.save(path, exif=block)


def resized_mask(tree: Tree) -> None:
    tree.describe(classes="classes: [" + ", ".join(f"c{i}" for i in range(30)) + "]\n")
    picture = Image.new("L", (64, 48))
    ImageDraw.Draw(picture).rectangle((20, 10, 44, 40), fill=25)
    picture.resize(SIZE[::-1], Image.Resampling.BILINEAR).save(tree.mask("t1"))


def all_masks(tree: Tree, ids: tuple[int, ...]) -> None:
    for path in (tree.root / "masks").rglob("*.png"):
        trees.save(path, trees.mask_of(list(ids), SIZE))


def label_ids(tree: Tree) -> None:
    tree.describe(classes="classes: [" + ", ".join(f"c{i}" for i in range(19)) + "]\nbackground: null\n")
    all_masks(tree, (7, 11, 21, 26))


def remake(path: Path, pixels: np.ndarray, ending: str = "png", **options: object) -> None:
    path.unlink()
    trees.save(path.with_suffix(f".{ending}"), pixels, **options)


def copy_pair(tree: Tree, source: str, target: str) -> None:
    shutil.copy(tree.image(source), tree.image(target))
    shutil.copy(tree.mask(source), tree.mask(target))


def encode_again(tree: Tree) -> None:
    copy_pair(tree, "t2", "v1")
    resave(tree.image("v1"), "jpg", quality=80)


def link(tree: Tree, target: Path | str) -> None:
    tree.image("t1").unlink()
    tree.image("t1").symlink_to(target)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def rename(tree: Tree, name: str, image: str, mask: str | None = None) -> None:
    tree.image(name).rename(tree.image(name).with_name(image))
    tree.mask(name).rename(tree.mask(name).with_name(mask or image))


def hide(tree: Tree) -> None:
    for folder in ("images", "masks"):
        for name in ("._t1.png", ".DS_Store", "Thumbs.db", "notes.txt"):
            trees.write(tree.root / folder / "train" / name, "x")


LISTS = "images: images\nmasks: masks\nsplits: {train: train.txt}\n"


def listed(tree: Tree, text: str) -> None:
    tree.describe(LISTS)
    trees.write(tree.root / "train.txt", text)


Spoil = Callable[[Tree], object]
ERRORS: dict[str, tuple[Spoil, str]] = {
    "1 empty": (lambda t: t.image("t1").write_bytes(b""), "unreadable-image"),
    "2 text": (lambda t: t.image("t1").write_text("hello"), "unreadable-image"),
    "3 web page": (lambda t: t.image("t1").write_text("<!DOCTYPE html><title>404</title>"), "unreadable-image"),
    "4 cut PNG": (lambda t: cut(t.image("t1")), "unreadable-image"),
    "5 cut JPEG": (lambda t: cut(resave(t.image("t1"), "jpg")), "unreadable-image"),
    "6 flipped bit": (lambda t: flip_bit(t.image("t1")), "unreadable-image"),
    "11 16 bits": (
        lambda t: remake(t.image("t1"), np.full(SIZE, 9000, np.uint16)), "unreadable-image"),
    "12 mask fits unturned": (lambda t: exif(t.image("t1"), 6), "unreadable-sample"),
    "13 bomb": (lambda t: claim(t.image("t1"), 30000, 30000), "unreadable-image"),
    "14 large header": (lambda t: claim(t.image("t1"), 12000, 12000), "unreadable-image"),
    "15 no pixels": (lambda t: claim(t.image("t1"), 0, 0), "unreadable-image"),
    "18 pages": (
        lambda t: (t.image("t1").unlink(), Image.fromarray(t.pixels()).save(
            t.image("t1", ending="tif"), save_all=True, append_images=[Image.fromarray(t.pixels())])),
        "unreadable-image"),
    "19 float": (
        lambda t: remake(t.image("t1"), np.full(SIZE, np.nan, np.float32), "tif"), "unreadable-image"),
    "20 bands": (
        lambda t: (t.image("t1").unlink(), tiff_of_bands(t.image("t1", ending="tif"), 5)), "unreadable-image"),
    "23 colour mask": (lambda t: trees.save(t.mask("t1"), t.pixels()), "colour-mask"),
    "24 JPEG mask": (lambda t: resave(t.mask("t1"), "jpg"), "lossy-mask"),
    "17 JPEG under another name": (lambda t: swap_bytes(t.mask("t1"), "JPEG"), "lossy-mask"),
    "25 mask with alpha": (lambda t: swap_bytes(t.mask("t1"), "PNG", "LA"), "bad-mask"),
    "25 coloured mask with alpha": (lambda t: swap_bytes(t.mask("t1"), "PNG", "RGBA"), "colour-mask"),
    "27 only the ignore value": (lambda t: all_masks(t, (0, 255)), "binary-mask"),
    "28 instance ids": (lambda t: trees.save(t.mask("t1"), np.full(SIZE, 26001, np.uint16)), "bad-mask"),
    "29 minus one": (lambda t: remake(t.mask("t1"), np.full(SIZE, -1, np.int32), "tif"), "bad-mask"),
    "30 fractions": (lambda t: remake(t.mask("t1"), np.full(SIZE, 1.5, np.float32), "tif"), "bad-mask"),
    "32 one pixel less": (lambda t: trees.save(t.mask("t1"), trees.mask_of([0], (24, 31))), "size-mismatch"),
    "32 twice": (lambda t: trees.save(t.mask("t1"), trees.mask_of([0], (48, 64))), "size-mismatch"),
    "32 transposed": (lambda t: trees.save(t.mask("t1"), trees.mask_of([0], (32, 24))), "size-mismatch"),
    "33 label ids": (label_ids, "undeclared-id"),
    "34 ids from 1": (lambda t: all_masks(t, (1, 2, 3)), "undeclared-id"),
    "36 undeclared": (lambda t: trees.save(t.mask("t1"), trees.mask_of([0, 7], SIZE)), "undeclared-id"),
    "39 image alone": (lambda t: t.mask("t1").unlink(), "unpaired"),
    "39 mask alone": (lambda t: t.image("t1").unlink(), "unpaired"),
    "40 two endings": (lambda t: shutil.copy(t.image("t1"), t.image("t1", ending="jpg")), "layout"),
    "42 list of missing files": (lambda t: listed(t, "train/t0\ntrain/none\ntrain/t1\n"), "unpaired"),
    "44 list leads out": (lambda t: listed(t, "train/t0\n../../etc/passwd\n"), "layout"),
    "44 list with an address": (lambda t: listed(t, "train/t0\nfile:///etc/passwd\n"), "layout"),
    "45 link out": (lambda t: link(t, shutil.copy(t.image("t2"), t.root.parent / "o.png")), "unreadable-image"),
    "45 dangling link": (lambda t: link(t, t.root / "none.png"), "unreadable-image"),
    "45 loop": (lambda t: link(t, t.image("t1")), "unreadable-image"),
    "46 FIFO": (lambda t: fifo(t.image("t1")), "unreadable-image"),
    "46 FIFO as mask": (lambda t: fifo(t.mask("t1")), "unreadable-mask"),
    "46 folder": (lambda t: (t.image("t1").unlink(), t.image("t1").mkdir()), "unpaired"),
    "49 same bytes": (lambda t: copy_pair(t, "t2", "v1"), "same-image"),
    "55 one image": (lambda t: [p.unlink() for n in "1234" for p in t.root.rglob(f"t{n}.png")], "one-image"),
    "55 empty split": (lambda t: [p.unlink() for p in t.root.rglob("v*.png")], "layout"),
}  # fmt: skip

FINE: dict[str, tuple[Spoil, set[str]]] = {
    "8 grey": (lambda t: swap_bytes(t.image("t1"), "PNG", "L"), set()),
    "9 alpha": (lambda t: swap_bytes(t.image("t1"), "PNG", "RGBA"), {"alpha"}),
    "9 grey with alpha": (lambda t: swap_bytes(t.image("t1"), "PNG", "LA"), {"alpha"}),
    "10 print colours": (
        lambda t: (swap_bytes(t.image("t1"), "JPEG", "CMYK"), t.image("t1").rename(t.image("t1", ending="jpg"))),
        {"print-colours"}),
    "11 16 bits declared": (
        lambda t: (remake(t.image("t1"), np.full(SIZE, 9000, np.uint16)), t.describe("bit_depth: 16\n")), set()),
    "12 turned": (
        lambda t: (trees.save(t.image("t1"), t.pixels((32, 24))), exif(t.image("t1"), 6)), {"turned"}),
    "12 square": (
        lambda t: (t.add("train", "t1", size=(24, 24)), exif(t.image("t1"), 6)), {"turned-square"}),
    "16 bytes behind": (
        lambda t: t.image("t1").write_bytes(t.image("t1").read_bytes() + b"more"), {"trailing-bytes"}),
    "17 JPEG under another name": (lambda t: swap_bytes(t.image("t1"), "JPEG"), {"other-format"}),
    "21 one pixel": (lambda t: t.add("train", "t1", size=(1, 1)), {"tiny-image"}),
    "21 one row": (lambda t: t.add("train", "t1", size=(1, 40)), {"tiny-image"}),
    "22 smaller than the crop": (lambda t: t.add("train", "t1", size=(9, 11)), set()),
    "26 one bit": (
        lambda t: trees.save(t.mask("t1"), trees.mask_of([0, 1], SIZE).astype(bool)), set()),
    "29 minus one mapped": (
        lambda t: (remake(t.mask("t1"), np.full(SIZE, -1, np.int32), "tif"),
                   t.describe("labels: {map: {-1: ignore, 0: background, 1: road, 2: tree}}\n")), {"all-void"}),
    "31 resized mask": (resized_mask, {"interpolated-mask", "class-missing", "class-rare"}),
    "34 nothing but ids from 1": (lambda t: all_masks(t, (1, 2)), {"class-missing"}),
    "35 all void": (lambda t: trees.save(t.mask("t1"), trees.mask_of([255], SIZE)), {"all-void"}),
    "37 class nowhere": (lambda t: t.describe(classes="classes: [background, road, tree, bird]\n"), {"class-missing"}),
    "37 class in val only": (
        lambda t: (t.describe(classes="classes: [background, road, tree, bird]\n"), t.add("val", "v1", (0, 3))),
        {"class-untrained"}),
    "38 rare class": (
        lambda t: (t.describe(classes="classes: [background, road, tree, bird]\n"), t.add("train", "t1", (0, 3))),
        {"class-rare"}),
    "39 left out": (
        lambda t: (t.mask("t1").unlink(), t.describe("on_missing: skip\n")), {"unpaired"}),
    "41 endings": (lambda t: rename(t, "t1", "t1.PNG", "t1.Png"), set()),
    "42 untidy list": (
        lambda t: listed(t, "\ufeff# all\r\ntrain/t0  \r\n\r\n/SegNet/CamVid/train/t1.jpg\r\ntrain/t2\r\ntrain/t3"),
        set()),
    "43 list entry twice": (lambda t: listed(t, "train/t0\ntrain/t1\ntrain/t0\ntrain/t2\n"), {"list"}),
    "45 links allowed": (
        lambda t: (link(t, shutil.copy(t.image("t1"), t.root.parent / "o.png")), t.describe("follow_links: true\n")),
        set()),
    "47 hidden files": (hide, set()),
    "48 composed and decomposed": (lambda t: rename(t, "t1", "e\u0301.png", "\u00e9.png"), set()),
    "48 spaces and emoji": (lambda t: rename(t, "t1", "a b \U0001f6a6.png"), set()),
    "48 newline": (lambda t: rename(t, "t1", "a\nb\t.png"), set()),
    "48 long": (lambda t: rename(t, "t1", "x" * 251 + ".png"), set()),
    "49 encoded again": (encode_again, {"near-same-image"}),
    "49 twice in training": (lambda t: copy_pair(t, "t2", "t1"), {"twin-image"}),
    "54 palette": (lambda t: trees.save_palette(t.mask("t1"), trees.mask_of([0, 1, 2], SIZE)), set()),
    "55 two images": (lambda t: [p.unlink() for n in "234" for p in t.root.rglob(f"t{n}.png")],
                      {"few-images", "class-rare"}),
}  # fmt: skip


def test_the_healthy_tree_has_no_findings(tree: Tree) -> None:
    assert tree.check().findings == ()
    assert load_everything(tree.config()) == 2 * 7


@pytest.mark.parametrize("entry", ERRORS)
def test_errors_are_found_and_the_skip_list_leaves_a_set_that_loads(tree: Tree, entry: str) -> None:
    spoil, code = ERRORS[entry]
    spoil(tree)
    report = tree.check()
    errors = [f for f in report.findings if f.level == "error"]
    assert {f.code for f in errors} == {code}
    assert all(f.message and f.remedy for f in errors)
    if code not in (
        "same-image",
        "binary-mask",
        "undeclared-id",
        "one-image",
    ):  # loads, but means something else
        with pytest.raises(EversegError):
            load_everything(tree.config())
    if all(f.sample for f in errors) and len(errors) < 5:
        skip = tree.root / "skip.txt"
        assert check_files.write_skiplist(skip, report) == len(errors)
        assert [f for f in tree.check(skip=str(skip)).findings if f.level == "error"] == []
        assert load_everything(tree.config(skip=str(skip))) > 0


@pytest.mark.parametrize("entry", FINE)
def test_what_is_no_error_loads_and_is_told(tree: Tree, entry: str) -> None:
    spoil, codes = FINE[entry]
    spoil(tree)
    report = tree.check()
    assert {f.code for f in report.findings} == codes
    assert report.ok
    assert load_everything(tree.config()) == 2 * sum(report.images.values())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_46_a_file_without_permission(tree: Tree) -> None:
    tree.image("t1").chmod(0)
    assert [f.code for f in tree.check().findings] == ["unreadable-image"]


def test_messages_name_the_remedy(tree: Tree) -> None:
    resave(tree.mask("t0"), "jpg")
    tiff_of_bands(tree.image("t1").with_suffix(".tif"), 5)
    tree.image("t1").unlink()
    trees.save(tree.image("t2"), np.full(SIZE, 9000, np.uint16))
    claim(tree.image("t3"), 30000, 30000)
    report = tree.check()
    said = {f.sample: f.message for f in report.findings if f.level == "error"}
    assert "PNG again" in said["t0"]
    assert "TIFF of 5 bands" in said["t1"]
    assert "bit_depth: 16" in said["t2"]
    assert "max_pixels" in said["t3"]


def test_7_a_flipped_bit_in_a_jpeg_is_found_with_stored_hashes(tree: Tree) -> None:
    path = resave(tree.image("t1"), "jpg", quality=95)
    lock = tree.root / "lock"
    check_files.write_lock(lock, tree.check())
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    assert tree.check().findings == ()
    dataset = load_dataset(tree.config())
    (found,) = doctor.check(dataset, lock=check_files.read_lock(lock)).findings
    assert (found.level, found.code, found.split, found.sample) == ("warning", "changed-file", "train", "t1")
    must_say(found.message, "image changed")


def random_fault(tree: Tree, rng: random.Random) -> None:
    """Spoil one file of one sample at random."""
    split = rng.choice(["train", "val"])
    name = rng.choice(sorted(p.stem for p in (tree.root / "masks" / split).iterdir()))
    path = rng.choice([tree.image, tree.mask])(name, split)
    if not path.is_file():
        return
    kind = rng.randrange(8)
    data = bytearray(path.read_bytes())
    if kind == 0:
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == 1:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
    elif kind == 2:
        path.unlink()
    elif kind == 3:
        size = rng.randint(1, 30), rng.randint(1, 30)
        trees.save(path, trees.mask_of([rng.randrange(256)], size))
    elif kind == 4 and data:
        pixels = np.random.default_rng(rng.randrange(99)).integers(
            0, 256, (*SIZE, rng.choice([3, 4])), dtype=np.uint8
        )
        trees.save(path, pixels)
    elif kind == 5:
        trees.save(path, np.full(SIZE, rng.randrange(2**16), np.uint16))
    elif kind == 6:
        Image.new("RGB" if path.parents[1].name == "images" else "L", SIZE[::-1]).save(path, "JPEG")
    else:
        other = rng.choice(sorted(p for p in path.parent.iterdir() if p.is_file()))
        path.write_bytes(other.read_bytes())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("seed", range(25))
def test_what_the_check_passes_training_cannot_stumble_over(tree: Tree, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(rng.randint(0, 3)):
        random_fault(tree, rng)
    report = tree.check()
    try:
        loaded = load_everything(tree.config())
    except EversegError:
        loaded = 0
    assert bool(loaded) >= report.ok, report.summary()
    if report.ok:
        assert loaded == 2 * sum(report.images.values())
    skip = tree.root / "skip.txt"
    for _ in range(3):  # the check after a skip list may see what unpaired files hid
        if not any(f.level == "error" and f.sample for f in report.findings):
            break
        check_files.write_skiplist(skip, report)
        report = tree.check(skip=str(skip))
    if report.ok:
        options = {"skip": str(skip)} if skip.exists() else {}
        assert load_everything(tree.config(**options)) == 2 * sum(report.images.values())
    else:
        assert {f.code for f in report.findings if f.level == "error"} <= {"layout", "binary-mask"}
