"""Bundles as the local page shows them: one list of classes, and a mask of an uploaded picture (floor 6)."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from everseg.data.datasets.decode import (
    PictureTooLargeError,
    Reading,
    decode_image,
    open_picture,
    orientation,
    turn,
)
from everseg.deploy.bundle import Bundle, open_bundle
from everseg.errors import DataError
from everseg.inference.pictures import palette
from everseg.inference.predict import LoadedModel, load

TYPES = ("image/png", "image/jpeg", "image/webp", "image/bmp")
"""What browsers show and everseg decodes."""
MAX_PIXELS = 16_000_000
"""Largest picture; refused before it is decoded."""
_MOST_LOGITS = 1_000_000_000
"""Values of a picture's logits at its own size (4 GB): models of many classes take smaller pictures."""
_FORMATS = frozenset({"PNG", "JPEG", "MPO", "WEBP", "BMP"})
_NAME = Path("image")
"""What messages call an upload; the file's own name never leaves the browser."""


class RefusedError(Exception):
    """A request that is answered with a status and one sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Served:
    """A bundle with its model in memory."""

    def __init__(self, path: str | Path, builder: Any = None) -> None:
        self.bundle: Bundle = open_bundle(path)
        self.model: LoadedModel = load(path, builder=builder)
        self.name = self.bundle.path.resolve().name
        self.paths = tuple(self.model.paths) if len(self.model.spaces) > 1 else ()
        """Names to choose a path by; empty where there is one path only."""
        outputs = max(space.num_classes for space in self.model.spaces.values())
        self.max_pixels = min(MAX_PIXELS, _MOST_LOGITS // outputs)

    def predict(self, image: np.ndarray, path: str | None) -> dict[str, Any]:
        """Classify an image.

        Args:
            image: (H, W, 3) uint8.
            path: one of `paths`; None for a model with one.

        Returns:
            width, height; mask: the lasting class ids as a grey PNG, as a data URI; pixels: id -> number of pixels;
            seconds.

        Raises:
            RefusedError: not clear which path, or the model could not do it.
        """
        if (path not in self.paths) if self.paths else (path is not None):
            names = ", ".join(self.paths) or "one path only: leave domain out"
            raise RefusedError(400, f"domain: {self.name} has {names}.")
        begun = time.monotonic()
        try:
            found = self.model.predict(image, branch=path)
        except (MemoryError, RuntimeError):
            raise RefusedError(
                500, f"{self.name} could not classify this image; a smaller one may fit into memory."
            ) from None
        ids = np.array(self.bundle.registry.ids(self.model.spaces[found.branch]), np.uint8)[found.ids]
        counts = np.bincount(ids.ravel(), minlength=256)
        return {
            "width": ids.shape[1],
            "height": ids.shape[0],
            "mask": _data_uri(ids),
            "pixels": {str(i): int(counts[i]) for i in np.flatnonzero(counts)},
            "seconds": round(time.monotonic() - begun, 3),
        }


def class_list(served: Sequence[Served]) -> list[dict[str, Any]]:
    """Every class of the bundles, by name: name, colour, background, its id in each bundle (None where unknown).

    A class has the first bundle's colour; where another's colour is taken already, the next free one.
    """
    rows: dict[str, dict[str, Any]] = {}
    taken: set[tuple[int, ...]] = set()
    free = iter([tuple(colour) for colour in palette(256).tolist()])
    for position, one in enumerate(served):
        empty = {
            space.names[space.background]
            for space in one.model.spaces.values()
            if space.background is not None
        }
        for entry in one.bundle.registry.classes:
            if not entry.paths:
                continue
            if entry.name not in rows:
                colour = tuple(entry.colour)
                if colour in taken:
                    colour = next(c for c in free if c not in taken and not _known(c, served))
                taken.add(colour)
                ids: list[int | None] = [None] * len(served)
                rows[entry.name] = {
                    "name": entry.name, "colour": list(colour), "background": entry.name in empty, "ids": ids,
                }  # fmt: skip
            rows[entry.name]["ids"][position] = entry.id
    return list(rows.values())


def decode_upload(data: bytes, max_pixels: int) -> np.ndarray:
    """Decode an uploaded picture, turned as its EXIF orientation says, as browsers do: (H, W, 3) uint8.

    Raises:
        RefusedError: no picture, damaged, of a format that browsers do not show, or too large.
    """
    try:
        picture = open_picture(io.BytesIO(data), _NAME, Reading(max_pixels=max_pixels))
        if picture.format not in _FORMATS:
            raise RefusedError(415, f"{picture.format} pictures are not taken here: use {_names()}.")
        image = decode_image(picture, _NAME)
        return np.asarray(turn(image, orientation(picture)))
    except PictureTooLargeError as error:
        raise RefusedError(413, f"The {_first_clause(error)}.") from None
    except DataError as error:
        raise RefusedError(400, f"The {_first_clause(error)}.") from None


def check_type(content_type: str) -> None:
    """Raise where a body is not announced as a picture."""
    if content_type.partition(";")[0].strip().lower() not in TYPES:
        raise RefusedError(415, f"Send the picture itself, as {_names()}.")


def _known(colour: tuple[int, ...], served: Sequence[Served]) -> bool:
    return any(colour == tuple(entry.colour) for one in served for entry in one.bundle.registry.classes)


def _first_clause(error: DataError) -> str:
    """What is wrong with the picture; what to do with files of a data set does not fit here."""
    return str(error).partition(";")[0]


def _names() -> str:
    return ", ".join(name.removeprefix("image/").upper() for name in TYPES)


def _data_uri(ids: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(ids).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
