"""Augmentations beyond the papers' crop, flip and shift: colours, blur, scaled crops, vertical flips, right angles.

Each is off by default and has a random stream of its own (`own_stream`), made of seed, step, epoch, sample id and the
setting's name. So switching one on, or changing its range, never changes what another draws. The order is fixed: the
cut-out, brightness, contrast, saturation, hue, blur, padding, the paper's flip and shift, vertical flip, right angle.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from PIL import Image

from everseg.config.fields import DataConfig
from everseg.data.batches.transforms import ignored_map, sample_rng

Stream = Callable[[str], random.Random]
"""Name of an augmentation's setting -> its random stream for one sample in one epoch."""
_LUMA = (0.299, 0.587, 0.114)
"""Share of red, green and blue in the grey of a pixel (ITU-R BT.601, as in Pillow and torchvision)."""


def own_stream(seed: int, step: int, epoch: int, sample_id: str) -> Stream:
    """Make the source of one random stream per augmentation; no file name holds the NUL that parts id and name."""
    return lambda setting: sample_rng(seed, step, epoch, f"{sample_id}\0{setting}")


def scaled_crop(
    image: np.ndarray, label: np.ndarray, *, crop: int, scale_range: tuple[float, float], stream: Stream
) -> tuple[np.ndarray, np.ndarray]:
    """Resize by a random factor and cut out a square at a random place, as mmsegmentation and DeepLab do.

    Only the cut-out is computed. At its border the filter does not see beyond it, so border pixels may differ a little
    from those of a whole resized image.

    Args:
        image: (H, W, C) uint8 or float32, resized bilinearly (antialiased when it shrinks).
        label: (H, W) ids, by nearest neighbour.
        crop: largest side of the result, pixels.
        scale_range: range of the factor on both sides, drawn uniformly.
        stream: of "scale_range": the factor, then top and left.

    Returns:
        (C, h, w) and (h, w) with h, w <= crop: less where the resized image is smaller; `padded` fills it up.
    """
    rng = stream("scale_range")
    factor = rng.uniform(*scale_range)
    sides = [max(1, round(side * factor)) for side in label.shape]
    starts = [rng.randint(0, max(0, side - crop)) for side in sides]
    lengths = [min(side, crop) for side in sides]
    # Each line of the result -> the place in the source that its centre lies on.
    edges = [
        (start * source / side, (start + length) * source / side)
        for start, length, side, source in zip(starts, lengths, sides, label.shape, strict=True)
    ]
    rows, columns = (
        np.minimum((np.arange(start, start + length) + 0.5) * source / side, source - 1).astype(np.intp)
        for start, length, side, source in zip(starts, lengths, sides, label.shape, strict=True)
    )
    (top, bottom), (left, right) = edges
    box = left, top, right, bottom
    planes = [
        Image.fromarray(np.ascontiguousarray(image[:, :, channel])).resize(
            (lengths[1], lengths[0]), Image.Resampling.BILINEAR, box
        )
        for channel in range(image.shape[2])
    ]
    return np.stack([np.asarray(plane) for plane in planes]), label[rows[:, None], columns]


