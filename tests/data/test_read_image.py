"""One picture in every form a user may hold it in: the same pixels, the same refusals."""

from __future__ import annotations

import io
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import everseg
from everseg.data.datasets.decode import ENDINGS, Reading, open_picture, read_image
from everseg.data.datasets.listing import image_files
from everseg.errors import DataError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), np.uint8)
GREY = RNG.integers(0, 256, (5, 7), np.uint8)
ALPHA = RNG.integers(0, 256, (5, 7, 4), np.uint8)
GREY_ALPHA = RNG.integers(0, 256, (5, 7, 2), np.uint8)
DEEP = RNG.integers(0, 65536, (5, 7), np.uint16)
BITS = RNG.integers(0, 2, (5, 7)).astype(bool)


def forms(path):
    """Path, text, bytes, stream and the picture as Pillow opens it."""
    data = path.read_bytes()
    return [path, str(path), data, bytearray(data), io.BytesIO(data), Image.open(path)]


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (RGB, RGB),
        (GREY, np.stack([GREY] * 3, 2)),
        (ALPHA, ALPHA[..., :3]),
        (GREY_ALPHA, np.repeat(GREY_ALPHA[..., :1], 3, 2)),
        (BITS, np.stack([BITS * np.uint8(255)] * 3, 2)),
    ],
    ids=["RGB", "grey", "RGBA", "LA", "bits"],
)
def test_every_form_gives_the_same_pixels(array, expected, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path)
    for given in [
        *forms(path),
        array,
        Image.fromarray(array),
        torch.from_numpy(array),
        array[:, ::-1][:, ::-1],
    ]:
        np.testing.assert_array_equal(read_image(given), expected)


def test_a_grey_array_may_have_a_channel():
    np.testing.assert_array_equal(read_image(GREY[..., None]), read_image(GREY))


@pytest.mark.parametrize("how", range(1, 9))
def test_every_form_is_turned_by_its_exif_orientation(how, tmp_path):
    """Expected: what Pillow's own `exif_transpose` makes of the file."""
    from PIL import ImageOps

    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = how
    Image.fromarray(RGB).save(path, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert (expected.shape == RGB.shape) is (how <= 4)
    for given in forms(path):
        np.testing.assert_array_equal(read_image(given), expected)
    np.testing.assert_array_equal(read_image(path, Reading(exif="ignore", follow_links=True)), RGB)
    turned = ImageOps.exif_transpose(Image.open(path))  # says itself that it is upright
    np.testing.assert_array_equal(read_image(turned), expected)


def test_16_bits_are_refused_in_every_form_and_reduced_where_declared(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(DEEP).save(path)
    deep = Reading(bit_depth=16, follow_links=True)
    for given in [*forms(path), DEEP, Image.fromarray(DEEP), torch.from_numpy(DEEP)]:
        with pytest.raises(DataError, match=r"8 bits.*bit_depth: 16"):
            read_image(given)
    for given in [*forms(path), DEEP, Image.fromarray(DEEP)]:
        np.testing.assert_array_equal(read_image(given, deep)[..., 1], (DEEP >> 8).astype(np.uint8))


def test_many_bands_are_refused_in_every_form(tmp_path):
    bands = RNG.integers(0, 256, (5, 7, 6), np.uint8)
    with pytest.raises(DataError, match=r"5x7x6 of 6 channels.*three"):
        read_image(bands)
    with pytest.raises(DataError, match=r"3x5x7 of 7 channels.*last"):
        read_image(RGB.transpose(2, 0, 1))


@pytest.mark.parametrize("given", [RGB / 255, RGB.astype(np.float32), RGB.astype(np.int64)])
def test_numbers_that_are_no_bytes_are_refused(given):
    with pytest.raises(DataError, match=rf"array of {given.dtype}.*uint8, 0 to 255"):
        read_image(given)


@pytest.mark.parametrize(
    "given", [None, 7, {}, "", RGB[:0], np.zeros((2, 2, 2, 2), np.uint8), np.array("x"), [[1, 2], [3]], b""]
)
def test_what_is_no_picture_is_refused_in_words(given):
    with pytest.raises(DataError, match=r"not a picture|regular file|is empty|no such file"):
        read_image(given)


def test_large_ones_are_refused_in_every_form(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(RGB).save(path)
    for given in [*forms(path), RGB, Image.fromarray(RGB)]:
        with pytest.raises(DataError, match=r"7x5.*limit.*34"):
            read_image(given, Reading(max_pixels=34, follow_links=True))


def test_a_damaged_file_is_refused_in_every_form(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-4000])
    for given in forms(path):
        with pytest.raises(DataError, match="damaged"):
            read_image(given)


def test_the_result_may_be_written_to():
    image = Image.fromarray(RGB)
    read_image(image)[:] = 0
    read_image(RGB)[:] = 0
    np.testing.assert_array_equal(np.asarray(image), RGB)


def test_the_limit_of_one_picture_is_not_that_of_the_next(tmp_path):
    """Pillow's limit is the whole process's: opening a large picture must not change it, whichever thread does."""
    before = Image.MAX_IMAGE_PIXELS
    path = tmp_path / "a.png"
    Image.fromarray(RGB).save(path)

    def many() -> None:
        for _ in range(200):
            with path.open("rb") as file:
                open_picture(file, path, Reading(max_pixels=2**40))

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert before == Image.MAX_IMAGE_PIXELS


def test_formats_and_endings_of_pictures_stand_in_one_place():
    """Other files that name an ending write or look for one file of a known kind."""
    package = Path(everseg.__file__).parent
    several = re.compile(r"""["']\.(jpe?g|bmp|tiff?|webp|p[pgn]m)["']""")
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if len(set(several.findall(path.read_text()))) > 1
    }
    assert found == {"data/datasets/decode.py"}
    lossy = [path.name for path in package.rglob("*.py") if '"MPO", "WEBP"' in path.read_text()]
    assert lossy == ["decode.py"]


def test_a_folder_s_pictures_are_those_that_can_be_read(tmp_path):
    for ending in ENDINGS["PPM"]:
        Image.fromarray(GREY if ending == ".pgm" else RGB).save(tmp_path / f"{ending[1:]}{ending}", "PPM")
    found = image_files(tmp_path)
    assert [path.suffix for path in found] == sorted(ENDINGS["PPM"])
    assert all(read_image(path).shape == RGB.shape for path in found)
