"""Distillation of the teacher's softmax: over the old classes, MiB's unbiased form, MDIL's divergence."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from everseg.losses.pixelwise import (
    Over,
    Reduction,
    checked_alpha,
    checked_logits,
    checked_num_old,
    checked_teacher,
    reduce,
)


def distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    num_old: int | None = None,
    alpha: float = 1.0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    over: Over = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """Distil the old classes, the student's softmax taken over the old channels only.

    Per pixel -(1/K) sum_c q_c log p_c with q = softmax(alpha * t) and p = softmax(x_0..x_{K-1}). Its minimum over
    the student is the teacher's entropy / K (reached where p = q), not 0.

    Args:
        logits: student, (B, C, H, W), unnormalised; old classes come first.
        teacher_logits: (B, K, H, W) with K <= C; no gradient flows into it.
        num_old: K. Where it is given, it is only checked against the teacher.
        alpha: factor on the teacher's logits; above 1 it hardens the targets.
        weight: (K,) factor of each old class's summand; None = 1.
        mask: (B, H, W) bool or float factor of each pixel; None = 1. Without it ignored pixels count too.
        over: "all" divides by all B*H*W pixels, whatever the mask (the authors' code); "valid" by the mask's sum.
        reduction: "mean", "sum" (no division), or "none" for (B, H, W).

    Returns:
        Scalar >= 0, mean over pixels and over the K classes. 0 with over="valid" and an empty mask.

    Raises:
        ValueError: shapes that do not fit, K not num_old, or alpha <= 0.

    Source: Li and Hoiem (LwF), ECCV 2016, per pixel, normalised by K as in MiB's code, so that published weights
    apply.

    >>> logits = torch.zeros(1, 3, 1, 1)
    >>> round(distillation(logits, logits[:, :2]).item(), 4)
    0.3466
    """
    checked_alpha("distillation", alpha)
    logits = checked_logits("distillation", logits)
    teacher_logits = checked_teacher("distillation", teacher_logits, logits, num_old)
    old = logits[
        :, : teacher_logits.shape[1]
    ]  # (B, K, H, W): the new logits do not enter the student's softmax
    return _reduced(
        "distillation", _soft_cross_entropy(old, teacher_logits, alpha, weight), mask, over, reduction
    )


def unbiased_distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    num_old: int | None = None,
    alpha: float = 1.0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    over: Over = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """Distil old classes while the old background covers today's background and every new class.

    Per pixel -(1/K) sum_c q_c log p_c with q = softmax(alpha * t), log p_c = x_c - logsumexp(x) for an old class c
    and log p_0 = logsumexp(x_0, x_K..x_{C-1}) - logsumexp(x). Computed as `distillation` of the K logits
    [logsumexp(background, new), x_1..x_{K-1}], which is the same number.

    Args:
        logits: student, (B, C, H, W), unnormalised; channel 0 is the background, old classes come first.
        teacher_logits: (B, K, H, W) with K < C; no gradient flows into it.
        num_old: K. Where it is given, it is only checked against the teacher.
        alpha: factor on the teacher's logits; above 1 it hardens the targets.
        weight: (K,) factor of each old class's summand; None = 1.
        mask: as in `distillation`.
        over: as in `distillation`.
        reduction: as in `distillation`.

    Returns:
        Scalar >= 0, mean over pixels and over the K teacher classes; ignored pixels are included.

    Raises:
        ValueError: K >= C (the authors' code fails there with a shape error), shapes that do not fit, alpha <= 0.

    Source: Cermelli et al., CVPR 2020, eq. 8-9. Same normalisation as the authors' code (divides by K), so the
    published weights apply.

    >>> teacher = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)
    >>> moved = torch.tensor([-1e9, 0.0, 2.0]).view(1, 3, 1, 1)  # background mass moved to the new class
    >>> round(unbiased_distillation(moved, teacher).item(), 4)
    0.1827
    """
    checked_alpha("unbiased_distillation", alpha)
    logits = checked_logits("unbiased_distillation", logits)
    teacher_logits = checked_teacher("unbiased_distillation", teacher_logits, logits, num_old)
    num_old = teacher_logits.shape[1]
    checked_num_old("unbiased_distillation", num_old, logits.shape[1])
    background, old, new = logits.split([1, num_old - 1, logits.shape[1] - num_old], dim=1)
    # What the teacher called background is background or a new class today. Their probabilities add up, so their
    # logits join by log-sum-exp.
    background = torch.logaddexp(background, torch.logsumexp(new, dim=1, keepdim=True))  # (B, 1, H, W)
    old = torch.cat([background, old], dim=1)  # (B, K, H, W), in the teacher's order
    per_pixel = _soft_cross_entropy(old, teacher_logits, alpha, weight)
    return _reduced("unbiased_distillation", per_pixel, mask, over, reduction)


def kl_divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    form: Literal["log", "probabilities"] = "log",
    mask: Tensor | None = None,
    over: Over = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """Divergence of the student's softmax from the teacher's, over the same classes.

    With q = softmax(t) and p = softmax(x), per pixel (1/C) sum_c q_c (ln q_c - ln p_c), which is 0 where p = q and
    nowhere less. A probability of 0 in q adds 0.

    Args:
        logits: student, (B, C, H, W), unnormalised.
        teacher_logits: (B, C, H, W) of the same classes; no gradient flows into it.
        form: "log" is the formula above. "probabilities" is (1/C) sum_c q_c (ln q_c - p_c): the value of torch's
            KLDivLoss when it gets probabilities instead of their logarithms. That is no divergence: it is negative,
            and lowest where p is all on the teacher's likeliest class.
        mask: as in `distillation`.
        over: as in `distillation`.
        reduction: as in `distillation`; times C, "sum" / B is what torch calls "batchmean".

    Returns:
        Scalar, mean over pixels and over the C classes; ignored pixels are included.

    Raises:
        ValueError: shapes that do not fit, another number of classes, or an unknown `form`.

    Source: Garg et al. (MDIL), WACV 2022. The authors' code computes form "probabilities"; the mean over
    B*C*H*W elements is theirs in both, so that the published weight applies.

    >>> logits, teacher = torch.zeros(1, 2, 1, 1), torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)
    >>> round(kl_divergence(logits, teacher).item(), 4), kl_divergence(teacher, teacher).item()
    (0.1639, 0.0)
    """
    if form not in ("log", "probabilities"):
        raise ValueError(f"kl_divergence: form: expected 'log' or 'probabilities', got {form!r}")
    logits = checked_logits("kl_divergence", logits)
    teacher_logits = checked_teacher("kl_divergence", teacher_logits, logits)
    if teacher_logits.shape[1] != logits.shape[1]:
        raise ValueError(
            f"kl_divergence: the teacher has {teacher_logits.shape[1]} classes and the student {logits.shape[1]}; "
            "use distillation or unbiased_distillation for a branch that has grown"
        )
    # From logarithms, so that a target that underflows to 0 adds 0 * finite = 0 and not 0 * inf = nan.
    log_target = torch.log_softmax(teacher_logits, dim=1).to(logits.dtype)  # (B, C, H, W)
    student = (torch.log_softmax if form == "log" else torch.softmax)(logits, dim=1)
    per_pixel = (log_target.exp() * (log_target - student)).mean(dim=1)
    return _reduced("kl_divergence", per_pixel, mask, over, reduction)


def _soft_cross_entropy(
    logits: Tensor, teacher_logits: Tensor, alpha: float, weight: Tensor | None
) -> Tensor:
    """-(1/K) sum_c w_c softmax(alpha t)_c log softmax(x)_c, (B, H, W)."""
    if alpha != 1:
        teacher_logits = alpha * teacher_logits
    target = torch.softmax(teacher_logits, dim=1).to(logits.dtype)
    if weight is not None:
        if weight.shape != logits.shape[1:2]:
            raise ValueError(
                f"expected one weight per old class ({logits.shape[1]},), got {tuple(weight.shape)}"
            )
        target = target * weight.to(logits).view(1, -1, 1, 1)
    return (target * torch.log_softmax(logits, dim=1)).sum(dim=1) / -logits.shape[1]


def _reduced(loss: str, per_pixel: Tensor, mask: Tensor | None, over: Over, reduction: Reduction) -> Tensor:
    if mask is None:
        return reduce(per_pixel, None, over, reduction=reduction)
    if mask.shape != per_pixel.shape:
        raise ValueError(
            f"{loss}: expected a mask of shape {tuple(per_pixel.shape)}, got {tuple(mask.shape)}"
        )
    mask = mask.to(per_pixel.dtype)
    # The mask is multiplied in here and is also the denominator of over="valid": `reduce` expects both.
    return reduce(per_pixel * mask, None, over, reduction=reduction, weight=mask)
