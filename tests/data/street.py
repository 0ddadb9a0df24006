"""Writes Cityscapes, BDD100K and IDD as miniature trees: the first and the last with polygons only."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 96, 48


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def annotation(path: Path, labels: list[str]) -> None:
    """Stripes from left to right, a polygon each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    step = WIDTH // len(labels)
    objects = [
        {"label": label, "polygon": [[left, 0], [left + step - 1, 0], [left + step - 1, 47], [left, 47]]}
        for left, label in zip(range(0, WIDTH, step), labels, strict=False)
    ]
    path.write_text(json.dumps({"imgHeight": HEIGHT, "imgWidth": WIDTH, "objects": objects}))


def write(base: Path) -> Path:
    """The data sets in the folders cs, bdd and idd."""
    for split in ("train", "val"):
        for number in range(4):
            city = f"aachen/aachen_{number:06d}_000019"
            picture(base / f"cs/leftImg8bit/{split}/{city}_leftImg8bit.png", number)
            annotation(base / f"cs/gtFine/{split}/{city}_gtFine_polygons.json", ["road", "cargroup", "sky"])
            picture(base / f"bdd/images/10k/{split}/b{number}.jpg", 10 + number)
            mask = np.full((HEIGHT, WIDTH), 255, np.uint8)
            mask[:, : WIDTH // 2], mask[:, 60:] = 0, 13
            target = base / f"bdd/labels/sem_seg/masks/{split}/b{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(target)
            picture(base / f"idd/leftImg8bit/{split}/201/frame{number:04d}_leftImg8bit.jpg", 20 + number)
            place = base / f"idd/gtFine/{split}/201/frame{number:04d}_gtFine_polygons.json"
            annotation(place, ["road", "autorickshaw", "fallback background"])
    return base