def padded(image: np.ndarray, label: np.ndarray, *, crop: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill (C, h, w) and (h, w) up to squares of side `crop` at the bottom and at the right: black, ignored."""
    height, width = label.shape
    if (height, width) == (crop, crop):
        return image, label
    x = np.zeros((len(image), crop, crop), image.dtype)
    y = ignored_map((crop, crop), label)
    x[:, :height, :width], y[:height, :width] = image, label
    return x, y


def appearance(image: np.ndarray, data: DataConfig, stream: Stream) -> np.ndarray:
    """Change colours and sharpness as the settings say; the label stays as it is.

    Args:
        image: (C, H, W) uint8, or float32 of any range.
        data: brightness, contrast, saturation, hue and blur are read; each draws one number, if it is on.
        stream: of those names.

    Returns:
        The same type and shape. The image itself if nothing is switched on.
    """
    drawn = {
        name: stream(name).uniform(*found)
        for name in ("brightness", "contrast", "saturation", "hue", "blur")
        if (found := getattr(data, name)) is not None
    }
    if not drawn:
        return image
    whole = image.dtype == np.uint8
    x = image.astype(np.float32)
    if "brightness" in drawn:
        x = _clipped(x * np.float32(drawn["brightness"]), whole)
    if "contrast" in drawn:
        x = _clipped(contrast(x, drawn["contrast"]), whole)
    if "saturation" in drawn:
        x = _clipped(saturation(x, drawn["saturation"]), whole)
    if "hue" in drawn:
        x = hue(x, drawn["hue"])
    if "blur" in drawn:
        x = blur(x, drawn["blur"])
    return np.rint(_clipped(x, whole)).astype(np.uint8) if whole else x


def _clipped(x: np.ndarray, whole: bool) -> np.ndarray:
    """Keep whole numbers in the range of their type; physical values have no limit."""
    return np.clip(x, 0, 255, out=x) if whole else x


def grey(image: np.ndarray) -> np.ndarray:
    """Reduce float (3, H, W) RGB to its grey, (H, W)."""
    red, green, blue = (plane * np.float32(share) for plane, share in zip(image, _LUMA, strict=True))
    return np.asarray(red + green + blue)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Move float (C, H, W) from its mean by `factor`: the mean grey of RGB, else each channel's own mean."""
    if len(image) == 3:
        mean = np.float32(grey(image).mean(dtype=np.float64))
    else:
        mean = image.mean(axis=(1, 2), keepdims=True, dtype=np.float64).astype(np.float32)
    return np.asarray((image - mean) * np.float32(factor) + mean)


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Move float (3, H, W) RGB from its grey by `factor`: 0 = grey, 1 = unchanged."""
    plain = grey(image)
    return np.asarray((image - plain) * np.float32(factor) + plain)


def hue(image: np.ndarray, turn: float) -> np.ndarray:
    """Turn the hue of float (3, H, W) RGB by a share of the colour circle; value and saturation (HSV) stay.

    Source: the usual conversion RGB -> HSV -> RGB, without rounding in between.
    """
    red, green, blue = image
    value, low = image.max(axis=0), image.min(axis=0)
    chroma = value - low
    inverse = np.float32(1) / np.where(chroma > 0, chroma, np.float32(1))  # grey has no hue, and keeps none
    # The hue in sixths of the circle, in [0, 6).
    sixth = np.where(
        value == red,
        (green - blue) * inverse,
        np.where(
            value == green, (blue - red) * inverse + np.float32(2), (red - green) * inverse + np.float32(4)
        ),
    )
    sixth += np.float32(6 * turn)
    result = np.empty_like(image)
    for plane, offset in zip(result, (5, 3, 1), strict=True):
        # Distance on the circle from the colour that has nothing of this channel.
        k = np.mod(sixth + np.float32(offset), np.float32(6))
        share = np.clip(np.minimum(k, np.float32(4) - k), 0, 1)
        np.subtract(value, chroma * share, out=plane)
    return result


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur float (C, H, W) by a Gaussian of `sigma` pixels, cut off at 3 sigma; borders are mirrored."""
    radius = int(np.ceil(3 * sigma))
    if radius < 1:
        return image
    weights = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    weights = (weights / (weights[0] + 2 * weights[1:].sum())).astype(np.float32)
    for axis in (1, 2):
        around = [(0, 0)] * 3
        around[axis] = (radius, radius)
        source = np.moveaxis(np.pad(image, around, mode="symmetric"), axis, 1)
        length = image.shape[axis]
        total = source[:, radius : radius + length] * weights[0]
        for distance in range(1, radius + 1):
            near = source[:, radius - distance : radius - distance + length]
            far = source[:, radius + distance : radius + distance + length]
            total += (near + far) * weights[distance]
        image = np.moveaxis(total, 1, axis)
    return image


def turned(
    image: np.ndarray, label: np.ndarray, data: DataConfig, stream: Stream
) -> tuple[np.ndarray, np.ndarray]:
    """Flip upside down and turn by a right angle, image (C, H, W) and label (H, W) alike.

    Args:
        image: any type.
        label: any type.
        data: `vertical_flip` and `rotate`, the probabilities.
        stream: of those names; "rotate" draws whether, then which of 1, 2, 3 quarter turns counter-clockwise.
    """
    if data.vertical_flip and stream("vertical_flip").random() < data.vertical_flip:
        image, label = image[:, ::-1], label[::-1]
    if data.rotate:
        rng = stream("rotate")
        if rng.random() < data.rotate:
            quarters = rng.randint(1, 3)
            image, label = np.rot90(image, quarters, axes=(1, 2)), np.rot90(label, quarters)
    # Contiguous and writable, as torch wants them.
    return np.require(image, None, ["C", "W"]), np.require(label, None, ["C", "W"])
