"""A simple saliency, for methods that read one (`data.extra`), where no trained detector's maps are at hand."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from everseg.data.base import Dataset, Split, channels_of_split
from everseg.data.batches.parallel import Progress, map_samples
from everseg.data.channels import picture_of
from everseg.data.writing import write_atomically
from everseg.display import Piece, Result, counted, percent
from everseg.errors import DataError, some

SALIENT = 255
"""Value of salient pixels in the maps; others are 0."""
_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
"""Linear sRGB -> XYZ with the white D65 (IEC 61966-2-1)."""
_WHITE = np.array([0.95047, 1.0, 1.08883])
_BINOMIAL = np.array([1, 4, 6, 4, 1]) / 16


def frequency_tuned(image: np.ndarray) -> np.ndarray:
    """Measure how far the colour of each pixel lies from the image's mean colour.

    It finds objects of another colour than their surroundings, and knows nothing of what they are. It is no substitute
    for the detector whose maps SSUL's authors publish.

    Args:
        image: (H, W, 3) uint8 RGB.

    Returns:
        (H, W) float64 >= 0: Euclidean distance in CIELAB between the mean of the image and the image smoothed by a 5x5
        binomial filter (borders are mirrored).

    Source: Achanta et al., Frequency-tuned salient region detection, CVPR 2009, eq. 4.
    """
    lab = _lab(image)
    mean = lab.mean(axis=(0, 1))
    for axis in (0, 1):
        around = [(0, 0)] * 3
        around[axis] = (2, 2)
        padded = np.moveaxis(np.pad(lab, around, mode="symmetric"), axis, 0)
        length = lab.shape[axis]
        total = sum(weight * padded[k : k + length] for k, weight in enumerate(_BINOMIAL))
        lab = np.moveaxis(np.asarray(total), 0, axis)
    return np.sqrt(((lab - mean) ** 2).sum(axis=2))


def salient(image: np.ndarray) -> np.ndarray:
    """Tell salient pixels: those at least twice as salient as the image's mean.

    Returns:
        (H, W) uint8, 255 = salient, 0 = not. An image of one colour has no salient pixel.

    Source: the adaptive threshold of Achanta et al., CVPR 2009, eq. 7.

    >>> image = np.zeros((9, 9, 3), np.uint8)
    >>> image[3:6, 3:6] = 255, 0, 0
    >>> salient(image)[4].tolist()
    [0, 0, 0, 255, 255, 255, 0, 0, 0]
    """
    strength = frequency_tuned(image)
    return np.where((strength >= 2 * strength.mean()) & (strength > 1e-6), SALIENT, 0).astype(np.uint8)


def _lab(image: np.ndarray) -> np.ndarray:
    """Convert sRGB, (H, W, 3) uint8, to CIELAB."""
    rgb = image.astype(np.float64) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    ratio = linear @ _TO_XYZ.T / _WHITE
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(f, 2, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=2)


@dataclass(frozen=True, repr=False)
class Saliency(Result):
    """Saliency maps that were written."""

    out: Path
    images: int
    share: float
    """Mean share of salient pixels."""

    def shown(self) -> Iterable[Piece]:
        yield (
            f"maps of {counted(self.images, 'image')} are in {self.out}: {percent(self.share, digits=0)} % of the "
            "pixels are "
            "salient (frequency-tuned saliency, Achanta et al. 2009: colours only, no detector)"
        )
        yield f"use them: data.extra.saliency={self.out}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out)}


def write_saliency(dataset: Dataset, out: Path, split: str, progress: Progress | None = None) -> Saliency:
    """Write the map of every image of a split to OUT/SPLIT/ID.png.

    Raises:
        DataError: no such split, images that cannot be read (all of them in one message), or a map cannot be written.
    """
    if split not in dataset.splits:
        raise DataError(f"'{dataset.name}' has no split '{split}'; it has {', '.join(dataset.splits)}")
    images = dataset.splits[split]
    found = map_samples(_write, (images, out / split), len(images), progress=progress)
    if faults := [one for one in found if isinstance(one, str)]:
        listing = some(faults, between="\n  ")
        raise DataError(f"{counted(len(faults), 'map', 'was', 'were')} not made:\n  {listing}")
    shares = [one for one in found if not isinstance(one, str)]
    return Saliency(out, len(shares), float(np.mean(shares)) if shares else 0.0)


def _write(subject: tuple[Split, Path], index: int) -> float | str:
    """Write one map; return its share of salient pixels, or what went wrong."""
    split, folder = subject
    try:
        found = salient(picture_of(split.read(index)[0], channels_of_split(split)))
        buffer = io.BytesIO()
        Image.fromarray(found).save(buffer, "PNG")
        path = folder / f"{split.id(index)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"{split.id(index)}: {error}"
    return float((found > 0).mean())
