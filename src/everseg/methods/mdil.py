"""Multi-domain incremental learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from everseg.losses import Term, kl_divergence
from everseg.methods.base import Method, StepContext, split_groups
from everseg.methods.terms import Positive, Weight, label_terms, over_branches
from everseg.models.model import SegmentationModel
from everseg.scenarios.steps import Step


@dataclass(kw_only=True)
class MDIL(Method):
    """Learn a new domain in a branch of its own while distillation holds the old domains' branches.

    A new branch starts from the one met before it (all but its classifier); the weights that the branches share
    move at a fraction of the learning rate; old branches' own weights are frozen. The teacher's softmax through each
    old branch, on the new domain's images, is the target of the student's through the same branch.

    Source: Garg et al., "Multi-Domain Incremental Learning for Semantic Segmentation", WACV 2022 (RAP-FT-KLD). The
    authors' code differs from this default in four places, and an option brings each of them back: `kl`, `updates`,
    `teacher_statistics`, and the base's `frozen_statistics` (false: old domains' running statistics drift).
    """

    uses_teacher: ClassVar[bool] = True
    partial_updates: ClassVar[bool] = True

    kd_weight: Weight = 0.1
    """Weight of the distillation, summed over the old branches (paper: 0.1)."""
    shared_lr_scale: Positive = 0.01
    """Learning rate of the shared weights relative to the new branch's, after the first step (paper: 5e-6 / 5e-4)."""
    keep_shared_statistics: bool = True
    kl: Literal["log", "probabilities"] = "log"
    """Divergence: of the probabilities' logarithms, or as in the authors' code, which feeds plain probabilities."""
    updates: Literal["one", "two", "two-legacy"] = "one"
    """Optimiser updates per batch: one; or as in the authors' code, from the third domain on, one for the labels and
    one for the distillation ("two-legacy": gradients zeroed instead of absent, so Adam moves the new branch twice)."""
    teacher_statistics: Literal["running", "authors"] = "running"
    """Batch statistics of the teacher: its running ones, or as in the authors' code, from the third domain on, the
    batch's own, with active dropout."""

    def grow(self, model, step):
        grow_from_previous(model, step)

    def param_groups(self, model, step):
        return branch_groups(self, model, step, self.shared_lr_scale)

    def losses(self, batch, ctx):
        old = old_branches(ctx)
        # The authors' script of the second domain differs from that of the third: only the latter has the two
        # deviations below, so they act only from two old branches on.
        third = len(old) >= 2
        if third and self.teacher_statistics == "authors":
            ctx.teacher.train()
        together = old if self.updates == "one" or not third else ()
        others = {"kd": Term(kl_divergence, options={"form": self.kl}, weight=self.kd_weight)}
        student = ctx.student_through(batch, (batch.branch, *together))
        own = label_terms(student[batch.branch].logits, batch, ctx)
        yield over_branches(own, others, student, ctx.teach_through(batch, together), batch)
        # The engine takes an optimiser update after each yield, so this forward sees the weights already moved.
        if old and not together:
            student = ctx.student_through(batch, old)
            yield over_branches({}, others, student, ctx.teach_through(batch, old), batch)

    def after_backward(self, ctx):
        if self.updates == "two-legacy":
            # Adam skips weights without gradient but moves those with gradient 0, by their running averages.
            for weight in ctx.module.parameters():
                if weight.requires_grad and weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
        return {}


def old_branches(ctx: StepContext) -> tuple[str, ...]:
    """Branches that are not trained now and that the teacher knows."""
    return ctx.step.old_branches if ctx.teacher is not None else ()


def grow_from_previous(model: SegmentationModel, step: Step) -> None:
    """Grow the model; a new branch starts from the branch met before it."""
    order = step.branch_order
    for branch, number in step.grows.items():
        # New and not the first: there is a branch before it in the order in which branches were met.
        new = number and step.num_old(branch) == 0 and order.index(branch) > 0
        previous = order[order.index(branch) - 1] if new and not step.fresh else None
        model.grow({branch: number}, init_from=previous if previous in model.branches else None)


def branch_groups(method: Method, model: SegmentationModel, step: Step, scale: float) -> list[dict[str, Any]]:
    """Parameter groups: after the first step the shared weights at `scale` times the rate."""
    if step.is_first:
        return Method.param_groups(method, model, step)
    return split_groups(model, scale)
