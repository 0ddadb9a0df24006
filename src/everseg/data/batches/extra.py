"""Further maps of images (`data.extra`): one picture for each image, such as saliency, in folders of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from everseg.data.base import Dataset, Split
from everseg.data.batches.parallel import map_samples
from everseg.data.batches.samples import Maps
from everseg.data.datasets.decode import MaskCoding, Reading, decode_mask, open_inside, open_picture
from everseg.display import counted
from everseg.errors import DataError, some
from everseg.files import real_path

ENDING = ".png"
LISTED = 20
"""Most faults that a message names one by one; it counts the rest."""


class MapFolder:
    """The maps of a split's images: FOLDER/SPLIT/ID.png if there is a folder FOLDER/SPLIT, else FOLDER/ID.png.

    A map has one channel of 8 or 16 bits. Its values mean what the method says that reads them.

    Args:
        folder: the folder, as the configuration names it.
        split: the images.

    Raises:
        DataError: there is no such folder.
    """

    def __init__(self, folder: str | Path, split: Split) -> None:
        self.root = Path(folder).expanduser()
        if not self.root.is_dir():
            raise DataError(
                f"{self.root}: no such folder; make the maps, or correct data.extra (saliency: "
                "everseg data saliency DATASET --out DIR)"
            )
        own = self.root / split.name
        self.root = real_path(own if own.is_dir() else self.root)
        self.split = split

    def path(self, index: int) -> Path:
        """Path of the map of one image."""
        return self.root / f"{self.split.id(index)}{ENDING}"

    def read(self, index: int) -> np.ndarray:
        """Decode the map of one image, as `read_map` does."""
        return read_map(self.root, f"{self.split.id(index)}{ENDING}")

    def missing(self, indices: Iterable[int]) -> list[Path]:
        """Paths of the maps that do not exist."""
        return [path for path in map(self.path, indices) if not path.is_file()]

    def fingerprint(self, indices: Iterable[int]) -> str:
        """SHA-256 of the names and contents of these images' maps; it does not depend on where they lie."""
        chosen = list(indices)
        digests = map_samples(_digest, (self, chosen), len(chosen))
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def read_map(folder: Path, name: str) -> np.ndarray:
    """Decode one map: (H, W) uint8, or uint16 where the file has 16 bits.

    Args:
        folder: the folder of maps; nothing outside it is read.
        name: path of the file below it.

    Raises:
        DataError: missing, unreadable, or not a picture of one channel without loss.
    """
    path = folder / name
    with open_inside(folder, name) as file:
        picture = open_picture(file, path, Reading())
        wide = picture.mode.startswith("I")
        values = decode_mask(picture, path, MaskCoding(most=2**16 - 1))
    return values.astype(np.uint16 if wide else np.uint8, copy=False)


def _digest(subject: tuple[MapFolder, list[int]], place: int) -> str:
    maps, indices = subject
    path = maps.path(indices[place])
    return f"{maps.split.id(indices[place])}\0{hashlib.sha256(path.read_bytes()).hexdigest()}"


def maps_of(dataset: Dataset, split: str, names: Iterable[str] | None = None) -> dict[str, Maps]:
    """Open the further maps of a split.

    Args:
        dataset: its `extra` names the folders.
        split: name of the split.
        names: the maps to open; default all.

    Raises:
        DataError: a folder does not exist.
    """
    chosen = dataset.extra if names is None else [name for name in names if name in dataset.extra]
    return {name: MapFolder(dataset.extra[name], dataset.splits[split]) for name in chosen}


def missing_maps(
    used: Mapping[tuple[str, str], Iterable[int]], datasets: Mapping[str, Dataset], only: str | None = None
) -> list[str]:
    """List the maps that images lack, in sentences: one for each folder.

    Args:
        used: (key of the data set, split) -> positions of the images that need them.
        datasets: key -> data set.
        only: the map that is looked for; None = all.
    """
    problems = []
    for (key, split), indices in used.items():
        for name, folder in datasets[key].extra.items():
            if only not in (None, name):
                continue
            try:
                absent = MapFolder(folder, datasets[key].splits[split]).missing(indices)
            except DataError as error:
                problems.append(f"data.extra.{name}: {error}")
                continue
            if absent:
                problems.append(
                    f"data.extra.{name}: no map for {counted(len(absent), 'image')} of '{key}/{split}': "
                    f"{some([str(path) for path in absent], LISTED)}"
                )
    return problems
