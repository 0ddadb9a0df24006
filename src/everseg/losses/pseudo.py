"""Pseudo-labels: old classes that the teacher sees where the labels show none, and how far it may be believed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from everseg.labels import ignored_id
from everseg.losses.banded import on_all_threads
from everseg.losses.bilinear import banded_resize
from everseg.losses.pixelwise import Reduction, checked_logits, checked_teacher, reduce

Measure = Literal["entropy", "probability"]
"""What is compared with a threshold: the teacher's entropy (accepted below it), or its largest probability (accepted
unless below it)."""
EntropyNorm = Literal["code", "paper"]
"""Scale of the entropy: see `uncertainty`."""
Activation = Literal["sigmoid", "softmax", "none"]
"""What makes the teacher's outputs scores: see `completed_labels`."""
_EPSILON = 1e-8
"""Added by PLOP's code inside its logarithms."""
_BAND_BYTES, _LARGE_BAND_BYTES = 2**20, 2**26
"""Size of a band of teacher logits on the CPU (stays in a core's cache) and elsewhere (few bands), as in `banded`."""


class PseudoLabels(NamedTuple):
    """Result of `pseudo_labels` for B images of H x W pixels; everything lies on the teacher logits' device.

    An old pixel has a label below K, the number of the teacher's classes; an ignored one is not old. Accepted is one
    whose class the teacher is certain enough of.
    """

    label: Tensor
    """(B, H, W) int64: train ids, 255 = ignored. Old pixels have the teacher's class or are ignored (with
    `keep_rejected`: or keep their label); all others are as they were given."""
    kept: Tensor
    """(B, H, W) bool: old pixels that have the teacher's class in `label`: the accepted ones, with `agreeing` without
    those that contradict their label."""
    old: Tensor
    """(B,) int64: number of old pixels of each image."""
    accepted: Tensor
    """(B,) int64: how many of them were accepted; 0 to `old`."""
    confidence: Tensor | None
    """(B, H, W) floating: the teacher's largest probability, in [0, 1], at old pixels, and 1 elsewhere; None unless
    asked for."""


