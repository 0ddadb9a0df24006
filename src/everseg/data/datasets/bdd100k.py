"""Read BDD100K semantic segmentation (the 10 000 images), in the folders of the first and of later releases."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from everseg.data.base import Dataset
from everseg.data.datasets.cityscapes import present_splits
from everseg.data.datasets.files import FileSplit
from everseg.data.datasets.listing import pair, scan
from everseg.data.datasets.options import reading_of, root_of
from everseg.data.datasets.street_labels import CITYSCAPES_CLASSES, VOID
from everseg.errors import ConfigError, DataError
from everseg.labels import RawLabels


class Generation(NamedTuple):
    """The folders of a release."""

    images: str
    masks: str
    suffix: str
    """Ending of the masks' stems."""
    places: tuple[str, ...]
    """Folders below the root that may hold them."""


GENERATIONS = {
    "old": Generation("images", "labels", "_train_id", ("seg", "bdd100k/seg", ".")),
    "new": Generation("images/10k", "labels/sem_seg/masks", "", (".", "bdd100k")),
}


def build(
    root: str | Path | None = None,
    *,
    generation: str | None = None,
    **shared: Any,
) -> Dataset:
    """Read BDD100K's semantic segmentation.

    Args:
        root: for the old folders, `seg/` (with `images/train`, `labels/train`, ...) or a folder that holds it, also
            as `bdd100k/seg`; for the new ones, the folder with `images/10k` and `labels/sem_seg/masks`, or
            `bdd100k/` with them.
        generation: "old" or "new"; only needed where both lie below `root`.
        shared: options of all readers, see `everseg.data.datasets.options.reading_of`.

    Returns:
        The splits `train` and `val` as far as they exist, sorted by name; the 19 classes of Cityscapes with its
        trainIds as raw ids, no background class, void 255.

    Raises:
        ConfigError: no such root, both generations found and none chosen, or a wrong option.
        DataError: neither generation found, or images and masks that do not pair.
    """
    reading = reading_of(shared)
    base, layout = _find(root_of(root), generation)
    splits = {}
    for name in present_splits(base, layout.images):
        images = scan(base, f"{layout.images}/{name}")
        masks = scan(base, f"{layout.masks}/{name}", suffix=layout.suffix)
        samples, warnings = pair(images, masks, f"{base}, {name}", name, reading)
        splits[name] = FileSplit(name, base, samples, reading=reading, warnings=warnings)
    labels = RawLabels(names=dict(enumerate(CITYSCAPES_CLASSES)), background=None, void=(VOID,))
    return Dataset("bdd100k", labels, splits)


def _find(root: Path, wanted: str | None) -> tuple[Path, Generation]:
    """Find the folder of the wanted generation, or of the only one that exists."""
    if wanted is not None and wanted not in GENERATIONS:
        raise ConfigError(f"data.options.generation: expected 'old' or 'new', got {wanted!r}")
    found = {}
    for name, layout in GENERATIONS.items():
        folders = [root / place for place in layout.places if _holds(root / place, layout)]
        if folders and wanted in (None, name):
            found[name] = folders[0], layout
    if not found:
        raise DataError(
            f"{root}: is not a BDD100K segmentation folder: has neither seg/images/ with seg/labels/ (old"
            " generation) nor images/10k/ with labels/sem_seg/masks/ (new), here or in bdd100k/;"
            " pass the right folder as data.root=DIR"
        )
    if len(found) > 1:
        raise ConfigError(
            f"data.root: {root} holds both generations of BDD100K's segmentation ({found['old'][0]} and"
            f" {found['new'][0]}); choose with data.options.generation=old or new"
        )
    return next(iter(found.values()))


def _holds(base: Path, layout: Generation) -> bool:
    return any((base / layout.masks / name).is_dir() for name in ("train", "val"))
