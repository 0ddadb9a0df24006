"""The memory of a finished step: which images later steps are trained on again, and copies of them where asked for.

Only this module knows the layout of memory.json, which lies beside the model of a step and in bundles.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from everseg.data.batches.selection import Candidate
from everseg.data.channels import Channels
from everseg.data.datasets.decode import MaskCoding, Reading, decode_mask, open_inside, open_picture
from everseg.errors import CheckpointError, DataError, some
from everseg.files import MB, MOST_LIST, UnreadableError, array_of, real_path
from everseg.runs.commit import Committed, is_file_name, read_committed, read_document

FILE = "memory.json"
FORMAT = 1
_NAME = "memory-{:05d}"
MOST_COPY = 4096 * MB
"""Bytes of an image."""


@dataclass(frozen=True)
class Copy:
    """The copy of an image, its mask and its further maps, in the folder of the step that stored it."""

    step: int
    """Step beside whose model the files lie."""
    image: str
    mask: str
    extra: Mapping[str, str] = field(default_factory=dict)
    """Name of a further map -> its file."""
    lasting: bool = False
    """Whether the mask holds the lasting ids of a bundle's classes, and with them only the classes that were annotated.
    Else it holds the data set's raw ids."""

    @property
    def names(self) -> tuple[str, ...]:
        """All of its files."""
        return (self.image, self.mask, *self.extra.values())


@dataclass(frozen=True)
class Kept:
    """An image in the memory."""

    image: Candidate
    copy: Copy | None = None
    """None = it is read from the data set again."""


@dataclass(frozen=True)
class Memory:
    """The memory after a step."""

    size: int
    """Largest number of images."""
    selection: str
    offered: int
    """Number of images that were ever candidates."""
    images: tuple[Kept, ...] = ()
    """In the order of storing."""

    def document(self) -> dict[str, Any]:
        """Convert to the JSON value that the file holds."""
        return {
            "format": FORMAT,
            "size": self.size,
            "selection": self.selection,
            "offered": self.offered,
            "images": [_entry(kept) for kept in self.images],
        }

    @property
    def copies(self) -> tuple[Copy, ...]:
        """The copies of its images; () where they are read from the data again."""
        return tuple(kept.copy for kept in self.images if kept.copy is not None)


_LISTS = ("classes", "pixels", "labelled", "steps")
_TEXTS = ("id", "dataset", "split", "branch")


def _entry(kept: Kept) -> dict[str, Any]:
    image, copy = kept.image, kept.copy
    return {
        **{key: getattr(image, key) for key in _TEXTS},
        **{key: list(getattr(image, key)) for key in _LISTS},
        "stored_for": image.stored_for,
        "files": None
        if copy is None
        else {
            "step": copy.step,
            "image": copy.image,
            "mask": copy.mask,
            "ids": "lasting" if copy.lasting else "raw",
            "extra": dict(copy.extra),
        },
    }


# ---------------------------------------------------------------- reading


