"""DKD: decomposed knowledge distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from everseg.losses import (
    Term,
    binary_negatives,
    decomposed_distillation,
    icarl_distillation,
    pixelwise_losses,
)
from everseg.losses.decomposed import Sign
from everseg.methods.base import Method, groups_of
from everseg.methods.sigmoids import (
    Unlabelled,
    candidate_labels,
    check_head,
    check_step,
    new_classes_term,
    rest_dropout,
    unfit_steps,
    without_background,
)
from everseg.methods.terms import Positive, Weight
from everseg.models.heads import Head, start_from
from everseg.models.model import SegmentationModel

AUXILIARY = "auxiliary"
"""Name of the output that is never positive and that new classifiers start from."""


@dataclass(kw_only=True)
class DKD(Method):
    """Learn each class by a sigmoid of its own, and keep what speaks for and against every old class apart.

    Source: Baek et al., NeurIPS 2022, with the weights of the authors' code. With `scenario.memory` it is DKD-M.
    """

    uses_teacher: ClassVar[bool] = True

    pos_weight: Positive = 2.0
    """Factor of the loss where the label is the class, in the first step (authors: 2, ADE20K 35)."""
    pos_weight_next: Positive | None = 1.0
    """The same in later steps; null = as in the first (authors: 1, ADE20K 35)."""
    kd_weight: Weight = 5.0
    """Weight of the distillation of the old classes' sigmoids (authors: 5)."""
    positive_weight: Weight = 5.0
    """Weight of the distillation of what the classifiers' positive weights give (authors: 5)."""
    negative_weight: Weight = 5.0
    """Weight of the distillation of what their negative weights give (authors: 5)."""
    auxiliary_weight: Weight = 1.0
    """Weight of the auxiliary classifier's loss (authors: 1)."""
    init_auxiliary: bool = True
    """Start the new classifiers from the auxiliary one, which says that no class is anywhere."""
    unlabelled: Unlabelled = "left out"
    """Void pixels teach the new classes nothing, or are "negative" for all of them, as in the authors' code."""
    decay: Literal["new", "all"] = "new"
    """Weights with weight decay in later steps: the new classifier's alone, as in the authors' code, or all."""
    freeze_norm: bool = True
    """Freeze the affine weights of all norms from step `freeze_from` on (authors: yes)."""

    def unfit(self, steps):
        return unfit_steps("dkd", steps)

    def heads(self, step):
        branch = check_step("dkd", step)
        first = Head(background="constant", auxiliary={AUXILIARY: 1}, detached=(AUXILIARY,))
        return {branch: first} if step.is_first else {}

    def prepare_model(self, model, step):
        super().prepare_model(model, step)
        check_head("dkd", model, step, AUXILIARY)
        if not step.is_first:
            rest_dropout(model)
            if self.init_auxiliary:
                start_from(model.head(step.branch), AUXILIARY)

    def param_groups(self, model, step):
        if step.is_first or self.decay == "all":
            return super().param_groups(model, step)
        return groups_of(model, (model.head(step.branch).classifiers[-1], 1.0), (model, 1.0, 0.0))

    def losses(self, batch, ctx):
        teacher, student = ctx.teach(batch), ctx.student(batch)
        positive = self.pos_weight if teacher is None else self.pos_weight_next or self.pos_weight
        terms = {
            "mbce": new_classes_term(batch, ctx, positive, self.unlabelled),
            "auxiliary": Term(binary_negatives, options={"last": 1}, weight=self.auxiliary_weight),
        }
        if teacher is not None:
            terms["kd"] = Term(icarl_distillation, options={"first": 1}, weight=self.kd_weight)
        # In the background's place stands the auxiliary output: one pass over the pixels serves all terms.
        logits = without_background(student.logits, student.auxiliary[AUXILIARY])
        found = pixelwise_losses(terms, logits, batch.label, None if teacher is None else teacher.logits)
        if teacher is not None:
            number = len(ctx.teacher.head(batch.branch).classifiers)
            weights = _weights(ctx.module, batch.branch, number), _weights(ctx.teacher, batch.branch, number)
            maps = student.features["decoder"], teacher.features["decoder"]
            factors: dict[Sign, float] = {"positive": self.positive_weight, "negative": self.negative_weight}
            for sign, factor in factors.items():
                parts = decomposed_distillation(maps[0], weights[0], maps[1], weights[1], sign)
                found[sign] = factor * parts.sum()
        yield found

    def memory_labels(self, batch, ctx, threshold):
        return candidate_labels(ctx.module(batch.image, (batch.branch,)), batch, threshold)


def _weights(model: SegmentationModel, branch: str, number: int) -> Tensor:
    """The weights of a branch's first classifiers, (K, D, 1, 1)."""
    return torch.cat([cast(Tensor, part.weight) for part in model.head(branch).classifiers[:number]])
