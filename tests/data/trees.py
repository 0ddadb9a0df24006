"""Writes miniature data sets in the real layouts, with known pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (12, 16)  # height, width


def image_of(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Smooth, so that JPEG keeps it nearly as it is; `number` sets the brightness."""
    height, width = size
    ramp = np.linspace(0, 60, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None]
    return np.broadcast_to(ramp + 10 * (number % 10) + np.array([0, 20, 40]), (height, width, 3)).astype(
        np.uint8
    )


def mask_of(ids: list[int], size: tuple[int, int] = SIZE) -> np.ndarray:
    """Vertical stripes of the given ids."""
    height, width = size
    stripes = np.array(ids, np.uint8)[np.arange(width) * len(ids) // width]
    return np.tile(stripes, (height, 1))


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def save_palette(path: Path, ids: np.ndarray) -> Path:
    """A P-mode PNG as VOC ships them: indices with colours that mean nothing to a reader of ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(ids).convert("L")
    picture.putpalette([(i * 37) % 256 for i in range(768)])
    picture.save(path)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


VOC_IDS = {
    "2007_000032": [0, 1, 255, 15],
    "2007_000039": [0, 20],
    "2008_000008": [0, 13, 15],
    "2008_000015": [0, 5],
    "2007_000033": [0, 1],
}


def voc(base: Path, *, aug: bool = True) -> Path:
    """A VOC2012 folder as the devkit unpacks it; three more training masks come with the SBD."""
    for number, (name, ids) in enumerate(VOC_IDS.items()):
        save(base / "JPEGImages" / f"{name}.jpg", image_of(number), quality=95)
        if not name.startswith("2008"):
            save_palette(base / "SegmentationClass" / f"{name}.png", mask_of(ids))
        if aug:
            save(base / "SegmentationClassAug" / f"{name}.png", mask_of(ids))
    lists = base / "ImageSets" / "Segmentation"
    write(lists / "train.txt", "2007_000032\n2007_000039\n")
    write(lists / "val.txt", "2007_000033\n")
    return base


def voc_mib(root: Path) -> Path:
    """The original MiB repository's folder: PascalVOC12 with its own lists of slash-led pairs."""
    base = voc(root / "PascalVOC12")
    pairs = [f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png" for n in VOC_IDS]
    write(base / "splits" / "train_aug.txt", "\n".join([pairs[3], *pairs[:3]]))
    write(base / "splits" / "val.txt", pairs[4] + "\n")
    return root


def ade(base: Path) -> Path:
    for split, folder, count in (("train", "training", 4), ("val", "validation", 2)):
        for i in range(1, count + 1):
            name = f"ADE_{split}_{i:08d}"
            save(base / "images" / folder / f"{name}.jpg", image_of(i), quality=95)
            save(base / "annotations" / folder / f"{name}.png", mask_of([0, i, 150]))
    write(base / "objectInfo150.txt", "Idx\tRatio\n")
    return base


def camvid(base: Path) -> Path:
    frames = {
        "train": ["0001TP_006690", "0006R0_f00930"],
        "val": ["0016E5_07959"],
        "test": ["0001TP_008550", "Seq05VD_f00000"],
    }
    for split, names in frames.items():
        for i, name in enumerate(names):
            save(base / split / f"{name}.png", image_of(i))
            save(base / f"{split}annot" / f"{name}.png", mask_of([0, 3, 11, i + 4]))
        lines = [f"/SegNet/CamVid/{split}/{n}.png /SegNet/CamVid/{split}annot/{n}.png" for n in names]
        write(base / f"{split}.txt", "\n".join(reversed(lines)) + "\n")
    return base


FOLDER_YAML = """\
classes: [background, road, tree]
ignore: 9
"""


def folder(base: Path, text: str = FOLDER_YAML) -> Path:
    """images/{train,val} and masks/{train,val} beside a data.yaml; the YAML's path is returned."""
    for split, count in (("train", 3), ("val", 1)):
        for i in range(count):
            save(base / "images" / split / f"a_{i}.png", image_of(i))
            save(base / "masks" / split / f"a_{i}.png", mask_of([0, 1, 2, 9]))
    return write(base / "data.yaml", text)
