"""Distance of two networks' attention, pooled over the regions of classes."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from everseg.losses.pixelwise import full_precision
from everseg.losses.prototypes import label_at

Keys = Literal["cells", "classes"]
"""What the pooled attention of a class points at: the cells of the map, or their sum over each class's region."""


def attention_distance(
    attention: Tensor, teacher_attention: Tensor, label: Tensor, *, num_classes: int, keys: Keys = "cells"
) -> Tensor:
    """Distance between the attention that each class's region pays to the image, in student and teacher.

    The rows of the attention map that belong to a class are averaged, in every image and head: what a region looks at,
    inside itself (intra-class) and outside (inter-class). The distance of an image is the Euclidean norm of the
    differences over all classes, heads and keys, divided by the square root of the number of its (class, head) rows.

    Args:
        attention: student, (B, heads, h, w, h', w'): from each cell to each cell of a map that may be coarser.
        teacher_attention: the same shape; no gradient flows into it.
        label: (B, H, W) integers, sampled at both grids; values outside [0, C), such as 255, belong to no region.
        num_classes: C.
        keys: "classes" adds up what each row pays to every class's region, which leaves a table of C x C per head.

    Returns:
        Scalar >= 0: mean over the images; 0 for an image without regions.

    Raises:
        ValueError: shapes that do not fit.

    Source: Qiu et al. (SATS), Pattern Recognition 2023: self-attention transfer with class-specific region pooling.

    >>> own = torch.tensor([[0.5, 0.5], [0.0, 1.0]]).view(1, 1, 1, 2, 1, 2)
    >>> taught = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).view(1, 1, 1, 2, 1, 2)
    >>> round(attention_distance(own, taught, torch.tensor([[[0, 1]]]), num_classes=2).item(), 4)
    1.0
    """
    if attention.dim() != 6 or attention.shape != teacher_attention.shape or not attention.numel():
        raise ValueError(
            "attention_distance: expected maps (B, heads, h, w, h', w') of student and teacher, got "
            f"{tuple(attention.shape)} and {tuple(teacher_attention.shape)}"
        )
    if label.dim() != 3 or len(label) != len(attention) or label.is_floating_point() or not label.numel():
        raise ValueError(
            f"attention_distance: expected integer labels (B, H, W) of {len(attention)} images, got {label.dtype} of "
            f"shape {tuple(label.shape)}"
        )
    if keys not in get_args(Keys):
        raise ValueError(f"attention_distance: keys: expected 'cells' or 'classes', got {keys!r}")
    gap = full_precision(attention) - full_precision(teacher_attention).detach()
    rows = _regions(label, gap.shape[2:4], num_classes, gap)  # (B, C, hw)
    counts = rows.sum(dim=2)
    mean = rows / counts.clamp(min=1)[:, :, None]
    # Pooling is linear, so the difference is pooled once instead of both maps. A product, which every device sums in a
    # fixed order.
    pooled = torch.einsum("bcq,bhqk->bhck", mean, gap.flatten(4).flatten(2, 3))
    if keys == "classes":
        pooled = torch.einsum("bhck,bdk->bhcd", pooled, _regions(label, gap.shape[4:], num_classes, gap))
    present = (counts > 0).sum(dim=1).clamp(min=1) * gap.shape[1]
    return (torch.linalg.vector_norm(pooled, dim=(1, 2, 3)) / present.to(gap.dtype).sqrt()).mean()


def _regions(label: Tensor, size: torch.Size, num_classes: int, like: Tensor) -> Tensor:
    """Which cells of a grid belong to each class: (B, C, h * w) of 0 and 1."""
    cells = label_at(label, size).flatten(1).long()
    known = (cells >= 0) & (cells < num_classes)
    return (
        F.one_hot(torch.where(known, cells, num_classes), num_classes + 1)[..., :-1]
        .transpose(1, 2)
        .to(like.dtype)
    )
