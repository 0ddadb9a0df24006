"""Read polygons and run-length masks from COCO's JSON, and draw each mask when it is read."""

from __future__ import annotations

import hashlib
import json
import mmap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from everseg.config.checks import shown
from everseg.data.base import Dataset
from everseg.data.datasets.coco_shapes import BOXES, Picture, draw, is_empty
from everseg.data.datasets.decode import UNLIMITED, Reading, open_inside, open_picture, orientation
from everseg.data.datasets.descriptor import division_of
from everseg.data.datasets.file_names import (
    FileIndex,
    FileNote,
    parts_of,
    split_in_name,
    walk,
    without_ending,
)
from everseg.data.datasets.files import FileSplit
from everseg.data.datasets.listing import LeftOut, Sample
from everseg.data.datasets.options import reading_of, root_of
from everseg.display import counted
from everseg.errors import ConfigError, DataError, some
from everseg.files import UnreadableError, read_regular, real_path
from everseg.labels import (
    BACKGROUND,
    IGNORED,
    MOST_CLASSES,
    RawLabels,
    find_name,
    ignored_id,
    is_background_name,
    is_void_name,
    spelling,
)

Given = str | Sequence[str] | Mapping[str, str | Sequence[str]]


def build(
    root: str | Path | None = None,
    *,
    annotations: Given | None = None,
    images: str | Mapping[str, str] | None = None,
    split: Mapping[str, Any] | None = None,
    boxes: str = "void",
    **shared: Any,
) -> Dataset:
    """Read COCO-style annotations: `images`, `categories` and `annotations` with polygons or run lengths.

    Objects are drawn in the order of the file, later ones on top. Pixels of no object are background, id 0, and so are
    objects of a category with one of the background's usual names; those of a category like `ignore` are void. The
    other categories are ids 1, 2, ... in the order of their own ids. Categories of several files are one where their
    names are. A category that is only the parent of others, and that no object has, is left out; the notes of the data
    set name it.

    Args:
        root: data folder.
        annotations: JSON file, or several, or split -> file or files, below `root`. Default: all that lie in it or up
            to two folders deeper. Their names, or those of their folders, tell the split (`instances_Train.json`,
            `valid/_annotations.coco.json`); files of one split are read together. Of a split that has files called
            `instances...` only those are read. The notes name every file that is not used.
        images: folder of the images, or split -> folder. Default: beside the file, in `images`, or in a folder of the
            file's name or split; the one with the most of its images. If none has any, the ends of the names count.
        split: shares of the images that are held out where no file belongs to a split: {val: 0.2, seed: 0}, the
            default.
        boxes: what becomes of objects with a box and no shape; see `everseg.data.datasets.coco_shapes.draw`.
        shared: options of all readers, see `everseg.data.datasets.options.reading_of`.

    Returns:
        The splits that have a file, in its order of the images; background 0, void 255 (65,535 where there are more
        than 254 categories; masks then have 16 bits).

    Raises:
        ConfigError: no such root, or a wrong option.
        DataError: no annotations, files that are no such annotations (every fault of theirs), images that do not
            exist or that two files annotate, or no shape at all.
    """
    reading = reading_of(shared)
    base = root_of(root)
    division, problems = division_of({"val": 0.2} if split is None else split)
    if boxes not in BOXES:
        problems.append(f"boxes: expected {' or '.join(BOXES)}, got {boxes!r}")
    if problems:
        raise ConfigError([f"data.options.{problem}" for problem in problems])
    paths, notes = _files(base, annotations, reading.follow_links)
    files = {name: [read_file(base, path, reading) for path in of] for name, of in paths.items()}
    every = [file for of in files.values() for file in of]
    _check_shapes(base, every, boxes)
    names, more = _names(every)
    notes += more
    raw, void = {spelling(name): number for number, name in enumerate(names)}, ignored_id(len(names))
    index = FileIndex(base, follow_links=reading.follow_links)
    splits: dict[str, CocoSplit] = {}
    for name, of in files.items():
        items, warnings = _gathered(
            base, name, of, images, index, reading, raw, void, annotations is not None
        )
        parts = (
            {name: range(len(items))}
            if name or division is None
            else division.parts([s[0] for s, _, _ in items])
        )
        for part, chosen in parts.items():
            picked = [items[i] for i in chosen]
            said = warnings if part in (name, "train") else []
            splits[part or "train"] = CocoSplit(
                part or "train", base, picked, boxes=boxes, void=void, reading=reading, warnings=said
            )
    return Dataset("coco", RawLabels(dict(enumerate(names)), 0, (void,)), splits, tuple(notes))


