"""Colours for class ids, and pictures coloured by class id.

Images are (H, W, 3) uint8 RGB, ids (H, W) integers. This module works without matplotlib. Every function asks which id
is the background: only a background is near-black. `None` says that there is none.
"""

from __future__ import annotations

import colorsys
import io
from functools import lru_cache

import numpy as np
from PIL import Image

from everseg.labels import IGNORED, IGNORED_WIDE

IGNORED_COLOUR = (205, 205, 205)
"""Light grey; no class has it."""

BACKGROUND_COLOUR = (40, 40, 46)
# Okabe and Ito, "Color Universal Design" (2008), without black: safe for all three kinds of colour blindness.
_FIRST = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB: protanopia and deuteranopia.
_COLOUR_BLIND = (
    ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
)
SAFE = 12
"""So many first colours are as far apart as those of Okabe and Ito among themselves, for normal eyes and three kinds of
colour blindness. With more classes, pictures that must be read need another mark than colour."""
_BYTES = 256
"""Ids that a byte tells apart."""
_ROWS = 256
"""Rows of an image that are mixed at once."""


def palette(n: int, *, background: int | None) -> np.ndarray:
    """Colours of the ids 0 ... n-1.

    With the same background, every palette is the beginning of every longer one, so a class keeps its colour when the
    model grows. The first seven class colours are those of Okabe and Ito. Each further colour is the one farthest from
    all earlier colours, for normal and for red-green blind eyes (OKLab distance). Row 255 is the colour of ignored
    pixels.

    Args:
        n: number of ids. Above 255 the colours of the classes repeat; 255 is then a class like the others.
        background: id of the background, which is near-black; None if there is none. Then no id below 254 is
            near-black.

    Returns:
        (n, 3) uint8, RGB.

    Raises:
        ValueError: n below 0.
    """
    if n < 0:
        raise ValueError(f"palette of {n} colours: 0 or more are possible")
    if n > _BYTES:
        return _in_order()[_positions(np.arange(n), background)]
    return all_colours(background)[:n].copy()


def colourise(ids: np.ndarray, *, background: int | None) -> np.ndarray:
    """Colour every id; ignored pixels are a fixed light grey.

    Args:
        ids: (H, W) integers. If they are uint16, they are ids of more than 255 classes: ignored is 65,535, and the
            colours repeat. Else ids are in 0 ... 255, and 255 is ignored.
        background: id of the background, or None, as for `palette`.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: not two-dimensional integers, or an id out of range.
    """
    if ids.dtype == np.uint16 and ids.ndim == 2:
        return _in_order()[np.where(ids == IGNORED_WIDE, IGNORED, _positions(ids, background))]
    return all_colours(background)[byte_ids(ids)]


def overlay(image: np.ndarray, ids: np.ndarray, alpha: float = 0.5, *, background: int | None) -> np.ndarray:
    """Lay the colours of `ids` over an image.

    Args:
        image: (H, W, 3) uint8.
        ids: (H, W) integers in 0 ... 255.
        background: id of the background, or None, as for `palette`.
        alpha: opacity of the colours, 0 (image only) to 1 (colours only).

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: sizes differ, wrong types, or alpha outside 0 ... 1.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha={alpha}: an opacity from 0 to 1 is expected")
    check_pair(image, ids)
    mixed = np.empty_like(image)
    for start in range(0, len(image), _ROWS):  # floats of a large image would take many times its memory
        rows = slice(start, start + _ROWS)
        colours = colourise(ids[rows], background=background).astype(np.float32)
        mixed[rows] = np.rint((1.0 - alpha) * image[rows].astype(np.float32) + alpha * colours)
    return mixed


def _positions(ids: np.ndarray, background: int | None) -> np.ndarray:
    """Rows of `_in_order`: the first for the background only, then 254 for the other ids over and over."""
    empty = (
        IGNORED - 1 if background is None else background
    )  # its colour has to go somewhere: as far off as possible
    ids = ids.astype(np.int64)
    return np.where(ids == empty, 0, 1 + (ids - (ids > empty)) % (IGNORED - 1))


_HUES = ((15, "red"), (45, "orange"), (70, "yellow"), (160, "green"), (195, "cyan"), (255, "blue"), (290, "purple"),
         (335, "pink"), (361, "red"))  # fmt: skip


def colour_word(colour: tuple[int, int, int]) -> str:
    """Name a colour in a word or two, so that people recognise it: "dark green".

    >>> colour_word((128, 0, 0)), colour_word((70, 70, 70)), colour_word((0, 0, 0))
    ('dark red', 'dark grey', 'black')
    """
    high, low = max(colour), min(colour)
    if high < 24:
        return "black"
    if high - low <= high * 0.12:
        return "white" if low > 240 else "dark grey" if high < 96 else "grey" if high < 200 else "light grey"
    hue, _, _ = colorsys.rgb_to_hsv(*(c / 255 for c in colour))
    word = next(name for end, name in _HUES if hue * 360 < end)
    return f"dark {word}" if high < 150 else f"light {word}" if low > 150 else word


def png(picture: Image.Image) -> bytes:
    """Encode a picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def byte_ids(ids: np.ndarray) -> np.ndarray:
    """Convert ids to uint8; raises ValueError unless they are two-dimensional integers in 0 ... 255."""
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids of shape {ids.shape} and type {ids.dtype}: (H, W) integers are expected")
    if ids.size and (ids.min() < 0 or ids.max() > IGNORED):
        raise ValueError(f"ids from {ids.min()} to {ids.max()}: 0 to {IGNORED} are possible")
    return ids.astype(np.uint8)


