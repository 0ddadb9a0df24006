"""Turn pictures and masks into network inputs, with pure functions on uint8 arrays.

Labels of more than 255 classes are uint16 arrays; everything said of uint8 labels holds for them. Everything said of
labels also holds for a label with further maps in one array (`with_maps`): all of its fields are moved alike.

All randomness comes from the `random.Random` that is passed in, so a sample's augmentation depends on
(seed, step, epoch, sample id) alone and never on the worker, the rank or what was drawn before.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from everseg.data.channels import Channels
from everseg.labels import IGNORED, IGNORED_WIDE
from everseg.types import IMAGENET_MEAN, IMAGENET_STD

RATIO = (3 / 4, 4 / 3)
"""Range of the training crop's width : height."""
_ATTEMPTS = 10


LABEL = "label"
"""Field of the label in an array that holds further maps."""


def with_maps(label: np.ndarray, maps: Mapping[str, np.ndarray]) -> np.ndarray:
    """Join a label and further maps of its size in one array with named fields, so that geometry moves all alike.

    Args:
        label: (H, W) uint8 or uint16.
        maps: name -> (H, W) uint8 or uint16.

    Returns:
        (H, W) with the fields "label" and the names in front of which a "/" is put; the label itself without maps.
    """
    if not maps:
        return label
    joined = np.empty(
        label.shape, [(LABEL, label.dtype), *((f"/{name}", m.dtype) for name, m in maps.items())]
    )
    joined[LABEL] = label
    for name, one in maps.items():
        joined[f"/{name}"] = one
    return joined


def parted(joined: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Take apart what `with_maps` joined: the label, and the maps by name."""
    if joined.dtype.names is None:
        return joined, {}
    label, *rest = (np.ascontiguousarray(joined[name]) for name in joined.dtype.names)
    return label, dict(zip((name[1:] for name in joined.dtype.names[1:]), rest, strict=True))


def translated(label: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Send the ids of a label through a table raw id -> train id. Further maps in the array keep their values."""
    if label.dtype.names is None:
        return table.take(label)
    only, maps = parted(label)
    return with_maps(table.take(only), maps)


def ignored_map(shape: tuple[int, ...], like: np.ndarray) -> np.ndarray:
    """Make a map of ignored pixels, with the fields and types of another one; all of its fields get their own value."""
    if like.dtype.names is None:
        return np.full(shape, ignored_in(like), like.dtype)
    empty = np.empty(shape, like.dtype)
    for name in like.dtype.names:
        empty[name] = ignored_in(empty[name])
    return empty


def sample_rng(seed: int, step: int, epoch: int, sample_id: str) -> random.Random:
    """Make the random stream of one sample in one epoch.

    The stream is the same on every machine and Python version (BLAKE2b, not `hash`).
    """
    key = f"{seed}\0{step}\0{epoch}\0{sample_id}".encode("utf-8", "surrogateescape")
    return random.Random(int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "big"))


