"""What the channels of a data set's images are, where they are not the three of an RGB picture with 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from everseg.errors import near_miss

MOST = 512
"""Largest number of channels."""
TYPES: Mapping[int, np.dtype[Any]] = {
    8: np.dtype(np.uint8),
    16: np.dtype(np.uint16),
    32: np.dtype(np.float32),
}
"""Bits per channel, as a data.yaml states them -> type of the values in files."""
_KEYS = ("count", "names", "bits", "range", "mean", "std", "shown", "folders")
_LARGEST = {8: 255.0, 16: 65535.0}


@dataclass(frozen=True)
class Channels:
    """The channels of images, in order. All numbers are in the units of the files.

    In arrays, values of 8 bits are uint8, others float32, which holds each value of 16 bits exactly.
    """

    names: tuple[str, ...]
    bits: int
    """8, 16 (unsigned whole numbers) or 32 (floating-point numbers)."""
    low: tuple[float, ...]
    """Values that pictures show as black."""
    high: tuple[float, ...]
    """Values that pictures show as white."""
    mean: tuple[float, ...]
    """Subtracted from each channel before the network sees it."""
    std: tuple[float, ...]
    """Divides each channel after that."""
    shown: tuple[int, ...]
    """The channels that pictures show as red, green and blue, or the one that they show as grey."""
    folders: tuple[str, ...] = ()
    """Folders of a data set with the files of further channels; a model does not remember them."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def array_type(self) -> np.dtype[Any]:
        """Type of the arrays that images are read as."""
        return np.dtype(np.uint8 if self.bits == 8 else np.float32)

    def picture(self, image: np.ndarray) -> np.ndarray:
        """Compose the picture for people, (H, W, 3) uint8, of an image (H, W, channels)."""
        chosen = list(self.shown if len(self.shown) == 3 else self.shown * 3)
        low, high = (np.array(values, np.float32)[chosen] for values in (self.low, self.high))
        share = (image[:, :, chosen].astype(np.float32) - low) / (high - low)
        return np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8)

    def to_json(self) -> dict[str, Any]:
        """Convert to the form that `channels_of` reads, without the folders."""
        return {
            "names": list(self.names),
            "bits": self.bits,
            "range": [list(pair) for pair in zip(self.low, self.high, strict=True)],
            "mean": list(self.mean),
            "std": list(self.std),
            "shown": list(self.shown),
        }


def same_channels(a: Channels | None, b: Channels | None) -> bool:
    """Whether two images mean the same to a network; what pictures show does not matter."""
    if a is None or b is None:
        return a is b
    return (a.names, a.bits, a.mean, a.std) == (b.names, b.bits, b.mean, b.std)


def picture_of(image: np.ndarray, channels: Channels | None) -> np.ndarray:
    """Make the picture for people, (H, W, 3) uint8; an RGB image is one already."""
    return image if channels is None else channels.picture(image)


def channels_of(given: Any) -> tuple[Channels | None, list[str]]:
    """Read `channels` of a data.yaml, or what `Channels.to_json` wrote.

    ::

        channels:
          names: [red, green, blue, infrared, height]   # or count: 5
          bits: 16                # per channel: 8 (default), 16, or 32 = floating point
          range: [0, 10000]       # black and white: one pair, or one for each channel; default all of the bits' values
          mean: [...]             # the network sees (value - mean) / std; default: 0 at black and 1 at white
          std: [...]
          shown: [red, green, blue]   # in pictures: three, or one as grey; default the first three, or the first
          folders: [nir/{split}]  # files of further channels, with the names of the images

    Returns:
        The channels, None if nothing or something wrong is given, and the problems.
    """
    if given is None:
        return None, []
    if not isinstance(given, Mapping):
        return None, [f"channels: expected keys such as names and bits, got {given!r}"]
    keys = _Keys(given)
    channels = keys.read()
    return (None, keys.problems) if keys.problems else (channels, [])


