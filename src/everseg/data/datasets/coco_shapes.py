"""Draw the objects of COCO's JSON, polygons and run lengths, with the pixels that pycocotools gives them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools import mask as reference

from everseg.config.checks import shown
from everseg.display import counted
from everseg.errors import DataError, some
from everseg.labels import IGNORED

FOREIGN = (TypeError, KeyError, ValueError, IndexError, AttributeError, OverflowError)
"""What parsing annotations may raise beside DataError where lists, texts and numbers stand in each other's places."""
BOXES = ("void", "fill")
"""What becomes of an object that has a box and no shape."""
MAX_OUTLINE = 2_000_000
"""Pixels along one polygon; of longer ones the library would take memory without asking (about 50 bytes per pixel)."""
MOST_DRAWN, MOST_RUNS = 20_000_000_000, 50_000_000
"""Pixels and runs of pixels that all objects of an image may draw together: about half a minute."""
_SHOWN = 8
_NOT_PACKED = re.compile("[^0-o]|[P-o]{7}")
"""A character that packed run lengths do not have, or a number of more than 35 bits."""


@dataclass(frozen=True)
class Picture:
    """One image with its objects, unchanged from the file."""

    file: str
    height: int
    width: int
    """0 where the file does not give the size."""
    objects: list[tuple[int, Any]] = field(default_factory=list)
    """(category id, segmentation), in the order of the file."""
    names: list[str] = field(default_factory=list)
    """How messages call each object; without names it is its number in the image."""
    boxes: list[Any] = field(default_factory=list)
    """The `bbox` of each object, [left, top, width, height]; None where there is none."""

    def called(self, number: int) -> str:
        """How messages call an object."""
        return self.names[number] if number < len(self.names) else f"object {number}"

    def box(self, number: int) -> Any:
        """The `bbox` of an object, or None."""
        return self.boxes[number] if number < len(self.boxes) else None


def draw(
    picture: Picture,
    table: Mapping[int, int],
    max_pixels: int,
    *,
    boxes: str = "void",
    void: int = IGNORED,
    remarks: list[str] | None = None,
) -> np.ndarray:
    """Draw the objects of an image in the order of the file, so that later ones lie on top.

    Every object covers the same pixels as in pycocotools (`annToMask`), so that the annotation's `area` agrees. Objects
    are drawn one after the other into one picture, so memory does not grow with their number.

    Args:
        table: category id -> raw id.
        max_pixels: larger pictures are refused.
        boxes: what an object with a box but no shape becomes: with "void", the pixels of the box that no object covers
            are void, because some of them are the object; with "fill", the box is drawn as if it were the shape.
        void: raw id of pixels whose class the annotations leave open; above 255 the ids have 16 bits.
        remarks: a text is appended for each object that is not drawn as a shape, and why.

    Returns:
        (H, W) raw ids, uint8 or uint16: 0 where no object is, `void` where only boxes are.

    Raises:
        DataError: some shapes cannot be drawn; the error lists all of them.
    """
    height, width = picture.height, picture.width
    if height * width > max_pixels:
        raise DataError(f"claims {width}x{height} pixels, more than the limit of {max_pixels}")
    # Transposed, because the runs go down the columns.
    mask = np.zeros((width, height), np.uint8 if void <= IGNORED else np.uint16)
    pixels = mask.reshape(-1)  # (W * H,)
    faults: list[str] = []
    said = [] if remarks is None else remarks
    open_boxes: list[list[int]] = []
    drawn = drawn_runs = 0
    for number, (category, segmentation) in enumerate(picture.objects):
        name = picture.called(number)
        has_shape = not is_empty(segmentation)
        try:
            if has_shape:
                runs = _runs(segmentation, height, width, name, said)
            elif picture.box(number) is None:
                said.append(f"{name} has neither a shape nor a box, and is not drawn")
                continue
            else:
                runs = _box_runs(picture.box(number), height, width)
        except DataError as error:
            faults.append(f"{name}: {error}")
            continue
        drawn, drawn_runs = drawn + int(runs[1::2].sum()), drawn_runs + runs.size // 2
        if drawn > MOST_DRAWN or drawn_runs > MOST_RUNS:
            raise DataError(
                f"its objects up to {name} cover {drawn} pixels in {drawn_runs} runs, and it has {height * width}; "
                "objects that cover each other so often cannot be an annotation"
            )
        # A last run of 0 has no run of 1 after it.
        ends = np.cumsum(runs).tolist()
        if has_shape and not runs[1::2].any():
            said.append(f"{name} covers no pixel of the image")
        elif not has_shape and boxes == "void":
            said.append(f"{name} has a box and no shape; the box is void where no other object is")
            open_boxes.append(ends)
            continue
        elif not has_shape:
            said.append(f"{name} has a box and no shape; the box is drawn")
        for start, end in zip(ends[0::2], ends[1::2], strict=False):
            pixels[start:end] = table[category]
    if faults:
        raise DataError(some(faults, _SHOWN, "; "))
    for ends in open_boxes:
        for start, end in zip(ends[0::2], ends[1::2], strict=False):
            run = pixels[start:end]
            run[run == 0] = void
    return np.ascontiguousarray(mask.T)


