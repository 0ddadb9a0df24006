"""A small data set of a class that no generated scene has, as files: what a deployed model is taught next."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_forklifts(root: Path) -> None:
    """Pictures with a bright rectangle each, which is a forklift."""
    for split, count in (("train", 8), ("val", 4)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            rng = np.random.RandomState(index + 100 * (split == "val"))
            mask = np.zeros((48, 64), np.uint8)
            top, left = rng.randint(0, 24, 2)
            mask[top : top + 20, left : left + 24] = 1
            image = rng.randint(0, 60, (48, 64, 3), dtype=np.uint8) + 150 * mask[..., None]
            Image.fromarray(image).save(root / "images" / split / f"{index}.png")
            Image.fromarray(mask).save(root / "masks" / split / f"{index}.png")
    (root / "data.yaml").write_text("name: site\nclasses: [background, forklift]\n")
