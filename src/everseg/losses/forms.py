"""Pixel-wise losses as sums of few statistics of the logits: what each one is made of.

Given label and teacher, most pixel-wise losses are linear in log-sum-exps over groups of classes, sums of softplus,
single logits, and products of the logits with the teacher's probabilities. A form lists the statistics of a loss with
their coefficients; its value is their sum, and its gradient follows from the same list, with one exponential per logit
for all losses together. The functions of `classification` and `distillation` are the oracle of these forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from everseg.labels import ignored_id
from everseg.losses.classification import (
    binary_cross_entropy,
    binary_negatives,
    cross_entropy,
    icarl,
    icarl_distillation,
    unbiased_cross_entropy,
)
from everseg.losses.distillation import distillation, kl_divergence, unbiased_distillation
from everseg.losses.replayed import replayed_cross_entropy


@dataclass(frozen=True)
class LogSumExp:
    """Log-sum-exp of the logits of some ranges of classes (first, one past the last)."""

    classes: tuple[tuple[int, int], ...]
    alpha: float | None = None
    """If given, times the probability of class 0 in the teacher's softmax(alpha t)."""


@dataclass(frozen=True)
class Softplus:
    """Sum of softplus over the classes first to last - 1."""

    first: int
    last: int


@dataclass(frozen=True)
class Logit:
    """The logit of one class per pixel, index (P,)."""

    index: Tensor


@dataclass(frozen=True)
class Negated:
    """Softplus of minus the logit of one class per pixel, index (P,): what a positive costs."""

    index: Tensor


@dataclass(frozen=True)
class Target:
    """Sum of q_c x_c over the classes first to last - 1, q = softmax(alpha t) or sigmoid(alpha t) of the teacher."""

    first: int
    last: int
    of: Literal["softmax", "sigmoid"] = "softmax"
    alpha: float = 1.0


@dataclass(frozen=True)
class Entropy:
    """Entropy of the teacher's softmax(alpha t)."""

    alpha: float = 1.0


Statistic = LogSumExp | Softplus | Logit | Negated | Target | Entropy


def shift_invariant(statistic: Statistic) -> bool:
    """Whether a loss with this part may be given logits less their maximum."""
    return not (isinstance(statistic, Softplus | Negated) or getattr(statistic, "of", "") == "sigmoid")


Parts = list[tuple[Statistic, Tensor]]
"""Statistics and their coefficients, (P,)."""


@dataclass(frozen=True)
class Pixels:
    """What a form knows of P pixels: their label (P,) int64, the number of classes, and of the teacher's."""

    label: Tensor
    num_classes: int
    num_old: int

    @property
    def valid(self) -> Tensor:
        """Which are not ignored."""
        return self.label != ignored_id(self.num_classes)


def _cross_entropy(at: Pixels, factor: Tensor, *, weight: Tensor | None = None) -> Parts:
    # -log softmax(x)_y = logsumexp(x) - x_y
    index = at.label.masked_fill(~at.valid, 0)  # ignored pixels read class 0, and count 0
    factor = factor * at.valid
    if weight is not None:
        factor = factor * weight[index]
    return [(LogSumExp(((0, at.num_classes),)), factor), (Logit(index), -factor)]


def _unbiased_cross_entropy(
    at: Pixels, factor: Tensor, *, num_old: int, weight: Tensor | None = None
) -> Parts:
    # A new class y: logsumexp(x) - x_y. An old one, labelled background: logsumexp(x) - logsumexp of the old classes.
    is_new = (at.label >= num_old) & at.valid
    index = at.label * is_new
    factor = factor * at.valid
    if weight is not None:
        factor = factor * weight[index]
    new = factor * is_new
    return [
        (LogSumExp(((0, at.num_classes),)), factor),
        (LogSumExp(((0, num_old),)), new - factor),
        (Logit(index), -new),
    ]


def _replayed_cross_entropy(at: Pixels, factor: Tensor, *, num_old: int, void: str = "ignored") -> Parts:
    # An old class y: logsumexp(x) - x_y. The background: logsumexp(x) - logsumexp of background and new classes.
    if void == "ignored":
        factor = factor * at.valid
    is_old = (at.label > 0) & (at.label < num_old)
    old = factor * is_old
    return [
        (LogSumExp(((0, at.num_classes),)), factor),
        (LogSumExp(((0, 1), (num_old, at.num_classes))), old - factor),
        (Logit(at.label * is_old), -old),
    ]


