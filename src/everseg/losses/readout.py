"""Readouts: from logits and auxiliary outputs to one value per class, whose largest one is the class of a pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from everseg.losses.pixelwise import full_precision, upsample
from everseg.types import Readout, SegOutput


def small_values(output: SegOutput, readout: Readout) -> Tensor:
    """Compute what is resized to the image, at the logits' own resolution.

    Args:
        output: of a branch with C classes, the background first where the readout concerns it.

    Returns:
        (B, C + M, h, w) float32 or float64: values of the classes, then `merged_outputs(readout)` = M further logits,
        which `merge_background` adds to the background once they are resized. Under a sigmoid that acts after the
        resizing the values are logits: the sigmoid changes no arg-max, and loses digits.

    Raises:
        ValueError: an auxiliary output that the readout names is missing.
    """
    values, auxiliary = full_precision(output.logits), output.auxiliary
    missing = [name for name in (*readout.merge, readout.residual) if name and name not in auxiliary]
    # A residual output comes with the second growth.
    missing = [name for name in missing if name != readout.residual]
    if missing:
        raise ValueError(f"the model has no output '{missing[0]}', which its readout needs")
    if readout.residual in auxiliary:
        values = with_residual(values, full_precision(auxiliary[readout.residual]))
    merged = [full_precision(auxiliary[name]).sum(dim=1, keepdim=True) for name in readout.merge]
    after = merged_outputs(readout)
    if readout.activation == "sigmoid" and readout.before:
        values, merged = values.sigmoid(), [one.sigmoid() for one in merged]
    if readout.threshold is not None:
        value = torch.tensor(readout.threshold, dtype=torch.float64)
        value = value if readout.before or readout.activation == "none" else value.logit()
        values = torch.cat([torch.full_like(values[:, :1], float(value)), values[:, 1:]], dim=1)
    if merged and not after:
        values = torch.cat([values[:, :1] + sum(merged), values[:, 1:]], dim=1)
    return torch.cat([values, *merged], dim=1) if after else values


def merged_outputs(readout: Readout) -> int:
    """Number of logits behind the classes' values that are merged with the background after the resizing."""
    return len(readout.merge) if readout.activation == "sigmoid" and not readout.before else 0


def with_residual(logits: Tensor, residual: Tensor) -> Tensor:
    """Lower the background's logits by the negative parts of residual ones (BARM): b + sum_k min(r_k, 0).

    Args:
        logits: (B, C, h, w), the background first.
        residual: (B, K, h, w).

    Returns:
        (B, C, h, w).
    """
    background = logits[:, :1] + residual.clamp(max=0).sum(dim=1, keepdim=True)
    return torch.cat([background, logits[:, 1:]], dim=1)


def merge_background(background: Tensor, others: Sequence[Tensor] | Tensor) -> Tensor:
    """Logit whose sigmoid is the sum of the sigmoids of logits; infinite where that sum is 1 or more.

    Args:
        background: logits of any shape.
        others: logits of the same shape.

    >>> merge_background(torch.tensor([0.0, -2.0]), [torch.tensor([0.0, -2.0])])
    tensor([    inf, -1.1603])
    """
    # In logarithms, so that probabilities near 0 keep their digits.
    share = F.logsigmoid(torch.stack([background, *others])).logsumexp(dim=0)
    inside = share.clamp(max=-torch.finfo(share.dtype).tiny)
    return torch.where(share < 0, inside - (-torch.expm1(inside)).log(), torch.inf)


def full_values(output: SegOutput, readout: Readout, size: tuple[int, int] | torch.Size) -> Tensor:
    """Compute the values of all classes at an image's resolution.

    For exported graphs, tests and small images. Everything else takes the arg-max a band of rows at a time
    (`losses.argmax.predict_ids`).

    Args:
        size: (H, W) of the image.

    Returns:
        (B, C, H, W); the class of a pixel is the first of the largest.
    """
    values = upsample(small_values(output, readout), size)
    merged = merged_outputs(readout)
    if not merged:
        return values
    classes = values.shape[1] - merged
    background = merge_background(values[:, 0], values[:, classes:].unbind(dim=1))
    return torch.cat([background[:, None], values[:, 1:classes]], dim=1)