def read_memory(folder: Path, committed: Committed | None = None) -> Memory | None:
    """Read and check the memory beside a model; None if there is none.

    Args:
        folder: the committed folder that holds the model.
        committed: its manifest, if the caller has read it before.

    Raises:
        CheckpointError: the file is unreadable, changed, damaged, or written by a later everseg. All faults are told
            together.
    """
    committed = committed or read_committed(folder)
    if FILE not in committed.files:
        return None
    path = folder / FILE
    stored = read_document(path, "images", data=committed.read(FILE), most=MOST_LIST)
    number = stored.get("format")
    if type(number) is int and number > FORMAT:
        raise CheckpointError(
            f"{path} has format {number}, this everseg reads up to {FORMAT}: it was written by a later everseg; "
            "update everseg to read it"
        )
    problems: list[str] = []
    if number != FORMAT:
        problems.append(f"format: expected {FORMAT}")
    numbers = {key: stored.get(key) for key in ("size", "offered")}
    problems += [f"{key}: expected a whole number" for key, value in numbers.items() if not _is_count(value)]
    if not isinstance(stored.get("selection"), str):
        problems.append("selection: expected a text")
    entries = stored["images"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        problems.append("images: expected an entry for each image")
        entries = []
    images = [_kept(entry, f"images[{place}]", problems) for place, entry in enumerate(entries)]
    found = [kept for kept in images if kept is not None]
    # An image that came with a bundle may be met again in the data: as another one, with annotations of its own.
    keys = Counter((kept.image.dataset, kept.image.split, kept.image.id, kept.image.steps) for kept in found)
    if twice := ["/".join(key[:3]) for key, number in keys.items() if number > 1]:
        problems.append(f"images: {some(twice, 4)} appears twice")
    if problems:
        raise CheckpointError(
            f"{path} is damaged: {some(problems, 8, between='; ')}; restore it or start again under another name"
        )
    return Memory(stored["size"], stored["selection"], stored["offered"], tuple(found))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _kept(entry: Mapping[str, Any], where: str, problems: list[str]) -> Kept | None:
    wrong = [f"{where}.{key}: expected a text" for key in _TEXTS if not isinstance(entry.get(key), str)]
    for key in _LISTS:
        values = entry.get(key)
        if not isinstance(values, list) or not all(map(_is_count, values)):
            wrong.append(f"{where}.{key}: expected whole numbers")
        elif key != "pixels" and values != sorted(set(values)):
            wrong.append(f"{where}.{key}: expected each number once, ascending")
    if not wrong and len(entry["classes"]) != len(entry["pixels"]):
        wrong.append(f"{where}.pixels: expected a number for each class")
    stored_for = entry.get("stored_for")
    if stored_for is not None and not _is_count(stored_for):
        wrong.append(f"{where}.stored_for: expected a class or null")
    copy, faults = _copy(entry.get("files"), f"{where}.files")
    problems += [*wrong, *faults]
    if wrong or faults:
        return None
    given: dict[str, Any] = {key: entry[key] for key in _TEXTS} | {key: tuple(entry[key]) for key in _LISTS}
    return Kept(Candidate(**given, stored_for=stored_for), copy)


def _copy(stored: Any, where: str) -> tuple[Copy | None, list[str]]:
    if stored is None:
        return None, []
    if not isinstance(stored, dict) or not isinstance(stored.get("extra"), dict):
        return None, [f"{where}: expected the copies of image, mask and maps"]
    names = [stored.get("image"), stored.get("mask"), *stored["extra"].values()]
    # A name with a separator in it could lead anywhere on this machine.
    if not all(map(is_file_name, names)):
        return None, [f"{where}: expected names of files beside this one"]
    if not _is_count(stored.get("step")):
        return None, [f"{where}.step: expected the number of a step"]
    if stored.get("ids") not in ("raw", "lasting"):
        return None, [f"{where}.ids: expected 'raw' or 'lasting'"]
    lasting = stored["ids"] == "lasting"
    return Copy(stored["step"], stored["image"], stored["mask"], dict(stored["extra"]), lasting), []


# ---------------------------------------------------------------- copies


class CopiedSplit:
    """Images of a memory that are read from their copies; satisfies `everseg.data.base.Split`.

    They have the names that they had in the data set, so they are augmented as they would be there.

    Args:
        name: name of their split.
        places: for each image its name, its copy, and the folder that holds the copy.
        channels: what the channels of the images are, if not RGB with 8 bits.
    """

    def __init__(
        self, name: str, places: Sequence[tuple[str, Copy, Path]], channels: Channels | None = None
    ) -> None:
        self.name = name
        self.places = tuple(places)
        self.reading = Reading(channels=channels)

    def __len__(self) -> int:
        return len(self.places)

    def id(self, index: int) -> str:
        return self.places[index][0]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        _, copy, folder = self.places[index]
        if copy.image.endswith(".npy"):
            with open_inside(real_path(folder), copy.image) as file:
                try:
                    image = array_of(file, os.fstat(file.fileno()).st_size, MOST_COPY)
                except UnreadableError as error:
                    raise DataError(f"{folder / copy.image}: {error}; restore the folder") from None
        else:
            image = _read_png(folder, copy.image, rgb=True)
        return image, self.read_mask(index)

    def read_mask(self, index: int) -> np.ndarray:
        _, copy, folder = self.places[index]
        return _read_png(folder, copy.mask)

    def fingerprint(self) -> str:
        raise NotImplementedError("the manifest of the folder knows the hashes of copies")

    def maps(self, name: str) -> CopiedMaps:
        """The further maps of a name."""
        return CopiedMaps(self, name)


@dataclass(frozen=True)
class CopiedMaps:
    """Further maps of a memory's images, read from their copies; satisfies `everseg.data.batches.samples.Maps`."""

    split: CopiedSplit
    name: str

    def read(self, index: int) -> np.ndarray:
        sample, copy, folder = self.split.places[index]
        if self.name not in copy.extra:
            raise DataError(
                f"{folder / FILE}: image {sample} of the memory has no map '{self.name}': it was stored by a run "
                f"without data.extra.{self.name}"
            )
        return _read_png(folder, copy.extra[self.name])


def _read_png(folder: Path, name: str, *, rgb: bool = False) -> np.ndarray:
    with open_inside(real_path(folder), name) as file:
        picture = open_picture(file, folder / name, Reading())
        if rgb:
            return np.asarray(picture.convert("RGB"))
        wide = picture.mode.startswith("I")
        values = decode_mask(picture, folder / name, MaskCoding(most=2**16 - 1))
    return values.astype(np.uint16 if wide else np.uint8, copy=False)


def png(array: np.ndarray) -> bytes:
    """Write (H, W, 3) uint8, or (H, W) uint8 or uint16, as a PNG without loss."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, "PNG")
    return buffer.getvalue()


def new_copy(
    number: int,
    step: int,
    read: Callable[[], Mapping[str, np.ndarray]],
    *,
    plain: bool,
    maps: Iterable[str] = (),
) -> tuple[Copy, dict[str, Callable[[], bytes]]]:
    """Name the files of an image's copy, and say how to make the bytes of each.

    Args:
        number: of the image among those that the step stores.
        step: the step that stores it.
        read: gives "image", "mask" and the further maps by name. It is called for each file, so that images are not
            kept in memory until all are written.
        plain: the image is RGB with 8 bits.
        maps: names of the further maps.
    """
    stem = _NAME.format(number)
    files = {name: f"{stem}-map-{place}.png" for place, name in enumerate(sorted(maps))}
    copy = Copy(step, f"{stem}.{'png' if plain else 'npy'}", f"{stem}-mask.png", files)

    def image() -> bytes:
        array = read()["image"]
        if plain:
            return png(array)
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        return buffer.getvalue()

    def part(name: str) -> Callable[[], bytes]:
        return lambda: png(read()[name])

    return copy, {
        copy.image: image,
        copy.mask: part("mask"),
        **{file: part(name) for name, file in files.items()},
    }
