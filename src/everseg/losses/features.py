"""Distillation of features."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from everseg.losses.pixelwise import full_precision


def feature_distillation(
    features: Tensor, teacher_features: Tensor, *, reduction: Literal["mean", "sum", "none"] = "mean"
) -> Tensor:
    """Squared difference between the student's and the teacher's features.

    Args:
        features: student, any shape, usually (B, C, h, w) of the `encoder` tap; half precision becomes float32.
        teacher_features: the same shape; no gradient flows into it.
        reduction: "mean" over all elements, "sum", or "none" for the element-wise squares.

    Returns:
        Scalar >= 0.

    Raises:
        ValueError: shapes differ, or an unknown reduction.

    Source: Michieli and Zanuttigh (ILT), ICCV Workshops 2019, as in MiB's code: the mean over all elements of the
    encoder's last features.

    >>> feature_distillation(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])).item()
    2.0
    """
    if features.shape != teacher_features.shape:
        raise ValueError(
            f"feature_distillation: student features have shape {tuple(features.shape)}, "
            f"the teacher's {tuple(teacher_features.shape)}"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    features, teacher_features = full_precision(features), full_precision(teacher_features).detach()
    # Either may be float64 (a model in double precision): the comparison runs in the wider type.
    dtype = torch.promote_types(features.dtype, teacher_features.dtype)
    return F.mse_loss(features.to(dtype), teacher_features.to(dtype), reduction=reduction)
