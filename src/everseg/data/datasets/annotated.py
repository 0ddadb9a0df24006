"""Read the exports of labelling tools that store objects: labelme, Supervisely, V7, Label Studio, YOLO's polygons.

The files are parsed when the data set is opened, and each mask is drawn when it is read, as COCO's are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np

from everseg.config.yaml import read as read_yaml
from everseg.data.base import Dataset
from everseg.data.datasets import tool_files
from everseg.data.datasets.coco import CocoSplit, Item, same_ids, with_size
from everseg.data.datasets.coco_shapes import FOREIGN, Picture, packed_runs
from everseg.data.datasets.decode import Reading, open_inside, open_picture
from everseg.data.datasets.descriptor import division_of
from everseg.data.datasets.file_names import FileIndex, FileNote, split_in_name, walk, without_ending
from everseg.data.datasets.listing import LeftOut
from everseg.data.datasets.options import reading_of, root_of
from everseg.data.datasets.tool_files import Drawn
from everseg.display import counted
from everseg.errors import ConfigError, DataError, some
from everseg.files import UnreadableError, read_regular, read_text
from everseg.labels import (
    BACKGROUND,
    MOST_CLASSES,
    RawLabels,
    find_name,
    ignored_id,
    is_background_name,
    is_void_name,
    spelling,
)

TOOLS = ("labelme", "supervisely", "v7", "label-studio", "label-studio-png", "yolo")
"""The exports that are read."""
MAX_BYTES = 2 * 2**30
"""Larger files are refused before they are parsed."""
LOOKED_AT = 20
"""So many files of a folder at most are parsed to find out which tool wrote them."""
_BRUSH = re.compile(r"task-(\d+)-annotation-(\d+)-by-(.+)-tag-(.+)-(\d+)\.png")
T = TypeVar("T")
Found = tuple[str, Drawn]
"""The annotation file below the root, and what it says of one image."""


def build(
    root: str | Path | None = None,
    *,
    tool: str | None = None,
    classes: Sequence[str] | None = None,
    split: Mapping[str, Any] | None = None,
    **shared: Any,
) -> Dataset:
    """Read the polygons and bitmaps of a labelling tool's export: labelme, Supervisely, V7, Label Studio, YOLO.

    Objects are drawn in the order of the file, later ones on top, with the pixels that COCO's have. Pixels of no object
    are background; objects of a class like `ignore` are void. Lines and points have no pixels; the check names them.

    Args:
        root: data folder.
        tool: one of `TOOLS`; default what the files are.
        classes: names in the order of their ids; default background and the names that the export lists or, where it
            lists none, those of all objects in the order of the alphabet. A data.yaml should state them, so that more
            files cannot change an id.
        split: shares of the images that are held out where no folder (or tag) names a split: {val: 0.2, seed: 0}, the
            default. Given explicitly, it replaces the folders' splits.
        shared: options of all readers, see `everseg.data.datasets.options.reading_of`.

    Returns:
        The splits of the folders' names, or those cut here; void 255 (65,535 where there are more than 255 classes).

    Raises:
        ConfigError: no such root, or a wrong option.
        DataError: no such export, files that cannot be understood, images that do not exist or that two files annotate,
            classes that `classes` does not name, or images with and without a split.
    """
    reading = reading_of(shared)
    base = root_of(root)
    division, problems = division_of({"val": 0.2} if split is None else split)
    if tool is not None and tool not in TOOLS:
        problems.append(f"tool: expected one of {', '.join(TOOLS)}, got {tool!r}")
    if classes is not None and (
        not isinstance(classes, Sequence)
        or isinstance(classes, str)
        or not all(isinstance(c, str) for c in classes)
    ):
        problems.append(f"classes: expected a list of names, got {classes!r}")
    if problems:
        raise ConfigError([f"data.options.{problem}" for problem in problems])
    tool = tool or find_tool(base)
    if tool is None:
        raise DataError(f"{base}: no export of {', '.join(TOOLS)} there; name the folder that the tool wrote")
    index = FileIndex(base, follow_links=reading.follow_links)
    found, listed, said = _parsed(base, tool, index, reading)
    names = _class_list(found, listed) if classes is None else _given_classes(classes)
    raw, void = {spelling(name): number for number, name in enumerate(names)}, ignored_id(len(names))
    items, left_out, more = _items(base, found, index, reading, raw, void)
    notes = [*said, *more]
    parts = _split_up(base, items, division, split is not None)
    splits: dict[str, CocoSplit] = {}
    for number, (name, of) in enumerate(parts.items()):
        splits[name] = CocoSplit(
            name, base, of, void=void, reading=reading, warnings=left_out if number == 0 else []
        )
    background = next((i for i, name in enumerate(names) if is_background_name(name)), None)
    return Dataset(tool, RawLabels(dict(enumerate(names)), background, (void,)), splits, tuple(notes))


Parsed = tuple[list[Found], list[str], list[str]]
"""What the files of an export say of every image, the class names that it lists, and notes."""
_parsed_once: ContextVar[dict[Any, Any] | None] = ContextVar("_parsed_once", default=None)


@contextmanager
def parsing_once() -> Iterator[None]:
    """Parse every file of an export once, however often it is opened within. The files must not change meanwhile."""
    token = _parsed_once.set({})
    try:
        yield
    finally:
        _parsed_once.reset(token)


def _kept(key: Any, make: Callable[[], T]) -> T:
    """Make something, or within `parsing_once` take what was made under the same key."""
    known = _parsed_once.get()
    if known is None:
        return make()
    if key not in known:
        known[key] = make()
    return known[key]


def find_tool(base: Path) -> str | None:
    """Find out which tool's export a folder is; None if it is none of `TOOLS`."""
    pngs = (name for _, _, files in walk(base) for name in files if _BRUSH.fullmatch(name))
    for path in islice(_json_files(base), LOOKED_AT):
        if name := _kept(("tool", path), partial(_tool_of, path)):
            return name
    if next(pngs, None) is not None:
        return "label-studio-png"
    return "yolo" if _yolo_labels(base) and _is_yolo(base) else None


