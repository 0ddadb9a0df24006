"""Value and gradient, over one band of pixels, of losses made of `forms`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from everseg.losses.classification import LINEAR_FROM
from everseg.losses.forms import Entropy, Logit, LogSumExp, Negated, Parts, Softplus, Statistic, Target


class Buffers:
    """Memory for the largest band of P pixels, made once and used by all."""

    def __init__(self, pixels: int, like: Tensor) -> None:
        self._pixels, self._like = pixels, like
        self._flat: dict[object, Tensor] = {}

    def view(self, name: object, num_classes: int, pixels: int) -> Tensor:
        """The buffer of that name as contiguous (num_classes, pixels); undefined where nothing was written."""
        if name not in self._flat:
            self._flat[name] = self._like.new_empty(num_classes * self._pixels)
        return self._flat[name][: num_classes * pixels].view(num_classes, pixels)


@dataclass(frozen=True)
class _Groups:
    """How classes, segments (runs of classes in the same groups), groups and coefficients go together."""

    segments: tuple[tuple[int, int], ...]
    of_classes: Tensor
    """(groups, C): 1 where the class is in the group."""
    of_coefficients: Tensor
    """Group of each coefficient."""
    to_segments: Tensor
    """(segments, coefficients): 1 where the segment is in the coefficient's group."""


@lru_cache(maxsize=64)
def _groups(
    classes: tuple[tuple[tuple[int, int], ...], ...],
    num_classes: int,
    dtype: torch.dtype,
    device: torch.device,
) -> _Groups:
    groups = [*dict.fromkeys(classes)]  # two terms often sum over the same classes: computed once
    # Cut the classes wherever a group begins or ends. Within a segment all classes are in the same groups, so their
    # gradients share one factor per pixel.
    cuts = {0, num_classes, *(edge for group in groups for span in group for edge in span)}
    segments = tuple(pairwise(sorted(cuts)))
    of_classes = torch.zeros(len(groups), num_classes, dtype=dtype)
    for row, group in zip(of_classes, groups, strict=True):
        for first, last in group:
            row[first:last] = 1
    index = torch.tensor([groups.index(group) for group in classes])
    to_segments = of_classes[:, [first for first, _ in segments]].t()[:, index].contiguous()
    return _Groups(segments, of_classes.to(device), index.to(device), to_segments.to(device))


@dataclass(frozen=True)
class _Teacher:
    """The teacher's probabilities over a band."""

    logits: Tensor
    powers: Tensor
    """Probabilities (K, P) but for `scale`."""
    scale: Tensor
    """Factor (P,)."""
    log_sum: Tensor | None
    """Of a softmax: its normaliser, (P,)."""


