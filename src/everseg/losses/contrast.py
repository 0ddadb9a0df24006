"""Contrast between the pixels of a batch, weighed by the teacher's certainty that two of them show one class.

Source: Yang et al. (UCD), "Uncertainty-aware Contrastive Distillation for Incremental Semantic Segmentation", TPAMI
2022, and its code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from everseg.labels import IGNORED
from everseg.losses.pixelwise import full_precision

_BLOCK, _LARGE_BLOCK = 2**22, 2**25
"""Pairs of pixels that are held at a time on the CPU, and on other devices, where there should be few blocks."""
_AUTHORS_LARGEST = 20
"""The largest class of Pascal VOC: the authors' code takes a larger label for background, on every data set."""


def contrast_labels(
    label: Tensor, size: tuple[int, int] | torch.Size, *, interpolated: bool = False
) -> Tensor:
    """Bring a label to the size of a feature map.

    Args:
        label: (B, H, W) integers, 255 = ignored.
        size: (h, w).
        interpolated: the authors' code, which resizes the ids bilinearly and cuts the decimals off, so that a border
            between two classes shows ids of others; what is then above 20, 255 too, becomes 0.

    Returns:
        (B, h, w) int64; without `interpolated` the label under each cell's centre.
    """
    if not interpolated:
        rows, columns = (
            (2 * torch.arange(small, device=label.device) + 1) * large // (2 * small)
            for small, large in zip(size, label.shape[-2:], strict=True)
        )
        return label[:, rows[:, None], columns].long()
    resized = F.interpolate(label[:, None].double(), tuple(size), mode="bilinear", align_corners=False)
    found = resized[:, 0].long()
    return found.masked_fill((found < 0) | (found > _AUTHORS_LARGEST), 0)