@torch.no_grad()
def pseudo_labels(
    teacher_logits: Tensor,
    label: Tensor,
    *,
    num_classes: int,
    measure: Measure | None = "entropy",
    thresholds: Tensor | float | None = None,
    norm: EntropyNorm = "code",
    keep_rejected: bool = False,
    agreeing: bool = False,
    confidence: bool = False,
    band: int | None = None,
    align_corners: bool = False,
) -> PseudoLabels:
    """Give old pixels the teacher's class where the teacher is certain enough.

    A pixel is old if its label is below K, the number of the teacher's classes. An ignored pixel is not old. The
    teacher's class may be the background.

    The teacher's logits are resized to the label's size one band of rows at a time, so nothing with K channels of full
    resolution is made. Nothing waits for the device.

    Args:
        teacher_logits: (B, K, h, w), any resolution and floating type.
        label: (B, H, W) integers: train ids, 255 = ignored.
        num_classes: C >= K, the classes known now. It scales the entropy.
        measure: what is compared with the thresholds; None accepts every old pixel.
        thresholds: one number, or one of each class (at least K); the teacher's class says which one counts. With
            entropy nan rejects and inf accepts every pixel of a class.
        norm: scale of the entropy.
        keep_rejected: a rejected old pixel keeps its label instead of being ignored.
        agreeing: ignore an accepted pixel whose class is not its label ("removed errors").
        confidence: return the teacher's largest probability, too.
        band: rows per band; None chooses. It changes memory and time only.
        align_corners: of the bilinear resizing.

    Returns:
        The labels, and how many pixels of each image were old and accepted.

    Raises:
        ValueError: shapes that do not fit, no thresholds, or too few.

    Source: Douillard et al. (PLOP), CVPR 2021, section 3.3, and its code.

    >>> logits, label = torch.tensor([[[[9.0, 0.1]], [[0.0, 0.0]]]]), torch.tensor([[[0, 0]]])
    >>> found = pseudo_labels(logits, label, num_classes=3, measure="probability", thresholds=0.9)
    >>> found.label.tolist(), found.old.tolist(), found.accepted.tolist()
    ([[[0, 255]]], [2], [1])
    """
    teacher_logits = checked_pair("pseudo_labels", teacher_logits, label, num_classes)
    num_old = teacher_logits.shape[1]
    if measure is not None and measure not in get_args(Measure):
        raise ValueError(
            f"pseudo_labels: measure: expected 'entropy', 'probability' or None, got {measure!r}"
        )
    limits = None
    if measure is not None:
        if thresholds is None:
            raise ValueError(f"pseudo_labels: measure '{measure}' needs thresholds")
        limits = torch.as_tensor(thresholds, dtype=teacher_logits.dtype, device=teacher_logits.device)
        limits = limits.expand(num_old) if limits.dim() == 0 else limits
        if limits.dim() != 1 or len(limits) < num_old:
            raise ValueError(
                f"pseudo_labels: expected one threshold for each of the teacher's {num_old} classes, got "
                f"{tuple(limits.shape)}"
            )
    ignored = ignored_id(num_classes)
    result = label.long().clone()
    kept = torch.zeros_like(result, dtype=torch.bool)
    certainty = torch.ones_like(result, dtype=teacher_logits.dtype) if confidence else None

    def work(number: int, here: slice, logits: Tensor) -> None:
        given = label[number, here]
        old = given < num_old
        probabilities = torch.softmax(logits, dim=0)
        largest, best = probabilities.max(dim=0)
        accepted = old
        if limits is not None and measure == "entropy":
            accepted = old & (entropy_of(probabilities, num_classes, norm) < limits[best])
        elif limits is not None:
            accepted = old & ~(largest < limits[best])
        out = result[number, here]
        if not keep_rejected:
            out.masked_fill_(old & ~accepted, ignored)
        out.copy_(torch.where(accepted, best, out))
        if agreeing:
            out.masked_fill_(accepted & (best != given), ignored)
        kept[number, here] = accepted
        if certainty is not None:
            certainty[number, here] = torch.where(old, largest, certainty[number, here])

    over_bands(teacher_logits, label.shape[1:], work, band=band, align_corners=align_corners)
    old_pixels = (label < num_old).sum(dim=(1, 2))
    return PseudoLabels(result, kept, old_pixels, kept.sum(dim=(1, 2)), certainty)


@torch.no_grad()
def completed_labels(
    teacher_logits: Tensor,
    label: Tensor,
    *,
    num_classes: int,
    threshold: float,
    num_open: int = 1,
    activation: Activation = "sigmoid",
    ignore_unsure: bool = False,
    band: int | None = None,
    align_corners: bool = False,
) -> Tensor:
    """Fill open pixels with the class that the teacher sees there, where its score is high enough.

    Open is a pixel whose label is below `num_open`: background, or whatever outputs come before the classes. It gets
    the teacher's best output if that is no open one itself, and keeps its label otherwise. The maximum is over all of
    the teacher's outputs, so an open one that scores highest leaves the pixel as it is. Of equal scores, as saturated
    sigmoids are, the first output counts.

    The teacher's logits are resized to the label's size one band of rows at a time, before the activation. Nothing
    waits for the device.

    Args:
        teacher_logits: (B, K, h, w), any resolution and floating type.
        label: (B, H, W) integers: train ids, 255 = ignored.
        num_classes: C >= K, the outputs known now: says which label is ignored.
        threshold: least score that is accepted (>=).
        num_open: outputs 0..num_open-1 are open; 1 <= num_open.
        activation: "sigmoid" of each output, "softmax" over the outputs, or "none" where the maps are scores already
            (SegACIL resizes its sigmoids).
        ignore_unsure: open pixels where a class scores highest but not high enough are ignored: neither the teacher
            says what they are nor their label, which shows no old class.
        band: rows per band; None chooses. It changes memory and time only.
        align_corners: of the bilinear resizing.

    Returns:
        (B, H, W) int64.

    Raises:
        ValueError: shapes that do not fit, no open output, or an unknown activation.

    Source: Cha et al. (SSUL), NeurIPS 2021, eq. 3 and its code; BARM, SegACIL and MBS use the same rule.

    >>> logits, label = torch.tensor([[[[0.0, 0.0, 0.0]], [[2.0, 0.5, 2.0]]]]), torch.tensor([[[0, 0, 255]]])
    >>> completed_labels(logits, label, num_classes=2, threshold=0.7).tolist()
    [[[1, 0, 255]]]
    """
    teacher_logits = checked_pair("completed_labels", teacher_logits, label, num_classes)
    if activation not in get_args(Activation):
        raise ValueError(
            f"completed_labels: activation: expected 'sigmoid', 'softmax' or 'none', got {activation!r}"
        )
    if num_open < 1:
        raise ValueError(f"completed_labels: expected at least one open output, got {num_open}")
    result = label.long().clone()
    ignored = ignored_id(num_classes)

    def work(number: int, here: slice, logits: Tensor) -> None:
        scores = logits
        if activation == "sigmoid":
            scores = torch.sigmoid(logits)
        elif activation == "softmax":
            scores = torch.softmax(logits, dim=0)
        largest, best = scores.max(dim=0)
        out = result[number, here]
        seen = (out < num_open) & (best >= num_open)
        sure = largest >= threshold
        if ignore_unsure:
            best = best.masked_fill(~sure, ignored)
        out.copy_(torch.where(seen if ignore_unsure else seen & sure, best, out))

    over_bands(teacher_logits, label.shape[1:], work, band=band, align_corners=align_corners)
    return result


