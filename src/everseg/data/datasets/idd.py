"""Read the India Driving Dataset for segmentation: Part 1, Part 2, or both as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from everseg.data.base import Dataset
from everseg.data.datasets.cityscapes import pair_drawn, present_splits
from everseg.data.datasets.decode import Reading
from everseg.data.datasets.files import FileSplit
from everseg.data.datasets.listing import Sample, data_folder, scan
from everseg.data.datasets.options import reading_of, root_of
from everseg.data.datasets.street_labels import IDD_CLASSES, VOID
from everseg.labels import RawLabels

PARTS = (
    ("IDD_Segmentation", "idd-segmentation/IDD_Segmentation"),
    ("idd20kII", "idd-20k-II/idd20kII"),
)
"""Part 1 and Part 2: where each may lie below the root."""
_NEEDED = ("leftImg8bit", "gtFine")


def build(
    root: str | Path | None = None,
    **shared: Any,
) -> Dataset:
    """Read IDD with the 26 classes of level 3.

    Args:
        root: a folder with `leftImg8bit/` and `gtFine/` (either part), or one that holds `IDD_Segmentation/`,
            `idd20kII/`, or both, which are then united.
        shared: options of all readers, see `everseg.data.datasets.options.reading_of`.

    Returns:
        The splits `train` and `val` as far as they exist, Part 1 before Part 2, each sorted by sequence and name; raw
        ids are the level3Ids, no background class, void 255. Names of united parts start with the part's folder.

    Raises:
        ConfigError: no such root, or a wrong option.
        DataError: not this layout, images and masks that do not pair, or polygons without masks.
    """
    reading = reading_of(shared)
    base = root_of(root)
    parts = find_parts(base)
    samples: dict[str, list[Sample]] = {}
    warnings: dict[str, list[str]] = {}
    for part in parts:
        for name in present_splits(base / part, "leftImg8bit"):
            prefix = f"{Path(part).name}/" if len(parts) > 1 else ""
            found, noticed = _samples(base, part, name, reading, prefix)
            samples.setdefault(name, []).extend(found)
            warnings.setdefault(name, []).extend(noticed)
    splits = {
        name: FileSplit(name, base, found, reading=reading, warnings=warnings[name])
        for name, found in samples.items()
    }
    labels = RawLabels(names=dict(enumerate(IDD_CLASSES)), background=None, void=(VOID,))
    return Dataset("idd", labels, splits)


def find_parts(root: Path) -> list[str]:
    """Find the folders that hold `leftImg8bit/` and `gtFine/`, relative to `root` ("." is `root` itself).

    Raises:
        DataError: none.
    """
    places = [place for part in PARTS for place in part]
    first = data_folder(root, places, _NEEDED, "level-3 IDD")
    if first == root:  # the root is one part itself: nothing below it is looked at
        return ["."]
    with_both = [[p for p in part if all((root / p / n).is_dir() for n in _NEEDED)] for part in PARTS]
    return [found[0] for found in with_both if found]


def _samples(
    base: Path, part: str, split: str, reading: Reading, prefix: str
) -> tuple[list[Sample], list[str]]:
    place = "" if part == "." else f"{part}/"
    images = scan(base, f"{place}leftImg8bit/{split}", suffix=("_leftImg8bit", "_image"), recursive=True)
    masks = scan(base, f"{place}gtFine/{split}", suffix="_gtFine_labellevel3Ids", recursive=True)
    command = f"everseg data prepare idd {base}"
    return pair_drawn(base, f"{place}gtFine/{split}", images, masks, command, split, reading, prefix=prefix)
