"""Value and gradient of losses made of `forms`, for one band of pixels after the other (floor 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from everseg.losses.classification import LINEAR_FROM
from everseg.losses.forms import Entropy, Logit, LogSumExp, Parts, Softplus, Statistic, Target

_Other = Softplus | Logit | Target | Entropy


class Buffers:
    """Memory for the largest band, made once and used by all."""

    def __init__(self, pixels: int, like: Tensor) -> None:
        self._pixels, self._like = pixels, like
        self._flat: dict[object, Tensor] = {}

    def view(self, name: object, num_classes: int, pixels: int) -> Tensor:
        """The buffer of that name as contiguous (num_classes, pixels); undefined where nothing was written."""
        if name not in self._flat:
            self._flat[name] = self._like.new_empty(num_classes * self._pixels)
        return self._flat[name][: num_classes * pixels].view(num_classes, pixels)


@dataclass
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
    """All parts of all terms over one image, N pixels.

    Args:
        parts: of each term, coefficients (N,).
        num_classes: C.
        like: a tensor of the logits' type and device.
        buffers: memory for the results.
        shifted: every pixel's logits are known to be at most 0 and near it: no maximum is looked for.
    """

    def __init__(
        self, parts: list[Parts], num_classes: int, like: Tensor, buffers: Buffers, shifted: bool
    ) -> None:
        self._buffers, self._shifted, self._num_classes = buffers, shifted, num_classes
        self._smallest = torch.finfo(like.dtype).tiny / torch.finfo(like.dtype).eps
        self._kinds: dict[tuple[str, float], None] = {}
        self._sums: list[tuple[int, LogSumExp]] = []
        self._others: list[tuple[int, _Other, Tensor]] = []
        maps = []
        for term, listed in enumerate(parts):
            for stat, map_ in listed:
                self._kinds.update(_kinds(stat))
                if isinstance(stat, LogSumExp):
                    self._sums.append((term, stat))
                    maps.append(map_)
                else:
                    self._others.append((term, stat, map_))
        self._sum_values: list[Tensor] = []
        self._other_values: list[list[Tensor]] = [[] for _ in self._others]
        if self._sums:
            self._maps = torch.stack(maps)
            self._arrange(like)

    def _arrange(self, like: Tensor) -> None:
        """Matrices between classes, segments (runs of classes in the same groups), groups and parts."""
        classes = [stat.classes for _, stat in self._sums]
        groups = [*dict.fromkeys(classes)]
        cuts = {0, self._num_classes, *(edge for group in groups for span in group for edge in span)}
        self._segments = [(a, b) for a, b in pairwise(sorted(cuts))]
        self._group_of = torch.tensor([groups.index(c) for c in classes], device=like.device)
        self._in_group = like.new_zeros(len(groups), self._num_classes)
        for row, group in zip(self._in_group, groups, strict=True):
            for first, last in group:
                row[first:last] = 1
        starts = [first for first, _ in self._segments]
        self._to_segments = self._in_group[:, starts].t()[:, self._group_of].contiguous()

    def band(
        self, logits: Tensor, teacher_logits: Tensor | None, pixels: slice, grad: Tensor, needs_grad: bool
    ) -> bool:
        """Add the values of a band, and write its gradient.

        Args:
            logits: student, (C, P); left as it is.
            teacher_logits: (K, P) or None; left as it is.
            pixels: where the band lies among the N pixels.
            grad: (C, P) to write the gradient into.
            needs_grad: whether it is wanted; without, what is written is undefined.

        Returns:
            False, and nothing added, where exponentials underflow: the logits of a whole group of classes lie too
            far below the largest of the pixel.
        """
        targets = self._targets(teacher_logits)
        if targets is None:
            return False
        if self._sums:
            if not self._add_sums(logits, grad, targets, pixels, needs_grad):
                return False
        elif needs_grad:
            grad.zero_()
        for (_, stat, map_), values in zip(self._others, self._other_values, strict=True):
            values.append(
                self._add_other(stat, map_[pixels], logits, targets, pixels, grad if needs_grad else None)
            )
        return True

    def add_values(self, values: Tensor) -> None:
        """Add the sums over all bands to those of the terms, (n,) float64."""
        if self._sum_values:
            sums = torch.stack(self._sum_values).double().sum(dim=0)
            terms = torch.tensor([term for term, _ in self._sums], device=values.device)
            values.index_add_(0, terms, sums)
        for (term, _, _), listed in zip(self._others, self._other_values, strict=True):
            if listed:
                values[term] += torch.stack(listed).double().sum()

    def _targets(self, teacher_logits: Tensor | None) -> dict[tuple[str, float], _Teacher] | None:
        """The teacher's probabilities of each kind that is needed; None where they underflow."""
        found = {}
        for of, alpha in self._kinds:
            assert teacher_logits is not None
            num_old, size = teacher_logits.shape
            powers = self._buffers.view((of, alpha), num_old, size)
            if of == "sigmoid":
                torch.sigmoid(teacher_logits, out=powers)
                found[of, alpha] = _Teacher(teacher_logits, powers, powers.new_ones(size), None)
                continue
            top = None if self._shifted else teacher_logits.amax(dim=0)
            scaled = teacher_logits if top is None else torch.sub(teacher_logits, top, out=powers)
            if alpha != 1:
                scaled = torch.mul(scaled, alpha, out=powers)
            sums = torch.exp(scaled, out=powers).sum(dim=0)
            if not sums.amin() > self._smallest:
                return None
            log_sum = sums.log() if top is None else sums.log().add_(top, alpha=alpha)
            found[of, alpha] = _Teacher(teacher_logits, powers, sums.reciprocal_(), log_sum)
        return found

    def _add_sums(
        self,
        logits: Tensor,
        grad: Tensor,
        targets: Mapping[tuple[str, float], _Teacher],
        pixels: slice,
        needs_grad: bool,
    ) -> bool:
        """Add the values of all log-sum-exps of a band, and write their gradient; False where they underflow."""
        top = None
        if self._shifted:
            torch.exp(logits, out=grad)
        else:
            top = logits.amax(dim=0)
            torch.sub(logits, top, out=grad).exp_()
        sums = torch.mm(self._in_group, grad)
        if not sums.amin() > self._smallest:
            return False
        maps = self._maps[:, pixels].clone()
        for row, (_, stat) in zip(maps, self._sums, strict=True):
            if stat.alpha is not None:
                teacher = targets["softmax", stat.alpha]
                row.mul_(teacher.powers[0]).mul_(teacher.scale)
        sums = sums[self._group_of]
        logs = sums.log()
        if top is not None:
            logs += top
        self._sum_values.append(logs.mul_(maps).sum(dim=1))
        if needs_grad:
            factors = torch.mm(self._to_segments, maps.div_(sums))
            for (first, last), factor in zip(self._segments, factors, strict=True):
                grad[first:last].mul_(factor)
        return True

    def _add_other(
        self,
        stat: _Other,
        map_: Tensor,
        logits: Tensor,
        targets: Mapping[tuple[str, float], _Teacher],
        pixels: slice,
        grad: Tensor | None,
    ) -> Tensor:
        """Value of a part, summed over the band; its gradient is added to `grad`."""
        if isinstance(stat, Logit):
            index = stat.index[None, pixels]
            if grad is not None:
                grad.scatter_add_(0, index, map_[None])
            return torch.dot(map_, logits.gather(0, index)[0])
        scratch = self._buffers.view("scratch", self._num_classes, logits.shape[1])
        if isinstance(stat, Entropy):
            teacher = targets["softmax", stat.alpha]
            assert teacher.log_sum is not None
            scratch = scratch[: len(teacher.powers)]
            mean = torch.mul(teacher.powers, teacher.logits, out=scratch).sum(dim=0).mul_(teacher.scale)
            return torch.dot(map_, teacher.log_sum.sub(mean, alpha=stat.alpha))
        logits, scratch = logits[stat.first : stat.last], scratch[stat.first : stat.last]
        if isinstance(stat, Softplus):
            value = torch.dot(map_, F.softplus(logits, threshold=LINEAR_FROM).sum(dim=0))
            factor = torch.sigmoid(logits, out=scratch)
        else:
            teacher = targets[stat.of, stat.alpha]
            factor = teacher.powers[stat.first : stat.last]
            map_ = map_ * teacher.scale
            value = torch.dot(map_, torch.mul(factor, logits, out=scratch).sum(dim=0))
        if grad is not None:
            grad[stat.first : stat.last].addcmul_(factor, map_)
        return value


def _kinds(stat: Statistic) -> dict[tuple[str, float], None]:
    """Which probabilities of the teacher a statistic needs."""
    if isinstance(stat, Target):
        return {(stat.of, stat.alpha): None}
    alpha = getattr(stat, "alpha", None)
    return {} if alpha is None else {("softmax", alpha): None}