def accepted_share(
    old: Tensor,
    accepted: Tensor,
    *,
    minimum: float = 0.0,
    epsilon: float = 1e-6,
    empty: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """PLOP's adaptive factor of each image: accepted / (old + epsilon), and not below a minimum.

    Args:
        old: (B,) old pixels of each image.
        accepted: (B,) how many of them were accepted.
        minimum: smallest factor.
        epsilon: added to the number of old pixels (PLOP's code 1e-6, REMINDER's 0).
        empty: factor of an image without old pixels; None = what the formula gives (0, or nan with epsilon = 0).
        dtype: type of the result.

    Returns:
        (B,) in [minimum, 1].

    Source: Douillard et al. (PLOP), CVPR 2021, eq. 9, and the code.

    >>> accepted_share(torch.tensor([4, 0]), torch.tensor([1, 0]), epsilon=0, empty=1.0).tolist()
    [0.25, 1.0]
    """
    share = (accepted.to(dtype) / (old.to(dtype) + epsilon)).clamp(min=minimum)
    return share if empty is None else share.masked_fill(old == 0, empty)


def uncertainty(logits: Tensor, num_classes: int, norm: EntropyNorm = "code") -> Tensor:
    """Entropy of the teacher's softmax, scaled.

    Args:
        logits: (B, K, H, W), any floating type.
        num_classes: C >= 2, the classes known now; read by "code" only.
        norm: "paper" is H / ln K, in [0, 1]. "code" is what PLOP's code computes: H is a mean over the K classes
            instead of a sum, and it is divided once more, by ln C. So it is K ln C times smaller than the paper's, and
            the thresholds of the published runs belong to it.

    Returns:
        (B, H, W). With one class "paper" gives 0.

    Raises:
        ValueError: an unknown norm, wrong shapes, or C below 2 or K.

    Source: Douillard et al. (PLOP), CVPR 2021, eq. 7 (u) and its code.

    >>> x = torch.zeros(1, 4, 1, 1)
    >>> round(uncertainty(x, 6, "paper").item(), 4), round(uncertainty(x, 6).item(), 4)
    (1.0, 0.1395)
    """
    logits = checked_logits("uncertainty", logits)
    if norm not in get_args(EntropyNorm):
        raise ValueError(f"uncertainty: norm: expected 'code' or 'paper', got {norm!r}")
    checked_classes("uncertainty", num_classes, logits.shape[1])
    return torch.stack([entropy_of(torch.softmax(image, dim=0), num_classes, norm) for image in logits])


def soft_uncertain(
    logits: Tensor, teacher_logits: Tensor, *, authors_sign: bool = True, reduction: Reduction = "mean"
) -> Tensor:
    """What PLOP's option `soft_uncertain` gives rejected pixels: sum_c p_c ln q_c over the teacher's classes.

    Here p = softmax(x_0..x_{K-1}) is the student's and q the teacher's distribution. With the authors' sign,
    minimising it pushes the student away from the teacher; without, it is the cross-entropy of q under p.

    Args:
        logits: student, (B, C, H, W).
        teacher_logits: (B, K, H, W) with K <= C; no gradient flows into it.
        authors_sign: keep the sum as it is; False multiplies by -1.
        reduction: "mean", "sum" or "none" for (B, H, W).

    Raises:
        ValueError: shapes that do not fit.

    >>> round(soft_uncertain(torch.zeros(1, 3, 1, 1), torch.zeros(1, 2, 1, 1)).item(), 4)
    -0.6931
    """
    logits = checked_logits("soft_uncertain", logits)
    teacher_logits = checked_teacher("soft_uncertain", teacher_logits, logits)
    own = torch.softmax(logits[:, : teacher_logits.shape[1]], dim=1)
    per_pixel = (own * torch.log_softmax(teacher_logits, dim=1)).sum(dim=1)
    return reduce(per_pixel if authors_sign else -per_pixel, None, reduction=reduction)


def over_bands(
    logits: Tensor,
    size: tuple[int, ...],
    work: Callable[[int, slice, Tensor], None],
    *,
    band: int | None = None,
    align_corners: bool = False,
) -> None:
    """Walk over small logits at the label's size, one band of rows at a time, on all threads.

    Args:
        logits: (B, K, h, w) float32 or float64; no gradient is kept.
        size: (H, W).
        work: gets the image's number, the band's rows and the band (K, r, W). Several threads may call it at once, each
            with another band, so it must write to these rows only, or under a lock.
        band: rows per band; None chooses.
        align_corners: of the bilinear resizing.
    """
    if band is not None and band < 1:
        raise ValueError(f"band must be at least 1 row, got {band}")
    height, width = size
    wanted = _BAND_BYTES if logits.device.type == "cpu" else _LARGE_BAND_BYTES
    rows = band or max(1, wanted // (logits.shape[1] * width * logits.element_size()))
    resize = banded_resize(tuple(logits.shape[2:]), tuple(size), align_corners, logits.dtype, logits.device)
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        for number, image in enumerate(logits):
            tall = resize.rows(image)  # (K, H, w)
            # One iterator for all threads: `next` of it is atomic, so each band is taken exactly once.
            todo = iter(range(0, height, rows))

            def some(number: int = number, tall: Tensor = tall, todo: Iterator[int] = todo) -> None:
                for start in todo:
                    here = slice(start, min(start + rows, height))
                    part = tall[:, here]
                    if not resize.keeps_columns:
                        wide = part.new_empty(len(part), part.shape[1] * width)
                        resize.columns(part, wide)
                        part = wide.view(len(part), -1, width)
                    work(number, here, part)

            on_all_threads(some, logits.device)


def checked_pair(name: str, teacher_logits: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """The logits in full precision, after they were compared with the label and the number of classes."""
    teacher_logits = checked_logits(name, teacher_logits).detach()
    if label.dim() != 3 or len(label) != len(teacher_logits) or label.is_floating_point():
        raise ValueError(
            f"{name}: expected an integer label (B, H, W) for teacher logits of shape "
            f"{tuple(teacher_logits.shape)}, got {label.dtype} of shape {tuple(label.shape)}"
        )
    checked_classes(name, num_classes, teacher_logits.shape[1])
    return teacher_logits


def checked_classes(name: str, num_classes: int, num_old: int) -> None:
    """Check the number of classes known now: the entropy is divided by its logarithm."""
    if num_classes < max(2, num_old):
        raise ValueError(
            f"{name}: num_classes must be at least 2 and the teacher's {num_old}, got {num_classes}"
        )


def entropy_of(probabilities: Tensor, num_classes: int, norm: EntropyNorm) -> Tensor:
    """`uncertainty` of one image or band, from probabilities (K, ...)."""
    num_old = len(probabilities)
    if norm == "paper":
        return torch.special.entr(probabilities).sum(dim=0) / (math.log(num_old) or 1.0)
    entropy = -(probabilities * torch.log(probabilities + _EPSILON)).sum(dim=0) / num_old
    return entropy / (math.log(num_old + _EPSILON) * math.log(num_classes))
