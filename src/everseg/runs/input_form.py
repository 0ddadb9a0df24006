"""How a model sees an image: its size, its normalisation, its windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from everseg.config.fields import DataConfig
from everseg.runs.commit import read_json


@dataclass(frozen=True)
class Windows:
    """Which windows an image is seen through."""

    side: int
    """Side of the square windows in pixels; an axis of the image that is shorter is seen whole."""
    overlap: float = 1 / 3
    """Share of its side that a window has in common with the next, at least."""
    batch: int = 4
    """Windows that go through the network at once."""

    @classmethod
    def of(cls, data: DataConfig, batch: int) -> Windows | None:
        """The windows test images are seen through; None where they are seen at once."""
        if data.evaluation != "sliding":
            return None
        return cls(data.window or data.crop, data.overlap, batch)

    def starts(self, length: int) -> tuple[int, ...]:
        """First pixels of the windows along an axis; the last window is flush with the border.

        >>> Windows(512, 0.25).starts(1024), Windows(512).starts(300)
        ((0, 384, 512), (0,))
        """
        if length <= self.side:
            return (0,)
        step = max(1, int(self.side * (1 - self.overlap)))
        return (*range(0, length - self.side, step), length - self.side)


@dataclass(frozen=True)
class InputForm:
    """How a model saw its images in training."""

    normalisation: Literal["imagenet", "unit"] = "imagenet"
    """Kind of `everseg.data.batches.transforms.normalise`."""
    size: tuple[int, int] | None = None
    """(H, W) in pixels that images are brought to; None: their own size."""
    windows: Windows | None = None
    """Overlapping windows that images of their own size are seen through; None: at once."""

    @classmethod
    def read(cls, folder: Path) -> InputForm:
        """Read it from a model folder."""
        return cls.of(read_json(folder / "classes.json"))

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> InputForm:
        """What a model's file says; older folders and imported models say less, and mean the defaults."""
        evaluation = stored.get("evaluation")
        size = stored.get("size") if evaluation == "resize" else None
        windows = Windows(stored["window"], stored["overlap"]) if evaluation == "sliding" else None
        normalisation = stored.get("normalisation", "imagenet")
        return cls(normalisation, None if size is None else (size[0], size[1]), windows)
