"""Bilinear resizing of one image, a band of rows at a time, and its adjoint."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_SOURCES = 32
"""Small columns per matrix product: fewer make thin products, more multiply more zeros (measured)."""
_ALL = slice(None)


class BandedResize:
    """Bilinear resizing as matrix products: the rows of a stripe once, then the columns of one band after the other.

    Only (C, R, w) of a stripe of R rows is ever held: the full width W exists for the rows of one band. An axis that
    keeps its size is not touched, nor copied.

    Args:
        small: (h, w) of the tensors to resize.
        size: (H, W) to resize to.
        align_corners: as in `torch.nn.functional.interpolate`, whose values these are.
        dtype: type of the matrices.
        device: where they lie.
    """

    def __init__(
        self,
        small: tuple[int, ...],
        size: tuple[int, ...],
        align_corners: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.keeps_rows, self.keeps_columns = small[0] == size[0], small[1] == size[1]
        self._rows = None
        if not self.keeps_rows:
            self._rows = _matrix(small[0], size[0], align_corners, dtype).to(device)
        self._blocks: list[tuple[slice, slice, Tensor, Tensor]] = []
        if not self.keeps_columns:
            # A column of the result mixes two neighbouring columns of the source: the matrix is nearly all zeros. It is
            # cut into blocks of columns, and each block keeps only the sources that it reads.
            matrix = _matrix(small[1], size[1], align_corners, dtype)  # (W, w)
            step = max(1, size[1] * _SOURCES // max(small[1], _SOURCES))
            for start in range(0, size[1], step):
                part = matrix[start : start + step]
                used = (part != 0).any(dim=0).nonzero()[:, 0]
                sources = slice(int(used[0]), int(used[-1]) + 1)
                part = part[:, sources].contiguous().to(device)
                columns = slice(start, min(start + step, size[1]))
                # both ways round, each contiguous: forward multiplies by (w', W'), the adjoint by (W', w')
                self._blocks.append((columns, sources, part.t().contiguous(), part))

    def sources(self, stripe: slice) -> slice:
        """The small rows that a stripe of large rows is made of; of all rows: all, also those that nothing reads."""
        if self._rows is None:
            return stripe
        if stripe in (_ALL, slice(0, len(self._rows))):
            return _ALL
        used = (self._rows[stripe] != 0).any(dim=0).nonzero()[:, 0]
        return slice(int(used[0]), int(used[-1]) + 1)

    def rows(self, image: Tensor, stripe: slice = _ALL) -> Tensor:
        """Resize the rows of (C, h', w), the sources of a stripe of R rows: (C, R, w)."""
        if self._rows is None:
            return image
        return torch.matmul(self._rows[stripe, self.sources(stripe)], image)

    def rows_adjoint(self, grad: Tensor, stripe: slice = _ALL) -> Tensor:
        """Gradient (C, h', w) of `rows` from that of its result, (C, R, w)."""
        if self._rows is None:
            return grad
        return torch.matmul(self._rows[stripe, self.sources(stripe)].t(), grad)

    def columns(self, band: Tensor, out: Tensor) -> None:
        """Resize the columns of a band (C, r, w) into `out`, contiguous (C, r * W)."""
        small = band.reshape(-1, band.shape[2])
        large = out.view(small.shape[0], -1)
        for columns, sources, matrix, _ in self._blocks:
            torch.mm(small[:, sources], matrix, out=large[:, columns])

    def columns_adjoint(self, grad: Tensor, out: Tensor) -> None:
        """Write the gradient of a band (C, r, w) into `out`, from that of its result, contiguous (C, r * W)."""
        if self.keeps_columns:
            out.copy_(grad.view(out.shape))
            return
        large = grad.view(out.shape[0] * out.shape[1], -1)
        small = grad.new_zeros(
            large.shape[0], out.shape[2]
        )  # (C * r, w); neighbouring blocks share sources: add
        for columns, sources, _, matrix in self._blocks:
            small[:, sources].addmm_(large[:, columns], matrix)
        out.copy_(small.view(out.shape))


@lru_cache(maxsize=32)
def banded_resize(
    small: tuple[int, ...],
    size: tuple[int, ...],
    align_corners: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> BandedResize:
    """The resizing between two sizes, made once; arguments as of `BandedResize`."""
    return BandedResize(small, size, align_corners, dtype, device)


def resized_at(
    maps: Tensor, size: tuple[int, int] | torch.Size, points: tuple[int, int] | torch.Size
) -> Tensor:
    """Resize maps bilinearly to a size, and keep a grid of points of the result: nothing of that size is made.

    Args:
        maps: (B, C, h, w), float32 or float64.
        size: (H, W) to resize to, corners not aligned.
        points: (h', w'), rows and columns to keep, those of `grid_points`.

    Returns:
        (B, C, h', w').
    """
    rows, columns = (
        _matrix_at(small, large, kept, maps.dtype, maps.device)
        for small, large, kept in zip(maps.shape[2:], size, points, strict=True)
    )
    return rows @ maps @ columns.t()


def grid_points(
    large: int, small: int, device: torch.device | str = "cpu", *, centred: bool = False
) -> Tensor:
    """Which of `large` rows stand for the rows of a map that has `small`, (small,).

    Row i is floor(i * large / small), where the part of the image that it stands for begins; `centred`, it is
    floor((i + 1/2) * large / small), the middle of that part.
    """
    # In integers: a scale in floating point may fall just below the row that is meant.
    if centred:
        return (2 * torch.arange(small, device=device) + 1) * large // (2 * small)
    return torch.arange(small, device=device) * large // small


@lru_cache(maxsize=32)
def _matrix_at(small: int, large: int, points: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of `_matrix` at the grid's points, (points, small)."""
    return _matrix(small, large, False, dtype)[grid_points(large, points)].to(device)


def _matrix(small: int, large: int, align_corners: bool, dtype: torch.dtype) -> Tensor:
    """What `interpolate` does to one axis, (large, small), asked of itself."""
    basis = torch.eye(small, dtype=dtype)[
        None, :, :, None
    ]  # one channel per source pixel, 1 there and 0 elsewhere
    resized = F.interpolate(basis, (large, 1), mode="bilinear", align_corners=align_corners)
    return resized[0, :, :, 0].t().contiguous()
