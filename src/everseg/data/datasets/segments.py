"""Read releases of Segments.ai: JSON with the objects of every sample, beside the files that its SDK stores.

A bitmap holds objects by number, and the JSON says which class each object is. Releases of polygons need no bitmaps.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from everseg.config.checks import shown
from everseg.data.base import Dataset, Split
from everseg.data.datasets.coco import MAX_BYTES, CocoSplit, read_json, same_ids, with_size
from everseg.data.datasets.coco_shapes import FOREIGN, Picture, is_point
from everseg.data.datasets.decode import Reading, open_inside, open_picture
from everseg.data.datasets.descriptor import division_of
from everseg.data.datasets.file_names import SPLITS, FileIndex, FileNote, walk, without_ending
from everseg.data.datasets.files import FileSplit
from everseg.data.datasets.listing import LeftOut
from everseg.data.datasets.numbered import annotated_objects, classes_of, numbers
from everseg.data.datasets.options import reading_of, root_of
from everseg.display import counted
from everseg.errors import ConfigError, DataError, some
from everseg.files import UnreadableError, read_regular
from everseg.labels import (
    BACKGROUND,
    MOST_CLASSES,
    RawLabels,
    doubled,
    ignored_id,
    is_background_name,
    is_void_name,
)

BITMAPS = ("segmentation-bitmap", "segmentation-bitmap-highres")
VECTORS = ("vector", "bboxes", "keypoints")
LABELSET = "ground-truth"
_WORDS = (b'"samples"', b'"labels"', b'"task_attributes"')


def build(
    root: str | Path | None = None,
    *,
    release: str | None = None,
    labelset: str = LABELSET,
    split: Mapping[str, Any] | None = None,
    **shared: Any,
) -> Dataset:
    """Read a release of Segments.ai whose images (and bitmaps, `NAME_label_LABELSET.png`) lie below the root.

    Pixels of no object are background, id 0; the categories are ids 1, 2, ... in the order of their own ids. Objects of
    a category like `ignore` are void.

    Args:
        root: data folder.
        release: the release's JSON below `root`; default the only one there.
        labelset: the labels that count.
        split: shares of the images that are held out where the samples' metadata name no `split`: {val: 0.2, seed: 0},
            the default. Given explicitly, it replaces those splits.
        shared: options of all readers, see `everseg.data.datasets.options.reading_of`.

    Returns:
        The splits of the metadata, or those cut here; void 255 (65,535 where there are more than 255 classes).

    Raises:
        ConfigError: no such root, or a wrong option.
        DataError: no release or several, one of another task or form, missing images or bitmaps; names all.
    """
    reading = reading_of(shared)
    base = root_of(root)
    division, problems = division_of({"val": 0.2} if split is None else split)
    if problems:
        raise ConfigError([f"data.options.{problem}" for problem in problems])
    file = _release_file(base, release, reading)
    content = read_json(base, file, reading)
    categories, samples, task = _content(file, content)
    names, raw = _classes(file, categories)
    void = ignored_id(len(names))
    raw = {key: void if number < 0 else number for key, number in raw.items()}
    index = FileIndex(base, follow_links=reading.follow_links)
    found, left_out, notes = _found(base, file, samples, labelset, task in BITMAPS, index, reading)
    shapes = [_shape(entry) for one in found for entry in one.objects]
    if task in VECTORS and not any(shapes):
        raise DataError(f"{file}: none of the {len(shapes)} objects is a polygon; export polygons or bitmaps")
    unknown = sorted({c for one in found for c in one.categories} - raw.keys())
    if unknown:
        raise DataError(
            f"{file}: objects have categories that it does not list: {some(list(map(str, unknown)), 8)}"
        )
    stated = {one.split for one in found}
    if split is None and "" not in stated:
        parts = {name: [one for one in found if one.split == name] for name in ("train", "val", "test")}
    elif division is None:
        parts = {"train": list(found)}
    else:
        chosen = division.parts([one.id for one in found])
        parts = {name: [found[i] for i in of] for name, of in chosen.items()}
    splits: dict[str, Split] = {}
    for name, of in parts.items():
        if of:
            warnings = [] if splits else left_out
            splits[name] = _split(name, base, file, of, raw, void, task in BITMAPS, reading, warnings)
    labels = RawLabels(dict(enumerate(names)), 0, (void,))
    return Dataset("segments", labels, splits, tuple(notes))


def find_releases(base: Path, *, follow_links: bool = False) -> list[Path]:
    """Find the releases in a folder and its folders: JSON that names samples, their labels and task attributes."""
    return sorted(
        Path(here) / name
        for here, _, files in walk(base, follow_links=follow_links)
        for name in files
        if name.lower().endswith(".json") and not name.startswith(".") and _looks_like(Path(here) / name)
    )


def category_names(path: Path) -> list[tuple[int, str]]:
    """Id and name of the categories of a release; [] if the file is none."""
    try:
        return _content(path, json.loads(read_regular(path, MAX_BYTES)))[0]
    except (ValueError, RecursionError, UnreadableError, DataError):
        return []


def _looks_like(path: Path) -> bool:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return all(content.find(word) >= 0 for word in _WORDS)
    except (OSError, ValueError):  # ValueError: an empty file cannot be mapped
        return False


def _release_file(base: Path, given: str | None, reading: Reading) -> Path:
    if given is not None:
        return base / given
    releases = find_releases(base, follow_links=reading.follow_links)
    if len(releases) != 1:
        shown = some([path.relative_to(base).as_posix() for path in releases], 5)
        raise DataError(
            f"{base}: {counted(len(releases), 'release')} of Segments.ai there{f' ({shown})' if releases else ''}; "
            "name the one "
            "that counts with data.options.release=FILE.json"
        )
    return releases[0]


@dataclass(frozen=True)
class _Sample:
    """A labelled sample whose files are there."""

    id: str
    image: str
    """Path below the root."""
    bitmap: str
    """Path of the picture of objects by number; "" for polygons."""
    objects: Sequence[Mapping[str, Any]]
    split: str

    @property
    def categories(self) -> set[int]:
        return {int(entry["category_id"]) for entry in self.objects}


def _content(file: Path, content: Any) -> tuple[list[tuple[int, str]], list[Any], str]:
    """Categories, samples and the kind of task of a release."""
    try:
        dataset = content["dataset"]
        categories = [(int(c["id"]), str(c["name"])) for c in dataset["task_attributes"]["categories"]]
        samples, task = list(dataset["samples"]), str(dataset.get("task_type") or BITMAPS[0])
    except FOREIGN:
        raise DataError(
            f"{file}: is not a release of Segments.ai (dataset with samples and task_attributes.categories)"
        ) from None
    if task not in (*BITMAPS, *VECTORS):
        raise DataError(f"{file}: labels of the kind {task}; release segmentations or polygons of images")
    return categories, samples, task


def _classes(file: Path, categories: Sequence[tuple[int, str]]) -> tuple[list[str], dict[int, int]]:
    """Class names in the order of their raw ids, and category id -> raw id; -1 for void."""
    if twice := doubled(dict(categories)):
        called = dict(categories)
        raise DataError(
            f"{file}: categories {some([f'{called[a]} ({a}, {b})' for a, b in twice], 8)} stand there twice"
        )
    names, raw = [BACKGROUND], dict[int, int]()
    for key, name in sorted(categories):
        if is_void_name(name):
            raw[key] = -1
        elif is_background_name(name):
            raw[key] = 0
        else:
            raw[key] = len(names)
            names.append(name)
    if len(names) < 2:
        raise DataError(f"{file}: names no category")
    if len(names) > MOST_CLASSES:
        raise DataError(
            f"{file}: {counted(len(names), 'class')}; a mask holds up to {MOST_CLASSES}, keep fewer of them"
        )
    return names, raw


def _found(
    base: Path,
    file: Path,
    samples: Sequence[Any],
    labelset: str,
    bitmaps: bool,
    index: FileIndex,
    reading: Reading,
) -> tuple[list[_Sample], list[str], list[str]]:
    """The labelled samples with their files, warnings about samples left out, and notes."""
    found: dict[str, _Sample] = {}
    faults: list[str] = []
    missing: list[tuple[str, str]] = []
    open_ones: list[str] = []
    folder = file.parent.relative_to(base).as_posix()
    for number, sample in enumerate(samples):
        try:
            name = str(sample["name"])
            stem = without_ending(name)
            image = stem + _ending(sample["attributes"]["image"]["url"], name)
            label = (sample.get("labels") or {}).get(labelset)
            if not label:
                open_ones.append(name)
                continue
            objects = label["attributes"]["annotations"]
            if annotated_objects(objects) is None:
                raise KeyError
            given = (label["attributes"].get("segmentation_bitmap") or {}).get("url") or ".png"
            bitmap = f"{stem}_label_{labelset}{_ending(given, '.png')}"
            metadata = sample.get("metadata") or {}
        except FOREIGN:
            faults.append(f"samples[{number}] has no name, image or annotations with id and category_id")
            continue
        at = "" if folder == "." else f"{folder}/"
        path = index.exact(at + image) or index.exact(image) or index.find(image)
        if path is None:
            missing.append((image, stem))
            continue
        beside = f"{path.rpartition('/')[0]}/{bitmap.rpartition('/')[2]}".lstrip("/")
        drawn = (index.exact(beside) or index.find(bitmap)) if bitmaps else ""
        if drawn is None:
            missing.append((bitmap, stem))
            continue
        if path in found:
            faults.append(f"samples[{number}] ({name}) is the image of another sample: {path}")
        stated = metadata.get("split") if isinstance(metadata, Mapping) else None
        found[path] = _Sample(without_ending(path), path, drawn, objects, SPLITS.get(str(stated).lower(), ""))
    if faults:
        raise DataError(f"{file}: {some(faults, 8, '; ')}; export the release again")
    if missing and reading.on_missing == "stop":
        raise DataError(
            f"{file}: images or bitmaps that do not exist: {some([name for name, _ in missing], 8)}; the SDK "
            "stores them: SegmentsDataset(RELEASE); or leave them out with on_missing=skip"
        )
    left_out: list[str] = [LeftOut(f"{name}: no such file", stem) for name, stem in missing]
    if not found:
        raise DataError(f"{file}: no sample with labels of '{labelset}' has its files below {base}")
    text = f"{counted(len(open_ones), 'sample')} without label: {some(open_ones, 5)}"
    return list(found.values()), left_out, [FileNote(f"not used: {text}")] if open_ones else []


def _ending(address: str, default: str) -> str:
    path = urlsplit(address).path.rpartition("/")[2]
    return f".{path.rpartition('.')[2]}" if "." in path else f".{default.rpartition('.')[2]}"


def _split(
    name: str,
    base: Path,
    file: Path,
    samples: Sequence[_Sample],
    raw: Mapping[int, int],
    void: int,
    bitmaps: bool,
    reading: Reading,
    warnings: Sequence[str],
) -> FileSplit:
    if bitmaps:
        classes = {one.id: {int(o["id"]): raw[int(o["category_id"])] for o in one.objects} for one in samples}
        files = [(one.id, one.image, one.bitmap) for one in samples]
        return BitmapSplit(name, base, files, classes, void, reading=reading, warnings=warnings)
    items = []
    for one in samples:
        objects = [(raw[int(o["category_id"])], _shape(o)) for o in one.objects]
        called = [f"annotation {o['id']}" for o in one.objects]
        picture = with_size(base, one.image, Picture(one.image, 0, 0, objects, called), reading)
        sample = (one.id, one.image, file.relative_to(base).as_posix())
        items.append((sample, replace(picture), same_ids(objects, void)))
    return CocoSplit(name, base, items, void=void, reading=reading, warnings=warnings)


def _shape(entry: Mapping[str, Any]) -> Any:
    """The polygon of an object; [] for lines and points. A box stays one, which is none of its object's pixels."""
    points = entry.get("points")
    if entry.get("type") != "polygon" or not isinstance(points, list):
        return []
    if not all(map(is_point, points)):
        raise DataError(
            f"annotation {shown(entry.get('id'))}: its points are not pairs of numbers; export the release again"
        )
    return [[float(v) for point in points for v in point]]