def _distillation(at: Pixels, factor: Tensor, *, num_old: int | None = None, alpha: float = 1.0) -> Parts:
    # -sum_c q_c log softmax(x)_c over the old classes; sum_c q_c = 1 leaves logsumexp - sum_c q_c x_c
    factor = factor / at.num_old
    return [(LogSumExp(((0, at.num_old),)), factor), (Target(0, at.num_old, alpha=alpha), -factor)]


def _unbiased_distillation(
    at: Pixels, factor: Tensor, *, num_old: int | None = None, alpha: float = 1.0
) -> Parts:
    factor = factor / at.num_old
    # The student's counterpart of the teacher's background is background and all new classes together: their
    # log-sum-exp times q_0 takes the place of q_0 x_0.
    hidden = ((0, 1), (at.num_old, at.num_classes))
    return [
        (LogSumExp(((0, at.num_classes),)), factor),
        (LogSumExp(hidden, alpha), -factor),
        (Target(1, at.num_old, alpha=alpha), -factor),
    ]


def _kl_divergence(at: Pixels, factor: Tensor, *, form: str = "log") -> Parts | None:
    if form != "log":
        return None
    factor = factor / at.num_classes
    return [
        (LogSumExp(((0, at.num_classes),)), factor),
        (Target(0, at.num_classes), -factor),
        (Entropy(), -factor),
    ]


def _binary_cross_entropy(
    at: Pixels, factor: Tensor, *, pos_weight: float = 1.0, first: int = 0, unlabelled: str = "left out"
) -> Parts:
    # -log sigmoid(x) = softplus(x) - x, and -log(1 - sigmoid(x)) = softplus(x)
    positive = factor * (at.valid & (at.label >= first))
    index = at.label.masked_fill(~at.valid, 0)
    counted = factor * at.valid if unlabelled == "left out" else factor
    parts: Parts = [(Softplus(first, at.num_classes), counted), (Logit(index), -positive)]
    return parts if pos_weight == 1 else [*parts, (Negated(index), (pos_weight - 1) * positive)]


def _binary_negatives(at: Pixels, factor: Tensor, *, first: int = 0, last: int | None = None) -> Parts:
    return [(Softplus(first, at.num_classes if last is None else last), factor)]


def _icarl(at: Pixels, factor: Tensor, *, background_from_label: bool = False) -> Parts:
    by_label = (at.label >= at.num_old) & at.valid
    if background_from_label:
        by_label = by_label | (at.label == 0)
    return [
        (Softplus(0, at.num_classes), factor),
        (Target(int(background_from_label), at.num_old, "sigmoid"), -factor),
        (Logit(at.label * by_label), -factor * by_label),
    ]


def _icarl_distillation(at: Pixels, factor: Tensor, *, first: int = 0) -> Parts:
    return [(Softplus(first, at.num_old), factor), (Target(first, at.num_old, "sigmoid"), -factor)]


_FORMS: dict[Any, tuple[Callable[..., Parts | None], frozenset[str]]] = {
    cross_entropy: (_cross_entropy, frozenset({"weight"})),
    unbiased_cross_entropy: (_unbiased_cross_entropy, frozenset({"weight", "num_old"})),
    replayed_cross_entropy: (_replayed_cross_entropy, frozenset({"num_old", "void"})),
    distillation: (_distillation, frozenset({"num_old", "alpha"})),
    unbiased_distillation: (_unbiased_distillation, frozenset({"num_old", "alpha"})),
    kl_divergence: (_kl_divergence, frozenset({"form"})),
    binary_cross_entropy: (_binary_cross_entropy, frozenset({"pos_weight", "first", "unlabelled"})),
    binary_negatives: (_binary_negatives, frozenset({"first", "last"})),
    icarl: (_icarl, frozenset({"background_from_label"})),
    icarl_distillation: (_icarl_distillation, frozenset({"first"})),
}
"""The form of each loss, and the options that it knows."""


def parts_of(
    loss: Callable[..., Tensor], options: Mapping[str, Any], at: Pixels, factor: Tensor
) -> Parts | None:
    """What a loss times a factor (P,) is made of; None for one that has no form and is left to autograd."""
    form, known = _FORMS.get(loss, (None, frozenset()))
    if form is None or not options.keys() <= known:
        return None
    return form(at, factor, **options)
