"""Pictures of class ids: triplets, legends, confusion heat maps, prediction files.

Images are (H, W, 3) uint8 RGB; ids are (H, W) integers. The module does not need matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from everseg.data.class_colours import (
    IGNORED_COLOUR,
    all_colours,
    byte_ids,
    check_pair,
    colourise,
    overlay,
    palette,
    png,
)
from everseg.display import counted, percent
from everseg.errors import DataError
from everseg.labels import IGNORED
from everseg.runs.commit import write_bytes, writing

_LABELLED_CLASSES = 25
_INK = (20, 20, 20)
_BLANK = (228, 228, 228)
_DARK_CELL = (8, 48, 107)
_LIGHT_CELL = (247, 251, 255)
_GAP = 4
_LONGEST_NAME = 22


def triplet(
    image: np.ndarray, label: np.ndarray, prediction: np.ndarray, *, background: int | None
) -> np.ndarray:
    """Put image, label and prediction side by side, with a thin white line between them.

    Args:
        image: (H, W, 3) uint8.
        label: (H, W) ids, 255 = ignored.
        prediction: (H, W) ids.
        background: id of the background, None if there is none.

    Returns:
        (H, 3W + 8, 3) uint8.

    Raises:
        ValueError: sizes differ or wrong types.
    """
    check_pair(image, label)
    check_pair(image, prediction)
    line = np.full((image.shape[0], _GAP, 3), 255, dtype=np.uint8)
    shown = [colourise(ids, background=background) for ids in (label, prediction)]
    return np.concatenate([image, line, shown[0], line, shown[1]], axis=1)


def shrink(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Shrink a picture to at most (height, width), keeping its aspect ratio. Return smaller pictures unchanged."""
    scale = min(height / picture.shape[0], width / picture.shape[1], 1.0)
    if scale == 1.0:
        return picture
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


def confusion_picture(counts: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Draw a heat map of a confusion matrix, with every row (label) divided by its sum.

    With up to 25 classes the picture shows names and percentages, with more only cells. A row without pixels is grey.

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
            f"confusion matrix {counts.shape} for {counted(len(class_names), 'class name')}: C x C is expected"
        )
    if counts.min() < 0:
        raise ValueError("confusion matrix with negative counts")
    sums = counts.sum(axis=1, keepdims=True, dtype=np.float64)
    share = counts / np.maximum(sums, 1.0)  # (C, C)
    low, high = (np.array(colour, dtype=np.float64) for colour in (_LIGHT_CELL, _DARK_CELL))
    colours = np.rint(low + share[..., None] * (high - low)).astype(np.uint8)  # (C, C, 3)
    colours[sums[:, 0] == 0] = _BLANK
    if len(class_names) > _LABELLED_CLASSES:
        cell = max(2, 800 // len(class_names))
        return colours.repeat(cell, axis=0).repeat(cell, axis=1)
    return _labelled_confusion(colours, share, sums[:, 0] > 0, class_names)


def legend(class_names: Sequence[str], *, background: int | None) -> np.ndarray:
    """Draw the colour and name of every id and of ignored pixels, in columns of up to 32 entries.

    Args:
        class_names: names in the order of the ids; above 255 their colours repeat.
        background: id of the background, None if there is none.

    Returns:
        (H, W, 3) uint8.
    """
    font = ImageFont.load_default(size=14)
    texts = [f"{index} {_short(name)}" for index, name in enumerate(class_names)] + ["ignored"]
    colours = [*palette(len(class_names), background=background).tolist(), IGNORED_COLOUR]
    rows = min(32, len(texts))
    line, width = 22, 40 + max(_text_width(font, text) for text in texts)
    picture = Image.new("RGB", (width * -(-len(texts) // rows), rows * line + 8), "white")
    draw = ImageDraw.Draw(picture)
    for index, (text, colour) in enumerate(zip(texts, colours, strict=True)):
        x, y = index // rows * width + 6, index % rows * line + 4
        draw.rectangle((x, y + 3, x + 20, y + 18), fill=tuple(colour), outline=_INK)
        draw.text((x + 27, y + line // 2), text, fill=_INK, font=font, anchor="lm")
    return np.asarray(picture)


def write_prediction(
    path_stem: Path, ids: np.ndarray, image: np.ndarray, *, background: int | None
) -> tuple[Path, Path]:
    """Write a prediction as an id mask and as an overlay, each atomically.

    The mask is a PNG of mode P: a viewer shows colours, and `numpy.asarray(Image.open(...))` gives the exact ids. Ids
    of more than 255 classes (uint16) are written as a grey PNG of 16 bits. The
    endings of the names prevent clashes with the input and with files of other stems. Missing folders are created.

    Args:
        path_stem: path of the files without ending. "out/0001" gives "out/0001_mask.png" and
            "out/0001_overlay.png".
        ids: (H, W) integers in 0 ... 255; 255 = ignored; or uint16, where 65,535 = ignored.
        image: (H, W, 3) uint8, the input at the same size.
        background: id of the background, None if there is none.

    Returns:
        Paths of the mask and of the overlay.

    Raises:
        DataError: an id that one byte cannot hold.
        ValueError: sizes differ or wrong types.
        CheckpointError: the disk is full or read-only, or permission is missing. No file is left half-written.
    """
    mask_path = path_stem.with_name(f"{path_stem.name}_mask.png")
    overlay_path = path_stem.with_name(f"{path_stem.name}_overlay.png")
    wide = ids.dtype == np.uint16
    if not wide and ids.size and int(ids.max()) > IGNORED:
        raise DataError(f"{mask_path}: class id {int(ids.max())} does not fit a PNG of ids (0 to {IGNORED})")
    mixed = overlay(image, ids, background=background)
    mask = Image.fromarray(np.ascontiguousarray(ids) if wide else byte_ids(ids))
    if not wide:
        mask.putpalette(all_colours(background).tobytes())
    with writing(path_stem):
        path_stem.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(mask_path, png(mask))
    write_bytes(overlay_path, png(Image.fromarray(mixed)))
    return mask_path, overlay_path


def _labelled_confusion(
    colours: np.ndarray, share: np.ndarray, present: np.ndarray, class_names: Sequence[str]
) -> np.ndarray:
    """Draw the cells with class names at both sides and percentages inside."""
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
            text = percent(share[row, column], digits=0)
            if present[row] and (text != "0" or row == column):
                ink = "white" if share[row, column] > 0.55 else _INK
                draw.text((x + cell // 2 - 1, y + cell // 2 - 1), text, fill=ink, font=small, anchor="mm")
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
