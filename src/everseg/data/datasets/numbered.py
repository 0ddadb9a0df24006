"""Pictures of objects by number, and the lists that say which class each object is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from everseg.data.datasets.decode import decode_image, stored_ids
from everseg.errors import DataError


def annotated_objects(value: Any) -> dict[int, int] | None:
    """Read number of an object -> class from a list of annotations or its JSON; None if it is something else."""
    if isinstance(value, str | bytes):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if isinstance(value, Mapping) and isinstance(value.get("annotations"), list):
        value = value["annotations"]
    if isinstance(value, Mapping):  # `datasets` stores a sequence of entries as columns
        keys = [key for key in ("id", "category_id") if isinstance(value.get(key), list)]
        if len(keys) < 2:
            return None
        value = [dict(zip(keys, pair, strict=False)) for pair in zip(*(value[k] for k in keys), strict=False)]
    if not isinstance(value, list):
        return None
    try:
        return {int(entry["id"]): int(entry["category_id"]) for entry in value}
    except (KeyError, TypeError, ValueError):
        return None


def numbers(picture: Any, shown: Path) -> np.ndarray:
    """Decode a picture of objects by number, (H, W); colours count red + 256 green + 65536 blue."""
    if picture.mode not in ("RGB", "RGBA", "RGBX"):
        return stored_ids(picture, shown)
    rgb = np.asarray(decode_image(picture, shown)).astype(np.int64)
    return rgb[..., 0] | rgb[..., 1] << 8 | rgb[..., 2] << 16


def classes_of(
    found: np.ndarray, classes: Mapping[int, int], shown: Path, most: int, *, background: bool = False
) -> np.ndarray:
    """Turn objects by number into ids of classes; pixels of no object (0) stay 0.

    Args:
        background: id 0 is the background, so that objects of it may join the pixels of no object.

    Raises:
        DataError: an object without annotation, pixels of no object beside a class 0, or a class beyond `most`.
    """
    values, places = np.unique(found, return_inverse=True)
    present = values.tolist()
    if unknown := [v for v in present if v != 0 and v not in classes]:
        raise DataError(
            f"{shown}: objects {unknown[:12]} have no annotation; correct it, or leave the sample out"
        )
    if not background and 0 in present and 0 not in classes and 0 in classes.values():
        raise DataError(
            f"{shown}: 0 is a class of the annotations, and the pixels of no object would get it as well; give the "
            "classes ids from 1 on"
        )
    wanted = [classes.get(v, 0) for v in present]
    if wrong := [v for v in wanted if not 0 <= v <= most]:
        raise DataError(
            f"{shown}: category_id {wrong[:12]} lie outside 0..{most}; declare classes of these ids"
        )
    table = np.array(wanted, np.uint8 if max(wanted) <= 255 else np.uint16)
    return table[places].reshape(found.shape)