class _Keys:
    """Reads one key of `channels` after the other and collects the faults."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given
        self.problems = [
            f"channels.{key}: unknown key{near_miss(str(key), _KEYS)}" for key in given if key not in _KEYS
        ]

    def wrong(self, key: str, expected: str) -> None:
        self.problems.append(f"channels.{key}: expected {expected}, got {self.given.get(key)!r}")

    def read(self) -> Channels | None:
        names, bits = self.names(), self.bits()
        if not names or bits is None:
            return None
        mean, std = self.numbers("mean", names), self.numbers("std", names)
        if (self.given.get("mean") is None) != (self.given.get("std") is None):
            self.problems.append("channels: mean and std go together; give both, or only range")
        if std is not None and min(std) <= 0:
            self.wrong("std", "numbers above 0")
            return None
        low, high = self.bounds(names, bits, mean, std)
        shown, folders = self.shown(names), self.folders()
        if self.problems:
            return None
        if mean is None or std is None:
            mean, std = low, tuple(white - black for black, white in zip(low, high, strict=True))
        return Channels(tuple(names), bits, low, high, mean, std, shown, folders)

    def names(self) -> list[str]:
        names, count = self.given.get("names"), self.given.get("count")
        if names is None:
            if type(count) is not int or not 1 <= count <= MOST:
                self.wrong("count", f"a whole number from 1 to {MOST}, or names in its place")
                return []
            return [f"channel {number}" for number in range(count)]
        if (
            not (isinstance(names, list) and 1 <= len(names) <= MOST)
            or not all(isinstance(name, str) and name for name in names)
            or len(set(names)) < len(names)
        ):
            self.wrong("names", f"1 to {MOST} different names")
            return []
        if count not in (None, len(names)):
            self.wrong("count", f"{len(names)}, as there are names, or nothing")
        return names

    def bits(self) -> int | None:
        bits = self.given.get("bits", 8)
        if type(bits) is int and bits in TYPES:
            return bits
        self.wrong("bits", "8, 16, or 32 for floating-point numbers")
        return None

    def numbers(self, key: str, names: list[str]) -> tuple[float, ...] | None:
        value = self.given.get(key)
        if value is None:
            return None
        if _number(value):
            value = [value] * len(names)
        if isinstance(value, list) and len(value) == len(names) and all(map(_number, value)):
            return tuple(map(float, value))
        self.wrong(key, f"a number, or one for each of the {len(names)} channels")
        return None

    def bounds(
        self, names: list[str], bits: int, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Black and white of each channel."""
        found = self.given.get("range")
        if found is None and bits in _LARGEST:
            found = [0.0, _LARGEST[bits]]
        elif found is None and mean is not None and std is not None:
            found = [[m - 2 * s, m + 2 * s] for m, s in zip(mean, std, strict=True)]
        pairs = [found] * len(names) if _pair(found) else found
        if not (isinstance(pairs, list) and len(pairs) == len(names) and all(map(_pair, pairs))):
            self.wrong("range", f"[black, white], or one such pair for each of the {len(names)} channels")
            return (), ()
        return tuple(float(pair[0]) for pair in pairs), tuple(float(pair[1]) for pair in pairs)

    def shown(self, names: list[str]) -> tuple[int, ...]:
        found = self.given.get("shown", [0, 1, 2] if len(names) >= 3 else [0])
        numbers = (
            [names.index(one) if one in names else one for one in found] if isinstance(found, list) else []
        )
        if len(numbers) in (1, 3) and all(type(one) is int and 0 <= one < len(names) for one in numbers):
            return tuple(numbers)
        self.wrong("shown", f"one or three of {', '.join(names[:12])}")
        return ()

    def folders(self) -> tuple[str, ...]:
        found = self.given.get("folders", [])
        if not (isinstance(found, list) and all(isinstance(one, str) and one for one in found)):
            self.wrong("folders", "folders below the data folder")
            return ()
        if any(one.startswith("/") or ".." in one.replace("\\", "/").split("/") for one in found):
            self.wrong("folders", "folders inside the data folder")
        return tuple(found)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and bool(np.isfinite(value)) and abs(value) < 1e30


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_number, value)) and value[0] < value[1]