def is_empty(segmentation: Any) -> bool:
    """Whether an object has no shape: nothing, or lists and run lengths without content."""
    if isinstance(segmentation, dict):
        return not segmentation or segmentation.get("counts") in ([], "")
    return not segmentation or (isinstance(segmentation, list) and all(part == [] for part in segmentation))


def _runs(segmentation: Any, height: int, width: int, name: str, remarks: list[str]) -> np.ndarray:
    """Lengths of alternating runs of 0 and 1, (R,) int64, beginning with 0, down the columns; they fill the picture."""
    if isinstance(segmentation, dict):
        if segmentation.get("size") != [height, width]:
            raise DataError(
                f"run lengths for the size {shown(segmentation.get('size'))}, not {[height, width]}"
            )
        return run_lengths(segmentation.get("counts"), height, width)
    if not isinstance(segmentation, list):
        raise DataError("neither polygons nor run lengths")
    if all(isinstance(part, dict) for part in segmentation):
        ones = [_runs(part, height, width, name, remarks) for part in segmentation if not is_empty(part)]
        return _union(ones, height * width)
    if all(map(is_number, segmentation)) or (
        len(segmentation) > 2 and all(is_point(part) for part in segmentation)
    ):
        segmentation = [segmentation]  # one polygon without the list around it
    parts = []
    for part in segmentation:
        points = part
        if isinstance(part, list) and len(part) > 2 and all(is_point(point) for point in part):
            points = [number for point in part for number in point]
        if _check_polygon(points, height, width, alone=len(segmentation) == 1):
            parts.append(points)
        elif not _is_outside(points, height, width):
            remarks.append(f"{name}: a part of fewer than three points has no pixels")
    if not parts:
        return np.array([height * width], np.int64)
    drawn = reference.frPyObjects(parts, height, width)
    return unpack(reference.merge(drawn)["counts"].decode())


def _union(runs: list[np.ndarray], size: int) -> np.ndarray:
    """Runs of all pixels that are 1 in any of some runs."""
    pixels = np.zeros(size, bool)
    for one in runs:
        ends = np.cumsum(one).tolist()
        for start, end in zip(ends[0::2], ends[1::2], strict=False):
            pixels[start:end] = True
    edges = np.flatnonzero(np.diff(pixels, prepend=False))
    return np.diff(edges, prepend=0, append=size)


def _box_runs(box: Any, height: int, width: int) -> np.ndarray:
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)) or min(box[2:]) < 0:
        raise DataError(f"no shape, and the box {shown(box)}, expected [left, top, width, height]")
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    corners = [left, top, right, top, right, bottom, left, bottom]
    return _runs([corners], height, width, "", [])


