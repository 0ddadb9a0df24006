"""Read Pascal VOC 2012, alone or with the SBD annotations ("Aug"), in its usual layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from everseg.data.base import Dataset
from everseg.data.datasets.files import FileSplit
from everseg.data.datasets.listing import ListedFolder, data_folder
from everseg.data.datasets.options import reading_of, root_of
from everseg.errors import DataError
from everseg.labels import RawLabels

NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_FOLDERS = ("VOC2012", "VOCdevkit/VOC2012", "PascalVOC12")
_LISTS = ("splits", "ImageSets/Segmentation", "ImageSets/SegmentationAug", "list")
_TRAIN = ("train_aug", "trainaug", "train")  # in order of preference


def build(
    root: str | Path | None = None,
    *,
    train_list: str | None = None,
    val_list: str = "val",
    masks: str | None = None,
    **shared: Any,
) -> Dataset:
    """Read Pascal VOC 2012.

    Args:
        root: `VOC2012`, a folder that holds it (also as `VOCdevkit/VOC2012`), or one that holds the original
            MiB repository's `PascalVOC12` with its `splits/`.
        train_list: list of the training images: a name (`train`, `train_aug`) or a file below the data folder.
            Default `train_aug` if there is one, else `train`.
        val_list: the same for validation.
        masks: folder of the masks where a list does not name one; default `SegmentationClassAug` if it exists,
            else `SegmentationClass`.
        shared: options of all readers, see `everseg.data.datasets.options.reading_of`.

    Returns:
        Splits `train` and, if its list exists, `val`, in the order of the lists; background 0, void 255.

    Raises:
        ConfigError: no such root, or a wrong option.
        DataError: not this layout, a missing list, or listed files that do not exist.
    """
    reading = reading_of(shared)
    base = data_folder(root_of(root), _FOLDERS, ("JPEGImages",), "Pascal VOC")
    if masks is None:
        masks = "SegmentationClassAug" if (base / "SegmentationClassAug").is_dir() else "SegmentationClass"
    listed = ListedFolder(base, "JPEGImages", masks)
    files = {"train": _find_list(base, (train_list,) if train_list else _TRAIN)}
    val = _find_list(base, (val_list,), optional=val_list == "val")
    if val is not None:
        files["val"] = val
    splits = {}
    for name, file in files.items():
        assert file is not None
        samples, warnings = listed.samples(file, name, reading)
        splits[name] = FileSplit(name, base, samples, reading=reading, warnings=warnings)
    labels = RawLabels(names=dict(enumerate(NAMES)), background=0, void=(255,))
    return Dataset("voc", labels, splits)


def _find_list(base: Path, names: tuple[str, ...], *, optional: bool = False) -> Path | None:
    places = [base / folder / f"{name}.txt" for name in names for folder in _LISTS]
    places += [base / name for name in names if name.endswith(".txt")]
    found = next((p for p in places if p.is_file()), None)
    if found is None and not optional:
        raise DataError(
            f"{base}: no image list {' or '.join(n.removesuffix('.txt') + '.txt' for n in names)} in "
            + ", ".join(f"{folder}/" for folder in _LISTS)
            + "; add one, or name yours with data.options.train_list=FILE"
        )
    return found
