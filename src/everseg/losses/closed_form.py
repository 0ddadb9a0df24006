"""Value and gradient of losses made of `forms`, for one band of pixels after the other (floor 1)."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from everseg.losses.classification import LINEAR_FROM
from everseg.losses.forms import Entropy, Logit, LogSumExp, Parts, Softplus, Statistic, Target

Targets = dict[tuple[str, float], tuple[Tensor, Tensor]]
"""The teacher's probabilities of each kind, as (K, P) and a factor (P,) that is still to be applied."""

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
        self, logits: Tensor, teacher_logits: Tensor | None, pixels: slice, needs_grad: bool
    ) -> Tensor | None:
        """Add the values of a band, and give its gradient (C, P).

        Args:
            logits: student, contiguous (C, P); left as it is.
            teacher_logits: (K, P) or None; left as it is.
            pixels: where the band lies among the N pixels.
            needs_grad: whether the gradient is wanted; without it the result is undefined.

        Returns:
            The gradient, in a buffer. None, and nothing added, where exponentials underflow: the logits of a whole
            group of classes lie too far below the largest of the pixel.
        """
        size = logits.shape[1]
        grad = self._buffers.view("exp", self._num_classes, size)
        targets = self._targets(teacher_logits, size)
        if targets is None:
            return None
        if self._sums:
            if not self._add_sums(logits, grad, targets, pixels, needs_grad):
                return None
        elif needs_grad:
            grad.zero_()
        for (_, stat, map_), values in zip(self._others, self._other_values, strict=True):
            values.append(
                self._add_other(stat, map_[pixels], logits, targets, pixels, grad if needs_grad else None)
            )
        return grad

    def add_values(self, values: Tensor) -> None:
        """Add the sums over all bands to those of the terms, (n,) float64."""
        if self._sum_values:
            sums = torch.stack(self._sum_values).double().sum(dim=0)
            terms = torch.tensor([term for term, _ in self._sums], device=values.device)
            values.index_add_(0, terms, sums)
        for (term, _, _), listed in zip(self._others, self._other_values, strict=True):
            if listed:
                values[term] += torch.stack(listed).double().sum()

    def _targets(self, teacher_logits: Tensor | None, size: int) -> Targets | None:
        found: Targets = {}
        for kind in self._kinds:
            assert teacher_logits is not None
            of, alpha = kind
            powers = self._buffers.view(kind, teacher_logits.shape[0], size)
            if of == "sigmoid":
                found[kind] = torch.sigmoid(teacher_logits, out=powers), powers.new_ones(size)
                continue
            if self._shifted:
                if alpha == 1:
                    torch.exp(teacher_logits, out=powers)
                else:
                    torch.mul(teacher_logits, alpha, out=powers).exp_()
            else:
                torch.sub(teacher_logits, teacher_logits.amax(dim=0), out=powers).mul_(alpha).exp_()
            sums = powers.sum(dim=0)
            if not sums.amin() > self._smallest:
                return None
            found[kind] = powers, sums.reciprocal_()
        return found

    def _add_sums(
        self, logits: Tensor, grad: Tensor, targets: Targets, pixels: slice, needs_grad: bool
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
                powers, scale = targets["softmax", stat.alpha]
                row.mul_(powers[0]).mul_(scale)
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
        targets: Targets,
        pixels: slice,
        grad: Tensor | None,
    ) -> Tensor:
        """Value of a part, summed over the band; its gradient is added to `grad`."""
        if isinstance(stat, Logit):
            index = stat.index[None, pixels]
            if grad is not None:
                grad.scatter_add_(0, index, map_[None])
            return torch.dot(map_, logits.gather(0, index)[0])
        if isinstance(stat, Entropy):
            powers, scale = targets["softmax", stat.alpha]
            return torch.dot(map_, torch.special.entr(powers * scale).sum(dim=0))
        logits = logits[stat.first : stat.last]
        scratch = self._buffers.view("scratch", self._num_classes, logits.shape[1])[stat.first : stat.last]
        if isinstance(stat, Softplus):
            value = torch.dot(map_, F.softplus(logits, threshold=LINEAR_FROM).sum(dim=0))
            factor = torch.sigmoid(logits, out=scratch)
        else:
            powers, scale = targets[stat.of, stat.alpha]
            factor = powers[stat.first : stat.last]
            map_ = map_ * scale
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
