"""Single files: masks in every pixel format, damaged pictures, and what must be refused."""

from __future__ import annotations

import os
import random
import re
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import trees
from PIL import Image

from everseg.data.datasets.decode import Reading, read_image
from everseg.data.datasets.files import FileSplit
from everseg.errors import DataError
from saying import must_say


def _split(root: Path, image: str = "i.png", mask: str = "m.png", **options) -> FileSplit:
    if not (root / image).exists() and not (root / image).is_symlink():
        trees.save(root / image, trees.image_of(1))
    return FileSplit("train", root, [("a", image, mask)], **options)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_masks_of_few_bits_keep_their_ids(tmp_path: Path, bits: int) -> None:
    ids = trees.mask_of([0, 1]) if bits == 1 else trees.mask_of([0, 1, 3, 2])
    rows = np.unpackbits(ids[..., None], axis=2)[..., 8 - bits :].reshape(12, -1)
    _write_png(tmp_path / "m.png", 16, 12, bits, 0, np.packbits(rows, axis=1))
    np.testing.assert_array_equal(_split(tmp_path).read_mask(0), ids)


def _write_png(path: Path, width: int, height: int, bits: int, colour: int, rows: np.ndarray) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["P", "1", "I;16", "I"])
def test_masks_of_every_integer_mode_are_read(tmp_path: Path, kind: str) -> None:
    ids = trees.mask_of([0, 1]) if kind == "1" else trees.mask_of([0, 7, 255])
    name = "m.tif" if kind == "I" else "m.png"
    if kind == "P":
        trees.save_palette(tmp_path / name, ids)
    else:
        trees.save(tmp_path / name, ids.astype({"1": bool, "I;16": np.uint16, "I": np.int32}[kind]))
    mask = _split(tmp_path, mask=name).read_mask(0)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, ids)


@pytest.mark.parametrize(("value", "dtype"), [(256, np.uint16), (26001, np.int32), (-1, np.int32)])
def test_ids_outside_a_byte_are_refused(tmp_path: Path, value: int, dtype: type) -> None:
    ids = trees.mask_of([0, 1]).astype(dtype)
    ids[3, 3] = value
    trees.save(tmp_path / "m.tif", ids)
    with pytest.raises(DataError, match=rf"m\.tif.*{min(0, value)} to {max(1, value)}.*instance"):
        _split(tmp_path, mask="m.tif").read_mask(0)


def test_colour_mask_is_refused_with_a_palette_to_fill_in(tmp_path: Path) -> None:
    rgb = np.zeros((12, 16, 3), np.uint8)
    rgb[:, 4:] = (128, 64, 32)
    trees.save(tmp_path / "m.png", rgb)
    with pytest.raises(DataError) as caught:
        _split(tmp_path).read(0)
    must_say(caught.value, "m.png", "colour mask", "ids")
    assert "labels:\n  palette:\n    name_0: [128, 64, 32]\n    name_1: [0, 0, 0]" in str(caught.value)


def test_only_twelve_of_many_colours_are_shown(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    trees.save(tmp_path / "m.png", rgb)
    with pytest.raises(DataError, match="the 12 most frequent of 192") as caught:
        _split(tmp_path).read_mask(0)
    assert str(caught.value).count("name_") == 12


@pytest.mark.parametrize("name", ["m.jpg", "m.webp", "m.png"])
def test_lossy_masks_are_refused_whatever_they_are_called(tmp_path: Path, name: str) -> None:
    buffer = BytesIO()
    Image.fromarray(trees.mask_of([0, 1])).save(buffer, "WEBP" if name == "m.webp" else "JPEG")
    (tmp_path / name).write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match=rf"{name}: .*stored as (JPEG|WEBP)"):
        _split(tmp_path, mask=name).read_mask(0)


@pytest.mark.parametrize("mode", ["LA", "F"])
def test_masks_that_are_no_ids_are_refused(tmp_path: Path, mode: str) -> None:
    Image.fromarray(trees.mask_of([0, 1])).convert(mode).save(tmp_path / "m.tif")
    with pytest.raises(DataError, match=rf"m\.tif.* mode {mode}"):
        _split(tmp_path, mask="m.tif").read_mask(0)


def test_sizes_that_differ_are_named_with_both_files(tmp_path: Path) -> None:
    trees.save(tmp_path / "m.png", trees.mask_of([0, 1], (12, 15)))
    with pytest.raises(DataError, match=r"i\.png.*m\.png.*16x12.*15x12"):
        _split(tmp_path).read(0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"hello, this is text\n", "is text"),
        (b"<!DOCTYPE html><title>404</title>", "is a web page"),
        (b"\x00\x01\x02\x03" * 20, "is not a readable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "is text"),
    ],
)
def test_files_that_are_no_pictures_say_what_they_are(tmp_path: Path, content: bytes, reason: str) -> None:
    trees.save(tmp_path / "m.png", trees.mask_of([0]))
    (tmp_path / "i.jpg").write_bytes(content)
    with pytest.raises(DataError, match=rf"i\.jpg: {reason}"):
        _split(tmp_path, image="i.jpg").read(0)


@pytest.mark.parametrize("name", ["i.png", "i.jpg", "i.tif"])
def test_truncated_pictures_are_refused(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    trees.save(tmp_path / name, noise)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=rf"{name}: (damaged|.*not a readable)"):
        read_image(tmp_path / name)


