"""Read polygon annotations of Cityscapes and IDD with all checks, and draw them as their own tools do."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from everseg.config.checks import shown
from everseg.display import counted
from everseg.errors import DataError, some

MAX_BYTES = 16 * 2**20
"""Larger polygon files are refused before they are parsed; real ones have less than 1 MB."""
MAX_PIXELS = 100_000_000
"""Larger images are refused before anything is drawn."""
MAX_COORDINATE = 1_000_000
"""Vertices may lie outside the image, but not farther out than this."""
_SHOWN = 5


@dataclass(frozen=True)
class Polygon:
    """One object of an annotation."""

    label: str
    points: tuple[tuple[float, float], ...]
    """(x, y) in pixels, x to the right, y down; may lie outside the image."""
    deleted: bool = False


@dataclass(frozen=True)
class Annotation:
    """The content of one polygon file."""

    width: int
    height: int
    polygons: tuple[Polygon, ...]
    """In the order of the file; later ones cover earlier ones."""


def parse(text: bytes) -> Annotation:
    """Read a polygon file: `{"imgHeight": h, "imgWidth": w, "objects": [{"label": ..., "polygon": [[x, y], ...]}]}`.

    An object is deleted if it has a `deleted` that is true or not 0. Its other keys are ignored.

    Raises:
        DataError: any other content, also sizes and coordinates that cannot be meant; lists the first faults.
    """
    if len(text) > MAX_BYTES:
        raise DataError(f"{counted(len(text), 'byte')}, more than the limit of {MAX_BYTES} for polygon files")
    try:
        content = json.loads(text)
    except RecursionError:
        raise DataError("is nested too deeply to be an annotation") from None
    except ValueError as error:
        raise DataError(f"is not JSON ({error})" if text.strip() else "is empty") from None
    if not isinstance(content, dict):
        raise DataError(f"holds {_kind(content)}, expected an object with imgHeight, imgWidth and objects")
    missing = [key for key in ("imgHeight", "imgWidth", "objects") if key not in content]
    if missing:
        raise DataError(f"lacks {', '.join(missing)}")
    faults = [
        f"{key} is {shown(content[key])}, expected a number of pixels"
        for key in ("imgHeight", "imgWidth")
        if not _is_number(content[key]) or content[key] != int(content[key]) or content[key] < 1
    ]
    if not faults and content["imgHeight"] * content["imgWidth"] > MAX_PIXELS:
        size = f"{shown(content['imgWidth'])}x{shown(content['imgHeight'])}"
        faults.append(f"claims an image of {size}, more than the limit of {MAX_PIXELS} pixels")
    polygons: list[Polygon] = []
    if isinstance(content["objects"], list):
        for number, item in enumerate(content["objects"]):
            found = _polygon(item)
            if isinstance(found, str):
                faults.append(f"objects[{number}] {found}")
            else:
                polygons.append(found)
    else:
        faults.append(f"objects is {_kind(content['objects'])}, expected a list")
    if faults:
        raise DataError(some(faults, _SHOWN, "; "))
    return Annotation(int(content["imgWidth"]), int(content["imgHeight"]), tuple(polygons))


def draw(
    annotation: Annotation,
    values: Mapping[str, int | None],
    *,
    background: int,
    least_points: int = 2,
    skip_unknown: bool = False,
) -> Image.Image:
    """Draw an annotation as json2labelImg of cityscapesScripts and of IDD's public code do.

    Polygons are filled in the order of the file, border pixels included (Pillow's rasterisation, which cuts
    fractions of coordinates off). A label "...group" that `values` does not know counts as the label before "group".

    Args:
        values: label -> pixel value; None: known, but never drawn.
        background: value of pixels that no polygon covers.
        least_points: >= 2; polygons of fewer points are left out. IDD's tool leaves out those of 1 and 2;
            Cityscapes' draws those of 2 as a line and stops at one of 1.
        skip_unknown: leave out polygons of unknown labels, as IDD's tool does since 2022, instead of refusing them.

    Returns:
        Image of mode "L" and the annotation's size.

    Raises:
        DataError: unknown labels (all of them), unless deleted or left out for their points.
    """
    picture = Image.new("L", (annotation.width, annotation.height), background)
    pen = ImageDraw.Draw(picture)
    unknown: list[str] = []
    for polygon in annotation.polygons:
        if polygon.deleted or len(polygon.points) < least_points:
            continue
        # "cargroup" is a group of cars whose members were not told apart. A label that really ends so is known whole.
        label = polygon.label
        if label not in values:
            label = label.removesuffix("group")
        if label not in values:
            unknown.append(polygon.label)
            continue
        value = values[label]
        if value is not None:
            pen.polygon(polygon.points, fill=value)  # over what earlier polygons drew
    if unknown and not skip_unknown:
        labels = some([shown(label) for label in dict.fromkeys(unknown)], _SHOWN, "; ")
        raise DataError(f"holds labels that are not of this data set: {labels}")
    return picture


def _polygon(item: Any) -> Polygon | str:
    """Read an object of the file; return it, or a description of what is wrong with it."""
    if not isinstance(item, dict):
        return f"is {_kind(item)}, expected an object with label and polygon"
    missing = [key for key in ("label", "polygon") if key not in item]
    if missing:
        return f"lacks {' and '.join(missing)}"
    label, points, deleted = item["label"], item["polygon"], item.get("deleted")
    if not isinstance(label, str):
        return f"has the label {shown(label)}, expected a name"
    if not isinstance(points, list):
        return f"({shown(label)}): polygon is {_kind(points)}, expected a list of points"
    for number, point in enumerate(points):
        if not isinstance(point, list) or len(point) != 2 or not all(_is_number(v) for v in point):
            return f"({shown(label)}): point {number} is {shown(point)}, expected [x, y]"
        if max(map(abs, point)) > MAX_COORDINATE:
            return f"({shown(label)}): point {number} is {shown(point)}, far outside of any image"
    if not (deleted is None or isinstance(deleted, (bool, int, float))):
        return f"({shown(label)}): deleted is {shown(deleted)}, expected 0 or 1"
    return Polygon(label, tuple((x, y) for x, y in points), bool(deleted))


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number; true and false are none."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
