"""One optimiser iteration: what a method asks for on one batch (floor 5)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from everseg.methods.base import Method, StepContext
from everseg.types import Batch


def train_batch(
    method: Method,
    batch: Batch,
    ctx: StepContext,
    optimizer: torch.optim.Optimizer,
    backward: Callable[[Tensor], None] = lambda loss: loss.backward(),
    check: Callable[[dict[str, Tensor]], None] = lambda terms: None,
) -> dict[str, Tensor]:
    """Take every optimiser update that the method asks for on one batch.

    Args:
        check: called with the loss terms when the gradients are there and before any weight or statistic is
            changed by them; may raise.

    Returns:
        Every loss term (weights applied) and every scalar of `after_backward`, detached. A name that comes in
        several updates holds the sum.
    """
    logged: dict[str, Tensor] = {}
    for terms in method.losses(batch, ctx):
        optimizer.zero_grad(set_to_none=True)
        backward(torch.stack([*terms.values()]).sum())
        check(terms)
        extra = method.after_backward(ctx)
        optimizer.step()
        for name, value in {**terms, **extra}.items():
            value = value.detach()
            logged[name] = logged[name] + value if name in logged else value
    return logged
