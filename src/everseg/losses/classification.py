"""Losses against labels: cross-entropy, its unbiased form, binary cross-entropy, iCaRL, focal.

In all of them `label` is (B, H, W) at the resolution of `logits` (B, C, H, W), with 255 = ignored. Above 255 classes
ignored is 65,535 (`everseg.labels.ignored_id`).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from everseg.labels import ignored_id
from everseg.losses.pixelwise import (
    Over,
    Reduction,
    checked_label,
    checked_logits,
    checked_num_old,
    checked_teacher,
    reduce,
)

LINEAR_FROM = 50.0
"""softplus(x) = x from here on, exact in float64 (torch's own default of 20 is off by 2e-9)."""


def cross_entropy(
    logits: Tensor,
    label: Tensor,
    *,
    weight: Tensor | None = None,
    over: Over = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy of a softmax over all classes.

    Args:
        logits: (B, C, H, W), unnormalised; half precision is computed in float32.
        label: (B, H, W) integers in [0, C), or 255 = ignored: such a pixel has loss 0.
        weight: (C,) factor of each class; None = 1.
        over: "all" divides by all B*H*W pixels, ignored ones included (MiB's trainer); "valid" divides by the
            number of non-ignored pixels, with `weight` by the sum of their weights (MDIL, torch).
        reduction: "mean", "sum" (no division), or "none" for (B, H, W).

    Returns:
        Scalar >= 0. With over="valid" and no pixel that counts it is 0, where the authors' code gives nan.

    Raises:
        ValueError: wrong shapes or types, or a label out of range (values are checked on the CPU only).

    Source: MiB's trainer (per-pixel loss, then the mean over all pixels); MDIL for `weight`.

    >>> logits = torch.zeros(1, 4, 1, 2)
    >>> label = torch.tensor([[[3, 255]]])
    >>> round(cross_entropy(logits, label).item(), 4), round(cross_entropy(logits, label, over="valid").item(), 4)
    (0.6931, 1.3863)
    """
    logits = checked_logits("cross_entropy", logits)
    label = checked_label("cross_entropy", label, logits)
    weight = _checked_weight("cross_entropy", weight, logits)
    ignored = ignored_id(logits.shape[1])
    per_pixel = _cross_entropy(logits, label, weight, ignored)
    pixel_weight = _pixel_weight(label, weight, ignored)
    return reduce(per_pixel, label, over, reduction=reduction, weight=pixel_weight, ignored=ignored)


def unbiased_cross_entropy(
    logits: Tensor,
    label: Tensor,
    *,
    num_old: int,
    weight: Tensor | None = None,
    over: Over = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy in which a background pixel may be the background or any old class.

    With K = num_old: log p(background) = logsumexp(x_0..x_{K-1}) - logsumexp(x), log p(new c) = x_c - logsumexp(x).
    Computed as the plain cross-entropy of [logsumexp(old), new], which is the same number.

    Args:
        logits: (B, C, H, W), unnormalised; channel 0 is the background, old classes come first.
        label: (B, H, W) in [0, C) or 255 = ignored; values in 1..num_old-1 are treated as background.
        num_old: classes known before this step, background included, 1 <= num_old < C.
        weight: (C,) factor of each class; entry 0 applies to all background and old pixels.
        over: as in `cross_entropy`.
        reduction: as in `cross_entropy`.

    Returns:
        Scalar >= 0; ignored pixels as in `cross_entropy`.

    Raises:
        ValueError: as `cross_entropy`, or no old or no new class.

    Source: Cermelli et al., CVPR 2020, eq. 5-6. The authors' class-level "mean" is over="valid" here (0 instead of
    nan without valid pixels); their trainer's mean is over="all".

    >>> logits = torch.zeros(1, 4, 1, 1)
    >>> round(unbiased_cross_entropy(logits, torch.zeros(1, 1, 1).long(), num_old=2).exp().item(), 4)
    2.0
    """
    logits = checked_logits("unbiased_cross_entropy", logits)
    checked_num_old("unbiased_cross_entropy", num_old, logits.shape[1])
    label = checked_label("unbiased_cross_entropy", label, logits)
    weight = _checked_weight("unbiased_cross_entropy", weight, logits)
    ignored = ignored_id(logits.shape[1])
    old, new = logits.split([num_old, logits.shape[1] - num_old], dim=1)  # (B, K, H, W) and (B, C - K, H, W)
    logits = torch.cat([torch.logsumexp(old, dim=1, keepdim=True), new], dim=1)  # (B, 1 + C - K, H, W)
    # Background and old classes share channel 0 now, and new classes move down by K - 1. The clamp keeps negative
    # labels negative: on CUDA nothing else checks them, and the kernel aborts on a negative label.
    merged = torch.where(label < num_old, label.clamp(max=0), label - (num_old - 1))
    label = merged.masked_fill(label == ignored, ignored)  # the shift above has moved it, too
    if weight is not None:
        weight = torch.cat([weight[:1], weight[num_old:]])
    per_pixel = _cross_entropy(logits, label, weight, ignored)
    pixel_weight = _pixel_weight(label, weight, ignored)
    return reduce(per_pixel, label, over, reduction=reduction, weight=pixel_weight, ignored=ignored)


def binary_cross_entropy(
    logits: Tensor,
    label: Tensor,
    *,
    weight: Tensor | None = None,
    pos_weight: float = 1.0,
    first: int = 0,
    unlabelled: Literal["left out", "negative"] = "left out",
    over: Over = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """Binary cross-entropy of one sigmoid per class against the one-hot label, summed over classes.

    Per pixel: sum_c w_c softplus(x_c) - w_y x_y over the classes c >= first, with w = 1 unless given. With
    `pos_weight` v the labelled class costs v softplus(-x_y) in place of softplus(-x_y).

    Args:
        logits: (B, C, H, W), unnormalised; half precision is computed in float32.
        label: (B, H, W) integers in [0, C), or 255 = ignored. A class below `first` is
            no class here: all targets are 0.
        weight: (C,) factor of each class's sigmoid; it does not enter the denominator.
        pos_weight: factor of the loss of the labelled class, against the imbalance of classes.
        first: first class that is learnt; the sum has the C - first classes from there on.
        unlabelled: loss of an ignored pixel: 0 ("left out"), or that of a pixel of no class ("negative"), as in DKD's
            and STAR's code.
        over: "all" divides by all pixels, ignored ones included; "valid" by the non-ignored ones.
        reduction: "mean", "sum" (no division), or "none" for (B, H, W).

    Returns:
        Scalar: mean over pixels of the sum over classes. 0 (the authors: nan) with over="valid" and no valid pixel.

    Raises:
        ValueError: wrong shapes or types, a label out of range (values are checked on the CPU only), or `first`
            outside 0..C.

    Source: the classification term of LwF-MC (Rebuffi et al., CVPR 2017) as in MiB's code; with `first`, `pos_weight`
    and `unlabelled` that of DKD (Baek et al., NeurIPS 2022).

    >>> round(binary_cross_entropy(torch.zeros(1, 3, 1, 1), torch.ones(1, 1, 1).long()).item(), 4)
    2.0794
    """
    logits = checked_logits("binary_cross_entropy", logits)
    label = checked_label("binary_cross_entropy", label, logits)
    weight = _checked_weight("binary_cross_entropy", weight, logits)
    if not 0 <= first <= logits.shape[1]:
        raise ValueError(
            f"binary_cross_entropy: first must be in 0..{logits.shape[1]} for {logits.shape[1]} classes, got {first}"
        )
    ignored = ignored_id(logits.shape[1])
    valid = label != ignored
    # Against a one-hot target every sigmoid costs softplus(x), and the labelled one gets its logit back.
    softplus = F.softplus(logits[:, first:], threshold=LINEAR_FROM)
    scaled = logits if weight is None else logits * weight.view(1, -1, 1, 1)
    summed = (
        softplus.sum(dim=1) if weight is None else (softplus * weight[first:].view(1, -1, 1, 1)).sum(dim=1)
    )
    positive = _picked(scaled, label)
    if first or unlabelled == "negative":
        positive = positive * ((label >= first) & valid)
    per_pixel = summed - positive  # (B, H, W)
    if pos_weight != 1:
        # softplus(-x) = softplus(x) - x is in the sum already, once.
        again = F.softplus(-_picked(logits, label), threshold=LINEAR_FROM) * ((label >= first) & valid)
        if weight is not None:
            again = again * weight[label.masked_fill(~valid, 0)]
        per_pixel = per_pixel + (pos_weight - 1) * again
    if unlabelled == "left out":
        per_pixel = per_pixel * valid
    return reduce(per_pixel, label, over, reduction=reduction, ignored=ignored)


def binary_negatives(
    logits: Tensor, *, first: int = 0, last: int | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Binary cross-entropy of some channels against 0 at every pixel, summed over them.

    Args:
        logits: (B, C, H, W), unnormalised; half precision is computed in float32.
        first: first channel.
        last: one past the last channel; None = C.
        reduction: "mean" over all pixels, "sum", or "none" for (B, H, W).

    Returns:
        Scalar >= 0: mean over pixels of sum_c softplus(x_c).

    Raises:
        ValueError: wrong shapes or types, or no channel in the range.

    Source: the loss of DKD's auxiliary classifier (Baek et al., NeurIPS 2022).

    >>> round(binary_negatives(torch.zeros(1, 3, 1, 1), last=1).item(), 4)
    0.6931
    """
    logits = checked_logits("binary_negatives", logits)
    last = logits.shape[1] if last is None else last
    if not 0 <= first < last <= logits.shape[1]:
        raise ValueError(
            f"binary_negatives: no channel in {first}..{last - 1} of {logits.shape[1]}; first and last must enclose one"
        )
    return reduce(_softplus_sum(logits[:, first:last]), None, reduction=reduction)


def icarl(
    logits: Tensor,
    label: Tensor,
    teacher_logits: Tensor,
    *,
    background_from_label: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """Binary cross-entropy with the teacher's sigmoids as targets of the old classes, labels for the new ones.

    Args:
        logits: student, (B, C, H, W), unnormalised.
        label: (B, H, W) in [0, C) or 255 = ignored. Ignored pixels are **not** left out: their targets for the new
            classes are 0, as in the authors' code.
        teacher_logits: (B, K, H, W) with K < C; no gradient flows into it.
        background_from_label: target of channel 0 is "the label is 0" instead of the teacher's sigmoid.
        reduction: "mean" over all pixels, "sum", or "none" for (B, H, W).

    Returns:
        Scalar >= 0: mean over all pixels of the sum over classes.

    Raises:
        ValueError: wrong shapes or types, a label out of range, or no new class.

    Source: Rebuffi et al., CVPR 2017 (eq. of algorithm 3), per pixel, as in MiB's code ("disjoint" form, option
    `icarl_bkg`).

    >>> zeros = torch.zeros(1, 3, 1, 1)
    >>> round(icarl(zeros, torch.full((1, 1, 1), 2), zeros[:, :2]).item(), 4)
    2.0794
    """
    logits = checked_logits("icarl", logits)
    label = checked_label("icarl", label, logits)
    teacher_logits = checked_teacher("icarl", teacher_logits, logits)
    num_old = teacher_logits.shape[1]
    checked_num_old("icarl", num_old, logits.shape[1])
    first = 1 if background_from_label else 0
    by_label = (label >= num_old) & (label != ignored_id(logits.shape[1]))
    if background_from_label:
        by_label = by_label | (label == 0)
    target = teacher_logits[:, first:].sigmoid().to(logits.dtype)
    old = (target * logits[:, first:num_old]).sum(dim=1)  # (B, H, W)
    # Binary cross-entropy with target q is softplus(x) - q x. The targets of old channels are the teacher's sigmoids;
    # those of the other channels come from the label. `by_label` is false on ignored pixels, so all of these are 0.
    per_pixel = _softplus_sum(logits) - old - _picked(logits, label) * by_label
    return reduce(per_pixel, None, reduction=reduction)


def icarl_distillation(
    logits: Tensor, teacher_logits: Tensor, *, first: int = 0, reduction: Reduction = "mean"
) -> Tensor:
    """Distil the old classes' sigmoids: binary cross-entropy against the teacher's, summed over old classes.

    The second term of LwF-MC's combined form: K times the mean over (B, K, H, W), that is the mean over pixels of
    the sum over the K old classes. Its weight (10) is the method's.

    Args:
        logits: student, (B, C, H, W), unnormalised; old classes come first.
        teacher_logits: (B, K, H, W) with K <= C; no gradient flows into it.
        first: first class that is distilled, as 1 where channel 0 is no output of the network.
        reduction: "mean" over all pixels (ignored ones included), "sum", or "none" for (B, H, W).

    Returns:
        Scalar >= 0.

    Raises:
        ValueError: shapes that do not fit, or `first` outside 0..K.

    Source: LwF-MC (Rebuffi et al., CVPR 2017) as in MiB's code; DKD's code has the same with a weight of 5.

    >>> round(icarl_distillation(torch.zeros(1, 3, 1, 1), torch.zeros(1, 2, 1, 1)).item(), 4)
    1.3863
    """
    logits = checked_logits("icarl_distillation", logits)
    teacher_logits = checked_teacher("icarl_distillation", teacher_logits, logits)
    if not 0 <= first <= teacher_logits.shape[1]:
        raise ValueError(
            f"icarl_distillation: first must be in 0..{teacher_logits.shape[1]} for {teacher_logits.shape[1]} old "
            f"classes, got {first}"
        )
    old, teacher_logits = logits[:, first : teacher_logits.shape[1]], teacher_logits[:, first:]
    per_pixel = _softplus_sum(old) - (teacher_logits.sigmoid().to(old.dtype) * old).sum(dim=1)
    return reduce(per_pixel, None, reduction=reduction)


def focal(
    logits: Tensor,
    label: Tensor,
    *,
    alpha: float = 1.0,
    gamma: float = 2.0,
    over: Over = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """Focal loss: alpha * (1 - p_y)^gamma * cross-entropy, with a softmax over all classes.

    Args:
        logits: (B, C, H, W), unnormalised.
        label: (B, H, W) in [0, C) or 255 = ignored: such a pixel has loss 0.
        alpha: constant factor.
        gamma: exponent, 0 (plain cross-entropy) or >= 1: below 1 the gradient is infinite at p_y = 1.
        over: as in `cross_entropy`.
        reduction: as in `cross_entropy`.

    Returns:
        Scalar >= 0.

    Raises:
        ValueError: as `cross_entropy`, or a gamma in (0, 1) or below 0.

    Source: Lin et al., ICCV 2017, eq. 5; reduction as in MiB's code (which never uses it).

    >>> round(focal(torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1).long()).item(), 4)
    0.1733
    """
    if gamma != 0 and not gamma >= 1:
        raise ValueError(f"focal: gamma must be 0 or at least 1, got {gamma}")
    logits = checked_logits("focal", logits)
    label = checked_label("focal", label, logits)
    ignored = ignored_id(logits.shape[1])
    entropy = _cross_entropy(logits, label, None, ignored)
    # 1 - p_y = 1 - exp(-entropy); expm1 keeps its digits where p_y is near 1.
    per_pixel = alpha * (-torch.expm1(-entropy)) ** gamma * entropy
    return reduce(per_pixel, label, over, reduction=reduction, ignored=ignored)


def _cross_entropy(logits: Tensor, label: Tensor, weight: Tensor | None, ignored: int) -> Tensor:
    return F.cross_entropy(logits, label, weight=weight, ignore_index=ignored, reduction="none")


def _softplus_sum(logits: Tensor) -> Tensor:
    return F.softplus(logits, threshold=LINEAR_FROM).sum(dim=1)


def _picked(logits: Tensor, label: Tensor) -> Tensor:
    """The logit of the labelled class; channel 0 where ignored."""
    index = label.masked_fill(label == ignored_id(logits.shape[1]), 0)
    return logits.gather(1, index.unsqueeze(1)).squeeze(1)


def _checked_weight(loss: str, weight: Tensor | None, logits: Tensor) -> Tensor | None:
    if weight is None:
        return None
    if tuple(weight.shape) != (logits.shape[1],):
        raise ValueError(f"{loss}: expected {logits.shape[1]} class weights, got shape {tuple(weight.shape)}")
    return weight.to(device=logits.device, dtype=logits.dtype)


def _pixel_weight(label: Tensor, weight: Tensor | None, ignored: int) -> Tensor | None:
    """The weight of each pixel's class, 0 where ignored."""
    if weight is None:
        return None
    left_out = label == ignored
    return weight[label.masked_fill(left_out, 0)].masked_fill(left_out, 0)
