"""What MBS compares: labels without doubted background, outputs, patch features, class features and class tokens.

Source: Park et al. (MBS), "Mitigating Background Shift in Class-Incremental Semantic Segmentation", ECCV 2024, and the
behaviour of its code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from everseg.labels import ignored_id
from everseg.losses.pixelwise import (
    Over,
    Reduction,
    checked_label,
    checked_logits,
    checked_teacher,
    full_precision,
    reduce,
)
from everseg.losses.pseudo import checked_pair, over_bands


@torch.no_grad()
def without_doubted(
    teacher_logits: Tensor, label: Tensor, *, num_classes: int, band: int | None = None
) -> Tensor:
    """Ignore background that the teacher rather takes for one of its other classes.

    A background pixel (label 0) is ignored where the teacher's softmax has less probability on the background than on
    all its other classes together. So a pixel may be ignored though its likeliest class is the background.

    Args:
        teacher_logits: (B, K, h, w), any resolution and floating type; channel 0 is the background.
        label: (B, H, W) integers: train ids, 255 = ignored.
        num_classes: C >= K, the classes known now.
        band: rows per band; None chooses. It changes memory and time only.

    Returns:
        (B, H, W) int64.

    Raises:
        ValueError: shapes that do not fit.

    >>> logits = torch.tensor([[[[1.0, 1.0, 1.0]], [[0.9, 0.0, 2.0]], [[0.9, 0.0, 0.0]]]])
    >>> without_doubted(logits, torch.tensor([[[0, 0, 3]]]), num_classes=4).tolist()
    [[[255, 0, 3]]]
    """
    teacher_logits = checked_pair("without_doubted", teacher_logits, label, num_classes)
    result, ignored = label.long().clone(), ignored_id(num_classes)

    def work(number: int, here: slice, logits: Tensor) -> None:
        probability = torch.softmax(logits, dim=0)
        doubted = probability[0] < probability[1:].sum(dim=0)
        out = result[number, here]
        out.masked_fill_((out == 0) & doubted, ignored)

    over_bands(teacher_logits, label.shape[1:], work, band=band)
    return result


def moved_distillation(
    logits: Tensor,
    label: Tensor,
    teacher_logits: Tensor,
    *,
    over: Over = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """Distil the teacher's softmax, its background moved to the new class where one is labelled.

    Per pixel -(1/C) sum_c q_c log p_c with p the softmax of all C classes and q that of the teacher's K, 0 for new
    classes. Where the label is a new class c, q_c takes q_0, and q_0 becomes 0.

    Args:
        logits: student, (B, C, H, W), unnormalised; old classes come first, channel 0 is the background.
        label: (B, H, W) in [0, C) or 255 = ignored. Ignored pixels count as those without a new class.
        teacher_logits: (B, K, H, W) with K <= C; no gradient flows into it.
        over: "all" divides by all B*H*W pixels, "valid" by those that are not ignored (their loss still counts).
        reduction: "mean", "sum", or "none" for (B, H, W).

    Returns:
        Scalar >= 0, mean over pixels and over all C classes.

    Raises:
        ValueError: shapes that do not fit, or a label out of range.

    >>> logits, teacher = torch.zeros(1, 3, 1, 1), torch.zeros(1, 2, 1, 1)
    >>> round(moved_distillation(logits, torch.full((1, 1, 1), 2), teacher).item(), 4)
    0.3662
    """
    logits = checked_logits("moved_distillation", logits)
    label = checked_label("moved_distillation", label, logits)
    teacher_logits = checked_teacher("moved_distillation", teacher_logits, logits)
    num_classes, num_old = logits.shape[1], teacher_logits.shape[1]
    target = torch.softmax(teacher_logits, dim=1).to(logits)
    log_p = torch.log_softmax(logits, dim=1)
    labelled = (label >= num_old) & (label != ignored_id(num_classes))
    # Where a new class is labelled, the background's share is multiplied with that class instead.
    place = label.masked_fill(~labelled, 0)
    moved = target[:, 0] * log_p.gather(1, place[:, None])[:, 0]
    kept = (target[:, 1:] * log_p[:, 1:num_old]).sum(dim=1)
    return reduce(
        -(moved + kept) / num_classes, label, over, reduction=reduction, ignored=ignored_id(num_classes)
    )


def old_share(teacher_logits: Tensor, label: Tensor, *, num_classes: int) -> Tensor:
    """How much of each cell's features is to be kept: AFD's weight.

    Args:
        teacher_logits: (B, K, h, w) small, at the cells' own resolution.
        label: (B, h, w) of the cells, completed by the teacher; 255 = ignored.
        num_classes: C > K, the classes known now.

    Returns:
        (B, h, w): 1 at old classes, the teacher's background probability at background, 0 at new classes and where
        ignored.

    Raises:
        ValueError: shapes that do not fit.
    """
    teacher_logits = checked_pair("old_share", teacher_logits, label, num_classes)
    if teacher_logits.shape[2:] != label.shape[1:]:
        raise ValueError(
            f"old_share: expected the labels of {tuple(teacher_logits.shape[2:])} cells, got {tuple(label.shape[1:])}"
        )
    background = torch.softmax(teacher_logits, dim=1)[:, 0]
    old = (label > 0) & (label < teacher_logits.shape[1])
    return torch.where(label == 0, background, old.to(background))


def weighted_feature_distance(features: Tensor, teacher_features: Tensor, weight: Tensor) -> Tensor:
    """Squared difference of features, weighted cell by cell: MBS's adaptive feature distillation.

    sum_i w_i |f_i - g_i|^2 / (D * number of cells with w_i > 0).

    Args:
        features: student, (B, D, h, w); half precision becomes float32.
        teacher_features: the same shape; no gradient flows into it.
        weight: (B, h, w) >= 0.

    Returns:
        Scalar >= 0; 0, with zero gradient, where no cell has a weight (the authors' code gives nan).

    Raises:
        ValueError: shapes that do not fit.

    >>> weighted_feature_distance(torch.ones(1, 2, 1, 2), torch.zeros(1, 2, 1, 2), torch.tensor([[[0.5, 0.0]]])).item()
    0.5
    """
    if features.shape != teacher_features.shape or weight.shape != features[:, 0].shape:
        raise ValueError(
            f"weighted_feature_distance: student features have shape {tuple(features.shape)}, the teacher's "
            f"{tuple(teacher_features.shape)}, the weights {tuple(weight.shape)}"
        )
    features, teacher_features = full_precision(features), full_precision(teacher_features).detach()
    dtype = torch.promote_types(features.dtype, teacher_features.dtype)
    distance = (features.to(dtype) - teacher_features.to(dtype)).square().mean(dim=1)  # (B, h, w)
    return (weight.to(dtype) * distance).sum() / (weight > 0).sum().clamp(min=1)


def token_orthogonality(tokens: Tensor, num_old: int) -> Tensor:
    """Mean |cosine| between each new class's token and every other class's, times the share of new classes.

    No gradient flows into the other class's token, so each new token turns away from the others. Cosines of exactly 0
    do not enter the mean.

    Args:
        tokens: (B, C, D), a token of each class in each image; half precision becomes float32.
        num_old: K, 0 <= K <= C; the tokens from K on are new.

    Returns:
        Scalar in [0, 1]; 0 without new classes, or where every new token is orthogonal to all others.

    Raises:
        ValueError: not three dimensions, or K out of range.

    >>> tokens = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]])
    >>> round(token_orthogonality(tokens, 1).item(), 4)
    0.3
    """
    if tokens.dim() != 3 or not 0 <= num_old <= tokens.shape[1]:
        raise ValueError(
            f"token_orthogonality: expected tokens (B, C, D) and 0 <= num_old <= C, got {tuple(tokens.shape)} and "
            f"{num_old}"
        )
    unit = F.normalize(full_precision(tokens), dim=2)
    number, new = tokens.shape[1], tokens.shape[1] - num_old
    cosine = unit[:, num_old:] @ unit.detach().mT  # (B, N, C)
    # A token compared with itself is no pair.
    own = torch.eye(number, dtype=torch.bool, device=tokens.device)[num_old:]
    size = cosine.masked_fill(own, 0.0).abs()
    return size.sum() / (size > 0).sum().clamp(min=1) * (new / number)