_KINDS: dict[str, Callable[[Any], bool]] = {
    "labelme": tool_files.is_labelme,
    "supervisely": tool_files.is_supervisely,
    "v7": tool_files.is_v7,
    "label-studio": tool_files.is_label_studio,
}


def _tool_of(path: Path) -> str:
    """The tool that wrote a file; "" if none of those known. Within `parsing_once` the content is kept."""
    try:
        content = _json(path)
    except DataError:
        return ""
    name = next((name for name, is_one in _KINDS.items() if is_one(content)), "")
    known = _parsed_once.get()
    if name and known is not None:
        known["content", path] = content
    return name


def _content(path: Path) -> Any:
    """What `_tool_of` has parsed, which is then forgotten; else parse it."""
    known = _parsed_once.get() or {}
    return known.pop(("content", path)) if ("content", path) in known else _json(path)


def _json_files(base: Path) -> Iterator[Path]:
    for here, _, files in walk(base):
        for name in sorted(files):
            if name.lower().endswith(".json") and not name.startswith("."):
                yield Path(here) / name


def _json(path: Path) -> Any:
    try:
        return json.loads(read_regular(path, MAX_BYTES))
    except UnreadableError as error:
        raise DataError(f"{path}: the annotations cannot be read ({error})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error})") from None


# ---------------------------------------------------------------- what the files say


def _parsed(base: Path, tool: str, index: FileIndex, reading: Reading) -> Parsed:
    """Parse all files of an export.

    Raises:
        DataError: files that cannot be understood; lists the first.
    """
    if tool == "yolo":
        return _yolo(base, index, reading)
    if tool == "label-studio-png":
        return _brush_pngs(base, index, reading)
    found: list[Found] = []
    faults: list[str] = []
    for path in _json_files(base):
        inside = path.relative_to(base).as_posix()
        try:
            drawn = _kept((path, tool, reading), partial(_drawn, path, tool, reading))
            if tool == "supervisely":  # its files do not name their image
                drawn = [replace(one, image=_supervisely_image(inside)) for one in drawn]
            found += [(inside, one) for one in drawn]
        except DataError as error:
            faults.append(str(error) if str(error).startswith(str(path)) else f"{path}: {error}")
    if faults:
        raise DataError(
            "\n  ".join(faults if len(faults) == 1 else [counted(len(faults), "faulty file"), *faults[:20]])
        )
    if not found:
        raise DataError(
            f"{base}: no annotation of {tool} there; name the folder that the tool wrote, or another tool"
        )
    return found, _listed_classes(base, tool), []


def _drawn(path: Path, tool: str, reading: Reading) -> list[Drawn]:
    """Parse one file; [] if the tool did not write it.

    Raises:
        DataError: it cannot be understood.
    """
    content = _content(path)
    if not _KINDS[tool](content):
        return []
    try:
        if tool == "labelme":
            return [tool_files.labelme(content, reading)]
        if tool == "supervisely":
            return [tool_files.supervisely(content, reading)]
        parse = tool_files.v7 if tool == "v7" else tool_files.label_studio
        return parse(content, reading)
    except FOREIGN as error:
        raise DataError(
            f"{path}: is not of the form that {tool} writes ({type(error).__name__}: {error}); export it again"
        ) from None