def test_sixteen_bit_images_are_refused(tmp_path: Path) -> None:
    trees.save(tmp_path / "grey.png", trees.image_of(1)[..., 0].astype(np.uint16) * 200)
    rows = (trees.image_of(1).astype(">u2") * 200).reshape(12, -1)
    _write_png(tmp_path / "rgb.png", 16, 12, 16, 2, rows)
    for name in ("grey.png", "rgb.png"):
        with pytest.raises(DataError, match=rf"{name}: .*8 bits"):
            read_image(tmp_path / name)


def test_pages_are_refused(tmp_path: Path) -> None:
    page = Image.fromarray(trees.image_of(0))
    page.save(tmp_path / "i.tif", save_all=True, append_images=[page, page])
    with pytest.raises(DataError, match="holds 3 pages"):
        read_image(tmp_path / "i.tif")


def test_huge_headers_are_refused_before_decoding(tmp_path: Path) -> None:
    _write_png(tmp_path / "bomb.png", 60000, 60000, 8, 2, np.zeros((1, 3), np.uint8))
    with pytest.raises(DataError, match=r"bomb\.png: .*limit of 100000000.*max_pixels"):
        read_image(tmp_path / "bomb.png")
    trees.save(tmp_path / "m.png", trees.mask_of([0]))
    split = _split(tmp_path, reading=Reading(max_pixels=191))
    with pytest.raises(DataError, match=r"i\.png: 16x12.*limit.*191"):
        split.read(0)
    _split(tmp_path, reading=Reading(max_pixels=192)).read(0)


@pytest.mark.parametrize("how", range(1, 9))
def test_exif_orientation_is_applied_where_the_mask_then_fits(tmp_path: Path, how: int) -> None:
    upright = trees.image_of(2)
    undo = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],  # stored a quarter turn anticlockwise
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[how]
    exif = Image.Exif()
    exif[0x0112] = how
    Image.fromarray(np.ascontiguousarray(undo)).save(tmp_path / "i.png", exif=exif)
    trees.save(tmp_path / "m.png", trees.mask_of([0, 1]))
    split = _split(tmp_path)
    np.testing.assert_array_equal(split.read(0)[0], upright)
    np.testing.assert_array_equal(read_image(tmp_path / "i.png"), upright)


def test_mask_that_fits_the_unturned_image_only_is_refused(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(trees.image_of(2)).save(tmp_path / "i.png", exif=exif)
    trees.save(tmp_path / "m.png", trees.mask_of([0, 1]))
    with pytest.raises(DataError, match="EXIF orientation 6"):
        _split(tmp_path).read(0)
    image, _ = _split(tmp_path, reading=Reading(exif="ignore")).read(0)
    np.testing.assert_array_equal(image, trees.image_of(2))


def test_only_regular_files_inside_the_root_are_opened(tmp_path: Path) -> None:
    root = tmp_path / "root"
    trees.save(root / "m.png", trees.mask_of([0]))
    outside = trees.save(tmp_path / "secret.png", trees.image_of(1))
    (root / "out.png").symlink_to(outside)
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "dangling.png").symlink_to(root / "none.png")
    trees.save(tmp_path / "away" / "a.png", trees.image_of(1))
    (root / "away").symlink_to(tmp_path / "away")
    (root / "here").symlink_to(root)
    (root / "folder.png").mkdir()
    (root / "device.png").symlink_to("/dev/zero")
    os.mkfifo(root / "fifo.png")
    expected = {
        "out.png": "leads out",
        "loop.png": "cannot be opened",
        "dangling.png": "no such file",
        "away/a.png": "leads out",
        "here/away/a.png": "leads out",
        "m.png/a.png": "cannot be opened",
        "folder.png": "regular file",
        "device.png": "leads out",
        "fifo.png": "regular file",
        "none.png": "no such file",
        "../secret.png": "leads out",
        "/etc/passwd": "leads out",
    }
    for name, reason in expected.items():
        with pytest.raises(DataError, match=rf"{re.escape(name)}.*{reason}"):
            FileSplit("train", root, [("a", name, "m.png")]).read(0)
    assert FileSplit("train", root, [("a", "m.png", "here/m.png")]).read_mask(0).shape == (12, 16)
    follow = FileSplit("train", root, [("a", "out.png", "m.png")], reading=Reading(follow_links=True))
    assert follow.read(0)[0].shape == (12, 16, 3)
    with pytest.raises(DataError, match=r"device\.png: .*regular file"):
        FileSplit("t", root, [("a", "device.png", "m.png")], reading=Reading(follow_links=True)).read(0)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file_is_named(tmp_path: Path) -> None:
    trees.save(tmp_path / "i.png", trees.image_of(0)).chmod(0)
    with pytest.raises(DataError, match=r"i\.png: .*\(Permission denied"):
        read_image(tmp_path / "i.png")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_mutated_files_give_pixels_or_a_data_error(tmp_path: Path) -> None:
    rng = random.Random(0)
    names = ["i.png", "i.jpg", "i.tif", "i.bmp", "i.webp"]
    for name in names:
        trees.save(tmp_path / name, trees.image_of(3))
    messages = []
    for trial in range(400):
        original = (tmp_path / names[trial % len(names)]).read_bytes()
        data = bytearray(original)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data))]
        (tmp_path / "x.png").write_bytes(data)
        split = FileSplit("train", tmp_path, [("a", "x.png", "x.png")])
        for action in (split.read, split.read_mask):
            try:
                action(0)
            except DataError as error:
                messages.append(str(error))
    assert len(messages) > 400
    assert all("x.png" in m for m in messages)
