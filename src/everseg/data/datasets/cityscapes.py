"""Read Cityscapes with fine annotations: leftImg8bit/ and gtFine/, one folder per split and city."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everseg.data.base import Dataset
from everseg.data.datasets.decode import Reading
from everseg.data.datasets.files import FileSplit
from everseg.data.datasets.listing import Sample, data_folder, pair, scan
from everseg.data.datasets.options import reading_of, root_of
from everseg.data.datasets.street_labels import CITYSCAPES_CLASSES, CITYSCAPES_TRAIN_ID, VOID
from everseg.errors import DataError
from everseg.labels import RawLabels

SPLITS = ("train", "val")
"""The splits with labels; the masks of `test` are empty."""


def build(
    root: str | Path | None = None,
    **shared: Any,
) -> Dataset:
    """Read Cityscapes.

    Args:
        root: the folder that holds `leftImg8bit/` and `gtFine/`, or `cityscapes/` with them.
        shared: options of all readers, see `everseg.data.datasets.options.reading_of`.

    Returns:
        The splits `train` and `val` as far as they exist, sorted by city and name; 19 classes whose raw ids are the
        trainIds, no background class, void 255. The masks are `*_gtFine_labelTrainIds.png`, or, where there are more
        of them, `*_gtFine_labelIds.png`, whose ids are translated when they are read.

    Raises:
        ConfigError: no such root, or a wrong option.
        DataError: not this layout, images and masks that do not pair, or polygons without masks.
    """
    reading = reading_of(shared)
    places = ("cityscapes", "Cityscapes")
    base = data_folder(root_of(root), places, ("leftImg8bit", "gtFine"), "Cityscapes")
    splits = {}
    for name in present_splits(base, "leftImg8bit"):
        images = scan(base, f"leftImg8bit/{name}", suffix="_leftImg8bit", recursive=True)
        masks = scan(base, f"gtFine/{name}", suffix="_gtFine_labelTrainIds", recursive=True)
        # The release brings labelIds; only cityscapesScripts or `everseg data prepare` draw trainIds.
        table = None
        if len(masks) < len(images):
            label_ids = scan(base, f"gtFine/{name}", suffix="_gtFine_labelIds", recursive=True)
            if len(label_ids) > len(masks):
                masks, table = label_ids, CITYSCAPES_TRAIN_ID
        command = f"everseg data prepare cityscapes {base}"
        samples, warnings = pair_drawn(base, f"gtFine/{name}", images, masks, command, name, reading)
        splits[name] = FileSplit(name, base, samples, id_table=table, reading=reading, warnings=warnings)
    labels = RawLabels(names=dict(enumerate(CITYSCAPES_CLASSES)), background=None, void=(VOID,))
    return Dataset("cityscapes", labels, splits)


def present_splits(base: Path, images: str) -> list[str]:
    """List the `SPLITS` that have an image folder below `base / images`.

    Raises:
        DataError: none.
    """
    found = [name for name in SPLITS if (base / images / name).is_dir()]
    if not found:
        raise DataError(
            f"{base / images}: has neither {' nor '.join(f'{name}/' for name in SPLITS)}; unpack the images there"
        )
    return found


def pair_drawn(
    base: Path,
    folder: str,
    images: Mapping[str, str],
    masks: Mapping[str, str],
    command: str,
    split: str,
    reading: Reading,
    *,
    prefix: str = "",
) -> tuple[list[Sample], list[str]]:
    """Pair images with masks that are drawn from polygon files beside them.

    Args:
        base: data folder.
        folder: folder of the masks and polygons, relative to `base`.
        images: name -> path relative to `base`, as `scan` returns it.
        masks: the same.
        command: the command that draws the missing masks, for the message.
        split: as for `pair`; so are `reading` and `prefix`.

    Raises:
        DataError: as `pair`; where missing masks have their polygon files, the message names `command` instead.
    """
    alone = sorted(images.keys() - masks.keys())
    drawn = any((base / folder / f"{name}_gtFine_polygons.json").is_file() for name in alone[:20])
    if drawn and reading.on_missing == "stop":
        raise DataError(
            f"{base / folder}: {len(alone)} of {len(images)} images have polygons (*_gtFine_polygons.json) but no"
            f" mask; make the masks with: {command}"
        )
    return pair(images, masks, f"{base}, {folder}", split, reading, prefix=prefix)
