"""Pictures as phones and GIS tools write them: overviews, bands without colours, HEIC, EXIF orientations."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import trees
from PIL import Image

from everseg.config.fields import DataConfig
from everseg.data.datasets import decode, load_dataset
from everseg.data.datasets.decode import read_image
from everseg.data.doctor import doctor
from everseg.errors import DataError
from saying import must_say

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)


def tiff(pages: list[tuple[np.ndarray, int, int]]) -> bytes:
    """A little-endian TIFF of pages (pixels, photometric interpretation, NewSubfileType)."""
    out, following = bytearray(b"II*\0" + bytes(4)), 4
    for pixels, photometric, kind in pages:
        height, width, bands = pixels.shape
        data = len(out)
        out += pixels.tobytes()
        bits = len(out)
        out += struct.pack(f"<{bands}H", *[8 * pixels.itemsize] * bands)
        tags = [(254, 4, 1, kind), (256, 3, 1, width), (257, 3, 1, height), (258, 3, bands, bits), (259, 3, 1, 1),
                (262, 3, 1, photometric), (273, 4, 1, data), (277, 3, 1, bands), (278, 3, 1, height),
                (279, 4, 1, pixels.nbytes)]  # fmt: skip
        out[following : following + 4] = struct.pack("<I", len(out))
        out += struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        following = len(out)
        out += bytes(4)
    return bytes(out)


HALF = np.ascontiguousarray(PIXELS[::2, ::2])
MASK = np.ascontiguousarray(PIXELS[:, :, :1])


@pytest.mark.parametrize(
    "pages",
    [
        [(PIXELS, 2, 0), (HALF, 2, 1)],
        [(PIXELS, 2, 0), (HALF, 2, 1), (np.ascontiguousarray(HALF[::2, ::2]), 2, 1)],
        [(PIXELS, 2, 0), (HALF, 2, 1), (MASK, 4, 4)],
    ],
    ids=["overview", "two", "overview and transparency"],
)
def test_overviews_leave_the_picture_itself(tmp_path: Path, pages: list) -> None:
    file = tmp_path / "cog.tif"
    file.write_bytes(tiff(pages))
    np.testing.assert_array_equal(read_image(file), PIXELS)


@pytest.mark.parametrize("kinds", [(0, 0), (1, 1), (0, 2)])
def test_pages_that_are_pictures_of_their_own_are_refused(tmp_path: Path, kinds: tuple[int, int]) -> None:
    file = tmp_path / "scan.tif"
    file.write_bytes(tiff([(PIXELS, 2, kinds[0]), (HALF, 2, kinds[1])]))
    with pytest.raises(DataError) as caught:
        read_image(file)
    must_say(caught.value, "scan.tif", "2 pages")


@pytest.mark.parametrize("cut", [1, 4, 40])
def test_a_directory_that_breaks_off_is_damage(cut: int) -> None:
    data = tiff([(PIXELS, 2, 0), (HALF, 2, 1)])
    with pytest.raises(DataError) as caught:
        read_image(data[:-cut])
    must_say(caught.value, "damaged")


@pytest.mark.parametrize("bands", [3, 4])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_bands_without_colours_are_named(tmp_path: Path, bands: int, kind: type) -> None:
    file = tmp_path / "sat.tif"
    file.write_bytes(tiff([(np.zeros((8, 9, bands), kind), 1, 0)]))
    with pytest.raises(DataError) as caught:
        read_image(file)
    must_say(
        caught.value,
        "sat.tif",
        f"{bands} bands",
        f"{8 * kind().itemsize} bits",
        "gdal_translate",
        "PHOTOMETRIC=RGB",
    )
    assert ("-scale" in str(caught.value)) == (kind is np.uint16)


def _heic(path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(path, format="HEIF")


def test_heic_is_named_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "HEIC", False)
    file = tmp_path / "IMG_1.HEIC"
    file.write_bytes(b"\0\0\0\x20ftypheic" + bytes(20))
    with pytest.raises(DataError) as caught:
        read_image(file)
    must_say(caught.value, "IMG_1.HEIC", "everseg[heic]")


def test_heic_is_read_with_the_extra(tmp_path: Path) -> None:
    _heic(tmp_path / "IMG_1.HEIC")
    image = read_image(tmp_path / "IMG_1.HEIC")
    assert image.shape == (48, 64, 3)
    assert abs(float(image.mean()) - 90) < 3


@pytest.mark.parametrize(
    ("how", "size", "level"),
    [(2, (12, 16), "warning"), (3, (12, 16), "warning"), (4, (12, 16), "warning"), (3, (12, 12), "warning"),
     (6, (12, 12), "warning"), (6, (16, 12), "note")],
)  # fmt: skip
def test_orientations_that_fit_either_way_are_doubted(
    tmp_path: Path, how: int, size: tuple[int, int], level: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = how
    for split in ("train", "val"):
        for number in range(3):
            pixels = np.random.default_rng([number, len(split)]).integers(0, 256, (*size, 3)).astype(np.uint8)
            (tmp_path / "images" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / f"images/{split}/{number}.png", exif=exif)
            mask = trees.mask_of([0, 1], size if how < 5 else size[::-1])
            trees.save(tmp_path / f"masks/{split}/{number}.png", mask)
    trees.write(
        tmp_path / "data.yaml", "images: images/{split}\nmasks: masks/{split}\nclasses: [background, road]\n"
    )
    report = doctor.check(load_dataset(DataConfig(dataset=str(tmp_path / "data.yaml"))), cache=False)
    turned = [finding for finding in report.findings if finding.code.startswith("turned")]
    assert {finding.level for finding in turned} == {level}
    if level == "warning":
        assert len(turned) == 6
        must_say(turned[0].message, "EXIF", how, "either")
