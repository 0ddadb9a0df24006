"""Cut large pictures into windows, each of which is a sample."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from everseg.data.batches.index import default_cache_dir
from everseg.data.datasets.decode import UNLIMITED, Reading, open_picture
from everseg.data.datasets.files import FileSplit
from everseg.errors import DataError, near_miss

KEEP = 4_000_000
"""Pictures of more pixels stay decoded in the cache folder, so that reading a window costs only its own pixels."""


@dataclass(frozen=True)
class Tiles:
    """The side of the square windows, and the overlap of neighbours in training, both in pixels."""

    size: int = 512
    overlap: int = 0

    def windows(self, height: int, width: int, *, training: bool) -> list[tuple[int, int, int, int]]:
        """List (top, left, bottom, right) of each window.

        In training, windows of `size` share at least `overlap` pixels, and the last ones end at the border. In other
        splits no two windows share a pixel, so that every pixel is scored once, and all are about equally large. A
        picture smaller than a window is one window.
        """
        rows, columns = (self._spans(length, training) for length in (height, width))
        return [(top, left, bottom, right) for top, bottom in rows for left, right in columns]

    def _spans(self, length: int, training: bool) -> list[tuple[int, int]]:
        if length <= self.size:
            return [(0, length)]
        if training:
            # The last window is moved back to end at the border, and then overlaps its neighbour by more.
            starts = range(0, length - self.size, self.size - self.overlap)
            return [(start, start + self.size) for start in [*starts, length - self.size]]
        count = -(-length // self.size)  # the fewest windows that are not larger than `size`
        ends = [round(length * k / count) for k in range(count + 1)]
        return list(pairwise(ends))


def tiles_of(given: Any) -> tuple[Tiles | None, list[str]]:
    """Check a `tiles` key.

    Returns:
        The windows, None if there are none or they are wrong, and what is wrong.
    """
    if given is None:
        return None, []
    if not isinstance(given, Mapping):
        return None, [f"tiles: expected {{size: 512, overlap: 64}}, got {given!r}"]
    known = ("size", "overlap")
    problems = [f"tiles.{key}: unknown key{near_miss(key, known)}" for key in given if key not in known]
    size, overlap = given.get("size", Tiles.size), given.get("overlap", Tiles.overlap)
    if type(size) is not int or size < 8:
        problems.append(f"tiles.size: expected a whole number of at least 8 pixels, got {size!r}")
    elif type(overlap) is not int or not 0 <= overlap < size:
        problems.append(f"tiles.overlap: expected a whole number from 0 to below {size}, got {overlap!r}")
    return (None, problems) if problems else (Tiles(size, overlap), [])


class TiledSplit:
    """The windows of a split's pictures; satisfies `everseg.data.base.Split`. Ids are `picture@top,left`.

    Args:
        split: the whole pictures; windows of `train` may overlap, those of other splits do not.
        tiles: the windows.
        reading: its skip list may name windows.
    """

    def __init__(self, split: FileSplit, tiles: Tiles, reading: Reading) -> None:
        self.name, self.root, self.warnings = split.name, split.root, split.warnings
        self._split, self._tiles, self.reading = split, tiles, split.reading
        self.void_share, self.colours = split.void_share, split.colours
        self.no_data_stated, self.raw_id = split.no_data_stated, split.raw_id
        rows = []
        for index in range(len(split)):
            for window in tiles.windows(*_size(split, index), training=split.name == "train"):
                if (split.name, _name(split.id(index), window)) not in reading.skip:
                    rows.append((index, *window))
        if not rows:
            raise DataError(
                f"split '{split.name}' of {split.root} is empty: the skip list names every window"
            )
        self._rows = np.array(rows, np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def id(self, index: int) -> str:
        """Name of a window: its picture's, with its upper left corner."""
        picture, *window = self._row(index)
        return _name(self._split.id(picture), tuple(window))

    def image_path(self, index: int) -> Path:
        """Path of the picture of a window."""
        return self._split.image_path(self._row(index)[0])

    def mask_path(self, index: int) -> Path:
        """Path of the picture's mask."""
        return self._split.mask_path(self._row(index)[0])

    def image_files(self, index: int) -> list[str]:
        """All image files of a window's picture, relative to `root`."""
        return self._split.image_files(self._row(index)[0])

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Decode one window: image (h, w, C) and mask (h, w) raw ids, of the whole picture's types.

        Raises:
            DataError: as the whole picture.
        """
        picture, top, left, bottom, right = self._row(index)
        pixels = self._pixels(picture)
        window = np.array(pixels[top:bottom, left:right])
        if window.shape[:2] != (bottom - top, right - left):
            raise DataError(f"{self.image_path(index)}: changed its size since the windows were cut")
        return np.ascontiguousarray(window["image"]), np.ascontiguousarray(window["mask"])

    def read_mask(self, index: int) -> np.ndarray:
        """Decode the mask of one window, (h, w) raw ids."""
        picture, top, left, bottom, right = self._row(index)
        # A window smaller than `size` both ways is a whole picture or part of a test picture cut evenly. The mask alone
        # is decoded then, without its image.
        if bottom - top < self._tiles.size and right - left < self._tiles.size:
            return self._split.read_mask(picture)[top:bottom, left:right]
        return self.read(index)[1]

    def own_palette(self, index: int) -> tuple[bytes, dict[int, int]]:
        """As that of the whole picture."""
        return self._split.own_palette(self._row(index)[0])

    def no_data(self, index: int) -> int | None:
        """As that of the whole picture."""
        return self._split.no_data(self._row(index)[0])

    def fingerprint(self) -> str:
        """SHA-256 of the whole pictures' fingerprint and the windows."""
        return hashlib.sha256(self._split.fingerprint().encode() + self._rows.tobytes()).hexdigest()

    def decoding(self) -> str:
        """Everything but the files that decides what `read` returns, as text."""
        return f"{self._split.decoding()} {self._tiles}"

    def _row(self, index: int) -> tuple[int, ...]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return tuple(self._rows[index].tolist())

    def _pixels(self, picture: int) -> np.ndarray:
        """Image and mask of a whole picture, (H, W) with two fields; a large one is a mapped decoded file."""
        file = self._cached(picture)
        if file is not None and file.is_file():
            try:
                return np.load(file, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError):
                file.unlink(missing_ok=True)
        image, mask = self._split.read(picture)
        # Each keeps its own type: ids of 16 bits beside bytes, or bytes beside channels of floating-point numbers.
        both = np.dtype([("image", image.dtype, image.shape[2:]), ("mask", mask.dtype)])
        pixels = np.empty(mask.shape, both)
        pixels["image"], pixels["mask"] = image, mask
        if file is not None and mask.size > KEEP:
            _store(file, pixels)
        return pixels

    def _cached(self, picture: int) -> Path | None:
        try:
            images = [self.root / relative for relative in self._split.image_files(picture)]
            stats = [p.stat() for p in (*images, self._split.mask_path(picture))]
        except OSError:
            return None
        # The files' content is too large to be hashed for every window: path, size, times and inode stand for it.
        key = ["two fields", *map(str, images), self._split.decoding()]
        key += [f"{s.st_size}:{s.st_mtime_ns}:{s.st_ctime_ns}:{s.st_ino}" for s in stats]
        name = hashlib.sha256("\0".join(key).encode("utf-8", "surrogateescape")).hexdigest()
        return default_cache_dir() / "tiles" / f"{name}.npy"


def _name(picture: str, window: tuple[int, ...]) -> str:
    return f"{picture}@{window[0]},{window[1]}"


def _size(split: FileSplit, index: int) -> tuple[int, int]:
    """Height and width of a sample's mask; (1, 1) for a mask that cannot be opened: `read` explains why."""
    path = split.mask_path(index)
    try:
        if not path.is_file():
            return 1, 1
        with path.open("rb") as file, open_picture(file, path, UNLIMITED) as picture:
            return picture.height, picture.width
    except Exception:  # decoders raise nearly anything on damaged files
        return 1, 1


def _store(file: Path, pixels: np.ndarray) -> None:
    """Keep a decoded picture. Where there is no room for it, it is decoded again for every window."""
    temporary = file.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as stream:
            np.save(stream, pixels, allow_pickle=False)
        os.replace(temporary, file)  # noqa: PTH105 - as atomic as the system allows
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
