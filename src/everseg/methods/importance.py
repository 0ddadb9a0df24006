"""The base of EWC, PI and RW: a quadratic pull towards old weights, weighted by importance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from everseg.methods.base import Method
from everseg.methods.terms import Weight, at_label_size, label_terms


@dataclass(kw_only=True)
class ImportancePenalty(Method):
    """Add weight * sum importance * (theta - theta_old)^2, whose gradient is written out by hand.

    The statistics see the gradient of the loss without the penalty (`after_backward` runs between the two), of
    the whole batch: under DDP gradients are averaged before, so all ranks agree. The authors' code uses rank 0's
    only, and fails on frozen weights; here a weight without gradient is left out.

    A subclass keeps its tensors in `self.stats[part][weight name]` through `start`, `observe`, `importance` and
    `finish`. Of these parts, `old` (weights at the start of the step) and `pull` (the importance that weighs the
    penalty) belong to this class.
    """

    reads_gradients: ClassVar[bool] = True
    per_step: ClassVar[tuple[str, ...]] = ()
    """Parts that start anew in every step."""

    weight: Weight
    """Weight of the penalty."""
    normalise: bool = True
    """Bring each tensor's importance to the range 0..1 before it is used."""
    bce: bool = False
    """Sigmoid cross-entropy summed over classes instead of softmax cross-entropy."""

    def __post_init__(self) -> None:
        self.stats: dict[str, dict[str, Tensor]] = {}
        self.iteration = 0
        """Iterations seen in this step."""
        self._step = -1
        self._placed = True

    def start(self, name: str, theta: Tensor) -> None:
        """Begin a step for one weight."""

    def observe(self, name: str, theta: Tensor, grad: Tensor) -> None:
        """Take in one iteration's gradient, before the optimiser moves the weight."""
        raise NotImplementedError

    def importance(self, name: str) -> Tensor | None:
        """Give the importance learnt in earlier steps, before the weight; None for a new weight."""
        raise NotImplementedError

    def finish(self, name: str, theta: Tensor) -> None:
        """Close the step for one weight."""

    def normalised(self, statistic: Tensor) -> Tensor:
        """(m - min) / (max - min + 1e-8) over one tensor; as it is with `normalise` off."""
        if not self.normalise:
            return statistic
        low, high = statistic.aminmax()
        return (statistic - low) / (high - low + 1e-8)

    def begin_step(self, ctx):
        if self._step == ctx.step.index:  # restored in the middle of this step: its statistics are complete
            return
        self._step, self.iteration = ctx.step.index, 0
        self._place(ctx.module)
        for part in ("old", "pull", *self.per_step):
            self.stats[part] = {}
        for name, theta in _weights(ctx.module):
            self.stats["old"][name] = theta.clone()
            # Read before `start`, which gives a new weight its first statistics: a new weight has no importance yet.
            pull = self.importance(name)
            if pull is not None:
                self.stats["pull"][name] = pull
            self.start(name, theta)

    def losses(self, batch, ctx):
        student = ctx.student(batch)
        yield at_label_size(label_terms(student.logits, batch, ctx, bce=self.bce), student, batch)

    @torch.no_grad()
    def after_backward(self, ctx):
        self._place(ctx.module)
        penalty = _precise(next(ctx.module.parameters()).new_zeros(()))
        for name, parameter in ctx.module.named_parameters():
            if parameter.grad is None:
                continue
            theta, grad = _precise(parameter.detach()), _precise(parameter.grad)
            # Observe first: the statistics must see the gradient of the loss alone, without the penalty added below.
            self.observe(name, theta, grad)
            pull = self.stats["pull"].get(name)
            if pull is not None:
                distance = theta - self.stats["old"][name]
                penalty = penalty + (pull * distance.square()).sum()
                # d/d(theta) of weight * pull * (theta - old)^2, added to the gradient that backward has left.
                parameter.grad += (2 * self.weight * pull * distance).to(parameter.grad.dtype)
        self.iteration += 1
        return {"penalty": self.weight * penalty} if self.stats["pull"] else {}

    @torch.no_grad()
    def end_step(self, ctx):
        self._place(ctx.module)
        for name, theta in _weights(ctx.module):
            self.finish(name, theta)
        self._step = -1  # no step is open
        # What belongs to one step goes: checkpoints between steps hold only what later steps read.
        for part in ("old", "pull", *self.per_step):
            self.stats[part] = {}

    def state_dict(self):
        counters = {"step": torch.tensor(self._step), "iteration": torch.tensor(self.iteration)}
        parts = {
            f"{part}/{name}": value for part, named in self.stats.items() for name, value in named.items()
        }
        return counters | parts

    def load_state_dict(self, state):
        # Keys are "part/weight name"; those without a slash are the two counters.
        self._step, self.iteration = int(state["step"]), int(state["iteration"])
        self.stats = {part: {} for part in ("old", "pull", *self.per_step)}
        for key, value in state.items():
            part, slash, name = key.partition("/")
            if slash:
                self.stats.setdefault(part, {})[name] = value.clone()
        self._placed = False  # the tensors lie where the checkpoint was read to; the model is not known yet

    def _place(self, module: nn.Module) -> None:
        """Move restored statistics to where the weights are."""
        if not self._placed:
            weights = dict(module.named_parameters())
            for named in self.stats.values():
                for name in named.keys() & weights.keys():
                    like = torch.empty_like(weights[name], dtype=named[name].dtype)  # device and layout
                    named[name] = like.copy_(named[name])
            self._placed = True


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        yield name, _precise(parameter.detach())


def _precise(tensor: Tensor) -> Tensor:
    """At least float32; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
