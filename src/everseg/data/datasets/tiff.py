"""Read the pages of a TIFF, and all bands of one, which Pillow does for up to four only. Only `decode` uses it.

8, 16 or 32 bits, interleaved or band after band, in strips or tiles, without compression or with deflate, as the
specification (TIFF 6.0; BigTIFF) has it. Errors of any kind mean a damaged file, but for `UnreadTiffError`.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import TiffImagePlugin

_KINDS = {
    (1, 8): "u1", (1, 16): "u2", (1, 32): "u4", (2, 8): "i1", (2, 16): "i2", (2, 32): "i4", (3, 32): "f4",
}  # fmt: skip
"""(sample format, bits) -> type."""


REDUCED, TRANSPARENCY = 1, 4
"""Bits of a page's `NewSubfileType`."""
MAX_PAGES = 10_000
_UNREAD = -1


class UnreadTiffError(Exception):
    """A TIFF of a kind that is not read here; the message says which, and what to do."""


@dataclass(frozen=True)
class Layout:
    """Where the pixels of a TIFF are."""

    height: int
    width: int
    bands: int
    kind: np.dtype[Any]
    """Type of the values, in the byte order of the file."""
    deflated: bool
    differences: bool
    """Each value is stored as the difference from the one to the left."""
    planar: bool
    """Band after band, not interleaved."""
    tiled: bool
    block: tuple[int, int]
    """Height and width of a strip or tile."""
    places: tuple[tuple[int, int], ...]
    """Offset and length of each, in bytes."""
    no_data: str = ""
    """What GDAL calls "no data", as text; "" if nothing."""


def directories(file: BinaryIO) -> Iterator[dict[int, Any]]:
    """Read the tags of a TIFF's pages one after the other; Pillow cannot open every page that it can describe.

    Raises:
        ValueError: the file is cut off within a directory. Other errors mean damage as well.
    """
    file.seek(0)
    header = file.read(8)
    if 43 in header[2:4]:  # BigTIFF; Pillow knows its directories with little-endian numbers only
        header += file.read(8)
    following = TiffImagePlugin.ImageFileDirectory_v2(header).next
    seen = set[int]()
    while following and following not in seen:
        seen.add(following)
        tags = TiffImagePlugin.ImageFileDirectory_v2(header)
        # Pillow only warns where a directory breaks off, and leaves the place of the next one as it was.
        tags.next = _UNREAD
        file.seek(following)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of tags that cannot be read: those needed are missed by the caller
            tags.load(file)
        if tags.next == _UNREAD:
            raise ValueError("its directory breaks off")
        following = int(tags.next)
        yield dict(tags)


def pages(file: BinaryIO) -> tuple[dict[int, Any], int]:
    """Read the tags of the first page, and count the pages.

    Those that only serve the first (overviews and masks of transparency, as in GeoTIFFs) do not count.
    """
    first, *others = islice(directories(file), MAX_PAGES)
    return first, 1 if all(map(_serves, others)) and not _serves(first) else 1 + len(others)


def _serves(tags: Mapping[int, Any]) -> bool:
    return bool(int(tags.get(254, 0)) & (REDUCED | TRANSPARENCY))


def layout_of(file: BinaryIO) -> Layout:
    """Read the directory of a TIFF; nothing is decoded yet.

    Raises:
        UnreadTiffError: several pages, or a kind that is not read here.
    """
    tags, count = pages(file)
    file.seek(0)
    order: Literal["<", ">"] = "<" if file.read(1) == b"I" else ">"
    if count > 1:
        raise UnreadTiffError("holds several pages; save one page with all channels")
    width, height, bands = int(tags[256]), int(tags[257]), int(tags.get(277, 1))
    bits, forms = set(numbers(tags.get(258, 1))), set(numbers(tags.get(339, 1)))
    compression, predictor, planar = (int(tags.get(tag, 1)) for tag in (259, 317, 284))
    kind = _KINDS.get((forms.pop(), bits.pop()) if len(forms) == len(bits) == 1 else (0, 0))
    known = compression in (1, 8, 32946) and predictor in (1, 2) and not (predictor == 2 and kind == "f4")
    if kind is None or not known:
        raise UnreadTiffError(
            f"a TIFF of a kind that is not read here (compression {compression}, predictor {predictor}); save it with "
            "8, 16 or 32 bits per channel, without compression or with deflate, or as NPY"
        )
    tiled = 322 in tags
    strip = (min(int(tags.get(278, height)), height), width)
    block = (int(tags[323]), int(tags[322])) if tiled else strip
    if (
        min(width, height, bands, *block) < 1
        or bands > 4096
        or block[0] * block[1] > 4 * max(width * height, 2**20)
    ):
        raise ValueError("impossible sizes")
    offsets, lengths = (numbers(tags[tag]) for tag in ((324, 325) if tiled else (273, 279)))
    return Layout(
        height, width, bands, np.dtype(kind).newbyteorder(order), compression != 1,
        predictor == 2, planar == 2, tiled, block, tuple(zip(offsets, lengths, strict=True)),
        str(tags.get(42113, "")),
    )  # fmt: skip


def pixels_of(file: BinaryIO, layout: Layout) -> np.ndarray:
    """Read the pixels, (height, width, bands), in the byte order of this machine."""
    rows, columns = layout.block
    image = np.empty((layout.height, layout.width, layout.bands), layout.kind.newbyteorder("="))
    groups = (
        [slice(band, band + 1) for band in range(layout.bands)] if layout.planar else [slice(0, layout.bands)]
    )
    places = iter(layout.places)
    for group in groups:
        for top in range(0, layout.height, rows):
            for left in range(0, layout.width, columns):
                part = image[top : top + rows, left : left + columns, group]
                part[...] = _block(file, layout, next(places), part.shape)[: part.shape[0], : part.shape[1]]
    return image


def _block(file: BinaryIO, layout: Layout, place: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """Read one strip or tile."""
    # Tiles are full at the border, too; the last strip is not.
    rows, columns = layout.block if layout.tiled else shape[:2]
    number = rows * columns * shape[2]
    file.seek(place[0])
    data = file.read(place[1])
    if layout.deflated:  # never more than needed, whatever the file says
        data = zlib.decompressobj().decompress(data, number * layout.kind.itemsize)
    values = np.frombuffer(data, layout.kind, number).reshape(rows, columns, -1)
    values = values.astype(layout.kind.newbyteorder("="))
    return np.cumsum(values, axis=1, dtype=values.dtype) if layout.differences else values


def numbers(value: Any) -> tuple[int, ...]:
    """The whole numbers of a tag, one or several. Raises almost any error where it holds something else."""
    return tuple(map(int, value)) if isinstance(value, tuple | list) else (int(value),)
