"""Pictures of ids: colours, overlays, triplets, confusion heat maps, prediction files.

Images are (H, W, 3) uint8 RGB, ids (H, W) integers; no matplotlib.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from everseg.errors import DataError
from everseg.labels import IGNORED
from everseg.runs.commit import write_bytes, writing

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
_LABELLED_CLASSES = 25
_INK = (20, 20, 20)
_BLANK = (228, 228, 228)
_DARK_CELL = (8, 48, 107)
_LIGHT_CELL = (247, 251, 255)
_GAP = 4
_LONGEST_NAME = 22
_ROWS = 256
"""Rows of an image that are mixed at once."""


def palette(n: int) -> np.ndarray:
    """Colours of the ids 0 ... n-1.

    Every palette is the beginning of the next longer one, so a class keeps its colour when the model grows. After
    seven colours of Okabe and Ito each further one is the farthest from all before, for normal and for red-green
    blind eyes alike (OKLab distance). Row 255 is the colour of ignored pixels.

    Args:
        n: number of ids, 0 to 256.

    Returns:
        (n, 3) uint8, RGB.

    Raises:
        ValueError: n outside 0 ... 256.
    """
    if not 0 <= n <= 256:
        raise ValueError(f"palette of {n} colours: 0 to 256 are possible")
    return _all_colours()[:n].copy()


def colourise(ids: np.ndarray) -> np.ndarray:
    """Colour every id; 255 (ignored) is a fixed light grey.

    Args:
        ids: (H, W) integers in 0 ... 255.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: not two-dimensional integers, or an id outside 0 ... 255.
    """
    return _all_colours()[_byte_ids(ids)]


def overlay(image: np.ndarray, ids: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """Lay the colours of `ids` over an image.

    Args:
        image: (H, W, 3) uint8.
        ids: (H, W) integers in 0 ... 255.
        alpha: opacity of the colours, 0 (image only) to 1 (colours only).

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: sizes differ, wrong types, or alpha outside 0 ... 1.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha={alpha}: an opacity from 0 to 1 is expected")
    _check_pair(image, ids)
    mixed = np.empty_like(image)
    for start in range(0, len(image), _ROWS):  # large images would take many times their size in floats
        rows = slice(start, start + _ROWS)
        colours = colourise(ids[rows]).astype(np.float32)
        mixed[rows] = np.rint((1.0 - alpha) * image[rows].astype(np.float32) + alpha * colours)
    return mixed