def _check_polygon(points: Any, height: int, width: int, *, alone: bool) -> bool:
    """Return whether a polygon can have pixels. Refuse those that pycocotools cannot handle: it checks little.

    Args:
        alone: the object has no other part. Four numbers may then be a box as well as two points.
    """
    if not isinstance(points, list) or len(points) % 2 or not all(map(is_number, points)):
        raise DataError("a polygon that is not at least three points x, y")
    if len(points) == 4 and alone:
        raise DataError(
            "four numbers are two points, without area, or a box [left, top, width, height], but no polygon of "
            "at least three points x, y; write a polygon, or leave the segmentation empty beside a bbox"
        )
    if len(points) < 6 or _is_outside(points, height, width):
        return False
    corners = np.array(points, np.float64).reshape(-1, 2)
    outline = np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1).sum()
    if not outline <= MAX_OUTLINE:
        raise DataError(f"a polygon of {outline:.0f} pixels around, more than the limit of {MAX_OUTLINE}")
    return True


def _is_outside(points: list[Any], height: int, width: int) -> bool:
    xs, ys = points[::2], points[1::2]
    return bool(points) and (max(xs) < 0 or max(ys) < 0 or min(xs) > width or min(ys) > height)


def is_point(value: Any) -> bool:
    """Whether a value of a file is [x, y]."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(is_number, value))


def is_number(value: Any) -> bool:
    """Whether a value of a file is a number that a picture can have: finite, and no larger than floats are exact."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53


def _is_whole(value: Any) -> bool:
    return is_number(value) and value == int(value)


def run_lengths(counts: Any, height: int, width: int) -> np.ndarray:
    """Check the run lengths of a file: a list of whole numbers (as floats, too), or COCO's packed text of them.

    The runs are not passed to pycocotools. If runs do not fill the picture, it draws uninitialised memory or merges
    forever.

    Returns:
        (R,) int64, alternating runs of 0 and 1, down the columns, beginning with 0.

    Raises:
        DataError: the counts are invalid, or the runs do not fill the picture exactly.
    """
    if isinstance(counts, str):
        runs = unpack(counts)
    elif isinstance(counts, list) and all(map(_is_whole, counts)):
        runs = np.array(counts, np.int64)
    else:
        raise DataError("run lengths that are not whole numbers")
    if runs.size and runs.min() < 0:
        raise DataError("a run of negative length")
    # A sum of floats cannot wrap around, and it is exact up to the size of a picture.
    total = runs.sum(dtype=np.float64)
    if total != height * width:
        raise DataError(f"runs of {counted(int(total), 'pixel')} for a picture of {width}x{height}")
    return runs


def unpack(text: str) -> np.ndarray:
    """Unpack the run lengths that COCO packs into text, (R,) int64: 5 bits and a "more follows" flag per character.

    From the fourth number on, each is stored as the difference from the number two places before it.

    Raises:
        DataError: invalid characters, numbers that are too long, or a truncated text.
    """
    wrong = _NOT_PACKED.search(text)
    if wrong:
        raise DataError(f"the packed run lengths hold {wrong[0]!r}")
    if not text:
        return np.zeros(0, np.int64)
    bits = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48  # (N,)
    last = np.flatnonzero(bits < 32)  # (R,), where each number ends
    if bits[-1] >= 32:
        raise DataError("the packed run lengths break off")
    first = np.concatenate([[0], last[:-1] + 1])
    shift = 5 * (np.arange(bits.size) - np.repeat(first, last - first + 1))  # the lowest bits come first
    runs = np.add.reduceat((bits & 31) << shift, first)  # (R,)
    runs -= ((bits[last] & 16) >> 4) << (shift[last] + 5)  # the highest bit is the sign
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])  # undo the differences
    return runs


def even_odd(parts: list[Any], height: int, width: int) -> dict[str, Any]:
    """Run lengths of the pixels that lie inside an odd number of polygons: outlines with holes in them.

    Raises:
        DataError: a part that is no polygon.
    """
    pixels = np.zeros(height * width, bool)
    for part in parts:
        ends = np.cumsum(_runs([part], height, width, "", [])).tolist()
        for start, end in zip(ends[0::2], ends[1::2], strict=False):
            pixels[start:end] ^= True
    return packed_runs(pixels.reshape(width, height).T)


def packed_runs(mask: np.ndarray) -> dict[str, Any]:
    """Pack the pixels of a mask, (H, W) bool, into COCO's run lengths."""
    runs = reference.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": runs["counts"].decode()}