def _supervisely_image(inside: str) -> str:
    """`ds0/ann/a.jpg.json` annotates `ds0/img/a.jpg`."""
    parts = inside.removesuffix(".json").split("/")
    if len(parts) > 1 and parts[-2] == "ann":
        parts[-2] = "img"
    return "/".join(parts)


def _listed_classes(base: Path, tool: str) -> list[str]:
    """Class names that the export lists, in its order; [] if it lists none."""
    try:
        if tool == "supervisely" and (base / "meta.json").is_file():
            return [str(c["title"]) for c in _json(base / "meta.json")["classes"]]
        if tool == "labelme":
            for name in ("labels.txt", "class_names.txt", "classes.txt"):
                if (base / name).is_file():
                    lines = read_text(base / name).splitlines()
                    return [line.strip() for line in lines if line.strip()]
    except (KeyError, TypeError, UnreadableError) as error:
        raise DataError(f"{base}: the list of classes cannot be read ({error})") from None
    return []


def _yolo_yaml(base: Path) -> tuple[dict[int, str], Mapping[str, Any]] | None:
    """The names in YOLO's YAML (data.yaml, dataset.yaml, ...), id -> name, and its other keys."""
    for path in sorted([*base.glob("*.yaml"), *base.glob("*.yml")]):
        try:
            content = read_yaml(path).value
        except ConfigError:
            continue
        names = content.get("names") if isinstance(content, dict) else None
        if isinstance(names, list) and names:
            return dict(enumerate(map(str, names))), content
        if isinstance(names, dict) and names and all(type(key) is int for key in names):
            return {key: str(name) for key, name in sorted(names.items())}, content
    for name in ("classes.txt", "obj.names", "labels/classes.txt"):
        if (base / name).is_file():
            try:
                lines = read_text(base / name).splitlines()
            except UnreadableError as error:
                raise DataError(f"{base / name}: the list of classes cannot be read ({error})") from None
            return dict(enumerate(line.strip() for line in lines if line.strip())), {}
    return None


_YOLO_LINE = re.compile(r"\d+( -?\d+(\.\d+)?(e-?\d+)?){4,}")


def _yolo_labels(base: Path) -> list[str]:
    """Text files that may hold YOLO's lines: those in folders `labels`, else those beside pictures."""
    texts = [
        (Path(here) / name).relative_to(base).as_posix()
        for here, _, files in walk(base)
        for name in sorted(files)
        if name.lower().endswith(".txt") and name != "classes.txt"
    ]
    inside = [text for text in texts if "labels" in text.lower().split("/")[:-1]]
    return inside or [text for text in texts if "/" in text or _yolo_yaml(base) is not None]


def _is_yolo(base: Path) -> bool:
    """Whether text files in folders `labels`, or beside pictures, hold a class and numbers in every line."""
    looked = [base / text for text in _yolo_labels(base)[:LOOKED_AT]]
    lines = [line for path in looked for line in _yolo_text(path).splitlines()[:50] if line.strip()]
    return bool(lines) and all(_YOLO_LINE.fullmatch(" ".join(line.split())) for line in lines)


def _yolo(base: Path, index: FileIndex, reading: Reading) -> Parsed:
    known = _yolo_yaml(base)
    if known is None:
        raise DataError(
            f"{base}: YOLO's labels, but no YAML with 'names:' (and no classes.txt); put the file of the export there"
        )
    names = known[0]
    labels = {without_text(text): text for text in _yolo_labels(base)}
    found: list[Found] = []
    faults: list[str] = []
    empty: list[str] = []
    pictures = [path for path in index.paths() if not _is_mask_folder(path)]
    for path in pictures:
        place = re.sub(r"(^|/)images(?=/)", r"\1labels", without_ending(path))
        text = labels.pop(place, None) or labels.pop(without_ending(path), None)
        empty_picture = Picture(path, 0, 0)
        try:
            sized = with_size(base, path, empty_picture, reading)
            if text is None:
                empty.append(path)
                found.append((path, Drawn(path, sized.height, sized.width)))
                continue
            parse = partial(_yolo_file, base / text, names, sized.height, sized.width)
            drawn = _kept((base / text, base / path, tuple(names.items())), parse)
            found.append((text, replace(drawn, image=path)))
        except (DataError, OSError) as error:
            faults.append(f"{text or path}: {error}")
    if labels:
        faults.append(
            f"{counted(len(labels), 'label file')} without image: {some(sorted(labels.values()), 8)}"
        )
    if len(empty) == len(pictures):
        faults.append("no label file belongs to any image")
    if faults:
        raise DataError(f"{base}: " + "\n  ".join(faults[:20]))
    notes: list[str] = []
    if empty:
        images = counted(len(empty), "image", "has", "have")
        text = f"{images} no label file: all background, as YOLO takes them: {some(empty, 5)}"
        notes.append(FileNote(text))
    return found, list(names.values()), notes


