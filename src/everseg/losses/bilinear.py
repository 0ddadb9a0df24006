"""Bilinear resizing of one image, a band of rows at a time, and its adjoint (floor 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class BandedResize:
    """Bilinear resizing as two matrix products: all rows once, then the columns of one band after the other.

    Only (C, H, w) is ever held: the full width W exists for the rows of one band.

    Args:
        small: (h, w) of the tensors to resize.
        size: (H, W) to resize to.
        align_corners: as in `torch.nn.functional.interpolate`, whose values these are.
        like: tensor whose type and device the matrices get.
    """

    def __init__(self, small: torch.Size, size: torch.Size, align_corners: bool, like: Tensor) -> None:
        self._rows = _matrix(small[0], size[0], align_corners, like)
        self._columns = _matrix(small[1], size[1], align_corners, like)
        self._columns_t = None if self._columns is None else self._columns.t().contiguous()

    def rows(self, image: Tensor) -> Tensor:
        """Resize the rows of (C, h, w): (C, H, w)."""
        return image if self._rows is None else torch.matmul(self._rows, image)

    def rows_adjoint(self, grad: Tensor) -> Tensor:
        """Gradient (C, h, w) of `rows` from that of its result, (C, H, w)."""
        return grad if self._rows is None else torch.matmul(self._rows.t(), grad)

    def columns(self, band: Tensor, out: Tensor) -> Tensor:
        """Resize the columns of a band (C, r, w) into `out`, contiguous (C, r * W)."""
        num_classes, height, width = band.shape
        if self._columns_t is None:
            out.view(band.shape).copy_(band)
        else:
            small = band.reshape(num_classes * height, width)
            torch.mm(small, self._columns_t, out=out.view(num_classes * height, -1))
        return out

    def columns_adjoint(self, grad: Tensor, out: Tensor) -> None:
        """Write the gradient of a band (C, r, w) into `out`, from that of its result, contiguous (C, r * W)."""
        flat = grad.view(out.shape[0] * out.shape[1], -1)
        out.copy_((flat if self._columns is None else torch.mm(flat, self._columns)).view(out.shape))


def _matrix(small: int, large: int, align_corners: bool, like: Tensor) -> Tensor | None:
    """What `interpolate` does to one axis, (large, small), asked of itself; None where it does nothing."""
    if small == large:
        return None
    basis = torch.eye(small, dtype=like.dtype, device=like.device)[None, :, :, None]
    resized = F.interpolate(basis, (large, 1), mode="bilinear", align_corners=align_corners)
    return resized[0, :, :, 0].t().contiguous()
