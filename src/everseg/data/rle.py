"""Run-length masks as COCO writes them: plain counts, or packed into text (floor 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from everseg.errors import DataError


def decode(counts: Sequence[int] | str, height: int, width: int) -> np.ndarray:
    """Draw a run-length mask: runs of 0 and 1 in turn, down the columns, beginning with 0.

    Args:
        counts: lengths of the runs, or COCO's packed text of them.

    Returns:
        (height, width) bool.

    Raises:
        DataError: not such counts, or runs that do not fill the picture exactly.
    """
    runs = np.asarray(unpack(counts) if isinstance(counts, str) else _whole(counts), np.int64)
    if runs.size and runs.min() < 0:
        raise DataError("a run of negative length")
    if int(runs.sum()) != height * width:
        raise DataError(f"runs of {int(runs.sum())} pixels for a picture of {width}x{height}")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def unpack(text: str) -> list[int]:
    """Lengths of the runs that COCO packs into text: 5 bits and a flag per character.

    From the fourth on they are differences to the last but one.

    Raises:
        DataError: characters that cannot stand there, or a text that breaks off.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise DataError(f"the packed run lengths hold {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise DataError("the packed run lengths break off")
    return runs


def _whole(counts: Any) -> Sequence[int]:
    if not isinstance(counts, list) or not all(type(c) is int for c in counts):
        raise DataError("run lengths that are no whole numbers")
    return counts