Item = tuple[Sample, Picture, Mapping[int, int]]
"""A sample, its objects, and category id -> raw id."""


class CocoSplit(FileSplit):
    """A split whose masks are drawn from annotations. The mask file of every sample is the JSON file."""

    def __init__(
        self,
        name: str,
        root: Path,
        items: Sequence[Item],
        *,
        boxes: str = "void",
        void: int = IGNORED,
        **options: Any,
    ) -> None:
        super().__init__(name, root, [sample for sample, _, _ in items], **options)
        by_id = {sample[0]: (picture, table) for sample, picture, table in items}
        self._pictures = [by_id[self.id(index)] for index in range(len(self))]
        self._boxes, self._void = boxes, void
        self._remarks: tuple[int, list[str]] = (-1, [])

    def read_mask(self, index: int) -> np.ndarray:
        """Draw the mask, (H, W) raw ids, of the size that the JSON states; uint16 in a set of more than 254 categories.

        Raises:
            DataError: an object cannot be drawn. The error names all such objects of the picture.
        """
        picture, table = self._pictures[index]
        remarks: list[str] = []
        try:
            mask = draw(
                picture, table, self.reading.max_pixels, boxes=self._boxes, void=self._void, remarks=remarks
            )
        except DataError as error:
            raise DataError(f"{self.mask_path(index)}, image {picture.file}: {error}") from None
        self._remarks = index, remarks
        return mask

    def remarks(self, index: int) -> list[str]:
        """Say which objects of a picture are not drawn as shapes, and why.

        Raises:
            DataError: as `read_mask`.
        """
        if self._remarks[0] != index:
            self.read_mask(index)
        return self._remarks[1]

    def own_palette(self, index: int) -> tuple[bytes, dict[int, int]]:
        """Drawn masks have no palette."""
        del index
        return b"", {}

    def decoding(self) -> str:
        """Describe, as text, everything except the files that determines what `read` returns."""
        return f"{super().decoding()} drawing {DRAWING} boxes {self._boxes}{self._wide}"

    @property
    def _wide(self) -> str:
        return "" if self._void == IGNORED else f" void {self._void}"

    def read_digested(self, index: int) -> tuple[np.ndarray, str]:
        """Draw the mask, and compute a digest of its objects and of how they are drawn."""
        return self.read_mask(index), self._mask_digest(index)

    def _mask_digest(self, index: int) -> str:
        picture, table = self._pictures[index]
        drawn = [DRAWING, picture.height, picture.width, picture.objects, sorted(table.items()), self._boxes]
        drawn += [
            box for (_, shape), box in zip(picture.objects, picture.boxes, strict=False) if is_empty(shape)
        ]
        drawn += [self._wide] if self._wide else []
        return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()


# ---------------------------------------------------------------- which files


def _files(base: Path, given: Given | None, follow_links: bool) -> tuple[dict[str, list[Path]], list[str]]:
    """Map each split to its files, and name those that are not used; "" stands for files without a split."""
    if isinstance(given, Mapping):
        return {str(name): _list(base, of) for name, of in given.items()}, []
    if given is not None:
        return {"": _list(base, given)}, []
    found: dict[str, list[Path]] = {}
    for path in find_annotations(base, follow_links=follow_links):
        found.setdefault(split_in_name(PurePosixPath(path.relative_to(base).as_posix())), []).append(path)
    if not found:
        raise DataError(
            f"{base}: no COCO annotations there or up to two folders deeper (JSON with the lists "
            f"{', '.join(LISTS)}); name them with data.options.annotations=FILE.json"
        )
    notes: list[str] = []
    for name, of in found.items():
        objects = [path for path in of if path.stem.lower().startswith("instances")]
        if objects and len(objects) < len(of):
            others = [path for path in of if path not in objects]
            notes.append(_unused(base, others, f"{objects[0].relative_to(base)} holds the objects"))
            found[name] = objects
    if "" in found and len(found) > 1:
        notes.append(_unused(base, found.pop(""), f"other files belong to {' and '.join(sorted(found))}"))
    ordered = [name for name in ("", "train", "val", "test") if name in found]
    return {name: found[name] for name in ordered}, notes