class ClosedForm:
    """Losses of one band of P pixels.

    Args:
        logits: student, (C, P); left as it is.
        teacher_logits: (K, P) or None; left as it is.
        grad: (C, P) to write the gradient into.
        needs_grad: whether it is wanted; without, what is written is undefined.
        shifted: the logits of each pixel are known to be at most 0, and near it: no maximum is looked for.
        buffers: memory for what comes between.
    """

    def __init__(
        self,
        logits: Tensor,
        teacher_logits: Tensor | None,
        grad: Tensor,
        buffers: Buffers,
        *,
        needs_grad: bool,
        shifted: bool,
    ) -> None:
        self._logits, self._teacher_logits, self._grad, self._buffers = logits, teacher_logits, grad, buffers
        self._needs_grad, self._shifted = needs_grad, shifted
        info = torch.finfo(logits.dtype)
        # A sum of exponentials below this has lost digits to denormal numbers; its logarithm would be wrong.
        self._smallest = info.tiny / info.eps
        self._teachers: dict[tuple[str, float], _Teacher] = {}

    def evaluate(self, parts: list[Parts]) -> Tensor | None:
        """Evaluate terms and write the gradient of their sum.

        Args:
            parts: of each term.

        Returns:
            The terms' sums over the pixels, (n,) float64. None where exponentials underflow: the logits of a whole
            group of classes lie too far below the largest of the pixel.
        """
        flat = [
            (term, stat, coefficient) for term, listed in enumerate(parts) for stat, coefficient in listed
        ]
        if not all(self._prepare(stat) for _, stat, _ in flat):
            return None
        # Log-sum-exps come first: they leave their gradient in `grad` by writing over it, the others add to it.
        values = self._logits.new_zeros(len(parts), dtype=torch.float64)
        terms = [term for term, stat, _ in flat if isinstance(stat, LogSumExp)]
        sums = [(stat, coefficient) for _, stat, coefficient in flat if isinstance(stat, LogSumExp)]
        if sums:
            of_sums = self._log_sum_exps(sums)
            if of_sums is None:
                return None
            values.index_add_(0, torch.tensor(terms, device=values.device), of_sums.double())
        elif self._needs_grad:
            self._grad.zero_()
        for term, stat, coefficient in flat:
            if not isinstance(stat, LogSumExp):
                values[term] += self._add(stat, coefficient)
        return values

    def _prepare(self, stat: Statistic) -> bool:
        """Compute the teacher's probabilities that a statistic needs; False where they underflow."""
        # Statistics without alpha know no teacher.
        of, alpha = getattr(stat, "of", "softmax"), getattr(stat, "alpha", None)
        if alpha is None or (of, alpha) in self._teachers:
            return True
        logits = self._teacher_logits
        assert logits is not None
        powers = self._buffers.view((of, alpha), *logits.shape)
        if of == "sigmoid":
            torch.sigmoid(logits, out=powers)
            self._teachers[of, alpha] = _Teacher(logits, powers, powers.new_ones(powers.shape[1]), None)
            return True
        top = None if self._shifted else logits.amax(dim=0)
        scaled = logits if top is None else torch.sub(logits, top, out=powers)
        if alpha != 1:
            scaled = torch.mul(scaled, alpha, out=powers)
        # The probabilities stay unnormalised, (K, P): dividing a row of (P,) sums once is cheaper than all of them.
        sums = torch.exp(scaled, out=powers).sum(dim=0)
        log_sum = sums.log() if top is None else sums.log().add_(top, alpha=alpha)
        self._teachers[of, alpha] = _Teacher(logits, powers, sums.reciprocal(), log_sum)
        return bool(sums.amin() > self._smallest)

    def _log_sum_exps(self, sums: list[tuple[LogSumExp, Tensor]]) -> Tensor | None:
        """Values of all log-sum-exps, (n,), and their gradient; None where they underflow."""
        # The exponentials are written where the gradient will stand: d/dx_c of log(sum exp) is exp(x_c) / sum, so each
        # has only to be multiplied by a factor per pixel. That is the one exponential per logit for all terms.
        logits, powers = self._logits, self._grad  # (C, P) both
        groups = _groups(tuple(stat.classes for stat, _ in sums), len(logits), logits.dtype, logits.device)
        top = None if self._shifted else logits.amax(dim=0)
        torch.exp(logits if top is None else torch.sub(logits, top, out=powers), out=powers)
        totals = torch.mm(groups.of_classes, powers)  # (groups, P)
        if not totals.amin() > self._smallest:
            return None
        coefficients = torch.stack([coefficient for _, coefficient in sums])  # (n, P)
        for row, (stat, _) in zip(coefficients, sums, strict=True):
            if stat.alpha is not None:
                teacher = self._teachers["softmax", stat.alpha]
                row.mul_(teacher.powers[0]).mul_(teacher.scale)  # times the teacher's probability of class 0
        totals = totals.index_select(0, groups.of_coefficients)  # (n, P)
        logs = totals.log()
        if top is not None:
            logs += top  # undo the shift: log(sum exp(x - top)) + top
        values = logs.mul_(coefficients).sum(dim=1)
        if self._needs_grad:
            # Segment by segment, the sum of coefficient / total over the groups that the segment is in: (segments, P).
            factors = torch.mm(groups.to_segments, coefficients.div_(totals))
            for (first, last), factor in zip(groups.segments, factors, strict=True):
                powers[first:last].mul_(factor)
        return values

    def _add(self, stat: Softplus | Logit | Negated | Target | Entropy, coefficient: Tensor) -> Tensor:
        """Value of a statistic times its coefficient, summed over the band; its gradient is added."""
        if isinstance(stat, Logit):
            return self._logit(stat, coefficient)
        if isinstance(stat, Negated):
            return self._negated(stat, coefficient)
        if isinstance(stat, Entropy):
            return self._entropy(stat, coefficient)
        if isinstance(stat, Softplus):
            return self._softplus(stat, coefficient)
        return self._target(stat, coefficient)

    def _logit(self, stat: Logit, coefficient: Tensor) -> Tensor:
        index = stat.index[None]
        if self._needs_grad:
            self._grad.scatter_add_(0, index, coefficient[None])
        return torch.dot(coefficient, self._logits.gather(0, index)[0])

    def _negated(self, stat: Negated, coefficient: Tensor) -> Tensor:
        index = stat.index[None]
        opposite = -self._logits.gather(0, index)  # (1, P)
        if self._needs_grad:
            self._grad.scatter_add_(0, index, -coefficient * opposite.sigmoid())
        return torch.dot(coefficient, F.softplus(opposite, threshold=LINEAR_FROM)[0])

    def _entropy(self, stat: Entropy, coefficient: Tensor) -> Tensor:
        teacher = self._teachers["softmax", stat.alpha]
        assert teacher.log_sum is not None
        scratch = self._scratch(0, len(teacher.powers))
        mean = torch.mul(teacher.powers, teacher.logits, out=scratch).sum(dim=0).mul_(teacher.scale)
        return torch.dot(coefficient, teacher.log_sum.sub(mean, alpha=stat.alpha))

    def _softplus(self, stat: Softplus, coefficient: Tensor) -> Tensor:
        logits = self._logits[stat.first : stat.last]
        if self._needs_grad:
            sigmoid = torch.sigmoid(logits, out=self._scratch(stat.first, stat.last))
            self._grad[stat.first : stat.last].addcmul_(sigmoid, coefficient)
        return torch.dot(coefficient, F.softplus(logits, threshold=LINEAR_FROM).sum(dim=0))

    def _target(self, stat: Target, coefficient: Tensor) -> Tensor:
        teacher, classes = self._teachers[stat.of, stat.alpha], slice(stat.first, stat.last)
        coefficient = coefficient * teacher.scale
        if self._needs_grad:
            self._grad[classes].addcmul_(teacher.powers[classes], coefficient)
        scratch = self._scratch(stat.first, stat.last)
        products = torch.mul(teacher.powers[classes], self._logits[classes], out=scratch)
        return torch.dot(coefficient, products.sum(dim=0))

    def _scratch(self, first: int, last: int) -> Tensor:
        return self._buffers.view("scratch", *self._logits.shape)[first:last]
