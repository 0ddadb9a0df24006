"""Sizes of images while a graph is exported: how an encoder of whole cells takes images of any size there.

PyTorch's exporter carries the image's height H as a symbol. The height enlarged to whole cells is then the expression
ceil(H / 32) * 32, and every layer behind makes a longer one of it, until the exporter can neither prove that two of
them are equal nor that a cut lies inside a map. So `Deployed` gives sizes that do not follow from H as inputs of their
own: the rows and columns of the enlarged image, those of each stride's cells that touch the image, and those of maps
enlarged to whole windows. Their lengths are symbols of their own, and the expressions stay short. `deploy.onnx` then
computes these inputs from the image's shape, at the beginning of the graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

Places = tuple[Tensor, Tensor]
"""Indices of rows (h,) and of columns (w,), int64."""


@dataclass(frozen=True)
class Sizes:
    """Which sizes a graph takes as inputs."""

    whole: Places
    """Row and column of the image at each row and column of the enlarged one. The last ones repeat."""
    cells: Mapping[int, Places]
    """Stride -> 0, 1, ... for each row and each column of cells that touch the image."""
    windows: Mapping[tuple[int, int], Places]
    """(stride, side of a window in cells) -> 0, 1, ... for each row and column of a map of the enlarged image that is
    enlarged to whole windows."""


_SIZES: ContextVar[Sizes | None] = ContextVar("everseg_open_sizes", default=None)


@contextlib.contextmanager
def given_sizes(sizes: Sizes) -> Iterator[None]:
    """Let encoders take these sizes."""
    token = _SIZES.set(sizes)
    try:
        yield
    finally:
        _SIZES.reset(token)


def sizes_at_hand() -> Sizes | None:
    """What `given_sizes` set; None in every ordinary run."""
    return _SIZES.get()


def places(
    height: int, width: int, multiple: int, strides: Sequence[int], windows: Sequence[tuple[int, int]] = ()
) -> Sizes:
    """Make the sizes of an image of `height` x `width` pixels.

    Args:
        multiple: what the sides of the enlarged image are a multiple of, in pixels.
        strides: of the encoder's maps, in pixels.
        windows: strides of maps that are cut into windows, and the windows' sides in cells.
    """
    whole = [-(-side // multiple) * multiple for side in (height, width)]

    def both(lengths: Iterable[int]) -> Places:
        rows, columns = map(torch.arange, lengths)
        return rows, columns

    enlarged = both(whole)
    return Sizes(
        (enlarged[0].clamp(max=height - 1), enlarged[1].clamp(max=width - 1)),
        {stride: both(-(-side // stride) for side in (height, width)) for stride in strides},
        {
            (stride, cells): both(-(-side // (stride * cells)) * cells for side in whole)
            for stride, cells in windows
        },
    )


def of_tensors(
    tensors: Sequence[Tensor], strides: Sequence[int], windows: Sequence[tuple[int, int]]
) -> Sizes:
    """Put together what `Sizes.tensors` gave, for the same strides and windows."""
    whole, *rest = [(tensors[i], tensors[i + 1]) for i in range(0, len(tensors), 2)]
    cells, inside = rest[: len(strides)], rest[len(strides) :]
    return Sizes(whole, dict(zip(strides, cells, strict=True)), dict(zip(windows, inside, strict=True)))


def picked(map: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Take rows (h,) and columns (w,) of (B, C, H, W), which gives (B, C, h, w)."""
    return map.index_select(2, rows).index_select(3, columns)


def cut(map: Tensor, like: Tensor) -> Tensor:
    """Cut (B, C, h, w) to the height and width of `like`, which are no larger."""
    if sizes_at_hand() is None:
        return map[..., : like.shape[2], : like.shape[3]]
    return picked(map, *(torch.arange(side, device=map.device) for side in like.shape[2:]))
