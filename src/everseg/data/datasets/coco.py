"""Read polygons and run-length masks from COCO's JSON, and draw each mask when it is read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as reference

from everseg.config.checks import shown
from everseg.data.base import Dataset
from everseg.data.datasets.descriptor import division_of
from everseg.data.datasets.files import FileSplit
from everseg.data.datasets.listing import LeftOut, Sample
from everseg.data.datasets.options import reading_of, root_of
from everseg.errors import ConfigError, DataError, some
from everseg.labels import BACKGROUND, RawLabels, find_name, is_background_name, spelling

FILES = {
    "train": (
        "annotations/instances_train*.json",
        "train/_annotations.coco.json",
        "annotations/*train*.json",
    ),
    "val": ("annotations/instances_val*.json", "val*/_annotations.coco.json", "annotations/*val*.json"),
    "test": ("test/_annotations.coco.json",),
}
"""Where the annotations of a split are looked for."""
ONE_FILE = ("annotations.json", "_annotations.coco.json", "result.json", "annotations/instances_default.json",
            "coco.json", "annotations/*.json", "*.json")  # fmt: skip
"""Where annotations without splits are looked for."""


def build(
    root: str | Path | None = None,
    *,
    annotations: str | Mapping[str, str] | None = None,
    images: str | Mapping[str, str] | None = None,
    split: Mapping[str, Any] | None = None,
    **shared: Any,
) -> Dataset:
    """Read COCO-style annotations: `images`, `categories` and `annotations` with polygons or run lengths.

    Objects are drawn from the largest to the smallest, so that smaller ones lie on top; of equally large ones the
    later. Pixels of no object are background, id 0, and so are objects of a category with one of the background's usual
    names; the other categories are ids 1, 2, ... in the order of their own ids. A category that is only the parent of
    others, and that no object has, is left out; the notes of the data set name it.

    Args:
        root: data folder.
        annotations: JSON file, or split -> JSON file, below `root`; default those at the usual places.
        images: folder of the images, or split -> folder; default where the first image of a file is found.
        split: shares of the images that are held out where there is one file only: {val: 0.2, seed: 0}, the default.
        shared: options of all readers, see `everseg.data.datasets.options.reading_of`.

    Returns:
        The splits that have a file, in its order of the images; void 255, which no pixel has.

    Raises:
        ConfigError: no such root, or a wrong option.
        DataError: no annotations, files that are no such annotations (every fault of theirs), or images that do not
            exist.
    """
    reading = reading_of(shared)
    base = root_of(root)
    division, problems = division_of({"val": 0.2} if split is None else split)
    if problems:
        raise ConfigError([f"data.options.{problem}" for problem in problems])
    files = {name: read_file(base, path) for name, path in _files(base, annotations).items()}
    names, left_out_names = _names(files)
    position = {spelling(name): raw for raw, name in enumerate(names)}
    found: dict[str, tuple[CocoFile, list[Picture], list[Sample], list[str]]] = {}
    for name, file in files.items():
        pictures, samples, missing = _samples(base, file, _folder_option(images, name))
        left_out: list[str] = [
            LeftOut(f"{m}: no such image", m) for m in missing if (name, m) not in reading.skip
        ]
        if left_out and reading.on_missing == "stop":
            raise DataError(
                f"{file.path}: {len(left_out)} images do not exist below {base}: {some([m.sample for m in left_out])};"  # type: ignore[attr-defined]
                " name their folder with data.options.images=FOLDER, or leave them out with on_missing=skip"
            )
        if name or division is None:
            found[name or "train"] = file, pictures, samples, left_out
            continue
        for part, chosen in division.parts([s[0] for s in samples]).items():
            pick = [pictures[i] for i in chosen], [samples[i] for i in chosen]
            found[part] = file, *pick, left_out if part == "train" else []
    splits = {
        name: CocoSplit(name, base, samples, pictures, file, position, reading=reading, warnings=warnings)
        for name, (file, pictures, samples, warnings) in found.items()
    }
    notes = tuple(
        f"category '{name}' is left out: it is only the parent of other categories, and no object has it"
        for name in left_out_names
    )
    return Dataset("coco", RawLabels(dict(enumerate(names)), 0, (255,)), splits, notes)


class CocoSplit(FileSplit):
    """A split whose masks are drawn from annotations. The mask file of every sample is the JSON file."""

    def __init__(
        self,
        name: str,
        root: Path,
        samples: list[Sample],
        pictures: list[Picture],
        file: CocoFile,
        position: Mapping[str, int],
        **options: Any,
    ) -> None:
        super().__init__(name, root, samples, **options)
        by_id = dict(zip((s[0] for s in samples), pictures, strict=True))
        self._pictures = [by_id[self.id(index)] for index in range(len(self))]
        found = {key: position.get(spelling(text)) for key, text in file.categories.items()}
        self._table = {key: raw for key, raw in found.items() if raw is not None}

    def read_mask(self, index: int) -> np.ndarray:
        """Draw the mask, (H, W) uint8 raw ids, of the size that the JSON states.

        Raises:
            DataError: an object cannot be drawn. The error names all such objects of the picture.
        """
        try:
            return draw(self._pictures[index], self._table, self.reading.max_pixels)
        except DataError as error:
            raise DataError(f"{self.mask_path(index)}, image {self._pictures[index].file}: {error}") from None

    def decoding(self) -> str:
        """Describe, as text, everything except the files that determines what `read` returns."""
        return f"{super().decoding()} drawing {DRAWING}"

    def read_digested(self, index: int) -> tuple[np.ndarray, str]:
        """Draw the mask, and compute a digest of its objects and of how they are drawn."""
        return self.read_mask(index), self._mask_digest(index)

    def _mask_digest(self, index: int) -> str:
        picture = self._pictures[index]
        drawn = [DRAWING, picture.height, picture.width, picture.objects, sorted(self._table.items())]
        return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()


def _files(base: Path, given: str | Mapping[str, str] | None) -> dict[str, Path]:
    """Map each split to its file; "" stands for a file without splits."""
    if isinstance(given, str):
        return {"": base / given}
    if isinstance(given, Mapping):
        return {str(name): base / str(path) for name, path in given.items()}
    if given is not None:
        raise ConfigError(f"data.options.annotations: expected a file or split: file, got {given!r}")
    found = {name: path for name, patterns in FILES.items() if (path := _first(base, patterns)) is not None}
    if "train" in found:
        return found
    one = _first(base, ONE_FILE)
    if one is None:
        raise DataError(
            f"{base}: no COCO annotations there; name them with data.options.annotations=FILE.json"
        )
    return {"": one}


def find_annotations(base: Path) -> list[Path]:
    """Find files at the usual places that look like COCO annotations: JSON that names the three lists."""
    found = [path for patterns in FILES.values() if (path := _first(base, patterns)) is not None]
    found = found or [path for path in [_first(base, ONE_FILE)] if path is not None]
    keys = (b'"images"', b'"categories"', b'"annotations"')
    return [path for path in found if all(key in path.read_bytes() for key in keys)]


def _first(base: Path, patterns: tuple[str, ...]) -> Path | None:
    return next((p for pattern in patterns for p in sorted(base.glob(pattern)) if p.is_file()), None)


def _names(files: Mapping[str, CocoFile]) -> tuple[list[str], list[str]]:
    """List class names, background first, and the names left out: parents that no object has (Roboflow writes one)."""
    order: dict[str, int] = {}
    for file in files.values():
        for key, name in sorted(file.categories.items()):
            known = find_name(name, order) or name
            if order.setdefault(known, key) != key:
                as_it = "" if known == name else f", where it is called '{known}'"
                raise DataError(
                    f"{file.path}: category '{name}' has id {key} here and {order[known]} in another split's file"
                    f"{as_it}; export the splits with the same categories"
                )
    used = {key for file in files.values() for p in file.pictures for key, _ in p.objects}
    above = {parent for file in files.values() for parent in file.parents}
    named = [n for n in sorted(order, key=order.__getitem__) if not is_background_name(n)]
    names = [n for n in named if order[n] in used or n not in above]
    if len(names) > 254:
        raise DataError(f"{len(names)} categories; a mask holds at most 254 besides background and void")
    if not names:
        raise DataError("the annotations name no category")
    return [BACKGROUND, *names], [name for name in named if name not in names]


def _folder_option(images: str | Mapping[str, str] | None, split: str) -> str | None:
    if images is None or isinstance(images, str):
        return images
    if isinstance(images, Mapping):
        return images.get(split or "train")
    raise ConfigError(f"data.options.images: expected a folder or split: folder, got {images!r}")


def _samples(base: Path, file: CocoFile, folder: str | None) -> tuple[list[Picture], list[Sample], list[str]]:
    """Make samples of the pictures that exist, and list the names of missing pictures."""
    stem = file.path.stem.removeprefix("instances_")
    here = file.path.parent.relative_to(base).as_posix()
    places = [folder] if folder is not None else [here, "images", stem, f"images/{stem}", ""]
    prefix = next(
        (p for p in places if file.pictures and (base / p / file.pictures[0].file).exists()), places[0]
    )
    stems = [str(Path(p.file).with_suffix("")) for p in file.pictures]
    unique = len(set(stems)) == len(stems)
    pictures, samples, missing = [], [], []
    for picture, name in zip(file.pictures, stems, strict=True):
        name = name if unique else picture.file
        path = "/".join(part for part in (prefix, picture.file) if part not in ("", "."))
        if (base / path).exists() or (base / path).is_symlink():
            pictures.append(picture)
            samples.append((name, path, file.path.relative_to(base).as_posix()))
        else:
            missing.append(name)
    return pictures, samples, missing


MAX_BYTES = 2 * 2**30
"""Larger files are refused before they are parsed."""
MAX_OUTLINE = 2_000_000
"""Pixels along one polygon; of longer ones the library would take memory without asking (about 50 bytes per pixel)."""
DRAWING = 2
"""Raised whenever the same annotations give other pixels, so that nothing cached of the old ones is used."""
_SHOWN = 8
_NOT_PACKED = re.compile("[^0-o]|[P-o]{7}")
"""A character that packed run lengths do not have, or a number of more than 35 bits."""


@dataclass(frozen=True)
class Picture:
    """One image with its objects, unchanged from the file."""

    file: str
    height: int
    width: int
    objects: list[tuple[int, Any]] = field(default_factory=list)
    """(category id, segmentation)."""


@dataclass(frozen=True)
class CocoFile:
    """A checked annotation file. Shapes are checked only when they are drawn."""

    path: Path
    categories: Mapping[int, str]
    parents: frozenset[str]
    """Names that stand as supercategory."""
    pictures: list[Picture]


def read_file(base: Path, path: Path) -> CocoFile:
    """Read annotations.

    Raises:
        DataError: not below `base`, unreadable, or not in COCO's format; the error lists the first faults.
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

    Every object covers the same pixels as in pycocotools (`annToMask`), so that the annotation's `area` agrees. Memory
    never holds more pixels than those of the result.

    Args:
        table: category id -> raw id.
        max_pixels: larger pictures are refused.

    Returns:
        (H, W) uint8 raw ids, 0 where no object is.

    Raises:
        DataError: some shapes cannot be drawn; the error lists all of them.
    """
    height, width = picture.height, picture.width
    if height * width > max_pixels:
        raise DataError(f"claims {width}x{height} pixels, more than the limit of {max_pixels}")
    order, faults = [], []
    for number, (_, segmentation) in enumerate(picture.objects):
        try:
            area = int(_runs(segmentation, height, width)[1::2].sum())  # every second run is of ones
        except DataError as error:
            faults.append(f"object {number}: {error}")
        else:
            order.append((-area, number))
    if faults:
        raise DataError(some(faults, _SHOWN, "; "))
    mask = np.zeros((width, height), np.uint8)  # transposed, because the runs go down the columns
    pixels = mask.reshape(-1)  # (W * H,)
    for _, number in sorted(order):
        category, segmentation = picture.objects[number]
        # The runs are computed a second time: the runs of all objects together may need more memory than the picture.
        # A last run of 0 has no run of 1 after it.
        ends = np.cumsum(_runs(segmentation, height, width)).tolist()
        for start, end in zip(ends[0::2], ends[1::2], strict=False):
            pixels[start:end] = table[category]
    return np.ascontiguousarray(mask.T)


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
        elif item["id"] in found or find_name(item["name"], found.values()) is not None:
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


def _runs(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Lengths of alternating runs of 0 and 1, (R,) int64, beginning with 0, down the columns; they fill the picture."""
    if isinstance(segmentation, dict):
        if segmentation.get("size") != [height, width]:
            raise DataError(
                f"run lengths for the size {shown(segmentation.get('size'))}, not {[height, width]}"
            )
        return run_lengths(segmentation.get("counts") or [], height, width)
    if not isinstance(segmentation, list) or not segmentation:
        raise DataError("neither polygons nor run lengths")
    for points in segmentation:
        _check_polygon(points, height, width)
    parts = reference.frPyObjects(segmentation, height, width)
    return unpack(reference.merge(parts)["counts"].decode())


