"""BARM: a background that each later step corrects by a residual of its own.

The background's logit b is the first step's. Step k adds a residual r_k. Where r_k is negative, its classes are, and it
lowers the background. `losses.readout.with_residual` applies that rule to a finished model, `adapted_logits` while the
newest residual is learnt.

The newest residual and the old outputs are compared at their own resolution. `label_cells` says which cells count.

Source: Zhang and Gao (BARM), "Background Adaptation with Residual Modeling for Exemplar-Free Class-Incremental Semantic
Segmentation", ECCV 2024, and its code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from everseg.labels import ignored_id
from everseg.losses.classification import LINEAR_FROM
from everseg.losses.features import feature_distillation
from everseg.losses.pixelwise import full_precision

_EPSILON = 1e-8
"""Added to the number of cells of the new classes, as in the authors' code."""


def adapted_logits(logits: Tensor, residual: Tensor, num_old: int) -> Tensor:
    """The logits that a later step trains: gradients reach the newest residual and the new classes alone.

    The background is b + sum_{j<k} min(r_j, 0) + r_k. The newest residual is not cut at 0, so that it learns where it
    is positive, too.

    Args:
        logits: (B, C, h, w), the background first.
        residual: (B, k, h, w), k >= 1, the newest last.
        num_old: classes known before the step, background included; 1 <= num_old <= C.

    Returns:
        (B, C, h, w).

    Raises:
        ValueError: shapes that do not fit, no residual, or `num_old` out of range.

    >>> adapted_logits(torch.tensor([2.0, 5.0]).view(1, 2, 1, 1), torch.tensor([[-1.0, 3.0, 4.0]]).view(1, 3, 1, 1), 1)
    tensor([[[[5.]],
    <BLANKLINE>
             [[5.]]]])
    """
    fit = logits.dim() == residual.dim() == 4 and len(logits) == len(residual)
    if not fit or logits.shape[2:] != residual.shape[2:] or not residual.shape[1]:
        raise ValueError(
            f"adapted_logits: expected logits (B, C, h, w) and residuals (B, k, h, w), got {tuple(logits.shape)} and "
            f"{tuple(residual.shape)}"
        )
    if not 1 <= num_old <= logits.shape[1]:
        raise ValueError(
            f"adapted_logits: num_old must be in 1..{logits.shape[1]} for {logits.shape[1]} classes, got {num_old}"
        )
    earlier = residual[:, :-1].detach().clamp(max=0).sum(dim=1, keepdim=True)
    background = logits[:, :1].detach() + earlier + residual[:, -1:]
    return torch.cat([background, logits[:, 1:num_old].detach(), logits[:, num_old:]], dim=1)


def label_cells(
    label: Tensor, size: tuple[int, int] | torch.Size, num_old: int, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Find the cells of a small map whose label is background, and those whose label is a new class.

    The label is resized by its nearest pixels: a cell has the label of the first pixel that it covers.

    Args:
        label: (B, H, W) train ids before any completion.
        size: (h, w) of the map.
        num_old: classes known before the step, background included.
        num_classes: C, classes known now: says which label is ignored.

    Returns:
        Two masks (B, h, w) bool. Ignored cells and those of old classes are in neither.

    >>> [mask.int().tolist() for mask in label_cells(torch.tensor([[[0, 1, 2, 255]]]), (1, 4), 2, 3)]
    [[[[1, 0, 0, 0]]], [[[0, 0, 1, 0]]]]
    """
    # float64 holds every id exactly; `interpolate` takes no integers.
    small = F.interpolate(label[:, None].double(), tuple(size), mode="nearest")[:, 0].long()
    return small == 0, (small >= num_old) & (small != ignored_id(num_classes))


def residual_margin(residual: Tensor, mask: Tensor, *, empty: float = 0.0) -> Tensor:
    """Keep a residual positive in the background: mean over the cells of a mask of max(0, 1 - 2 sigmoid(r)).

    Args:
        residual: (B, h, w) logits.
        mask: (B, h, w) bool.
        empty: value where the mask has no cell; the authors' code gives nan.

    Returns:
        Scalar in [0, 1].

    Raises:
        ValueError: shapes that differ.

    >>> round(residual_margin(torch.tensor([[[-2.0, 2.0, -9.0]]]), torch.tensor([[[True, True, False]]])).item(), 4)
    0.3808
    """
    residual, mask = _checked("residual_margin", residual, mask)
    # 1 - 2 sigmoid(r) = -tanh(r / 2).
    summed, number = torch.where(mask, (-torch.tanh(residual / 2)).relu(), 0).sum(), mask.sum()
    # The sum stays in the result, so that a loss without cells has a gradient of 0.
    return torch.where(number > 0, summed / number.clamp(min=1), summed + empty)


def residual_negatives(residual: Tensor, mask: Tensor) -> Tensor:
    """Make a residual negative on new classes: sum over the cells of a mask of softplus(r), over their number + 1e-8.

    Args:
        residual: (B, h, w) logits.
        mask: (B, h, w) bool.

    Returns:
        Scalar >= 0; 0 where the mask has no cell.

    Raises:
        ValueError: shapes that differ.

    >>> round(residual_negatives(torch.tensor([[[0.0, 9.0]]]), torch.tensor([[[True, False]]])).item(), 4)
    0.6931
    """
    residual, mask = _checked("residual_negatives", residual, mask)
    summed = torch.where(mask, F.softplus(residual, threshold=LINEAR_FROM), 0).sum()
    return summed / (mask.sum(dtype=residual.dtype) + _EPSILON)


def masked_feature_distance(features: Tensor, teacher_features: Tensor, mask: Tensor) -> Tensor:
    """Squared difference of features in the cells of a mask: a mean over all elements, those outside counting as 0.

    Args:
        features: student, (B, D, h, w); half precision becomes float32.
        teacher_features: the same shape; no gradient flows into it.
        mask: (B, h, w) bool.

    Returns:
        Scalar >= 0.

    Raises:
        ValueError: shapes that do not fit.

    >>> masked_feature_distance(torch.ones(1, 2, 1, 2), torch.zeros(1, 2, 1, 2), torch.tensor([[[True, False]]])).item()
    0.5
    """
    if features.dim() != 4 or mask.shape != features[:, 0].shape:
        raise ValueError(
            f"masked_feature_distance: expected features (B, D, h, w) and a mask (B, h, w), got "
            f"{tuple(features.shape)} and {tuple(mask.shape)}"
        )
    # `where`, not a product: outside the mask nothing may count, whatever it is.
    inside, zero = mask[:, None], features.new_zeros(())
    return feature_distillation(
        torch.where(inside, features, zero), torch.where(inside, teacher_features, zero.to(teacher_features))
    )


def _checked(name: str, residual: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    if residual.dim() != 3 or residual.shape != mask.shape:
        raise ValueError(
            f"{name}: expected a residual (B, h, w) and a mask of its shape, got {tuple(residual.shape)} and "
            f"{tuple(mask.shape)}"
        )
    return full_precision(residual), mask
