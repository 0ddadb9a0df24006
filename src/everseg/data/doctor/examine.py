"""Examine one sample: its faults, oddities, ids and fingerprints."""

from __future__ import annotations

import hashlib
import io
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from everseg.data.base import Split, channels_of_split, image_fault, mask_fault
from everseg.data.batches.index import count_ids
from everseg.data.channels import picture_of
from everseg.data.datasets.decode import ENDINGS, LOSSY, UNLIMITED, no_data, open_picture, orientation
from everseg.data.doctor.findings import Level
from everseg.data.mask_values import own_no_data, own_palette
from everseg.errors import DataError

MAX_DECODED = 100_000_000
"""Larger pictures are not decoded to find out why a reader refused them."""
LARGE = 25_000_000
"""From so many pixels on, windows are recommended."""
SIGNATURE = 16
"""Side of the small grey picture by which copies are recognised after they were encoded again."""
RECENT = 2.0
"""A file younger than so many seconds may change without a new time stamp; it is recognised by content only."""
_PNG_END = b"IEND\xaeB`\x82"


@dataclass(frozen=True, eq=False)
class Examined:
    """What is known about one sample; counts are None if it cannot be read."""

    id: str
    faults: tuple[tuple[str, str], ...] = ()
    """(code, message) of what stops a run."""
    notes: tuple[tuple[Level, str, str], ...] = ()
    """(level, code, message) of what does not."""
    counts: np.ndarray | None = None
    """(256,) pixels per raw id."""
    size: tuple[int, int] = (0, 0)
    """Height and width."""
    digests: tuple[str, str] = ("", "")
    """SHA-256 of image and mask; of the image's pixels alone where they do not lie in files.

    The files of further channels count to the image.
    """
    palette: bytes = b""
    """Red, green, blue of the stored ids from 0 on, of an indexed mask whose labels go by id."""
    stored: Mapping[int, int] = field(default_factory=dict)
    """Raw id -> stored id, of the ids in the mask; {} without palette."""
    no_data: int | None = None
    """The raw id that a GeoTIFF mask calls "no data"."""
    under_no_data: Mapping[int, int] = field(default_factory=dict)
    """Raw id -> pixels that a GeoTIFF image calls "no data"."""
    signature: bytes = b""
    """The image as grey picture of `SIGNATURE` x `SIGNATURE` bytes."""
    stamp: tuple[int, ...] = ()
    """Size, times and number of all its files; () if they must be looked into next time."""


class Job(NamedTuple):
    """The samples of a split to examine, with what an earlier check found."""

    split: Split
    indices: list[int]
    known: Mapping[str, Examined]


def examine(job: Job, position: int) -> Examined:
    """Examine one sample. Reuse what an earlier check found if its files are unchanged."""
    index = job.indices[position]
    name = job.split.id(index)
    paths = (_path(job.split, "image_path", index), _path(job.split, "mask_path", index))
    more = _further(job.split, index)
    stamp = _stamp((*paths, *more))
    known = job.known.get(name)
    if known is not None and stamp:
        if known.stamp == stamp:
            return known
        if known.digests == (_digest(paths[0], *more), _digest(paths[1])):
            return replace(known, stamp=_settled(stamp))
    return replace(_examine(job.split, index, name, paths), stamp=_settled(stamp))


def _further(split: Split, index: int) -> list[Path]:
    """The files of further channels of a sample."""
    find, root = getattr(split, "image_files", None), getattr(split, "root", None)
    return [] if find is None or root is None else [root / relative for relative in find(index)[1:]]


