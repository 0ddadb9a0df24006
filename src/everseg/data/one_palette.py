"""Refuse to train or score on indexed masks whose palettes contradict each other: their ids are scrambled.

`data init` and `data check` look at the same (`everseg.data.mask_values.palettes_differ`) with more around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from everseg.data.base import Split
from everseg.data.batches.index import count_ids
from everseg.data.batches.parallel import map_samples
from everseg.data.mask_values import MaskFile, own_palette, palettes_differ
from everseg.errors import DataError


def require_one_palette(dataset: str, splits: Mapping[str, tuple[Split, np.ndarray]]) -> None:
    """Compare the palettes of the masks of all splits that are used. Masks that are read by colour have none.

    Args:
        dataset: what the message calls the data set.
        splits: name -> split, and its (N, ids) pixels per raw id.

    Raises:
        DataError: an index stands for several colours, or a colour for several indices; names two masks.
    """
    headers = {name: map_samples(_palette, split, len(split)) for name, (split, _) in splits.items()}
    if len({palette for of in headers.values() for palette in of} - {b""}) < 2:
        return  # one palette contradicts nothing, and hardly any data set has several
    indexed: list[MaskFile] = []
    for name, (split, counts) in splits.items():
        for index, palette in enumerate(headers[name]):
            if palette:
                held = _held(split, index, counts[index])
                indexed.append(MaskFile(f"{name}/{split.id(index)}", "indexed", held, palette=palette))
    if differ := palettes_differ(indexed):
        raise DataError(
            f"data set '{dataset}': {differ}, so the labels would be scrambled. Masks that are told apart by their "
            "colours: everseg data init describes them so. Otherwise export them again with one palette; everseg data "
            "check shows the colours of every class"
        )


def _unmapped(split: Split) -> Iterator[Split]:
    """A split, and those that it wraps to change ids."""
    while split is not None:
        yield split
        split = getattr(split, "unmapped", None)  # type: ignore[assignment]


def _palette(split: Split, index: int) -> bytes:
    *_, innermost = _unmapped(split)
    find = getattr(innermost, "own_palette", None)
    try:
        return find(index)[0] if find is not None else b""
    except (DataError, OSError):  # the mask is drawn from another file, or reading it tells what is wrong
        return b""


def _held(split: Split, index: int, counts: np.ndarray) -> Mapping[int, int]:
    """The stored ids of a mask."""
    *_, innermost = _unmapped(split)
    if innermost is not split:  # `counts` are of ids that were changed since
        counts = count_ids(innermost.read_mask(index))
    return dict.fromkeys(own_palette(innermost, index, counts)[1].values(), 1)