def check_pair(image: np.ndarray, ids: np.ndarray) -> None:
    """Raise a ValueError if an image and its ids differ in size, or the image is not (H, W, 3) uint8."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image of shape {image.shape} and type {image.dtype}: (H, W, 3) uint8 is expected")
    if image.shape[:2] != ids.shape:
        raise ValueError(f"image is {image.shape[:2]}, ids are {ids.shape}: the same size is expected")


@lru_cache(maxsize=16)
def all_colours(background: int | None) -> np.ndarray:
    """Colours of the ids 0 ... 255, (256, 3) uint8, read-only; row 255 = ignored."""
    table = _in_order()[[*_positions(np.arange(IGNORED), background).tolist(), IGNORED]]
    table.setflags(write=False)
    return table


@lru_cache(maxsize=1)
def _in_order() -> np.ndarray:
    """All colours, (256, 3) uint8, read-only: background, Okabe-Ito, then greedy farthest points; row 255 = ignored."""
    levels = np.arange(0, 256, 15)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lightness = _oklab(_linear(grid))[:, 0]
    grid = grid[(lightness > 0.35) & (lightness < 0.95)]
    spaces = _perceived(grid)  # (3, N, 3)
    nearest = np.full(len(grid), np.inf)  # (N,), distance to the nearest colour taken so far
    colours = [BACKGROUND_COLOUR, *_FIRST]
    for taken in (IGNORED_COLOUR, (255, 255, 255), *colours):
        nearest = np.minimum(nearest, _distance(spaces, _perceived(np.array([taken]))))
    while len(colours) < IGNORED:
        # rounded, so that a difference in the last bits does not decide between equally far colours
        best = int(np.argmax(nearest.round(6)))
        colours.append(tuple(grid[best].tolist()))
        nearest = np.minimum(nearest, _distance(spaces, spaces[:, best : best + 1]))
    table = np.array([*colours, IGNORED_COLOUR], dtype=np.uint8)
    table.setflags(write=False)
    return table


def _distance(spaces: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Distance of OKLab colours (3, N, 3) to one (3, 1, 3): (N,), the smallest over the three kinds of eyes."""
    squares = ((spaces - colour) ** 2).sum(axis=2)
    # Dichromats see two dimensions instead of three. Without this factor their distances alone would decide.
    return np.sqrt(np.minimum(squares[0], 4.0 * np.minimum(squares[1], squares[2])))


def _perceived(colours: np.ndarray) -> np.ndarray:
    """Convert (N, 3) sRGB 0 ... 255 to (3, N, 3) OKLab as normal, protanope and deuteranope eyes see it."""
    linear = _linear(colours)
    seen = [linear, *(_times(linear, matrix).clip(0.0, 1.0) for matrix in _COLOUR_BLIND)]
    return np.stack([_oklab(each) for each in seen])


def _linear(colours: np.ndarray) -> np.ndarray:
    value = colours / 255.0
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _oklab(linear: np.ndarray) -> np.ndarray:
    """Convert linear RGB to OKLab: Ottosson (2020), "A perceptual color space for image processing"."""
    cones = _times(
        linear,
        (
            (0.4122214708, 0.5363325363, 0.0514459929),
            (0.2119034982, 0.6806995451, 0.1073969566),
            (0.0883024619, 0.2817188376, 0.6299787005),
        ),
    )
    return _times(
        np.cbrt(cones),
        (
            (0.2104542553, 0.7936177850, -0.0040720468),
            (1.9779984951, -2.4285922050, 0.4505937099),
            (0.0259040371, 0.7827717662, -0.8086757660),
        ),
    )


def _times(colours: np.ndarray, matrix: tuple[tuple[float, ...], ...]) -> np.ndarray:
    # The sums are written out because a BLAS product may differ in the last bit between machines.
    return np.stack([sum(colours[:, i] * row[i] for i in range(3)) for row in matrix], axis=1)
