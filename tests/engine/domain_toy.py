"""Domains as a plug-in file: the toy's rectangles under several lights, and runs of a few seconds over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from toy import COLOURS, Toy

from everseg.data.base import Dataset
from everseg.labels import RawLabels

HERE = f"{Path(__file__).resolve()}:build"
LIGHTS = {"day": (1.0, 0), "dusk": (0.4, 0), "fog": (0.3, 150)}
"""Light -> contrast and brightness added."""
ERFNET = {"name": "erfnet", "options": {"widths": [8, 12, 16], "blocks": [1, 1]}}
DEEPLAB = {"name": "deeplabv3-tiny", "norm": "bn",
           "options": {"widths": [8, 8, 8, 8], "hidden": 8, "out_channels": 8, "per_branch": "decoder"}}  # fmt: skip


class Lit(Toy):
    """The rectangles of the toy, other ones for every light."""

    def __init__(self, name: str, count: int, size: int, light: str) -> None:
        super().__init__(name, count, size)
        self.light = light
        self.shift = 100 * list(LIGHTS).index(light)

    def id(self, index: int) -> str:
        return f"{self.light}-{self.name}-{index:03d}"

    def read_mask(self, index: int) -> np.ndarray:
        return super().read_mask(index + self.shift)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        mask = self.read_mask(index)
        contrast, brightness = LIGHTS[self.light]
        rng = np.random.RandomState(index + self.shift)
        noise = rng.randint(0, 30, (self.size, self.size, 3), dtype=np.uint8)
        return (contrast * (COLOURS[mask] + noise) + brightness).astype(np.uint8), mask

    def fingerprint(self) -> str:
        return super().fingerprint() + self.light


def build(
    root: str | None = None,
    *,
    light: str = "day",
    train: int = 16,
    val: int = 6,
    size: int = 32,
    background: bool = True,
    names: list[str] | None = None,
) -> Dataset:
    first = "background" if background else "floor"
    classes = dict(enumerate([first, *(names or ["red", "green", "blue"])]))
    splits = {name: Lit(name, count, size, light) for name, count in (("train", train), ("val", val))}
    return Dataset(f"toy-{light}", RawLabels(classes, background=0 if background else None), splits)


def domain(light: str, *, rename: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
    """One entry of `data.domains`."""
    return {"dataset": HERE, "options": {"light": light, **options}, "rename": rename or {}}


def settings(out: Path, *lights: str, **changes: Any) -> dict[str, Any]:
    """A run of a few seconds over domains; mappings given as keywords are merged into the sections."""
    config: dict[str, Any] = {
        "name": "domains",
        "out": str(out),
        "seed": 3,
        "tracker": [],
        "report": False,
        "data": {"domains": {light: domain(light) for light in lights or ("day", "dusk")}, "transform": "resize",
                 "size": [32, 32], "evaluation": "resize", "normalisation": "unit", "workers": 0},
        "scenario": {"kind": "domain-incremental"},
        "model": ERFNET,
        "method": {"name": "mdil"},
        "train": {"epochs": 2, "batch": 4, "lr": 3e-3, "lr_next": None, "optimizer": "adam", "weight_decay": 1e-4,
                  "checkpoint_every": 3, "log_every": 1, "eval_batch": 4, "threads": 1},
    }  # fmt: skip
    for key, value in changes.items():
        merge = isinstance(value, dict) and isinstance(config.get(key), dict) and key != "model"
        config[key] = {**config[key], **value} if merge else value
    return config