def triplet(image: np.ndarray, label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Image, label and prediction side by side, with a thin white line between them.

    Args:
        image: (H, W, 3) uint8.
        label: (H, W) ids, 255 = ignored.
        prediction: (H, W) ids.

    Returns:
        (H, 3W + 8, 3) uint8.

    Raises:
        ValueError: sizes differ or wrong types.
    """
    _check_pair(image, label)
    _check_pair(image, prediction)
    line = np.full((image.shape[0], _GAP, 3), 255, dtype=np.uint8)
    return np.concatenate([image, line, colourise(label), line, colourise(prediction)], axis=1)


def shrink(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Reduce a picture to at most (height, width), its shape kept; a smaller one is returned as it is."""
    scale = min(height / picture.shape[0], width / picture.shape[1], 1.0)
    if scale == 1.0:
        return picture
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


def confusion_picture(counts: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Heat map of a confusion matrix, every row (label) divided by its sum.

    Up to 25 classes carry names and percentages; more are drawn as cells only. A row without pixels is grey.

    Args:
        counts: (C, C) pixel counts, row = label, column = prediction.
        class_names: C names in the order of the ids.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: not a square matrix of counts with one name per class.
    """
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.shape != (len(class_names),) * 2 or counts.size == 0:
        raise ValueError(
            f"confusion matrix {counts.shape} for {len(class_names)} class names: C x C is expected"
        )
    if counts.min() < 0:
        raise ValueError("confusion matrix with negative counts")
    sums = counts.sum(axis=1, keepdims=True, dtype=np.float64)
    share = counts / np.maximum(sums, 1.0)
    low, high = (np.array(colour, dtype=np.float64) for colour in (_LIGHT_CELL, _DARK_CELL))
    colours = np.rint(low + share[..., None] * (high - low)).astype(np.uint8)
    colours[sums[:, 0] == 0] = _BLANK
    if len(class_names) > _LABELLED_CLASSES:
        cell = max(2, 800 // len(class_names))
        return colours.repeat(cell, axis=0).repeat(cell, axis=1)
    return _labelled_confusion(colours, share, sums[:, 0] > 0, class_names)


def legend(class_names: Sequence[str]) -> np.ndarray:
    """Colour and name of every id, and of ignored pixels, in columns of up to 32.

    Args:
        class_names: names in the order of the ids, at most 255.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: more than 255 names.
    """
    if len(class_names) > IGNORED:
        raise ValueError(f"legend of {len(class_names)} classes: at most {IGNORED} are possible")
    font = ImageFont.load_default(size=14)
    texts = [f"{index} {_short(name)}" for index, name in enumerate(class_names)] + ["ignored"]
    colours = [*palette(len(class_names)).tolist(), IGNORED_COLOUR]
    rows = min(32, len(texts))
    line, width = 22, 40 + max(_text_width(font, text) for text in texts)
    picture = Image.new("RGB", (width * -(-len(texts) // rows), rows * line + 8), "white")
    draw = ImageDraw.Draw(picture)
    for index, (text, colour) in enumerate(zip(texts, colours, strict=True)):
        x, y = index // rows * width + 6, index % rows * line + 4
        draw.rectangle((x, y + 3, x + 20, y + 18), fill=tuple(colour), outline=_INK)
        draw.text((x + 27, y + line // 2), text, fill=_INK, font=font, anchor="lm")
    return np.asarray(picture)


def write_prediction(path_stem: Path, ids: np.ndarray, image: np.ndarray) -> tuple[Path, Path]:
    """Write a prediction as an id mask and as an overlay, each atomically.

    The mask is a PNG of mode P: a viewer shows colours, `numpy.asarray(Image.open(...))` gives the exact ids. The
    endings keep both files apart from the input and from those of any other stem. Missing folders are made.

    Args:
        path_stem: where, without an ending ("out/0001" gives "out/0001_mask.png" and "out/0001_overlay.png").
        ids: (H, W) integers in 0 ... 255; 255 = ignored.
        image: (H, W, 3) uint8, the input at the same size.

    Returns:
        Paths of the mask and of the overlay.

    Raises:
        DataError: an id that one byte cannot hold.
        ValueError: sizes differ or wrong types.
        CheckpointError: disk full, read-only, or no permission; nothing is left half-written.
    """
    mask_path = path_stem.with_name(f"{path_stem.name}_mask.png")
    overlay_path = path_stem.with_name(f"{path_stem.name}_overlay.png")
    if ids.size and int(ids.max()) > IGNORED:
        raise DataError(f"{mask_path}: class id {int(ids.max())} does not fit a PNG of ids (0 to {IGNORED})")
    mixed = overlay(image, ids)
    mask = Image.fromarray(_byte_ids(ids))
    mask.putpalette(_all_colours().tobytes())
    with writing(path_stem):
        path_stem.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(mask_path, _png(mask))
    write_bytes(overlay_path, _png(Image.fromarray(mixed)))
    return mask_path, overlay_path


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _byte_ids(ids: np.ndarray) -> np.ndarray:
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids of shape {ids.shape} and type {ids.dtype}: (H, W) integers are expected")
    if ids.size and (ids.min() < 0 or ids.max() > IGNORED):
        raise ValueError(f"ids from {ids.min()} to {ids.max()}: 0 to {IGNORED} are possible")
    return ids.astype(np.uint8)


def _check_pair(image: np.ndarray, ids: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image of shape {image.shape} and type {image.dtype}: (H, W, 3) uint8 is expected")
    if image.shape[:2] != ids.shape:
        raise ValueError(f"image is {image.shape[:2]}, ids are {ids.shape}: the same size is expected")


def _labelled_confusion(
    colours: np.ndarray, share: np.ndarray, present: np.ndarray, class_names: Sequence[str]
) -> np.ndarray:
    cell, font, small = 34, ImageFont.load_default(size=14), ImageFont.load_default(size=12)
    names = [_short(name) for name in class_names]
    margin = 34 + max(_text_width(font, name) for name in names)
    side = cell * len(names)
    title = "prediction (% of the label's pixels)"
    width = max(margin + side, _text_width(small, title)) + 8
    picture = Image.new("RGB", (width, margin + side + 8), "white")
    draw = ImageDraw.Draw(picture)
    for row in range(len(names)):
        for column in range(len(names)):
            x, y = margin + column * cell, margin + row * cell
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=tuple(colours[row, column].tolist()))
            percent = round(100 * share[row, column])
            if present[row] and (percent or row == column):
                ink = "white" if share[row, column] > 0.55 else _INK
                draw.text(
                    (x + cell // 2 - 1, y + cell // 2 - 1), str(percent), fill=ink, font=small, anchor="mm"
                )
    for index, name in enumerate(names):
        middle = margin + index * cell + cell // 2 - 1
        draw.text((margin - 6, middle), name, fill=_INK, font=font, anchor="rm")
        _text_upwards(picture, name, middle, margin - 6, font)
    draw.text((width - 8, 4), title, fill=_INK, font=small, anchor="ra")
    _text_upwards(picture, "label", 11, margin + side // 2 + 16, small)
    return np.asarray(picture)


def _text_upwards(
    picture: Image.Image,
    text: str,
    centre: int,
    bottom: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    strip = Image.new("RGB", (_text_width(font, text) + 2, 20), "white")
    ImageDraw.Draw(strip).text((0, 10), text, fill=_INK, font=font, anchor="lm")
    turned = strip.transpose(Image.Transpose.ROTATE_90)
    picture.paste(turned, (centre - turned.width // 2, bottom - turned.height))


def _text_width(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str) -> int:
    return int(np.ceil(font.getlength(text)))


def _short(name: str) -> str:
    clean = " ".join("".join(letter if letter.isprintable() else " " for letter in name).split()) or "?"
    return clean if len(clean) <= _LONGEST_NAME else clean[: _LONGEST_NAME - 3] + "..."


@lru_cache(maxsize=1)
def _all_colours() -> np.ndarray:
    """(256, 3) uint8, read-only: background, Okabe-Ito, then greedy farthest points; row 255 = ignored."""
    levels = np.arange(0, 256, 15)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lightness = _oklab(_linear(grid))[:, 0]
    grid = grid[(lightness > 0.35) & (lightness < 0.95)]
    spaces = _perceived(grid)
    nearest = np.full(len(grid), np.inf)
    colours = [BACKGROUND_COLOUR, *_FIRST]
    for taken in (IGNORED_COLOUR, (255, 255, 255), *colours):
        nearest = np.minimum(nearest, _distance(spaces, _perceived(np.array([taken]))))
    while len(colours) < IGNORED:
        best = int(np.argmax(nearest.round(6)))
        colours.append(tuple(grid[best].tolist()))
        nearest = np.minimum(nearest, _distance(spaces, spaces[:, best : best + 1]))
    table = np.array([*colours, IGNORED_COLOUR], dtype=np.uint8)
    table.setflags(write=False)
    return table


def _distance(spaces: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """(3, N, 3) and (3, 1, 3) OKLab -> (N,): the smallest over the three kinds of eyes."""
    squares = ((spaces - colour) ** 2).sum(axis=2)
    # Dichromats see two dimensions instead of three; without this factor they alone would decide.
    return np.sqrt(np.minimum(squares[0], 4.0 * np.minimum(squares[1], squares[2])))


def _perceived(colours: np.ndarray) -> np.ndarray:
    """(N, 3) sRGB 0 ... 255 -> (3, N, 3) OKLab as normal, protanope and deuteranope eyes see it."""
    linear = _linear(colours)
    seen = [linear, *(_times(linear, matrix).clip(0.0, 1.0) for matrix in _COLOUR_BLIND)]
    return np.stack([_oklab(each) for each in seen])


def _linear(colours: np.ndarray) -> np.ndarray:
    value = colours / 255.0
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _oklab(linear: np.ndarray) -> np.ndarray:
    """Ottosson (2020), "A perceptual color space for image processing"."""
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
    # Sums written out: a BLAS product may differ in the last bit from machine to machine.
    return np.stack([sum(colours[:, i] * row[i] for i in range(3)) for row in matrix], axis=1)