def _yolo_file(path: Path, names: Mapping[int, str], height: int, width: int) -> Drawn:
    return tool_files.yolo(_yolo_text(path), names, height, width)


def _yolo_text(path: Path) -> str:
    try:
        return read_regular(path).decode("utf-8-sig", "replace")
    except UnreadableError as error:
        raise DataError(f"{path}: the labels cannot be read ({error})") from None


def without_text(name: str) -> str:
    """A text file's path without its ending."""
    return name[: -len(".txt")]


def _is_mask_folder(path: str) -> bool:
    return any(part.lower() in ("masks", "mask", "visualization", "runs") for part in path.split("/")[:-1])


def _brush_pngs(base: Path, index: FileIndex, reading: Reading) -> Parsed:
    """Read Label Studio's pictures of brushes, one for each task and label, beside images named by their tasks."""
    brushes: dict[str, list[tuple[str, str, str]]] = {}
    images: dict[str, str] = {}
    for path in index.paths():
        match = _BRUSH.fullmatch(path.rpartition("/")[2])
        if match:
            brushes.setdefault(match[1], []).append((match[4], path, match[2]))
        else:
            stem = without_ending(path.rpartition("/")[2])
            images[re.sub(r"^task-", "", stem)] = path
    faults = [
        f"task {task}: {counted(len({a for _, _, a in of}), 'annotation')}; keep the files of the one that counts"
        for task, of in brushes.items()
        if len({a for _, _, a in of}) > 1
    ]
    lonely = [task for task in brushes if task not in images]
    if lonely:
        faults.append(
            "the pictures of brushes name tasks by number and no image (task "
            f"{some(lonely, 5)}); export as JSON, which names the images and holds the brushes as well, or name every "
            "image by its task: 12.jpg"
        )
    if faults:
        raise DataError(f"{base}: " + "; ".join(faults))
    found: list[Found] = []
    for task, of in sorted(brushes.items(), key=lambda item: int(item[0])):
        objects, names, size, path = [], [], (0, 0), ""
        union = np.zeros(0, bool)
        for label, path, _ in sorted(of):
            with open_inside(base, path, follow_links=reading.follow_links) as file:
                pixels = tool_files.stored_ids(open_picture(file, base / path, reading), base / path) >= 128
            if union.size and (union.shape != pixels.shape or (union & pixels).any()):
                raise DataError(
                    f"{base / path}: overlaps another label of task {task}, and pictures do not say which lies on top; "
                    "export as JSON"
                )
            union = pixels if not union.size else union | pixels
            objects.append((label, packed_runs(pixels)))
            names.append(path)
            size = pixels.shape
        found.append((path, Drawn(images[task], size[0], size[1], objects, names)))
    return found, [], []


# ---------------------------------------------------------------- classes, images, splits


def _class_list(found: Sequence[Found], listed: Sequence[str]) -> list[str]:
    used = {name for _, drawn in found for name, _ in drawn.objects}
    order = [*listed, *sorted(used)]
    names: list[str] = []
    for name in order:
        if not is_background_name(name) and not is_void_name(name) and find_name(name, names) is None:
            names.append(name)
    if not names:
        raise DataError(
            "the annotations hold no object of any class; export images on which something is drawn"
        )
    return _given_classes(names)


def _given_classes(names: Sequence[str]) -> list[str]:
    every = list(names) if any(map(is_background_name, names)) else [BACKGROUND, *names]
    if len(every) > MOST_CLASSES:
        raise DataError(
            f"{counted(len(every), 'class')}; a mask holds up to {MOST_CLASSES}, keep fewer of them"
        )
    return every