def _examine(split: Split, index: int, name: str, paths: tuple[Path | None, Path | None]) -> Examined:
    try:
        channels = channels_of_split(split)
        image, mask = split.read(index)
        if wrong := [fault for fault in (image_fault(image, channels), mask_fault(mask)) if fault]:
            return Examined(name, (("unreadable-sample", "; ".join(wrong)),))
        if image.shape[:2] != mask.shape:
            text = (
                f"the image is {image.shape[1]}x{image.shape[0]} but the mask {mask.shape[1]}x{mask.shape[0]}"
            )
            return Examined(name, (("size-mismatch", text),))
    except (DataError, OSError) as error:
        return Examined(name, tuple(_faults(split, index, str(error))))
    faults: tuple[tuple[str, str], ...] = ()
    if paths[1] is not None and _look(paths[1])[0] in ("JPEG", "MPO"):
        faults = (("lossy-mask", f"{paths[1]}: the mask is a JPEG file"),)
    notes = [*(_image_notes(paths[0]) if paths[0] and channels is None else ()), *_pixel_notes(mask)]
    remarks = getattr(split, "remarks", None)  # of splits whose masks are drawn from objects
    notes += [("warning", "object", text) for text in (remarks(index) if remarks is not None else ())]
    if paths[1] is not None and getattr(split, "colours", {}) and _is_indexed(paths[1]):
        notes.append(("note", "palette-colours", str(paths[1])))
    if paths[0] is None:
        pixels = repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()
        digests = (hashlib.sha256(pixels).hexdigest(), "")
    else:
        digests = (_digest(paths[0], *_further(split, index)), _digest(paths[1]))
    counts = count_ids(mask)
    palette, stored = own_palette(split, index, counts)
    return Examined(
        name,
        faults,
        tuple(notes),
        counts,
        mask.shape,
        digests,
        palette,
        stored,
        own_no_data(split, index),
        _under_no_data(split, index, image, mask),
        _signature(picture_of(image, channels)),
    )


def _under_no_data(split: Split, index: int, image: np.ndarray, mask: np.ndarray) -> dict[int, int]:
    """Raw id -> pixels, of those whose values a GeoTIFF image calls "no data" in all bands."""
    path = _path(split, "image_path", index)
    if path is None or path.suffix.lower() not in ENDINGS["TIFF"]:
        return {}
    try:
        with path.open("rb") as file:
            picture = open_picture(file, path, UNLIMITED)
            value = no_data(picture)
            if value is not None and channels_of_split(split) is None:  # `image` may be scaled to 8 bits
                image = np.asarray(picture)
    except Exception:  # only the data set's own reader can open it
        return {}
    if value is None or image.shape[:2] != mask.shape:
        return {}
    counts = count_ids(mask[(image == value).reshape(*mask.shape, -1).all(axis=2)])
    return {int(raw): int(counts[raw]) for raw in np.flatnonzero(counts)}


def _is_indexed(path: Path) -> bool:
    with path.open("rb") as file, open_picture(file, path, UNLIMITED) as picture:
        return picture.mode == "P"


def _faults(split: Split, index: int, message: str) -> Iterator[tuple[str, str]]:
    """Find out which file makes a sample unreadable: the image, the mask, or both."""
    mask: np.ndarray | None = None
    mask_message = ""
    try:
        mask = split.read_mask(index)
    except (DataError, OSError) as error:
        mask_message = str(error)
        path = _path(split, "mask_path", index)
        yield _mask_code(path), mask_message
    image_path = _path(split, "image_path", index)
    form, size, problem = _look(image_path) if image_path is not None else ("", None, "")
    if mask is None:
        if message != mask_message:
            yield "unreadable-image" if image_path is not None else "unreadable-sample", message
        elif problem:
            yield "unreadable-image", f"{image_path}: {problem}"
    elif form and not problem and size != (mask.shape[1], mask.shape[0]):
        yield "size-mismatch", message
    elif image_path is not None:
        files = (image_path, *_further(split, index))
        at_fault = problem or not form or message.startswith(tuple(f"{file}: " for file in files))
        yield "unreadable-image" if at_fault else "unreadable-sample", message
    else:
        yield "unreadable-sample", message


def _mask_code(path: Path | None) -> str:
    if path is None:
        return "bad-mask"
    form, _, problem = _look(path)
    if form in LOSSY:
        return "lossy-mask"
    if problem:
        return "unreadable-mask"
    with path.open("rb") as file, open_picture(file, path, UNLIMITED) as picture:
        return (
            "colour-mask" if picture.mode in ("RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB") else "bad-mask"
        )


def _look(path: Path) -> tuple[str, tuple[int, int] | None, str]:
    """Read the format, (width, height) and the faults of a picture file. Never blocks on a pipe or device."""
    form, size = "", None
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return form, size, "not a regular file"
        with path.open("rb") as file, open_picture(file, path, UNLIMITED) as picture:
            form, size = picture.format or "", picture.size
            if size[0] * size[1] > MAX_DECODED:
                return form, size, "too large"
            picture.load()
    except Exception as error:  # decoders raise almost any exception on damaged files
        return form, size, str(error).removeprefix(f"{path}: ") or type(error).__name__
    return form, size, ""


