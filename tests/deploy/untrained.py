"""Bundles of networks that were never trained: what they predict is arbitrary, but always the same, and varied."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from everseg.data.batches.transforms import normalise
from everseg.deploy.bundle import Contents, write_bundle
from everseg.labels import LabelSpace
from everseg.models.build import deeplabv3_tiny

SMALL = {"widths": [8, 8, 8, 8], "hidden": 8, "out_channels": 8, "norm": "bn"}


def picture(height: int = 96, width: int = 128) -> np.ndarray:
    """Coloured squares of 16 pixels, (height, width, 3) uint8."""
    cells = np.random.RandomState(0).randint(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.NEAREST))


@torch.no_grad()
def make_bundle(out: Path, branches: dict[str, list[str]], seed: int = 0, *, onnx: bool = False) -> Path:
    """A bundle whose outputs are balanced on `picture()`, so that each class has some of its pixels."""
    torch.manual_seed(seed)
    model = deeplabv3_tiny(**SMALL)
    for branch, names in branches.items():
        model.grow({branch: len(names)})
    model.eval()
    image = normalise(torch.from_numpy(picture().transpose(2, 0, 1).copy())[None], "imagenet")
    for branch in branches:
        logits = model(image, (branch,))[branch].logits
        std, mean = torch.std_mean(logits, dim=(0, 2, 3))
        classifier = model.heads[branch].classifiers[0]
        classifier.weight /= std[:, None, None, None]
        classifier.bias.copy_((classifier.bias - mean) / std)
    spaces = {
        branch: LabelSpace((tuple(range(len(names))),), tuple(names), background=0)
        for branch, names in branches.items()
    }
    return write_bundle(out, Contents(model, spaces), onnx=onnx).path


ONE_ITERATION = (
    "data.workers=0",
    "train.max_iterations=1",
    "data.crop=32",
    "train.batch=2",
    "data.evaluation=crop",
)
"""Overrides that make a step as short as it can be."""