def _unused(base: Path, paths: Iterable[Path], why: str) -> str:
    names = some([path.relative_to(base).as_posix() for path in paths], 8)
    return FileNote(
        f"not used: {names}; {why}. data.options.annotations={{train: [FILE, ...], val: ...}} decides"
    )


def _list(base: Path, given: Any) -> list[Path]:
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"data.options.annotations: expected a file, a list of files, or split: file or list, got {given!r}"
        )
    return [base / name for name in names]


LISTS = ("images", "categories", "annotations")
"""What COCO's JSON holds."""


def find_annotations(base: Path, *, follow_links: bool = False) -> list[Path]:
    """Find COCO annotations in a folder and up to two folders deeper: JSON that names the three lists.

    Panoptic files, whose segments lie in pictures of their own, are not among them.
    """
    found = []
    for here, folders, files in walk(base, follow_links=follow_links):
        if len(Path(here).relative_to(base).parts) > 2:
            continue
        del folders
        found += [
            Path(here) / name
            for name in sorted(files)
            if name.lower().endswith(".json") and not name.startswith(".") and looks_like(Path(here) / name)
        ]
    return sorted(found)


def looks_like(path: Path) -> bool:
    """Return whether a file is COCO annotations by its content, without reading it whole."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            head = content[:1024].lstrip(b"\xef\xbb\xbf \t\r\n")
            return (
                head[:1] == b"{"
                and all(content.find(f'"{key}"'.encode()) >= 0 for key in LISTS)
                and (content.find(b'"segments_info"') < 0 or content.find(b'"segmentation"') >= 0)
            )
    except (OSError, ValueError):  # ValueError: an empty file cannot be mapped
        return False


# ---------------------------------------------------------------- classes


def _check_shapes(base: Path, files: Sequence[CocoFile], boxes: str) -> None:
    """Refuse annotations that hold boxes only, unless they are to be drawn."""
    objects = [shape for file in files for picture in file.pictures for _, shape in picture.objects]
    if objects and boxes == "void" and all(map(is_empty, objects)):
        raise DataError(
            f"{base}: none of the {len(objects)} objects has a shape, they have boxes at most: annotations for "
            "detection. Export polygons or masks; or data.options.boxes=fill draws the boxes as the shapes"
        )


def _names(files: Sequence[CocoFile]) -> tuple[list[str], list[str]]:
    """List class names, background first, and say what was decided about categories."""
    order: dict[str, int] = {}
    notes: list[str] = []
    for file in files:
        for key, name in sorted(file.categories.items()):
            known = find_name(name, order) or name
            if order.setdefault(known, key) != key:
                as_it = "" if known == name else f", where it is called '{known}'"
                notes.append(
                    f"category '{name}' has id {key} in {file.path.name} and {order[known]} in another file"
                    f"{as_it}; it is one class, by its name"
                )
    used = {file.categories[key] for file in files for p in file.pictures for key, _ in p.objects}
    has_objects = {spelling(name) for name in used}
    above = {parent for file in files for parent in file.parents}
    named = [n for n in order if not is_background_name(n) and not is_void_name(n)]
    names = [n for n in named if spelling(n) in has_objects or n not in above]
    names.sort(key=order.__getitem__)
    if len(names) >= MOST_CLASSES:
        raise DataError(
            f"{counted(len(names), 'category')}; a mask holds up to {MOST_CLASSES - 1}, keep fewer of them"
        )
    if not names:
        raise DataError("the annotations name no category")
    notes += [
        f"category '{name}' is left out: it is only the parent of other categories, and no object has it"
        for name in named
        if name not in names
    ]
    notes += [
        f"objects of category '{name}' are void: that is its name" for name in order if is_void_name(name)
    ]
    return [BACKGROUND, *names], notes


def _table(file: CocoFile, raw: Mapping[str, int], void: int) -> dict[int, int]:
    """Category id -> raw id."""
    ids = {
        key: void if is_void_name(name) else raw.get(spelling(name)) for key, name in file.categories.items()
    }
    return {key: number for key, number in ids.items() if number is not None}


# ---------------------------------------------------------------- which images


def _gathered(
    base: Path,
    split: str,
    files: Sequence[CocoFile],
    images: str | Mapping[str, str] | None,
    index: FileIndex,
    reading: Reading,
    raw: Mapping[str, int],
    void: int,
    chosen: bool,
) -> tuple[list[Item], list[str]]:
    """Samples of all files of a split, and warnings about what is left out.

    Args:
        chosen: the user has named the files. Several drawings of one image then lie over one another.
    """
    gathered: dict[str, tuple[str, Picture, Mapping[int, int], CocoFile]] = {}
    warnings: list[str] = []
    shared: dict[tuple[Path, Path], list[str]] = {}
    for file in files:
        table = _table(file, raw, void)
        places = _places(base, file, split, _folder_option(images, split), index)
        try:
            paths, prefix = _paths(base, file, places, index)
        except DataError as error:
            raise DataError(f"{file.path}: {error}") from None
        missing = [p.file for p, path in zip(file.pictures, paths, strict=True) if path is None]
        left_out = [
            LeftOut(f"{name}: no such image", without_ending(name))
            for name in missing
            if (split or "train", without_ending(name)) not in reading.skip
        ]
        if left_out and reading.on_missing == "stop":
            looked = some([str(base / place) for place in dict.fromkeys(places)], 6)
            raise DataError(
                f"{file.path}: {counted(len(left_out), 'image', 'does not exist', 'do not exist')}: "
                f"{some([m.sample for m in left_out])}; looked in "
                f"{looked}, and for the ends of their names in all of {base if prefix is None else base / prefix}. "
                "Name their folder with data.options.images=FOLDER, or leave them out with on_missing=skip"
            )
        warnings += [*left_out, *file.warnings]
        for picture, path in zip(file.pictures, paths, strict=True):
            if path is None:
                continue
            picture = with_size(base, path, picture, reading)
            name = (
                path
                if prefix in (None, "") or not path.startswith(f"{prefix}/")
                else path[len(str(prefix)) + 1 :]
            )
            if path not in gathered:
                gathered[path] = name, picture, table, file
                continue
            _, before, old_table, other = gathered[path]
            shared.setdefault((other.path, file.path), []).append(path)
            gathered[path] = name, *_over(before, old_table, picture, table, void), other
    if shared and not chosen:
        both, paths_of_both = next(iter(shared.items()))
        one_name, other_name = (path.relative_to(base).as_posix() for path in both)
        raise DataError(
            f"{base}: {one_name} and {other_name} both annotate {counted(len(paths_of_both), 'image')}: "
            f"{some(paths_of_both, 5)}. "
            f"If only one file counts: data.options.annotations={one_name}. If each holds a part of the objects, to be "
            f"drawn over one another: data.options.annotations=[{one_name}, {other_name}]"
        )
    stems = [without_ending(name) for name, *_ in gathered.values()]
    ids = stems if len(set(stems)) == len(stems) else [without_ending(path) for path in gathered]
    if len(set(ids)) != len(ids):
        ids = list(gathered)
    return [
        (
            (unicodedata.normalize("NFC", name), path, file.path.relative_to(base).as_posix()),
            picture,
            table,
        )
        for name, (path, (_, picture, table, file)) in zip(ids, gathered.items(), strict=True)
    ], warnings


def _over(
    before: Picture, old: Mapping[int, int], after: Picture, new: Mapping[int, int], void: int
) -> tuple[Picture, Mapping[int, int]]:
    """Put the objects of one drawing over those of another of the same image."""
    if (before.height, before.width) != (after.height, after.width):
        raise DataError(f"{after.file}: two annotation files give it different sizes; keep the right one")
    objects = [
        *((old[key], shape) for key, shape in before.objects),
        *((new[key], shape) for key, shape in after.objects),
    ]
    joined = replace(
        before,
        objects=objects,
        names=[*before.names, *after.names],
        boxes=[*before.boxes, *after.boxes],
    )
    return joined, same_ids(objects, void)


def same_ids(objects: Sequence[tuple[int, Any]], void: int) -> Mapping[int, int]:
    """The table id -> raw id of objects whose ids are the raw ones already."""
    if void == IGNORED:  # all ids of a byte, which digests of earlier versions hold
        return _BYTES
    return {number: number for number, _ in objects}


_BYTES = {number: number for number in range(IGNORED + 1)}


def _folder_option(images: str | Mapping[str, str] | None, split: str) -> str | None:
    if images is None or isinstance(images, str):
        return images
    if isinstance(images, Mapping):
        return images.get(split or "train")
    raise ConfigError(f"data.options.images: expected a folder or split: folder, got {images!r}")


def _places(base: Path, file: CocoFile, split: str, folder: str | None, index: FileIndex) -> list[str]:
    """Folders in which the images of a file may be, the nearest first."""
    if folder is not None:
        return [folder.strip("/")]
    stem = file.path.stem.removeprefix("instances_")
    above = file.path.parent.relative_to(base).parts
    near = ["/".join(above[:count]) for count in range(len(above), -1, -1)]
    places = [
        "/".join(part for part in (here, inside) if part)
        for here in near
        for inside in ("", "images", stem, f"images/{stem}")
    ]
    return [
        *places,
        *(f for f in index.folders() if split and split_in_name(PurePosixPath(f) / "_") == split),
    ]


def _paths(
    base: Path, file: CocoFile, places: Sequence[str], index: FileIndex
) -> tuple[list[str | None], str | None]:
    """Path of every picture, None where there is none, and the folder that most of them are in.

    Where a folder holds some of them, the others are looked for in that folder only: a file of the same name elsewhere
    may be another picture.
    """
    entries = ["/".join(part for part in parts_of(p.file) if part != "..") for p in file.pictures]

    def at(place: str, entry: str) -> str | None:
        path = f"{place}/{entry}" if place else entry
        found = index.exact(path)
        if found is None and ((base / path).is_symlink() or (base / path).exists()):
            return path  # a linked folder; opening the file says whether it may be used
        return found

    # A few of them, spread over the file, tell the folder; only where none does all are looked for in all folders.
    few = entries[:: max(1, len(entries) // _FEW)]
    hits = {place: sum(at(place, entry) is not None for entry in few) for place in dict.fromkeys(places)}
    if not any(hits.values()) and len(few) < len(entries):
        hits = {place: sum(at(place, entry) is not None for entry in entries) for place in hits}
    prefix = max(hits, key=hits.__getitem__)
    if not hits[prefix]:
        below = places[0] if len(places) == 1 else ""
        return [index.find(entry, below) for entry in entries], None
    found = [at(prefix, entry) for entry in entries]
    return [
        path if path is not None else index.find(entry, prefix, whole=True)
        for path, entry in zip(found, entries, strict=True)
    ], prefix


def with_size(base: Path, path: str, picture: Picture, reading: Reading) -> Picture:
    """Take the size from the image itself where the file does not give it."""
    if picture.height and picture.width:
        return picture
    with open_inside(base, path, follow_links=reading.follow_links) as file:
        opened = open_picture(file, base / path, UNLIMITED)
        width, height = opened.size
        if reading.exif == "apply" and orientation(opened) > 4:
            width, height = height, width
    return replace(picture, height=height, width=width)


# ---------------------------------------------------------------- one file

_FEW = 200
MAX_BYTES = 2 * 2**30
"""Larger files are refused before they are parsed."""
DRAWING = 3
"""Raised whenever the same annotations give other pixels, so that nothing cached of the old ones is used."""
_SHOWN = 8


@dataclass(frozen=True)
class CocoFile:
    """A checked annotation file. Shapes are checked only when they are drawn."""

    path: Path
    categories: Mapping[int, str]
    parents: frozenset[str]
    """Names that stand as supercategory."""
    pictures: list[Picture]
    warnings: tuple[str, ...] = ()
    """What is left out of the file."""


def read_file(base: Path, path: Path, reading: Reading | None = None) -> CocoFile:
    """Read annotations.

    Args:
        reading: with its `on_missing` "skip", annotations of images that the file does not list are left out.

    Raises:
        DataError: not below `base`, unreadable, or not in COCO's format; the error lists the first faults.
    """
    reading = reading or Reading()
    content = read_json(base, path, reading)
    if not path.is_relative_to(base):
        path = real_path(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in LISTS):
        raise DataError(
            f"{path}: does not look like COCO annotations: expected an object with the lists {', '.join(LISTS)}"
        )
    faults: list[str] = []
    warnings: list[str] = []
    categories, parents = _categories(content["categories"], faults)
    pictures = _pictures(content["images"], faults)
    for number, item in enumerate(content["annotations"]):
        image, category = (_key(item, key) for key in ("image_id", "category_id"))
        if image not in pictures:
            said = f"annotations[{number}] belongs to no image of the file"
            (warnings if reading.on_missing == "skip" else faults).append(said)
        elif category not in categories:
            faults.append(f"annotations[{number}] has the category {shown(category)}, which is not there")
        else:
            picture = pictures[image]
            picture.objects.append((category, item.get("segmentation")))
            picture.names.append(
                f"annotation {shown(item['id'])}" if "id" in item else f"annotations[{number}]"
            )
            picture.boxes.append(item.get("bbox") or None)
    if faults:
        raise DataError(f"{path}: {some(faults, _SHOWN, '; ')}; export the annotations again")
    if warnings:
        warnings = [f"{path}: left out: {some(warnings, _SHOWN, '; ')}"]
    return CocoFile(path, categories, parents, list(pictures.values()), tuple(warnings))


def read_json(base: Path, path: Path, reading: Reading) -> Any:
    """Parse a JSON file of annotations.

    Raises:
        DataError: not below `base` (unless links are followed), too large, unreadable, or no JSON.
    """
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(base) and not reading.follow_links:
            raise DataError(
                f"{path}: lies outside of the data folder {base}; copy it there, or set data.options.follow_links=true"
            )
        if not real.is_file() or real.stat().st_size > MAX_BYTES:
            raise DataError(
                f"{path}: is not a file, or is larger than {MAX_BYTES >> 30} GB; cut it into several"
            )
        return json.loads(read_regular(real, MAX_BYTES))
    except (OSError, RuntimeError, UnreadableError) as error:
        if isinstance(error, RecursionError):
            raise DataError(f"{path}: is nested too deeply to be annotations") from None
        raise DataError(f"{path}: the annotations cannot be read ({error})") from None
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error})") from None


def _key(item: Any, key: str) -> Any:
    value = item.get(key) if isinstance(item, dict) else None
    return value if isinstance(value, int | float | str) else None


def _categories(items: list[Any], faults: list[str]) -> tuple[dict[int, str], frozenset[str]]:
    found: dict[int, str] = {}
    parents = set()
    for number, item in enumerate(items):
        key = _whole(item.get("id")) if isinstance(item, dict) else None
        if key is None or not isinstance(item.get("name"), str):
            faults.append(f"categories[{number}] needs a whole number as id, and a name")
        elif key in found or find_name(item["name"], found.values()) is not None:
            faults.append(
                f"categories[{number}]: id {item['id']} or name {shown(item['name'])} appears twice"
            )
        else:
            found[key] = item["name"]
            parents.add(str(item.get("supercategory")))
    return found, frozenset(parents)


def _pictures(items: list[Any], faults: list[str]) -> dict[Any, Picture]:
    found: dict[Any, Picture] = {}
    files: set[str] = set()
    for number, item in enumerate(items):
        if not isinstance(item, dict) or any(key not in item for key in ("id", "file_name")):
            faults.append(f"images[{number}] needs id and file_name")
            continue
        name, sides = item["file_name"], [item.get(side, 0) for side in ("height", "width")]
        lengths = [_whole(side) for side in sides]
        if (
            not isinstance(name, str)
            or not isinstance(item["id"], int | float | str)
            or item["id"] in found
            or name in files
        ):
            faults.append(
                f"images[{number}]: id {shown(item['id'])} or file {shown(name)} is wrong or appears twice"
            )
        elif "\0" in name or not parts_of(name) or ".." in parts_of(name):
            faults.append(f"images[{number}]: file {shown(name)} leads out of the data folder")
        elif any(
            length is None or length < 0 or (key in item and length == 0)
            for key, length in zip(("height", "width"), lengths, strict=True)
        ):
            faults.append(f"images[{number}] ({shown(name)}): a size of {shown(sides[1])}x{shown(sides[0])}")
        else:
            files.add(name)
            found[item["id"]] = Picture(name, lengths[0] or 0, lengths[1] or 0)
    return found


def _whole(value: Any) -> int | None:
    """A whole number, which some exports write as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) >= 2**53:
        return None
    return int(value) if value == int(value) else None
