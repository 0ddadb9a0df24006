"""Polygons and run-length masks in COCO's JSON, drawn as they are read (floor 2)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from everseg.data.base import Dataset
from everseg.data.datasets.coco_file import CocoFile, Picture, draw, read_file
from everseg.data.datasets.division import division_of
from everseg.data.datasets.files import FileSplit
from everseg.data.datasets.listing import LeftOut, Sample
from everseg.data.datasets.options import reading_of, root_of
from everseg.errors import ConfigError, DataError, some
from everseg.labels import RawLabels

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
    later. Pixels of no object are background, id 0; the categories are ids 1, 2, ... in the order of their own ids.

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
    names = _names(files)
    position = {name: raw for raw, name in enumerate(names)}
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
    return Dataset("coco", RawLabels(dict(enumerate(names)), 0, (255,)), splits)


class CocoSplit(FileSplit):
    """A split whose masks are drawn from annotations; the file of a mask is the JSON."""

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
        self._table = {key: position[text] for key, text in file.categories.items() if text in position}

    def read_mask(self, index: int) -> np.ndarray:
        """Draw the mask, (H, W) uint8 raw ids, of the size that the JSON states.

        Raises:
            DataError: an object that cannot be drawn; all of the picture's are named.
        """
        try:
            return draw(self._pictures[index], self._table, self._reading.max_pixels)
        except DataError as error:
            raise DataError(f"{self.mask_path(index)}, image {self._pictures[index].file}: {error}") from None

    def read_digested(self, index: int) -> tuple[np.ndarray, str]:
        """The mask and a digest of what it is drawn from."""
        return self.read_mask(index), self._mask_digest(index)

    def _mask_digest(self, index: int) -> str:
        picture = self._pictures[index]
        text = json.dumps([picture.height, picture.width, picture.objects, sorted(self._table.items())])
        return hashlib.sha256(text.encode()).hexdigest()


def _files(base: Path, given: str | Mapping[str, str] | None) -> dict[str, Path]:
    """Split -> file; "" stands for a file without splits."""
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
    """Files at the usual places that look like COCO annotations: JSON with its three lists named in it."""
    found = [path for patterns in FILES.values() if (path := _first(base, patterns)) is not None]
    found = found or [path for path in [_first(base, ONE_FILE)] if path is not None]
    keys = (b'"images"', b'"categories"', b'"annotations"')
    return [path for path in found if all(key in path.read_bytes() for key in keys)]


def _first(base: Path, patterns: tuple[str, ...]) -> Path | None:
    return next((p for pattern in patterns for p in sorted(base.glob(pattern)) if p.is_file()), None)


def _names(files: Mapping[str, CocoFile]) -> list[str]:
    """Class names, background first; dropped are names above others that no object carries (Roboflow writes one)."""
    order: dict[str, int] = {}
    for file in files.values():
        for key, name in sorted(file.categories.items()):
            if order.setdefault(name, key) != key:
                raise DataError(
                    f"{file.path}: category '{name}' has id {key} here and {order[name]} in another split's file;"
                    " export the splits with the same categories"
                )
    used = {key for file in files.values() for p in file.pictures for key, _ in p.objects}
    above = {parent for file in files.values() for parent in file.parents}
    names = [n for n in sorted(order, key=order.__getitem__) if order[n] in used or n not in above]
    if "background" in names:
        names.remove("background")
    if len(names) > 254:
        raise DataError(f"{len(names)} categories; a mask holds at most 254 besides background and void")
    if not names:
        raise DataError("the annotations name no category")
    return ["background", *names]


def _folder_option(images: str | Mapping[str, str] | None, split: str) -> str | None:
    if images is None or isinstance(images, str):
        return images
    if isinstance(images, Mapping):
        return images.get(split or "train")
    raise ConfigError(f"data.options.images: expected a folder or split: folder, got {images!r}")


def _samples(base: Path, file: CocoFile, folder: str | None) -> tuple[list[Picture], list[Sample], list[str]]:
    """The pictures that exist, as samples, and the names of those that do not."""
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
