"""The interface of data sets to the rest of everseg."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from everseg.data.channels import Channels
from everseg.errors import DataError
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
        """Decode one sample: image (H, W, 3) uint8 RGB and mask (H, W) raw ids, uint8, or uint16 for ids above 255.

        Raises:
            DataError: missing, unreadable, truncated, of different sizes, or not a mask of ids.
        """
        ...

    def read_mask(self, index: int) -> np.ndarray:
        """Decode the mask only, (H, W) raw ids, uint8 or uint16."""
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
    extra: Mapping[str, str] = field(default_factory=dict)
    """Name of a further map of the images (`data.extra`) -> folder that holds one for each image."""


def mask_fault(mask: object) -> str:
    """Say why an object is no mask of raw ids; "" if it is one."""
    if not isinstance(mask, np.ndarray):
        return f"the mask is a {type(mask).__name__}, not an array (H, W) uint8 of ids"
    shape = mask.shape
    if mask.ndim != 2 or 0 in mask.shape:
        hint = "; give its one channel, mask[:, :, 0]" if mask.ndim == 3 and mask.shape[2] == 1 else ""
        return f"the mask is {shape} {mask.dtype}, not (H, W) uint8 ids{hint}"
    if mask.dtype not in (np.uint8, np.uint16):
        return f"the mask is {shape} {mask.dtype}, not (H, W) uint8 ids; give mask.astype(np.uint8)"
    return ""


def image_fault(image: object, channels: Channels | None = None) -> str:
    """Say why an object is no image, RGB with 8 bits or of the stated channels; "" if it is one."""
    if channels is not None:
        return _channels_fault(image, channels)
    if not isinstance(image, np.ndarray):
        return f"the image is a {type(image).__name__}, not an array (H, W, 3) uint8 RGB"
    shape = image.shape
    if image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8 and 0 not in image.shape:
        return ""
    hint = ""
    if image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 1):
        hint = "; copy the grey channel to all three"
    elif image.ndim == 3 and image.shape[0] == 3:
        hint = "; the channels come last: image.transpose(1, 2, 0)"
    elif image.ndim == 3 and image.shape[2] == 4:
        hint = "; leave out alpha, image[:, :, :3]"
    if image.dtype != np.uint8:
        hint += (
            f"; bring its values, here {image.min():g} to {image.max():g}, to 0..255" if image.size else ""
        )
    return f"the image is {shape} {image.dtype}, not (H, W, 3) uint8 RGB{hint}"


def _channels_fault(image: object, channels: Channels) -> str:
    count, kind = len(channels), channels.array_type
    if not isinstance(image, np.ndarray):
        return f"the image is a {type(image).__name__}, not an array (H, W, {count}) {kind}"
    fits = image.ndim == 3 and image.shape[2] == count and image.dtype == kind and 0 not in image.shape
    if fits:
        return ""
    hint = ""
    if image.ndim == 2 and count == 1:
        hint = "; give it a third axis, image[:, :, None]"
    elif image.ndim == 3 and image.shape[0] == count != image.shape[2]:
        hint = "; the channels come last: image.transpose(1, 2, 0)"
    if image.dtype != kind:
        hint += f"; channels of {channels.bits} bits are given as {kind}, their values unchanged"
    return f"the image is {image.shape} {image.dtype}, not (H, W, {count}) {kind}{hint}"


def require_sample(sample_id: str, image: object, mask: object, channels: Channels | None = None) -> None:
    """Check what a split's `read` gave.

    Raises:
        DataError: not an image (H, W, 3) uint8, or of the stated channels, and a mask (H, W) uint8 or uint16 of the
            same size; names the sample and all faults.
    """
    faults = [fault for fault in (image_fault(image, channels), mask_fault(mask)) if fault]
    if not faults and image.shape[:2] != mask.shape:  # type: ignore[attr-defined]
        sizes = ["{1}x{0}".format(*array.shape) for array in (image, mask)]  # type: ignore[attr-defined]
        faults = [
            f"the image has {sizes[0]} pixels and the mask {sizes[1]} (width x height), so its labels would lie "
            "elsewhere; give both in one size"
        ]
    if faults:
        raise DataError(f"{sample_id}: {'; '.join(faults)}")
