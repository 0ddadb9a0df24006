"""CamVid in the widespread 11-class copy: train/ trainannot/ val/ valannot/ test/ testannot/ (floor 2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from everseg.data.base import Dataset
from everseg.data.datasets.decode import Reading
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
"""The drives the frames come from; 0001TP was filmed at dusk."""
_SPLITS = ("train", "val", "test")


def build(
    root: str | Path | None = None,
    *,
    sequence: str | Sequence[str] | None = None,
    lists: bool = False,
    max_pixels: int = Reading.max_pixels,
    follow_links: bool = False,
    exif: str = "apply",
) -> Dataset:
    """Read CamVid.

    Args:
        root: the folder that holds `train/`, `trainannot/` and so on (or `CamVid/` with them).
        sequence: keep only frames whose names start so (`0001TP`, or several); "dusk" and "day" stand for
            0001TP and the others. Splits that this leaves empty are dropped.
        lists: take the frames and their order from `train.txt`, `val.txt`, `test.txt`, whose entries may carry
            another machine's absolute prefix; default: the folders, sorted by name.
        max_pixels: larger pictures are refused.
        follow_links: allow links out of the data folder.
        exif: "apply" or "ignore" the images' EXIF orientation.

    Returns:
        Those of the splits `train`, `val` and `test` that exist; 11 classes, no background class, void 11.

    Raises:
        ConfigError: no such root, or a wrong option.
        DataError: not this layout, images and masks that do not pair, or no frame of the sequence.
    """
    reading = reading_of(max_pixels, follow_links, exif)
    base = data_folder(root_of(root), ("CamVid", "SegNet/CamVid"), ("train", "trainannot"), "CamVid")
    prefixes = _prefixes(sequence)
    splits = {}
    for name in _SPLITS:
        if name != "train" and not (base / name).is_dir():
            continue
        warnings: list[str] = []
        if lists:
            samples, warnings = ListedFolder(base, name, f"{name}annot").samples(base / f"{name}.txt")
        else:
            samples = pair(scan(base, name), scan(base, f"{name}annot"), f"{base}, {name}")
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
