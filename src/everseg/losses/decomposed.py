"""Distillation of the two parts of a logit, from positive and from negative weights (DKD)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from everseg.losses.classification import LINEAR_FROM
from everseg.losses.pixelwise import full_precision

Sign = Literal["positive", "negative"]


def decomposed_logits(features: Tensor, weight: Tensor, sign: Sign) -> Tensor:
    """The part of 1x1 convolutions' outputs that comes from their positive, or from their negative weights.

    Features after a ReLU are not negative, so the first part speaks for a class and the second one against it. Both
    together are the logit without its bias.

    Args:
        features: (B, D, h, w).
        weight: (C, D, 1, 1) or (C, D).
        sign: which weights.

    Returns:
        (B, C, h, w), in the wider type of both, at least float32.

    Raises:
        ValueError: shapes that do not fit.

    >>> features, weight = torch.tensor([2.0, 3.0]).view(1, 2, 1, 1), torch.tensor([[1.0, -1.0]])
    >>> decomposed_logits(features, weight, "positive").item(), decomposed_logits(features, weight, "negative").item()
    (2.0, -3.0)
    """
    if features.dim() != 4 or weight.flatten(1).shape[1] != features.shape[1]:
        raise ValueError(
            f"decomposed_logits: expected features (B, D, h, w) and weights (C, D, 1, 1), got {tuple(features.shape)} "
            f"and {tuple(weight.shape)}"
        )
    features = full_precision(features)
    dtype = torch.promote_types(features.dtype, weight.dtype)
    # relu, not clamp: at a weight of 0 its gradient is 0 on both sides.
    part = weight.relu() if sign == "positive" else -(-weight).relu()
    with torch.autocast(features.device.type, enabled=False):
        return F.conv2d(features.to(dtype), part.to(dtype).flatten(1)[:, :, None, None])


def decomposed_distillation(
    features: Tensor, weight: Tensor, teacher_features: Tensor, teacher_weight: Tensor, sign: Sign
) -> Tensor:
    """Binary cross-entropy of one part of the old classes' logits against the sigmoid of the teacher's same part.

    Args:
        features: what the student's classifiers see, (B, D, h, w).
        weight: the student's weights of the K old classes, (K, D, 1, 1).
        teacher_features: what the teacher's see, (B, D, h, w); no gradient flows.
        teacher_weight: the teacher's weights of the same classes; no gradient flows.
        sign: which weights.

    Returns:
        (K,): of each class, the mean over all pixels at the features' resolution, ignored ones included. The loss of
        DKD is their sum.

    Raises:
        ValueError: shapes that do not fit.

    Source: Baek et al. (DKD), NeurIPS 2022.

    >>> one = torch.ones(1, 1, 1, 1)
    >>> round(decomposed_distillation(one, 0 * one, one, 0 * one, "positive").item(), 4)
    0.6931
    """
    logits = decomposed_logits(features, weight, sign)
    with torch.no_grad():
        target = decomposed_logits(teacher_features, teacher_weight, sign).sigmoid().to(logits)
    if logits.shape != target.shape:
        raise ValueError(
            f"decomposed_distillation: the student's parts have shape {tuple(logits.shape)}, the teacher's "
            f"{tuple(target.shape)}"
        )
    return (F.softplus(logits, threshold=LINEAR_FROM) - target * logits).mean(dim=(0, 2, 3))
