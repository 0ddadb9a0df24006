"""The running mean feature of every class, of each branch: what SDR keeps between iterations and steps."""

from __future__ import annotations

import torch
from torch import Tensor

from everseg.losses.prototypes import class_sums, collected, updated_prototypes
from everseg.methods.base import StepContext


class RunningPrototypes:
    """Means of all features met, over all processes, in float64.

    Args:
        authors: gather features as SDR's released code does, see `losses.prototypes`.
    """

    def __init__(self, *, authors: bool = False) -> None:
        self.authors = authors
        self.of_branch: dict[str, tuple[Tensor, Tensor]] = {}
        """Branch -> prototypes (C, D) float64 and numbers of features (C,) int64; 0 for classes not met yet."""
        self._step = -1

    def begin_step(self, ctx: StepContext) -> None:
        """Forget everything where a step starts from scratch, but not where such a step is continued."""
        if self._step != ctx.step.index and ctx.step.is_first:
            self.of_branch = {}
        self._step = ctx.step.index

    def collect(
        self, features: Tensor, label: Tensor, branch: str, ctx: StepContext
    ) -> tuple[Tensor, Tensor]:
        """Take in a batch's features; returns the branch's prototypes and numbers after it.

        Args:
            features: (B, D, h, w); no gradient flows.
            label: (B, h, w) at their size.
            branch: the batch's.
            ctx: the step, and the sum over processes.
        """
        space = ctx.step.spaces[branch]
        sums, number = class_sums(features, label, space.num_classes, scrambled=self.authors)
        taken = collected(number, background=_background_is_pure(ctx, branch), first_dropped=self.authors)
        # One reduction for both: the numbers are exact in float64.
        both = ctx.all_reduce(torch.cat([sums, number[:, None]], dim=1) * taken[:, None])
        rows, count = self.of_branch.get(branch, (both[:0, :-1], number[:0]))
        added = space.num_classes - len(count)
        rows = torch.cat([rows.to(both), both.new_zeros(added, sums.shape[1])])
        count = torch.cat([count.to(number), number.new_zeros(added)])
        self.of_branch[branch] = updated_prototypes(rows, count, both[:, :-1], both[:, -1].long())
        return self.of_branch[branch]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a restart needs, as flat tensors."""
        state = {"step": torch.tensor(self._step)}
        for branch, (rows, count) in self.of_branch.items():
            state |= {f"prototypes/{branch}": rows, f"count/{branch}": count}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self._step = int(state["step"])
        branches = [key.partition("/")[2] for key in state if key.startswith("prototypes/")]
        self.of_branch = {
            b: (state[f"prototypes/{b}"].clone(), state[f"count/{b}"].clone()) for b in branches
        }


def _background_is_pure(ctx: StepContext, branch: str) -> bool:
    """Whether pixels labelled 0 hold no class of another step: under two protocols, or where 0 is a class itself."""
    first = ctx.step.num_old(branch) == 0
    pure = ctx.step.protocol == "sequential" or (ctx.step.protocol == "disjoint" and first)
    return pure or ctx.step.spaces[branch].background is None
