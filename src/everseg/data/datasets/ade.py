"""ADE20K as the scene parsing challenge released it, ADEChallengeData2016 (floor 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from everseg.data.base import Dataset
from everseg.data.datasets.ade_names import NAMES
from everseg.data.datasets.files import FileSplit
from everseg.data.datasets.listing import data_folder, pair, scan
from everseg.data.datasets.options import reading_of, root_of
from everseg.labels import RawLabels

_FOLDERS = {"train": "training", "val": "validation"}


def build(
    root: str | Path | None = None,
    **shared: Any,
) -> Dataset:
    """Read ADE20K.

    Args:
        root: `ADEChallengeData2016` (with `images/` and `annotations/`), or the folder that holds it.
        shared: options of all readers, see `everseg.data.datasets.options.reading_of`.

    Returns:
        Splits `train` and `val` sorted by file name, which is the order published image lists count in.
        Raw id 0 is "other" and counts as background; no pixel is void, though 255 would be.

    Raises:
        ConfigError: no such root, or a wrong option.
        DataError: not this layout, or images and masks that do not pair.
    """
    reading = reading_of(shared)
    needed = [f"{kind}/{f}" for kind in ("images", "annotations") for f in _FOLDERS.values()]
    base = data_folder(root_of(root), ("ADEChallengeData2016",), needed, "ADEChallengeData2016")
    splits = {}
    for name, folder in _FOLDERS.items():
        images, masks = scan(base, f"images/{folder}"), scan(base, f"annotations/{folder}")
        samples, warnings = pair(images, masks, f"{base}, {folder}", name, reading)
        splits[name] = FileSplit(name, base, samples, reading=reading, warnings=warnings)
    names = dict(enumerate(("background", *NAMES)))
    return Dataset("ade", RawLabels(names=names, background=0, void=(255,)), splits)