def _image_notes(path: Path) -> Iterator[tuple[Level, str, str]]:
    """Describe what is unusual about a readable image file."""
    data = path.read_bytes()
    try:
        picture = open_picture(io.BytesIO(data), path, UNLIMITED)
        how = orientation(picture)
    except Exception:  # only the data set's own reader can open it, so it is not an ordinary picture file
        return
    form, (width, height) = picture.format or "", picture.size
    if path.suffix.lower() not in ENDINGS.get("JPEG" if form == "MPO" else form, (path.suffix.lower(),)):
        yield "warning", "other-format", f"{path}: is a {form} file, whatever its name says"
    end = data.rfind(_PNG_END) + len(_PNG_END)
    if form == "PNG" and end >= len(_PNG_END) and end < len(data):
        yield "warning", "trailing-bytes", f"{path}: {len(data) - end} bytes follow the end of the picture"
    if picture.mode == "CMYK":
        yield "warning", "print-colours", f"{path}: colours for print (CMYK)"
    if picture.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        yield "note", "alpha", str(path)
    if how != 1 and (width == height or how <= 4):
        why = "being square, its mask fits either way" if width == height else "its mask fits either way"
        code = "turned-square" if width == height else "turned-same-size"
        yield "warning", code, f"{path}: is turned by its EXIF orientation {how}; {why}"
    elif how != 1:
        yield "note", "turned", str(path)
    if width * height > LARGE:
        yield "note", "large-image", f"{path} ({width}x{height})"


def _pixel_notes(mask: np.ndarray) -> Iterator[tuple[Level, str, str]]:
    ids = in_between(mask)
    if len(ids) >= 3:
        text = f"ids {', '.join(map(str, ids[:8]))} stand on the borders between smaller and larger ids only"
        yield "warning", "interpolated-mask", text


def in_between(mask: np.ndarray) -> list[int]:
    """Find ids that occur (almost) only between a smaller and a larger id: the trace of resizing with interpolation.

    Args:
        mask: (H, W) uint8.
    """
    between = np.zeros(mask.shape, bool)
    for before, middle, after, target in (
        (mask[:, :-2], mask[:, 1:-1], mask[:, 2:], between[:, 1:-1]),
        (mask[:-2], mask[1:-1], mask[2:], between[1:-1]),
    ):
        target |= ((before < middle) & (middle < after)) | ((before > middle) & (middle > after))
    total = count_ids(mask)
    found = count_ids(mask[between], len(total))
    return [int(i) for i in np.flatnonzero((total > 0) & (found >= 0.9 * total))]


def _signature(image: np.ndarray) -> bytes:
    small = Image.fromarray(image).convert("L").resize((SIGNATURE, SIGNATURE), Image.Resampling.BOX)
    return small.tobytes()


def _path(split: Split, kind: str, index: int) -> Path | None:
    """Path of a file of the sample, for splits that are files on disk."""
    find = getattr(split, kind, None)
    return None if find is None else Path(find(index))


def _stamp(paths: Sequence[Path | None]) -> tuple[int, ...]:
    """Values that change when a file changes; () for missing files, links, and anything that is not a regular file."""
    stamp: list[int] = []
    for path in paths:
        try:
            if path is None or path.resolve(strict=True) != path:
                return ()
            found = path.stat()
        except (OSError, RuntimeError):
            return ()
        if not stat.S_ISREG(found.st_mode):
            return ()
        stamp += [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    return tuple(stamp)


def _settled(stamp: tuple[int, ...]) -> tuple[int, ...]:
    times = [*stamp[1::4], *stamp[2::4]]
    return stamp if times and max(times) < (time.time() - RECENT) * 1e9 else ()


def _digest(path: Path | None, *more: Path) -> str:
    """SHA-256 of a file, or of several files' SHA-256; "" if one cannot be read."""
    if path is None:
        return ""
    found = []
    try:
        for one in (path, *more):
            info = one.stat()
            found.append(_file_digest(one, (info.st_size, info.st_mtime_ns, info.st_ctime_ns)))
    except OSError:
        return ""
    return found[0] if not more else hashlib.sha256("".join(found).encode()).hexdigest()


@lru_cache(maxsize=64)
def _file_digest(path: Path, _: tuple[int, ...]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