def random_resized_crop_params(
    width: int,
    height: int,
    *,
    scale: tuple[float, float],
    rng: random.Random,
    ratio: tuple[float, float] = RATIO,
) -> tuple[int, int, int, int]:
    """Draw the box of a random resized crop.

    Ten attempts draw an area (uniform, relative to the image's) and an aspect (log-uniform) and keep the first
    box that fits; after that the largest centred box of the nearest allowed aspect is taken. Because a box must
    fit, relative areas above 1 practically always fail: with the papers' scale (0.5, 2) the effective range
    is [0.5, 1], or the fallback.

    Args:
        width: of the image, pixels.
        height: of the image, pixels.
        scale: range of the box's area relative to the image's.
        rng: consumed as area, log aspect per attempt, then top and left on success.
        ratio: range of width / height.

    Returns:
        (top, left, height, width) of the box, pixels.

    Source: Cermelli et al., CVPR 2020, the authors' training transform; same random stream as theirs.
    """
    area = width * height
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    # The order and the kind of the draws are the authors': the same stream gives the same boxes.
    for _ in range(_ATTEMPTS):
        target = rng.uniform(*scale) * area
        aspect = math.exp(rng.uniform(*log_ratio))
        w = round(math.sqrt(target * aspect))
        h = round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = rng.randint(0, height - h)
            left = rng.randint(0, width - w)
            return top, left, h, w
    w, h = width, height  # the whole image, cut to the nearest allowed aspect
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def train_transform(
    image: np.ndarray,
    label: np.ndarray,
    *,
    crop: int,
    scale: tuple[float, float],
    flip: float,
    rng: random.Random,
    table: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Random resized crop, then a horizontal flip.

    Args:
        image: (H, W, 3) uint8.
        label: (H, W) uint8, any ids; resized by nearest neighbour, so no id is ever invented.
        crop: side of the square result, pixels.
        scale: range of the crop's area relative to the image's.
        flip: probability of the flip.
        rng: the sample's random stream; the flip's draw is made whatever `flip` is.
        table: (256,) uint8, raw id -> train id of the label; None leaves the ids. It is applied to the cut-out. That
            gives the same as applying it to the result and is less work where the cut-out is enlarged.

    Returns:
        (3, crop, crop) uint8 and (crop, crop) uint8, both contiguous.
    """
    height, width = label.shape
    top, left, h, w = random_resized_crop_params(width, height, scale=scale, rng=rng)
    box = slice(top, top + h), slice(left, left + w)
    x, y = _resize(image[box], label[box] if table is None else translated(label[box], table), crop, crop)
    if rng.random() < flip:
        x, y = x[:, ::-1], y[:, ::-1]
    # Contiguous and writable, as torch wants them; mostly no copy is needed.
    return np.require(x.transpose(2, 0, 1), None, ["C", "W"]), np.require(
        y, None, ["C", "W"]
    )  # often no copy


def center_transform(image: np.ndarray, label: np.ndarray, *, crop: int) -> tuple[np.ndarray, np.ndarray]:
    """Resize the short side to `crop` and cut the centre square, as the papers do with validation and test images.

    Args:
        image: (H, W, 3) uint8.
        label: (H, W) uint8.
        crop: side of the result, pixels.

    Returns:
        (3, crop, crop) uint8 and (crop, crop) uint8. The scores are thus measured on the resized centre.
    """
    height, width = label.shape
    if width < height:
        w, h = crop, int(crop * height / width)
    else:
        w, h = int(crop * width / height), crop
    x, y = _resize(image, label, h, w)
    top, left = round((h - crop) / 2), round((w - crop) / 2)
    box = slice(top, top + crop), slice(left, left + crop)
    return _channels_first(x[box]), np.array(y[box], order="C")


def whole_transform(image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep the whole image: (3, H, W) uint8 and (H, W) uint8."""
    return _channels_first(image), np.array(label, order="C")


def resize_transform(
    image: np.ndarray, label: np.ndarray, *, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Resize the whole image to one size, whatever its aspect.

    Args:
        image: (H, W, 3) uint8, resized bilinearly (with Pillow's antialiasing when it shrinks).
        label: (H, W) uint8, any ids, resized by nearest neighbour.
        size: height and width of the result, pixels.

    Returns:
        (3, *size) uint8 and `size` uint8, both contiguous.

    Source: Garg et al. (MDIL), WACV 2022, the authors' transform of training and test images.
    """
    x, y = _resize(image, label, *size)
    return _channels_first(x), np.array(y, order="C")


def flip_and_shift(
    image: np.ndarray,
    label: np.ndarray,
    *,
    flip: float,
    shift: int,
    fill: Literal["void", "authors"],
    rng: random.Random,
) -> tuple[np.ndarray, np.ndarray]:
    """Horizontal flip, then a move by up to `shift` pixels right or left and down or up.

    Args:
        image: (3, H, W) uint8; the strips that the move uncovers become 0 (black).
        label: (H, W) uint8 train ids.
        flip: probability of the flip.
        shift: largest move in each direction, pixels; each whole number in [-shift, shift] is equally likely.
        fill: label of the uncovered strips: "void" = ignored (255) on all sides; "authors" = ignored at the left
            and at the top, class 0 at the right and at the bottom, which also wins in the corners.
        rng: the sample's random stream, consumed as flip, move right, move down, whatever `flip` and `shift` are.

    Returns:
        Arrays of the same shapes, contiguous.

    Source: Garg et al. (MDIL), WACV 2022, the authors' training transform; same random stream as theirs. Their
    label 0 at the right and bottom ("road") comes from cropping beyond the image; it is the form "authors".
    """
    if rng.random() < flip:
        image, label = image[:, :, ::-1], label[:, ::-1]
    right, down = rng.randint(-shift, shift), rng.randint(-shift, shift)
    height, width = label.shape
    # `source` stays in the image, `target` is where it comes to lie; rows and columns move alike.
    source = _overlap(-down, height), _overlap(-right, width)
    target = _overlap(down, height), _overlap(right, width)
    x, y = np.zeros_like(image, order="C"), ignored_map(label.shape, label)
    x[:, *target] = image[:, *source]
    y[target] = label[source]
    if fill == "authors":
        ids = y if y.dtype.names is None else y[LABEL]  # the same memory: further maps keep their own filling
        ids[target[0].stop :], ids[:, target[1].stop :] = 0, 0
    return x, y


def ignored_in(label: np.ndarray) -> int:
    """Train id of ignored pixels in a label map of this type."""
    return IGNORED if label.dtype == np.uint8 else IGNORED_WIDE


def normalise(
    image: Tensor, kind: Literal["imagenet", "unit"] = "imagenet", channels: Channels | None = None
) -> Tensor:
    """Scale to [0, 1] and, for "imagenet", standardise with ImageNet's channel means and deviations.

    Args:
        image: (B, 3, H, W) or (3, H, W) uint8, on any device.
        kind: "imagenet" (MiB) or "unit", [0, 1] as it is (MDIL).
        channels: of images other than RGB with 8 bits, of the type `channels.array_type`: (value - mean) / std of each
            channel, whatever `kind` says.

    Returns:
        float32 of the same shape on the same device.
    """
    if channels is None:
        unit = image.to(torch.float32).div_(255)
        if kind == "unit":
            return unit
    # While a graph is traced, tensors are symbols of the trace. The cache must not keep them: they would spoil every
    # later image of the process.
    make = _mean_and_deviation.__wrapped__ if torch.compiler.is_compiling() else _mean_and_deviation
    if channels is not None:
        mean, std = make(image.device, channels.mean, channels.std)
        return (image.to(torch.float32) - mean) / std
    mean, std = make(image.device)
    return unit.sub_(mean).div_(std)


@lru_cache(maxsize=8)
def _mean_and_deviation(
    device: torch.device, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> tuple[Tensor, Tensor]:
    """Mean and deviation, ImageNet's by default, copied to the device once: each copy makes the host wait."""
    first, second = (torch.tensor(values, device=device) for values in (mean, std))
    return first.view(-1, 1, 1), second.view(-1, 1, 1)


def _overlap(move: int, length: int) -> slice:
    """The part of a line of `length` pixels that its own pixels cover after moving by `move`."""
    return slice(min(max(move, 0), length), max(min(length + move, length), 0))


def _resize(image: np.ndarray, label: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    if label.shape == (height, width):
        return image, label
    return _bilinear(image, height, width), resize_nearest(label, height, width)


def resize_nearest(label: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize ids by nearest neighbour: (H, W) of any ids, with the further maps it may carry, to (height, width)."""
    only, maps = parted(label)
    small = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(one)).resize((width, height), Image.Resampling.NEAREST)
        )
        for one in (only, *maps.values())
    ]
    return with_maps(small[0], dict(zip(maps, small[1:], strict=True)))


def _bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, C) uint8 or float32 as Pillow does, to the bit.

    Both Pillow and torch weigh pixels by whole numbers, Pillow in steps of 2^-22, torch in steps of 2^-14, and round
    between the two directions. Where all weights are multiples of torch's step, the results are equal, and torch's
    vector code does it in a third of the time.
    """
    if image.shape[2] != 3 or image.dtype != np.uint8:  # Pillow resizes each channel alone
        planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in image.transpose(2, 0, 1)]
        done = [np.asarray(plane.resize((width, height), Image.Resampling.BILINEAR)) for plane in planes]
        return np.stack(done, axis=2)
    if not (_weights_are_exact(image.shape[0], height) and _weights_are_exact(image.shape[1], width)):
        x = Image.fromarray(np.ascontiguousarray(image))
        return np.asarray(x.resize((width, height), Image.Resampling.BILINEAR))
    pixels = torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)[None]  # (1, 3, H, W)
    resized = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).numpy()


def resized_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize an image (H, W, C) bilinearly, antialiased when it shrinks; a copy."""
    return np.array(_bilinear(image, height, width))


def _weights_are_exact(source: int, target: int) -> bool:
    """Whether the weights of a resize are multiples of 2^-14.

    Enlarging to `target` pixels makes them multiples of 1 / (2 * target), so targets up to 2^13 that are powers of two
    qualify.
    """
    return source <= target <= 2**13 and target > 1 and target & (target - 1) == 0


def _channels_first(image: np.ndarray) -> np.ndarray:
    return np.array(image.transpose(2, 0, 1), order="C")  # a copy: decoded pictures are read-only
