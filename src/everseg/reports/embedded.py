"""Encode pictures as data URIs that are small enough to embed in a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from everseg.data.class_colours import IGNORED_COLOUR, colourise, palette
from everseg.labels import IGNORED

QUALITY = 82
"""Of JPEG."""


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


def labels(ids: np.ndarray, side: int, colours: Sequence[Sequence[int]] | None = None) -> str:
    """Encode ids (H, W) in 0 ... 255 as a PNG of mode P, scaled down without mixing ids; uint16 ids as colours.

    Args:
        colours: of the ids 0, 1, ...; default the palette of `engine.pictures`, 255 = ignored.
    """
    table = np.zeros((256, 3), np.uint8)
    if ids.dtype == np.uint16:
        pass
    elif colours is None:
        table[:IGNORED], table[IGNORED] = palette(IGNORED), IGNORED_COLOUR
    else:
        table[: len(colours)] = colours
    if ids.dtype == np.uint16:
        picture = Image.fromarray(colourise(ids))
    else:
        picture = Image.fromarray(ids.astype(np.uint8))
        picture.putpalette(table.tobytes())
    if max(picture.size) > side:
        scale = side / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return data_uri("image/png", buffer.getvalue())


def stored_picture(path: Path) -> np.ndarray | None:
    """Read a picture from disk as (H, W, 3) uint8; None if it cannot be read."""
    try:
        with Image.open(path) as opened:
            return np.asarray(opened.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def plot(pixels: np.ndarray, side: int) -> str:
    """Encode a drawing (H, W, 3) uint8 as a PNG with few colours, its longer side at most `side` pixels."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.quantize(128).save(buffer, format="PNG", optimize=True)
    return data_uri("image/png", buffer.getvalue())