def _items(
    base: Path,
    found: Sequence[Found],
    index: FileIndex,
    reading: Reading,
    raw: Mapping[str, int],
    void: int,
) -> tuple[list[tuple[str, Item]], list[str], list[str]]:
    """(split or "", sample with its objects) of every image that exists, warnings about the others, and notes."""
    unknown: dict[str, int] = {}
    missing: list[str] = []
    items: dict[str, tuple[str, Item]] = {}
    for file, drawn in found:
        folder = file.rpartition("/")[0]
        path = _image(drawn.image, folder, index)
        if path is None:
            missing.append(f"{drawn.image} ({file})")
            continue
        table: dict[str, int] = {}
        for name, _ in drawn.objects:
            number = (
                void if is_void_name(name) else raw.get(spelling(name), 0 if is_background_name(name) else -1)
            )
            if number < 0:
                unknown[name] = unknown.get(name, 0) + 1
            table[name] = number
        objects = [(table[name], shape) for name, shape in drawn.objects]
        picture = Picture(drawn.image, drawn.height, drawn.width, objects, drawn.names)
        picture = with_size(base, path, picture, reading)
        if path in items:
            raise DataError(
                f"{base}: {items[path][1][0][2]} and {file} both annotate {path}; keep one of them"
            )
        stated = drawn.split or split_in_name(PurePosixPath(folder, "-")) or split_in_name(
            PurePosixPath(path).parent / "-"
        )  # fmt: skip
        items[path] = stated, ((without_ending(path), path, file), picture, same_ids(objects, void))
    if unknown:
        counts = [f"{name} ({counted(count, 'object')})" for name, count in sorted(unknown.items())]
        raise DataError(
            f"{base}: classes that the list of classes does not name: {some(counts, 12)}; add them"
        )
    if missing and reading.on_missing == "stop":
        raise DataError(
            f"{base}: {counted(len(missing), 'image', 'does not exist', 'do not exist')}: {some(missing, 8)}; put "
            "them into the folder (exports of "
            "annotations alone do not hold them), or leave them out with on_missing=skip"
        )
    left_out: list[str] = [LeftOut(f"{name}: no such image", name) for name in missing]
    unused = [
        path for path in index.paths() if path not in items and not _BRUSH.fullmatch(path.rpartition("/")[2])
    ]
    notes: list[str] = []
    if unused:
        notes.append(
            FileNote(
                f"not used: {counted(len(unused), 'picture')} that no annotation names: {some(unused, 5)}"
            )
        )
    if not items:
        raise DataError(
            f"{base}: none of the annotated images is there; put them into the folder (exports of annotations alone do "
            "not hold them)"
        )
    stems = [item[0][0] for _, item in items.values()]
    if len(set(stems)) < len(stems):  # a.jpg and a.png
        items = {p: (s, ((p, *item[0][1:]), *item[1:])) for p, (s, item) in items.items()}
    return list(items.values()), left_out, notes


def _image(name: str, folder: str, index: FileIndex) -> str | None:
    """Find an image: beside its annotation, else by the end of its name."""
    name = name.replace("\\", "/")
    inside = re.sub(r"^(\./)+", "", f"{folder}/{name}" if folder else name)
    return (
        index.exact(inside)
        or index.exact(name)
        or index.find(name)
        or index.find(tool_files.without_upload(name.partition("?")[0] if "?d=" not in name else name))
    )


def _split_up(
    base: Path, items: Sequence[tuple[str, Item]], division: Any, anew: bool
) -> dict[str, list[Item]]:
    stated: dict[str, list[Item]] = {}
    for name, item in items:
        stated.setdefault(name, []).append(item)
    every = [item for _, item in items]
    if anew or set(stated) == {""}:
        if division is None:
            return {"train": every}
        return {
            part: [every[i] for i in chosen]
            for part, chosen in division.parts([i[0][0] for i in every]).items()
        }
    if "" in stated:
        lonely = [item[0][1] for item in stated[""]]
        others = " and ".join(sorted(name for name in stated if name))
        raise DataError(
            f"{base}: {counted(len(lonely), 'image', 'belongs', 'belong')} to no split, but others to {others}: "
            f"{some(lonely, 5)}; move "
            "them, or cut all images anew with split: {val: 0.2, seed: 0}"
        )
    return {name: _short(stated[name]) for name in ("train", "val", "test") if name in stated}


def _short(items: list[Item]) -> list[Item]:
    """Name the samples of a split without the folders that all of them share."""
    folders = {sample[0].rpartition("/")[0] for sample, _, _ in items}
    if len(folders) != 1 or (folder := folders.pop()) == "":
        return items
    return [((s[0][len(folder) + 1 :], *s[1:]), replace(picture), table) for s, picture, table in items]
