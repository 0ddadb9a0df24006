"""Read CamVid in the widespread 11-class copy: train/ trainannot/ val/ valannot/ test/ testannot/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everseg.data.base import Dataset
from everseg.data.datasets.files import FileSplit
from everseg.data.datasets.listing import ListedFolder, data_folder, pair, scan
from everseg.data.datasets.options import reading_of, root_of
from everseg.errors import ConfigError, DataError
from everseg.labels import RawLabels

NAMES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
VOID = 11
SEQUENCES = ("0001TP", "0006R0", "0016E5", "Seq05VD")
"""The drives that the frames come from; 0001TP was filmed at dusk."""
_SPLITS = ("train", "val", "test")


def build(
    root: str | Path | None = None,
    *,
    sequence: str | Sequence[str] | None = None,
    lists: bool = False,
    **shared: Any,
) -> Dataset:
    """Read CamVid.

    Args:
        root: the folder that holds `train/`, `trainannot/` and so on (or `CamVid/` with them).
        sequence: keep only frames whose names start with this (`0001TP`, or several such beginnings); "dusk" stands
            for 0001TP and "day" for the other drives. Splits that become empty are dropped.
        lists: take the frames and their order from `train.txt`, `val.txt`, `test.txt`, whose entries may carry
            another machine's absolute prefix; default: the folders, sorted by name.
        shared: options of all readers, see `everseg.data.datasets.options.reading_of`.

    Returns:
        The splits `train`, `val` and `test` as far as they exist; 11 classes, no background class, void 11.

    Raises:
        ConfigError: no such root, or a wrong option.
        DataError: not this layout, images and masks that do not pair, or no frame of the sequence.
    """
    reading = reading_of(shared)
    base = data_folder(root_of(root), ("CamVid", "SegNet/CamVid"), ("train", "trainannot"), "CamVid")
    prefixes = _prefixes(sequence)
    splits = {}
    for name in _SPLITS:
        if name != "train" and not (base / name).is_dir():
            continue
        if lists:
            listed = ListedFolder(base, name, f"{name}annot")
            samples, warnings = listed.samples(base / f"{name}.txt", name, reading)
        else:
            images, masks = scan(base, name), scan(base, f"{name}annot")
            samples, warnings = pair(images, masks, f"{base}, {name}", name, reading)
        kept = [s for s in samples if prefixes is None or s[0].startswith(prefixes)]
        if kept or prefixes is None:
            splits[name] = FileSplit(name, base, kept, reading=reading, warnings=warnings)
    if not splits:
        raise DataError(
            f"{base}: no frame of the sequence {', '.join(prefixes or ())}; the frames' names start with one of "
            + ", ".join(SEQUENCES)
        )
    labels = RawLabels(names=dict(enumerate(NAMES)), background=None, void=(VOID,))
    return Dataset("camvid", labels, splits)


def _prefixes(sequence: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if sequence is None:
        return None
    wanted = [sequence] if isinstance(sequence, str) else list(sequence)
    if not wanted or not all(isinstance(w, str) and w for w in wanted):
        raise ConfigError(
            f"data.options.sequence: expected a name or a list of names, got {sequence!r}; "
            'quote names that read as numbers: ["0006R0", "0016E5"]'
        )
    known = {"dusk": SEQUENCES[:1], "day": SEQUENCES[1:]}
    return tuple(prefix for w in wanted for prefix in known.get(w, (w,)))
