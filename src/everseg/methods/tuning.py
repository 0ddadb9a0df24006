"""Pre-tuning: weights that a method trains before its step, with an optimiser of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from everseg.types import Batch, LossTerms


class Reduces(Protocol):
    """What a pre-tuning needs of a `StepContext`."""

    @property
    def all_reduce(self) -> Callable[[Tensor], Tensor]: ...


def polynomial(iteration: int, total: int) -> float:
    """Factor of the polynomial schedule: (1 - iteration / total) ** 0.9."""
    return max(0.0, 1 - iteration / total) ** 0.9


@dataclass(frozen=True)
class Tuning:
    """What `StepContext.tune` was asked for. It is trained as a method is: by its losses, one update per batch."""

    parameters: Mapping[str, nn.Parameter]
    """Name -> weight to train: of the model, or of the method's own. Names are those of the checkpoints."""
    terms: Callable[[Batch], LossTerms]
    """Loss terms of a batch, weights applied."""
    epochs: int
    """Passes over the step's training images."""
    lr_scale: float = 1.0
    """Factor on the step's learning rate."""
    rate: Callable[[int, int], float] = polynomial
    """Factor on the learning rate from the number of an iteration, from 0, and their total."""
    momentum: float = 0.9
    """Nesterov momentum of SGD."""
    weight_decay: float = 1e-4
    """L2 penalty on every weight that is tuned."""

    def losses(self, batch: Batch, ctx: Reduces) -> Iterator[LossTerms]:
        """Yield the loss terms of the one update of a batch."""
        yield self.terms(batch)

    @torch.no_grad()
    def after_backward(self, ctx: Reduces) -> dict[str, Tensor]:
        """Take the mean of the gradients over processes, as DDP does for the weights it knows.

        A weight that the loss did not reach counts as one of gradient 0: all processes must send the same number of
        elements.
        """
        weights = list(self.parameters.values())
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        # The number of processes travels as one more element, so that one exchange is enough.
        sent = torch.cat([*(gradient.flatten() for gradient in gradients), gradients[0].new_ones(1)])
        received = ctx.all_reduce(sent)
        means = (received[:-1] / received[-1]).split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))
        return {}