class BitmapSplit(FileSplit):
    """A split whose masks are pictures of objects by number."""

    def __init__(
        self,
        name: str,
        root: Path,
        samples: Sequence[tuple[str, ...]],
        classes: Mapping[str, Mapping[int, int]],
        void: int,
        **options: Any,
    ) -> None:
        super().__init__(name, root, samples, **options)
        self._classes = [classes[self.id(index)] for index in range(len(self))]
        self._largest = void

    def read_mask(self, index: int) -> np.ndarray:
        """Decode the mask, (H, W) raw ids.

        Raises:
            DataError: missing, unreadable, or an object that the release does not list.
        """
        relative = self._sample(index)[2]
        shown = self.root / relative
        with open_inside(self.root, relative, follow_links=self.reading.follow_links) as file:
            found = numbers(open_picture(file, shown, self.reading), shown)
        return classes_of(found, self._classes[index], shown, self._largest, background=True)

    def own_palette(self, index: int) -> tuple[bytes, dict[int, int]]:
        """Colours of objects by number say nothing about classes."""
        del index
        return b"", {}

    def decoding(self) -> str:
        """Describe as text everything besides the files that decides what `read` returns."""
        every = json.dumps([sorted(classes.items()) for classes in self._classes])
        return f"{super().decoding()} objects {hashlib.sha256(every.encode()).hexdigest()}"

    def read_digested(self, index: int) -> tuple[np.ndarray, str]:
        """Decode the mask, and compute a digest of its file and of the objects' classes."""
        return self.read_mask(index), self._mask_digest(index)

    def _mask_digest(self, index: int) -> str:
        classes = json.dumps(sorted(self._classes[index].items()))
        return hashlib.sha256(f"{super()._mask_digest(index)}{classes}".encode()).hexdigest()
