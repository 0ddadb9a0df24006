"""Pooled output distillation: features compared by their means over strips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from everseg.losses.pixelwise import full_precision

Cells = Literal["both", "width"]
"""Where a cell ends: a share of the height and of the width, or of the width alone (PLOP's code)."""
Channels = Literal["sum", "trim"]
"""What becomes of channels that the teacher does not have: added to channel 0, or left out."""


def local_pod(
    features: Tensor,
    teacher_features: Tensor,
    *,
    scales: Sequence[int] = (1, 2, 4),
    square: bool = True,
    cells: Cells = "both",
    pool: Literal["mean", "sum"] = "mean",
    channels: Channels = "sum",
) -> Tensor:
    """Distance between the student's and the teacher's map, pooled over rows and columns of cells at several scales.

    Both maps are squared. At scale s they are cut into s x s cells. Of each cell the mean over its columns and the
    mean over its rows are kept, channel by channel. The distance of an image is the Euclidean norm of the difference
    between all that is kept of both maps.

    Args:
        features: student, (B, C, h, w), any floating type.
        teacher_features: (B, K, h, w) with K <= C; no gradient flows into it.
        scales: numbers of cells along each axis. A scale that has more cells than the map has pixels along an axis is
            left out; at least one must fit.
        square: square both maps first (the authors' `pod_prepro` "pow").
        cells: "both" makes cells of floor(h / s) x floor(w / s) pixels, so square maps and others work alike. "width"
            is PLOP's code: floor(w / s) x floor(w / s), which leaves out rows at the bottom where h > w. Rows and
            columns beyond the last whole cell are not used.
        pool: "mean", or "sum" over rows and columns; with `scales=(1,)` it gives the authors' "spatial" POD.
        channels: what becomes of channels that only the student has (new logits).

    Returns:
        Scalar >= 0, mean over images. Where both maps are equal it is 0 with gradient 0.

    Raises:
        ValueError: shapes that do not fit, scales below 1, no scale that fits, or cells "width" with h < w, where the
            authors' code stops, too.

    Source: Douillard et al. (PLOP), CVPR 2021, eq. 3-6 (the authors' `local` POD).

    >>> local_pod(torch.full((1, 1, 2, 2), 2.0), torch.ones(1, 1, 2, 2), scales=(1,)).item()  # 3, in 4 places
    6.0
    """
    features, teacher = full_precision(features), full_precision(teacher_features).detach()
    new = features.shape[1] - teacher.shape[1] if features.dim() == teacher.dim() == 4 else -1
    if new < 0 or len(features) != len(teacher) or features.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"local_pod: expected maps (B, C, h, w) and (B, K, h, w) with K <= C, got {tuple(features.shape)} "
            f"and {tuple(teacher.shape)}"
        )
    if cells not in get_args(Cells) or channels not in get_args(Channels) or pool not in ("mean", "sum"):
        raise ValueError(
            f"local_pod: unknown cells {cells!r}, pool {pool!r} or treatment of channels {channels!r}"
        )
    if new:
        features = old_channels(features, teacher.shape[1], channels)
    # Pooling is linear: the difference is pooled once instead of both maps.
    difference = teacher.square() - features.square() if square else teacher - features
    height, width = features.shape[2:]
    if cells == "width":
        if height < width:
            raise ValueError(
                f"local_pod: cells 'width' need maps at least as high as wide, got {height} x {width}; use 'both'"
            )
        height = width
    parts: list[Tensor] = []
    finer: tuple[int, int, int, Tensor, Tensor] | None = None  # scale, extent, and its two poolings
    for scale in sorted(set(_checked_scales(scales, min(height, width))), reverse=True):
        tall, wide = height // scale, width // scale  # of a cell
        extent = (scale * tall, scale * wide)
        if finer is not None and finer[:2] == extent and finer[2] % scale == 0:
            # The finer cells tile these: pool what is pooled already.
            ratio = finer[2] // scale
            rows = finer[3].unflatten(3, (scale, ratio))
            columns = finer[4].unflatten(2, (scale, ratio))
            rows, columns = (
                (rows.mean(4), columns.mean(3)) if pool == "mean" else (rows.sum(4), columns.sum(3))
            )
        else:
            used = difference[:, :, : extent[0], : extent[1]]
            rows, columns = used.unflatten(3, (scale, wide)), used.unflatten(2, (scale, tall))
            rows, columns = (
                (rows.mean(4), columns.mean(3)) if pool == "mean" else (rows.sum(4), columns.sum(3))
            )
        parts += [rows, columns]  # (B, K, s * tall, s) and (B, K, s, s * wide)
        finer = (*extent, scale, rows, columns)
    flat = torch.cat([part.flatten(1) for part in parts], dim=1)
    # The root of a sum of squares has no derivative at 0; this norm is given 0 there.
    return torch.linalg.vector_norm(flat, dim=1).mean()


def old_channels(features: Tensor, num_old: int, channels: Channels = "sum") -> Tensor:
    """The first `num_old` channels of a map (B, C, h, w), the others added to channel 0 ("sum") or left out ("trim").

    >>> old_channels(torch.tensor([[[[1.0]], [[2.0]], [[4.0]]]]), 2).flatten().tolist()
    [5.0, 2.0]
    """
    if channels == "trim":
        return features[:, :num_old]
    background = features[:, :1] + features[:, num_old:].sum(dim=1, keepdim=True)
    return torch.cat([background, features[:, 1:num_old]], dim=1)


def _checked_scales(scales: Sequence[int], side: int) -> list[int]:
    """The scales whose cells have at least one pixel."""
    if any(scale < 1 for scale in scales):
        raise ValueError(f"local_pod: scales must be at least 1, got {tuple(scales)}")
    fitting = [scale for scale in scales if scale <= side]
    if not fitting:
        raise ValueError(f"local_pod: none of the scales {tuple(scales)} fits a map with a side of {side}")
    return fitting
