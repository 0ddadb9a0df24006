"""RCIL's pooled cube distillation: squared features, averaged over windows and over neighbouring channels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from everseg.losses.pixelwise import full_precision

WINDOWS = (4, 8, 12, 16, 20, 24)
"""Sides in cells of the spatial term's windows."""


class PooledCube(NamedTuple):
    """The two terms of the pooled cube distillation, scalars >= 0."""

    spatial: Tensor
    channel: Tensor


def pooled_cube_distillation(
    features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    *,
    spatial: tuple[float, float] = (1.0, 1.0),
    channel: tuple[float, float] = (1.0, 1.0),
) -> PooledCube:
    """Distance between the student's and the teacher's squared maps, pooled in space and over channels.

    With d = teacher ** 2 - student ** 2 of a map:

    * spatial: d is averaged over k x k windows with stride 1 and zeros around the map, k in 4, 8, 12, 16, 20, 24. The
      distance is the Euclidean norm per image, then the mean over the images, then over the six k.
    * channel: each channel of d is averaged with its two neighbours (zeros beyond the first and the last). The distance
      is the norm per image, then the mean over the images.

    The spatial term is the mean over all maps of factor times distance. The channel term is that over all maps but
    the last one, the logits, since logits have no neighbouring channels.

    Args:
        features: the student's maps (B, C, h, w), any sizes, the small logits last. Where they have more channels than
            the teacher's, those are new classes and are added to channel 0, the background.
        teacher_features: the teacher's, in the same order; no gradient flows into them.
        spatial: factor of every map but the last, and of the last map: the logits.
        channel: factor of every map but the last, and of the last map *of this term*: the one before the logits.

    Raises:
        ValueError: fewer than two maps, unequal numbers of maps, or shapes that do not fit.

    Source: Zhang et al., "Representation Compensation Networks", CVPR 2022, as in the authors' code, whose list of
    maps ends with DeepLab's output for the channel term and with the logits for the spatial one.

    >>> maps = [torch.ones(1, 4, 8, 8), torch.ones(1, 2, 8, 8)]
    >>> [value.item() for value in pooled_cube_distillation(maps, maps)]
    [0.0, 0.0]
    """
    if len(features) != len(teacher_features) or len(features) < 2:
        raise ValueError(
            "pooled_cube_distillation: expected the same number of maps of student and teacher, at least one stage and "
            f"the logits; got {len(features)} and {len(teacher_features)}"
        )
    # Both terms pool the same difference, so each map is squared once.
    differences = [squared_difference(*pair) for pair in zip(features, teacher_features, strict=True)]
    return PooledCube(
        _weighted_mean([window_distance(d) for d in differences], *spatial),
        _weighted_mean([neighbour_distance(d) for d in differences[:-1]], *channel),
    )


def squared_difference(features: Tensor, teacher_features: Tensor) -> Tensor:
    """Subtract the squares, teacher - student, in full precision: (B, K, h, w); new channels go to channel 0 first.

    Args:
        features: student, (B, C, h, w), C >= K.
        teacher_features: (B, K, h, w); no gradient flows into it.

    Raises:
        ValueError: no such shapes.
    """
    student, teacher = features.shape, teacher_features.shape
    if len(student) != 4 or len(teacher) != 4 or features.numel() == 0 or teacher_features.numel() == 0:
        raise ValueError(f"expected maps (B, C, h, w), got {tuple(student)} and {tuple(teacher)}")
    if (student[0], *student[2:]) != (teacher[0], *teacher[2:]) or student[1] < teacher[1]:
        raise ValueError(
            f"the student's map {tuple(student)} does not fit the teacher's {tuple(teacher)}: expected the same images "
            "and cells, and at least as many channels"
        )
    features, teacher_features = full_precision(features), full_precision(teacher_features).detach()
    return teacher_features.square() - new_into_background(features, teacher[1]).square()


def new_into_background(features: Tensor, num_old: int) -> Tensor:
    """Add the channels from `num_old` on to channel 0: (B, C, h, w) -> (B, num_old, h, w).

    The raw values are added, not probabilities, as in the codes of PLOP and RCIL.
    """
    if features.shape[1] == num_old:
        return features
    background = features[:, :1] + features[:, num_old:].sum(1, keepdim=True)
    return torch.cat([background, features[:, 1:num_old]], dim=1)


def window_distance(difference: Tensor) -> Tensor:
    """Norm per image of a map averaged over windows, its mean over the images and over the sizes in WINDOWS.

    Args:
        difference: (B, C, h, w).

    Returns:
        Scalar >= 0. A k x k window has k // 2 zeros on each side of the map, which count in its average.
    """
    height, width = difference.shape[2:]
    norms = []
    for side in WINDOWS:
        # The average of a window is that of its rows' averages: two matrix products, many times faster on a CPU than
        # pooling. The result is transposed in between and stays so, as its norm is the same.
        rows = difference @ _averages(width, side, difference.dtype, difference.device)  # (B, C, h, w + 1)
        norms.append(_norm(rows.mT @ _averages(height, side, difference.dtype, difference.device)))
    return torch.stack(norms).mean()


@lru_cache(maxsize=256)
def _averages(length: int, side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Weights (length, windows): column i averages the window that begins side // 2 before cell i, zeros outside."""
    start = torch.arange(length + 2 * (side // 2) - side + 1, device=device) - side // 2
    cells = torch.arange(length, device=device)[:, None]
    return ((cells >= start) & (cells < start + side)).to(dtype) / side


def neighbour_distance(difference: Tensor) -> Tensor:
    """Norm per image of a map (B, C, h, w) whose channels are averaged with their neighbours; mean over the images."""
    padded = F.pad(difference, (0, 0, 0, 0, 1, 1))  # (B, C + 2, h, w)
    return _norm((padded[:, :-2] + difference + padded[:, 2:]) / 3)


def _norm(maps: Tensor) -> Tensor:
    """Euclidean norm per image, then the mean over the images."""
    return torch.linalg.vector_norm(maps.flatten(1), dim=1).mean()


def _weighted_mean(distances: Sequence[Tensor], factor: float, last: float) -> Tensor:
    factors = [factor] * (len(distances) - 1) + [last]
    return torch.stack([f * distance for f, distance in zip(factors, distances, strict=True)]).mean()