def _check_polygon(points: Any, height: int, width: int) -> None:
    """Refuse polygons that pycocotools cannot handle: it is written in C and checks little."""
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2 or not all(map(_is_number, points)):
        raise DataError("a polygon that is not at least three points x, y")
    xs, ys = points[::2], points[1::2]
    if max(xs) < 0 or max(ys) < 0 or min(xs) > width or min(ys) > height:
        raise DataError(f"a polygon outside of the image of {width}x{height}")
    corners = np.array(points, np.float64).reshape(-1, 2)
    outline = np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1).sum()
    if not outline <= MAX_OUTLINE:
        raise DataError(f"a polygon of {outline:.0f} pixels around, more than the limit of {MAX_OUTLINE}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53


def run_lengths(counts: Any, height: int, width: int) -> np.ndarray:
    """Check the run lengths of a file: a list of whole numbers, or COCO's packed text of them.

    The runs are not passed to pycocotools. If runs do not fill the picture, it draws uninitialised memory or merges
    forever.

    Returns:
        (R,) int64, alternating runs of 0 and 1, down the columns, beginning with 0.

    Raises:
        DataError: the counts are invalid, or the runs do not fill the picture exactly.
    """
    if isinstance(counts, str):
        runs = unpack(counts)
    elif isinstance(counts, list) and all(type(c) is int and abs(c) < 2**53 for c in counts):
        runs = np.array(counts, np.int64)
    else:
        raise DataError("run lengths that are no whole numbers")
    if runs.size and runs.min() < 0:
        raise DataError("a run of negative length")
    # A sum of floats cannot wrap around, and it is exact up to the size of a picture.
    total = runs.sum(dtype=np.float64)
    if total != height * width:
        raise DataError(f"runs of {total:.0f} pixels for a picture of {width}x{height}")
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
