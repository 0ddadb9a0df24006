"""Reading and drawing one file of COCO-style annotations, every fault named (floor 2)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from everseg.config.checks import shown
from everseg.data import rle
from everseg.errors import DataError, some

MAX_BYTES = 2 * 2**30
"""Larger files are refused before they are parsed."""
MAX_COORDINATE = 1_000_000
_SHOWN = 8


@dataclass(frozen=True)
class Picture:
    """One image with its objects as they stand in the file."""

    file: str
    height: int
    width: int
    objects: list[tuple[int, Any]] = field(default_factory=list)
    """(category id, segmentation)."""


@dataclass(frozen=True)
class CocoFile:
    """A checked file; the shapes themselves are checked when they are drawn."""

    path: Path
    categories: Mapping[int, str]
    parents: frozenset[str]
    """Names that stand as supercategory."""
    pictures: list[Picture]


def read_file(base: Path, path: Path) -> CocoFile:
    """Read annotations.

    Raises:
        DataError: not below `base`, unreadable, or not of COCO's form; the first faults are listed.
    """
    try:
        path = path.resolve(strict=True)
        if not path.is_relative_to(base):
            raise DataError(f"{path}: lies outside of the data folder {base}; copy it there")
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path}: is no file, or larger than {MAX_BYTES >> 30} GB; cut it into several")
        content = json.loads(path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: the annotations cannot be read ({error})") from None
    except RecursionError:
        raise DataError(f"{path}: is nested too deeply to be annotations") from None
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error})") from None
    lists = ("images", "categories", "annotations")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in lists):
        raise DataError(
            f"{path}: is not of COCO's form: expected an object with the lists {', '.join(lists)}"
        )
    faults: list[str] = []
    categories, parents = _categories(content["categories"], faults)
    pictures = _pictures(content["images"], faults)
    for number, item in enumerate(content["annotations"]):
        image, category = (_key(item, key) for key in ("image_id", "category_id"))
        if image not in pictures:
            faults.append(f"annotations[{number}] belongs to no image of the file")
        elif category not in categories:
            faults.append(f"annotations[{number}] has the category {shown(category)}, which is not there")
        else:
            pictures[image].objects.append((category, item.get("segmentation")))
    if faults:
        raise DataError(f"{path}: {some(faults, _SHOWN, '; ')}; export the annotations again")
    return CocoFile(path, categories, parents, list(pictures.values()))


def draw(picture: Picture, table: Mapping[int, int], max_pixels: int) -> np.ndarray:
    """Draw the objects of an image from the largest to the smallest, later ones of equal size on top.

    Args:
        table: category id -> raw id.
        max_pixels: larger pictures are refused.

    Returns:
        (H, W) uint8 raw ids, 0 where no object is.

    Raises:
        DataError: shapes that cannot be drawn; all of them.
    """
    size = picture.height, picture.width
    if size[0] * size[1] > max_pixels:
        raise DataError(f"claims {size[1]}x{size[0]} pixels, more than the limit of {max_pixels}")
    shapes, faults = [], []
    for number, (category, segmentation) in enumerate(picture.objects):
        try:
            shape = _shape(segmentation, *size)
        except DataError as error:
            faults.append(f"object {number}: {error}")
            continue
        shapes.append((-int(shape.sum()), number, shape, table[category]))
    if faults:
        raise DataError(some(faults, _SHOWN, "; "))
    mask = np.zeros(size, np.uint8)
    for _, _, shape, raw in sorted(shapes, key=lambda s: s[:2]):
        mask[shape] = raw
    return mask


def _key(item: Any, name: str) -> Any:
    value = item.get(name) if isinstance(item, dict) else None
    return value if isinstance(value, int | str) else None


def _categories(items: list[Any], faults: list[str]) -> tuple[dict[int, str], frozenset[str]]:
    found: dict[int, str] = {}
    parents = set()
    for number, item in enumerate(items):
        if (
            not isinstance(item, dict)
            or type(item.get("id")) is not int
            or not isinstance(item.get("name"), str)
        ):
            faults.append(f"categories[{number}] needs a whole number as id, and a name")
        elif item["id"] in found or item["name"] in found.values():
            faults.append(
                f"categories[{number}]: id {item['id']} or name {shown(item['name'])} stands there twice"
            )
        else:
            found[item["id"]] = item["name"]
            parents.add(str(item.get("supercategory")))
    return found, frozenset(parents)


def _pictures(items: list[Any], faults: list[str]) -> dict[Any, Picture]:
    found: dict[Any, Picture] = {}
    files: set[str] = set()
    for number, item in enumerate(items):
        keys = ("id", "file_name", "height", "width")
        if not isinstance(item, dict) or any(key not in item for key in keys):
            faults.append(f"images[{number}] needs {', '.join(keys)}")
            continue
        name, sides = item["file_name"], (item["height"], item["width"])
        if (
            not isinstance(name, str)
            or not isinstance(item["id"], int | str)
            or item["id"] in found
            or name in files
        ):
            faults.append(
                f"images[{number}]: id {shown(item['id'])} or file {shown(name)} is wrong or stands there twice"
            )
        elif name.startswith("/") or "\0" in name or ".." in name.split("/") or "://" in name:
            faults.append(f"images[{number}]: file {shown(name)} leads out of the data folder")
        elif not all(type(side) is int and side > 0 for side in sides):
            faults.append(f"images[{number}] ({shown(name)}): a size of {shown(sides[1])}x{shown(sides[0])}")
        else:
            files.add(name)
            found[item["id"]] = Picture(name, *sides)
    return found


def _shape(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Draw one object, (H, W) bool."""
    if isinstance(segmentation, dict):
        if segmentation.get("size") != [height, width]:
            raise DataError(
                f"run lengths for the size {shown(segmentation.get('size'))}, not {[height, width]}"
            )
        counts = segmentation.get("counts")
        return rle.decode(counts if isinstance(counts, str) else counts or [], height, width)
    if not isinstance(segmentation, list) or not segmentation:
        raise DataError("neither polygons nor run lengths")
    picture = Image.new("1", (width, height))
    pen = ImageDraw.Draw(picture)
    for points in segmentation:
        if (
            not isinstance(points, list)
            or len(points) < 6
            or len(points) % 2
            or not all(map(_is_number, points))
        ):
            raise DataError("a polygon that is not at least three points x, y")
        if max(map(abs, points)) > MAX_COORDINATE:
            raise DataError("a polygon far outside of any image")
        xs, ys = points[::2], points[1::2]
        if max(xs) < 0 or max(ys) < 0 or min(xs) > width or min(ys) > height:
            raise DataError(f"a polygon outside of the image of {width}x{height}")
        pen.polygon(list(zip(xs, ys, strict=True)), fill=1)
    return np.asarray(picture)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
