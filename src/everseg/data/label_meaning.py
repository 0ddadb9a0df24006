"""Refuse to train or score on masks that plainly do not mean what they are read as.

`data init` and `data check` look at the same things (`everseg.data.mask_values`), with more around them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from everseg.data.base import Dataset, Split
from everseg.data.batches.index import count_ids
from everseg.data.batches.parallel import map_samples
from everseg.data.mask_values import MaskFile, no_data_doubts, own_no_data, own_palette, palettes_differ
from everseg.errors import DataError


class _Header(NamedTuple):
    """What the header of a mask says."""

    palette: bytes
    no_data: int | None
    """The raw id called so."""


def require_meaning(dataset: Dataset, counts: Mapping[str, np.ndarray]) -> None:
    """Compare the masks of all splits that are used; only their headers are read.

    Args:
        counts: split -> (N, ids) pixels per raw id.

    Raises:
        DataError: palettes that differ, so that an index stands for several colours or a colour for several indices
            (masks that are read by colour have none); or a class that GeoTIFF masks call "no data", unless the
            description says that it is one. Names masks and figures.
    """
    headers = {name: map_samples(_header, dataset.splits[name], len(dataset.splits[name])) for name in counts}
    faults = [*_palettes(dataset, counts, headers), *_no_data(dataset, counts, headers)]
    if faults:
        raise DataError(f"data set '{dataset.name}': " + "\n  ".join(faults))


def _palettes(
    dataset: Dataset, counts: Mapping[str, np.ndarray], headers: Mapping[str, list[_Header]]
) -> Iterator[str]:
    if len({header.palette for of in headers.values() for header in of} - {b""}) < 2:
        return  # one palette contradicts nothing, and hardly any data set has several
    indexed: list[MaskFile] = []
    for name, of in headers.items():
        split = dataset.splits[name]
        for index, header in enumerate(of):
            if header.palette:
                held = _held(split, index, counts[name][index])
                indexed.append(MaskFile(f"{name}/{split.id(index)}", "indexed", held, palette=header.palette))
    if differ := palettes_differ(indexed):
        yield (
            f"{differ}, so the labels would be scrambled. If colours tell the classes, everseg data init describes "
            "them so; otherwise export the masks again with one palette (everseg data check shows the colours)"
        )


def _no_data(
    dataset: Dataset, counts: Mapping[str, np.ndarray], headers: Mapping[str, list[_Header]]
) -> Iterator[str]:
    if all(header.no_data is None for of in headers.values() for header in of):
        return
    named = [
        (header.no_data, {int(raw): int(row[raw]) for raw in np.flatnonzero(row)})
        for name, of in headers.items()
        for header, row in zip(of, counts[name], strict=True)
    ]
    void = dataset.labels.void
    for doubt in no_data_doubts([(None if own in void else own, held) for own, held in named]):
        (raw,) = doubt.values
        yield (
            f"{doubt.found}, which the description makes '{dataset.labels.names.get(raw, raw)}'; write ignore: {raw} "
            "into the data.yaml if they are without annotation, or no_data: class if they are of this class"
        )


def _innermost(split: Split) -> Split:
    """The split without those around it that change ids."""
    while (inner := getattr(split, "unmapped", None)) is not None:
        split = inner
    return split


def _header(split: Split, index: int) -> _Header:
    innermost = _innermost(split)
    find = getattr(innermost, "own_palette", None)
    try:
        palette = find(index)[0] if find is not None else b""
    except (DataError, OSError):  # the mask is drawn from another file, or reading it tells what is wrong
        palette = b""
    stated = getattr(split, "no_data_stated", True)
    return _Header(palette, None if stated else own_no_data(split, index))


def _held(split: Split, index: int, counts: np.ndarray) -> Mapping[int, int]:
    """The stored ids of a mask."""
    innermost = _innermost(split)
    if innermost is not split:  # `counts` are of ids that were changed since
        counts = count_ids(innermost.read_mask(index))
    return dict.fromkeys(own_palette(innermost, index, counts)[1].values(), 1)
