"""A data set of the user's own, as a plug-in file: coloured rectangles, three classes and a background."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from everseg.data.base import Dataset
from everseg.labels import RawLabels

COLOURS = np.array([[40, 40, 40], [220, 30, 30], [30, 220, 30], [30, 30, 220]], np.uint8)
HERE = f"{Path(__file__).resolve()}:build"


class Toy:
    """Images of rectangles, generated from their index."""

    def __init__(self, name: str, count: int, size: int) -> None:
        self.name, self.count, self.size = name, count, size

    def __len__(self) -> int:
        return self.count

    def id(self, index: int) -> str:
        return f"{self.name}-{index:03d}"

    def read_mask(self, index: int) -> np.ndarray:
        rng = np.random.RandomState(index + (1000 if self.name == "val" else 0))
        mask = np.zeros((self.size, self.size), np.uint8)
        for raw in rng.permutation([1, 2, 3])[: 2 + index % 2]:
            y, x = rng.randint(0, self.size * 2 // 3, 2)
            mask[y : y + self.size // 2, x : x + self.size // 3] = raw
        return mask

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        mask = self.read_mask(index)
        noise = np.random.RandomState(index).randint(0, 30, (self.size, self.size, 3), dtype=np.uint8)
        return COLOURS[mask] + noise, mask

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.name}{self.count}{self.size}".encode()).hexdigest()


def build(root: str | None = None, *, train: int = 24, val: int = 10, size: int = 40) -> Dataset:
    labels = RawLabels({0: "background", 1: "red", 2: "green", 3: "blue"}, background=0)
    return Dataset("toy", labels, {"train": Toy("train", train, size), "val": Toy("val", val, size)})


SEGFORMER = {
    "name": "mlp",
    "encoder": "hf:segformer",
    "options": {
        "hidden": 8,
        "config": {
            "hidden_sizes": [8, 8, 12, 16],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
        },
    },
}
"""A network with attention, of the transformers library."""
SEGMENTER = {
    "name": "segmenter",
    "encoder": "hf:segformer",
    "norm": None,
    "options": {"hidden": 8, "layers": 1, "stride": 8, "config": SEGFORMER["options"]["config"]},
}
"""A network whose classes are tokens."""
NEEDED = {"rcil": ["model.options.compensation=true"]}
"""Method -> what it asks of the network, as arguments of the command line."""
NETWORKS = {"sats": SEGFORMER, "mbs": SEGMENTER}
"""Method -> the network that it needs, on an encoder of the transformers library."""


MAPS = {"ssul": "saliency", "microseg": "proposals"}
"""Method -> the maps that it reads beside the images."""


def maps(folder: Path, kind: str, data: Dataset | None = None) -> str:
    """Draw the maps of the toy's images, or of other ones: what stands out, or regions 0 to 3 and pixels of none."""
    data = data or build()
    for split in data.splits.values():
        (folder / kind / split.name).mkdir(parents=True, exist_ok=True)
        for index in range(len(split)):
            mask = split.read(index)[1]
            drawn = np.where(mask > 0, 255, 0) if kind == "saliency" else np.where(mask > 0, mask, 255)
            if kind == "proposals":
                drawn[:, : drawn.shape[1] // 4][mask[:, : drawn.shape[1] // 4] == 0] = 0
            Image.fromarray(drawn.astype(np.uint8)).save(
                folder / kind / split.name / f"{split.id(index)}.png"
            )
    return str(folder / kind)


def settings(out: Path, **changes) -> dict:
    """A two-step run of a few seconds, with the network that the method needs."""
    config = {
        "name": "toy",
        "out": str(out),
        "seed": 3,
        "tracker": [],
        "report": False,
        "data": {"dataset": HERE, "crop": 32, "evaluation": "crop", "workers": 0},
        "scenario": {"task": "2-1"},
        "model": {"name": "deeplabv3-tiny", "norm": "bn", "options": {"widths": [8, 8, 8, 8], "hidden": 8}},
        "method": {"name": "mib"},
        "train": {"epochs": 3, "epochs_next": 2, "batch": 4, "lr": 0.05, "lr_next": 0.02, "checkpoint_every": 4,
                  "log_every": 3, "threads": 1},
    }  # fmt: skip
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) and key in config else value
    method = config["method"]  # a name, or a name with options
    name = method["name"] if isinstance(method, dict) else method
    if name in NETWORKS:
        config["model"] = NETWORKS[name]
    if name in NEEDED:
        config["model"]["options"] = {**config["model"]["options"], "compensation": True}
    return config