def contrast(
    features: Tensor,
    teacher_features: Tensor,
    label: Tensor,
    teacher_logits: Tensor,
    *,
    first_new: int | None,
    temperature: float = 0.07,
    certainty: bool = True,
    shifted: bool = False,
    block: int | None = None,
    ignored: int = IGNORED,
) -> Tensor:
    """Pull the features of pixels of one class together and push those of other classes away.

    All features are normalised. Background pixels (label 0) get the teacher's likeliest class, y. Anchors are the
    student's pixels with y > 0. Each is compared with the contrast set: the student's own such pixels, and the
    teacher's features of those whose class comes from the teacher; no gradient flows into the set. With
    s = product / temperature, P the set's pixels of the anchor's class without the anchor itself, N those of others,

        loss = mean over anchors of  -1/|P| sum_{p in P} J_p (s_p - log(exp(s_p) + sum_{n in N} exp(s_n)))

    J_p is the probability, by the teacher's softmax, that both pixels show the same old class, and 1 between pixels of
    new classes.

    Args:
        features: student, (B, D, h, w).
        teacher_features: the same shape; no gradient flows into it.
        label: (B, h, w) from `contrast_labels`; ignored pixels (255) are neither anchors nor compared.
        teacher_logits: (B, K, h, w).
        first_new: smallest id of a new class; None takes the smallest label above 0 in the batch, as the authors' code
            does (which fails where there is none: here no pair is of new classes then).
        temperature: divisor of the products.
        certainty: whether J weighs the pairs; False = 1.
        shifted: the authors' code, which lowers s_p by the largest s of the anchor, 1/temperature, and s_n not.
        block: anchors that are compared at a time; None chooses. It changes memory and the last digits only.
        ignored: label of ignored pixels, `everseg.labels.ignored_id(C)`.

    Returns:
        Scalar >= 0, the mean over the anchors that have a positive; 0 where there is none.

    Raises:
        ValueError: sizes that do not fit, or a temperature that is not positive.
    """
    _check(features, teacher_features, label, teacher_logits, temperature)
    student = normalised_pixels(features)  # (M, D), M = B * h * w
    ids = mixed_labels(label, teacher_logits).flatten()
    teacher = normalised_pixels(teacher_features.detach().to(student))
    belief = _pixels(full_precision(teacher_logits).detach().to(student)).softmax(dim=1)  # (M, K)
    anchor = (ids > 0) & (ids != ignored)
    taught = anchor & (label.flatten() == 0)
    others = _Set(
        torch.cat([student.detach(), teacher]),
        torch.cat([torch.where(anchor, ids, -1), torch.where(taught, ids, -1)]),
        torch.cat([belief, belief]) if certainty else None,
        label.masked_fill(label == 0, ignored).amin() if first_new is None else first_new,
    )
    rows = block or max(1, (_BLOCK if ids.device.type == "cpu" else _LARGE_BLOCK) // len(others.ids))
    # Blocks are recomputed in backward, so that only one of them is held; a single one is simply kept.
    compare = others.compare if rows >= len(student) else _recomputed(others.compare)
    values, counts = [], []
    for start in range(0, len(student), rows):
        here = slice(start, start + rows)
        place = torch.arange(len(student), device=ids.device)[here]
        asked = torch.where(anchor, ids, -2)[here]
        value, count = compare(student[here], asked, belief[here], place, temperature, shifted)
        values.append(value)
        counts.append(count)
    return torch.stack(values).sum() / torch.stack(counts).sum().clamp(min=1)


def normalised_pixels(features: Tensor) -> Tensor:
    """Features (B, D, h, w) as one row per pixel, (B * h * w, D), of norm 1; rows of zeros stay."""
    return F.normalize(_pixels(full_precision(features)), dim=1)


def mixed_labels(label: Tensor, teacher_logits: Tensor) -> Tensor:
    """The label, and the teacher's likeliest class where it is background: (B, h, w) int64."""
    return torch.where(label == 0, teacher_logits.argmax(dim=1), label.long())


def same_class(
    belief: Tensor, others: Tensor, ids: Tensor, other_ids: Tensor, first_new: int | Tensor
) -> Tensor:
    """Probability that two pixels show one class: products of the teacher's softmax, and 1 between new classes.

    Args:
        belief: (A, K) the teacher's probabilities at one side, `others` (S, K) at the other.
        others: see `belief`.
        ids: (A,) classes at one side, `other_ids` (S,) at the other.
        other_ids: see `ids`.
        first_new: smallest id of a new class.

    Returns:
        (A, S) in 0..1.
    """
    both_new = (ids >= first_new)[:, None] & (other_ids >= first_new)
    return (belief @ others.t()).masked_fill(both_new, 1)


class _Set:
    """What anchors are compared with: features (S, D), classes (S,) with -1 = none, the teacher's beliefs (S, K)."""

    def __init__(self, features: Tensor, ids: Tensor, belief: Tensor | None, first_new: int | Tensor) -> None:
        self.features, self.ids, self.belief, self.first_new = features, ids, belief, first_new

    def compare(
        self, anchors: Tensor, ids: Tensor, belief: Tensor, place: Tensor, temperature: float, shifted: bool
    ) -> tuple[Tensor, Tensor]:
        """Sum of the losses of some anchors, and how many of them have a positive.

        Args:
            anchors: (A, D).
            ids: (A,) classes, -2 = no anchor.
            belief: (A, K).
            place: (A,) where the anchor itself stands in the set.
        """
        products = anchors @ self.features.t() / temperature  # (A, S)
        same = ids[:, None] == self.ids
        itself = torch.arange(len(self.ids), device=place.device) == place[:, None]
        positive = same & ~itself
        negative = ~same & (self.ids >= 0)
        # Finite, so that an anchor without negatives has no infinity in its gradient.
        pushed = products.masked_fill(~negative, -1e30).logsumexp(dim=1, keepdim=True)
        pulled = products - 1 / temperature if shifted else products
        terms = torch.logaddexp(pulled, pushed) - pulled  # (A, S), -log of the positive's share
        if self.belief is not None:
            terms = terms * same_class(belief, self.belief, ids, self.ids, self.first_new)
        number = positive.sum(dim=1)
        losses = torch.where(positive, terms, 0).sum(dim=1) / number.clamp(min=1)
        return losses.sum(), (number > 0).sum()


def _recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, computed a second time in backward instead of keeping what it made."""
    # Nothing is drawn at random, and saving the generator's state would wait for the device.
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


def _pixels(maps: Tensor) -> Tensor:
    """(B, D, h, w) as (B * h * w, D), in the order image, row, column."""
    return maps.movedim(1, 3).flatten(0, 2)


def _check(
    features: Tensor, teacher_features: Tensor, label: Tensor, teacher_logits: Tensor, temperature: float
) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"contrast: temperature must be positive and finite, got {temperature}")
    size = (features.shape[0], *features.shape[2:])
    found = label.shape, (teacher_logits.shape[0], *teacher_logits.shape[2:])
    if features.dim() != 4 or features.shape != teacher_features.shape or any(one != size for one in found):
        raise ValueError(
            "contrast: expected features and teacher_features (B, D, h, w), a label (B, h, w) and teacher_logits "
            f"(B, K, h, w), got {tuple(features.shape)}, {tuple(teacher_features.shape)}, {tuple(label.shape)} and "
            f"{tuple(teacher_logits.shape)}"
        )
