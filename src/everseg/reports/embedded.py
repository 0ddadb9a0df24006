"""Encode pictures as data URIs that are small enough to embed in a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from everseg.data.class_colours import all_colours, colourise
from everseg.data.datasets.decode import Reading, open_inside, open_picture, read_image
from everseg.files import real_path

QUALITY = 82
"""Of JPEG."""
_DRAWN = Reading(max_pixels=20_000_000)
"""The plots of everseg have a tenth of it."""


def data_uri(kind: str, data: bytes) -> str:
    """Encode bytes as a `data:` address; `kind` is the media type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def photo(image: np.ndarray, side: int) -> str:
    """Encode an image (H, W, 3) uint8 as JPEG, its longer side at most `side` pixels."""
    picture = Image.fromarray(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=QUALITY)
    return data_uri("image/jpeg", buffer.getvalue())


def labels(ids: np.ndarray, side: int, *, background: int | None) -> str:
    """Encode train ids (H, W) in the colours of their classes, scaled down without mixing ids.

    Args:
        background: train id of the background, None if there is none.
    """
    if ids.dtype == np.uint16:
        return _small(Image.fromarray(colourise(ids, background=background)), side)
    return coloured(ids, side, all_colours(background).tolist())


def coloured(ids: np.ndarray, side: int, colours: Sequence[Sequence[int]]) -> str:
    """Encode ids (H, W) as a PNG of mode P in the colours given, scaled down without mixing ids."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = colours
    picture = Image.fromarray(ids.astype(np.uint8))
    picture.putpalette(table.tobytes())
    return _small(picture, side)


def _small(picture: Image.Image, side: int) -> str:
    """Encode a picture of classes as a PNG, its longer side at most `side` pixels."""
    if max(picture.size) > side:
        scale = side / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return data_uri("image/png", buffer.getvalue())


def stored_picture(folder: Path, name: str) -> np.ndarray:
    """Read a picture of a folder that somebody else may have made as (H, W, 3) uint8.

    Raises:
        DataError: missing, no picture of an allowed format, too large, a FIFO, or a link that leads out of the folder.
    """
    with open_inside(real_path(folder), name) as file, open_picture(file, name, _DRAWN) as picture:
        return read_image(picture, _DRAWN)


def plot(pixels: np.ndarray, side: int) -> str:
    """Encode a drawing (H, W, 3) uint8 as a PNG with few colours, its longer side at most `side` pixels."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.quantize(128).save(buffer, format="PNG", optimize=True)
    return data_uri("image/png", buffer.getvalue())
