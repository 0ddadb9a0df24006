"""Generated street scenes: coloured, with occlusion and changing light, good enough to learn from.

Every scene is a pure function of (seed, split, index). Nothing is downloaded or written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from everseg.data.base import Dataset
from everseg.data.demo import scenes
from everseg.errors import ConfigError
from everseg.labels import RawLabels

NAMES = {0: "background", 1: "road", 2: "building", 3: "tree", 4: "car", 5: "person", 6: "sign"}
"""Raw ids; background is the sky, the verges and the pavements."""


def build(
    root: str | Path | None = None,
    *,
    size: Sequence[int] = (64, 96),
    num_train: int = 400,
    num_val: int = 100,
    seed: int = 0,
    light: str = "day",
) -> Dataset:
    """Generate street scenes by day or at dusk; nothing is read from disk.

    Args:
        root: not used.
        size: (height, width) of the scenes, pixels, at least 32 each.
        num_train: scenes of the split `train`.
        num_val: scenes of the split `val`.
        seed: of the scenes.
        light: "day", or "dusk": other scenes, darker, bluish and grainy, for runs over two domains.

    Returns:
        Splits `train` and `val`; background 0 and six classes, of which several stand in every scene.

    Raises:
        ConfigError: a wrong option; all are named.
    """
    problems = []
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(_is_count(s, 32) for s in size):
        problems.append(f"data.options.size: expected [height, width] of at least 32 pixels, got {size!r}")
    for key, value in (("num_train", num_train), ("num_val", num_val)):
        if not _is_count(value, 1):
            problems.append(f"data.options.{key}: expected a number of scenes, at least 1, got {value!r}")
    if not _is_count(seed, 0):
        problems.append(f"data.options.seed: expected a whole number of at least 0, got {seed!r}")
    if light not in ("day", "dusk"):
        problems.append(f"data.options.light: expected 'day' or 'dusk', got {light!r}")
    if problems:
        raise ConfigError(problems)
    height, width = size
    splits = {
        name: _split(name, count, (height, width), seed, light == "dusk")
        for name, count in (("train", num_train), ("val", num_val))
    }
    return Dataset("demo", RawLabels(names=dict(NAMES), background=0, void=(255,)), splits)


@lru_cache(maxsize=4)
def _split(name: str, count: int, size: tuple[int, int], seed: int, dusk: bool) -> DemoSplit:
    """A split, kept for the next run or report of this process: its scenes cost more than a look at them."""
    return DemoSplit(name, count, size=size, seed=seed, dusk=dusk)


class DemoSplit:
    """Scenes made when they are first read, then kept; satisfies `everseg.data.base.Split`."""

    def __init__(
        self, name: str, count: int, *, size: tuple[int, int], seed: int, dusk: bool = False
    ) -> None:
        self.name = name
        self._count = count
        self._size = size
        self._seed = seed
        self._dusk = dusk
        self._made: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._fingerprint = ""

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}

    def id(self, index: int) -> str:
        """Name of a scene."""
        if not 0 <= index < self._count:
            raise IndexError(f"scene {index} of {self._count}")
        return f"{self.name}-{index:05d}"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) uint8 RGB and mask (H, W) uint8 raw ids; both read-only."""
        name = self.id(index)
        if index not in self._made:
            stream = f"demo/{self._seed}/{'dusk/' if self._dusk else ''}{name}"
            digest = hashlib.blake2b(stream.encode(), digest_size=8).digest()
            pair = scenes.scene(int.from_bytes(digest, "big"), self._size, dusk=self._dusk)
            for array in pair:
                array.flags.writeable = False
            self._made[index] = pair
        return self._made[index]

    def read_mask(self, index: int) -> np.ndarray:
        """Mask (H, W) uint8 raw ids, read-only."""
        return self.read(index)[1]

    def index_key(self) -> str:
        """SHA-256 of what the scenes are made of: the code that draws them and its arguments; nothing is drawn."""
        code = Path(scenes.__file__).read_bytes()
        made_of = (
            self.name,
            self._count,
            self._size,
            self._seed,
            self._dusk,
            np.__version__,
            PIL.__version__,
        )
        return hashlib.sha256(code + repr(made_of).encode()).hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 of the masks and their names."""
        if not self._fingerprint:
            total = hashlib.sha256(repr(self._size).encode())
            for index in range(self._count):
                total.update(self.id(index).encode())
                total.update(self.read_mask(index).tobytes())
            self._fingerprint = total.hexdigest()
        return self._fingerprint


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
