"""The interface of data sets to the rest of everseg."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from everseg.data.channels import Channels
from everseg.labels import RawLabels


class Split(Protocol):
    """An ordered list of images with their masks.

    A split that reads files may also have `reading`, an `everseg.data.datasets.decode.Reading`. A model that learns
    from the split gets further files decoded in the same way (bits per channel, EXIF orientation).
    """

    name: str

    def __len__(self) -> int: ...

    def id(self, index: int) -> str:
        """Name of a sample, stable and unique in the split (a file stem or a relative path)."""
        ...

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Decode one sample: image (H, W, 3) uint8 RGB and mask (H, W) uint8 raw ids.

        Raises:
            DataError: missing, unreadable, truncated, of different sizes, or not a mask of ids.
        """
        ...

    def read_mask(self, index: int) -> np.ndarray:
        """Decode the mask only, (H, W) uint8 raw ids."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 that changes when any mask or the list changes, and does not depend on where the data lie."""
        ...


def channels_of_split(split: Split) -> Channels | None:
    """What the channels of a split's images are, if not RGB with 8 bits."""
    return getattr(getattr(split, "reading", None), "channels", None)


@dataclass(frozen=True)
class Dataset:
    """Named splits, with the ids that their masks hold."""

    name: str
    labels: RawLabels
    splits: Mapping[str, Split]
    """Split name ("train", "val", "test") -> split."""
    notes: tuple[str, ...] = ()
    """What the reader decided about classes without being told to, in sentences without a full stop."""
