"""Ridge regression of labels on features, from sums over pixels: what a step without gradients adds up and solves.

The sums are the Gram matrix G = sum x x' and C = sum x y', where x holds a pixel's features and y is 1 at its class and
0 elsewhere. The weights (G + gamma I)^-1 C are those of all pixels at once, whatever came in which order, in whatever
number of steps. The authors of SegACIL update the inverse R = (G + gamma I)^-1 batch by batch instead. In exact
arithmetic that is the same; here rounding does not build up in an inverse, and the sums of processes can be added.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 1024
"""Columns of the Gram matrix at a time: only blocks on and above the diagonal are computed, 0.6 of the work at 4096."""
_ROWS = 4096
"""Pixels at a time, so that their features need little memory."""


def expanded(features: Tensor, weight: Tensor) -> Tensor:
    """Random features relu(B x).

    Args:
        features: (m, d).
        weight: (n, d), B.

    Returns:
        (m, n) >= 0.
    """
    return F.linear(features, weight).relu()


@torch.no_grad()
def add_pixels(
    gram: Tensor,
    cross: Tensor,
    features: Tensor,
    label: Tensor,
    *,
    weight: Tensor | None = None,
    of_pixel: Tensor | None = None,
    exact: bool = True,
) -> None:
    """Add pixels to the sums, in place.

    Args:
        gram: (n, n) float64; only the diagonal and what is above it are used.
        cross: (n, C) float64.
        features: (m, d), any floating type.
        label: (m,) classes from 0 to C - 1.
        weight: (n, d), the random expansion; None = the features themselves, d = n.
        of_pixel: (m,) >= 0, how often each pixel counts; None = once.
        exact: products in float64, else in float32. The sums are float64 either way.
    """
    kind = torch.float64 if exact else torch.float32
    for rows in range(0, len(features), _ROWS):
        part = slice(rows, rows + _ROWS)
        x = features[part].to(kind)
        if weight is not None:
            x = expanded(x, weight.to(kind))
        counted = x if of_pixel is None else x * of_pixel[part, None].to(kind)
        target = F.one_hot(label[part].long(), cross.shape[1]).to(kind)
        _add_product(cross, counted, target)
        for start in range(0, len(gram), _BLOCK):
            columns = slice(start, start + _BLOCK)
            _add_product(gram[columns, start:], counted[:, columns], x[:, start:])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Total += left' right, where the product may be of lower precision."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
    else:
        total.add_(left.T @ right)


def condition_bound(gram: Tensor, gamma: float) -> float:
    """Bound the condition number of G + gamma I: 1 + trace(G) / gamma.

    G has no negative eigenvalue and none above its trace, so the largest of the sum is at most trace + gamma and the
    smallest at least gamma. The weights' relative error is of the order of this number times the rounding unit (1e-16,
    or 6e-8 where the sums were stored in float32).
    """
    return 1 + float(gram.diagonal().sum()) / gamma


@torch.no_grad()
def ridge_weights(gram: Tensor, cross: Tensor, gamma: float) -> Tensor:
    """Solve (G + gamma I) W = C by a Cholesky factorisation: (n, C) float64.

    Args:
        gram: (n, n) as `add_pixels` leaves it.
        cross: (n, C).
        gamma: > 0.

    Raises:
        ValueError: the matrix is not positive definite in this precision.
    """
    return torch.cholesky_solve(cross, _factor(gram, gamma), upper=True)


@torch.no_grad()
def ridge_inverse(gram: Tensor, gamma: float) -> Tensor:
    """Compute (G + gamma I)^-1, (n, n) float64: the authors' state R. For comparisons; nothing here needs it."""
    return torch.cholesky_inverse(_factor(gram, gamma), upper=True)


def _factor(gram: Tensor, gamma: float) -> Tensor:
    factor = gram.triu()
    factor.diagonal().add_(gamma)
    factor, info = torch.linalg.cholesky_ex(factor, upper=True)
    if int(info):
        raise ValueError(
            f"gamma: {gamma:g} is too small for these features: with a condition number of up to "
            f"{condition_bound(gram, gamma):.1e} the ridge regression has no solution in this precision; raise gamma"
        )
    return factor


def pack(gram: Tensor) -> Tensor:
    """Keep the diagonal and what is above it, row by row: (n, n) to (n (n + 1) / 2,)."""
    return torch.cat([gram[row, row:] for row in range(len(gram))]) if len(gram) else gram.new_zeros(0)


def unpack(packed: Tensor) -> Tensor:
    """Give back what `pack` was given, zero below the diagonal."""
    size = round(((8 * len(packed) + 1) ** 0.5 - 1) / 2)
    gram = packed.new_zeros(size, size)
    for row, values in enumerate(packed.split(list(range(size, 0, -1)))):
        gram[row, row:] = values
    return gram
