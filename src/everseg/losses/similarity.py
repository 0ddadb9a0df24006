"""REMINDER's class-similarity-weighted distillation, and the class means it stands on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from everseg.labels import ignored_id
from everseg.losses.bilinear import banded_resize
from everseg.losses.pixelwise import (
    Over,
    Reduction,
    checked_alpha,
    checked_label,
    checked_logits,
    checked_teacher,
    full_precision,
    reduce,
)

_BAND_BYTES = 2**24
_TARGET_OFFSET = 1e-7
"""Added to every target by REMINDER's code; losses show it at a relative 1e-5."""


@torch.no_grad()
def class_sums(
    features: Tensor, label: Tensor, num_classes: int, *, first: int = 0, align_corners: bool = False
) -> tuple[Tensor, Tensor]:
    """Sum features, resized bilinearly to the label's size, over the pixels of each class.

    The resizing is linear. So instead of the features the masks of the classes are resized, backwards, a band of rows
    at a time: no features of full resolution are made.

    Args:
        features: (B, D, h, w), any resolution and floating type; no gradient is kept.
        label: (B, H, W) integers; 255 and classes outside the range are left out.
        num_classes: C.
        first: first class wanted; rows before it are 0.
        align_corners: of the bilinear resizing.

    Returns:
        Sums (C, D) float32 or float64 and pixels (C,) of the same type. The mean of a class is their quotient.

    Raises:
        ValueError: shapes that do not fit.

    >>> sums, pixels = class_sums(torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[1, 1]]]), 2)
    >>> sums.tolist(), pixels.tolist()
    ([[0.0], [4.0]], [0.0, 2.0])
    """
    features = full_precision(features)
    if (
        features.dim() != 4
        or label.dim() != 3
        or len(label) != len(features)
        or not 0 <= first <= num_classes
    ):
        raise ValueError(
            f"class_sums: expected features (B, D, h, w), a label (B, H, W) and first in 0..{num_classes}, got "
            f"{tuple(features.shape)}, {tuple(label.shape)} and {first}"
        )
    sums = features.new_zeros(num_classes, features.shape[1])
    pixels = features.new_zeros(num_classes)
    wanted = num_classes - first
    if not wanted:
        return sums, pixels
    height, width = label.shape[1:]
    rows = max(1, _BAND_BYTES // (wanted * width * features.element_size()))
    resize = banded_resize(
        tuple(features.shape[2:]), (height, width), align_corners, features.dtype, features.device
    )
    with torch.autocast(features.device.type, enabled=False):
        for image, given in zip(features, label, strict=True):
            shares = image.new_empty(wanted, height, image.shape[2])  # (C', H, w)
            for start in range(0, height, rows):
                here = slice(start, start + rows)
                place = given[here].long().reshape(1, -1) - first
                # Everything that is not wanted goes to one more row, which is dropped.
                place = torch.where((place < 0) | (place >= wanted), wanted, place)
                masks = image.new_zeros(wanted + 1, place.shape[1]).scatter_(0, place, 1.0)[:wanted]
                pixels[first:] += masks.sum(dim=1)
                resize.columns_adjoint(masks, shares[:, here])
            weights = resize.rows_adjoint(shares)  # (C', h, w): how much of each small pixel a class holds
            sums[first:] += weights.flatten(1) @ image.flatten(1).t()
    return sums, pixels


def class_similarity(prototypes: Tensor, old_prototypes: Tensor, *, delta: float = 0.0) -> Tensor:
    """How much each class resembles each old class: a softmax of cosines over the old ones.

    Args:
        prototypes: (C, D).
        old_prototypes: (K, D).
        delta: entries below delta / K become 0; the rest is not scaled up again.

    Returns:
        (C, K) in [0, 1]. The cosine with a zero vector counts as 0.

    Raises:
        ValueError: shapes that do not fit.

    Source: Phan et al. (REMINDER), CVPR 2022, and its code.

    >>> class_similarity(torch.eye(2), torch.zeros(4, 2))
    tensor([[0.2500, 0.2500, 0.2500, 0.2500],
            [0.2500, 0.2500, 0.2500, 0.2500]])
    """
    if prototypes.dim() != 2 or old_prototypes.dim() != 2 or prototypes.shape[1] != old_prototypes.shape[1]:
        raise ValueError(
            f"class_similarity: expected prototypes (C, D) and (K, D), got {tuple(prototypes.shape)} and "
            f"{tuple(old_prototypes.shape)}"
        )
    cosines = F.cosine_similarity(prototypes[:, None], old_prototypes[None], dim=2)
    shares = torch.softmax(cosines, dim=1)
    return shares.masked_fill(shares < delta / shares.shape[1], 0.0)


def similarity_distillation(
    logits: Tensor,
    label: Tensor,
    teacher_logits: Tensor,
    *,
    similarity: Tensor,
    temperature: float = 3.0,
    empty: float = 0.0,
    over: Over = "valid",
    reduction: Reduction = "mean",
) -> Tensor:
    """Distil, on the pixels of new classes, the old classes that resemble the pixel's class.

    Per pixel of a new class y, with temperature T, teacher t and student x:
    -T^2 sum_c (softmax(t / T)_c * similarity[y, c] + 1e-7) ln softmax(x_0..x_{K-1} / T)_c.

    Args:
        logits: student, (B, C, H, W); old classes come first.
        label: (B, H, W) in [0, C) or 255 = ignored. Pixels below K, and ignored ones, have loss 0.
        teacher_logits: (B, K, H, W) with K <= C; no gradient flows into it.
        similarity: (C, K), of `class_similarity`; no gradient flows into it.
        temperature: T (REMINDER: 3).
        empty: value of the mean where no pixel is of a new class; the authors' code gives nan.
        over: "valid" divides by the number of pixels of new classes; "all" by all pixels.
        reduction: "mean", "sum" or "none" for (B, H, W).

    Returns:
        Scalar >= 0, or `empty`.

    Raises:
        ValueError: shapes that do not fit, or temperature <= 0.

    Source: Phan et al. (REMINDER), CVPR 2022, and its code.

    >>> x, label = torch.zeros(1, 3, 1, 1), torch.full((1, 1, 1), 2)
    >>> round(similarity_distillation(x, label, x[:, :2], similarity=torch.ones(3, 2)).item(), 4)
    6.2383
    """
    checked_alpha("similarity_distillation: temperature", temperature)
    logits = checked_logits("similarity_distillation", logits)
    teacher_logits = checked_teacher("similarity_distillation", teacher_logits, logits)
    label = checked_label("similarity_distillation", label, logits)
    num_old = teacher_logits.shape[1]
    if similarity.shape != (logits.shape[1], num_old):
        raise ValueError(
            f"similarity_distillation: expected similarities {(logits.shape[1], num_old)}, got "
            f"{tuple(similarity.shape)}"
        )
    counted = (label >= num_old) & (label != ignored_id(logits.shape[1]))
    shares = similarity.detach().to(logits)[label.masked_fill(~counted, 0)].movedim(3, 1)  # (B, K, H, W)
    target = torch.softmax(teacher_logits / temperature, dim=1) * shares + _TARGET_OFFSET
    own = torch.log_softmax(logits[:, :num_old] / temperature, dim=1)
    per_pixel = -(temperature**2) * (target * own).sum(dim=1)
    value = reduce(per_pixel * counted, None, over, reduction=reduction, weight=counted)
    return torch.where(counted.any(), value, empty) if reduction == "mean" else value
