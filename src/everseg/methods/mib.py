"""Modeling the Background (floor 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from everseg.losses import distillation, unbiased_distillation
from everseg.methods.base import Method
from everseg.methods.parts import Positive, Weight, at_label_size, classification
from everseg.models.model import init_from_background


@dataclass(kw_only=True)
class MiB(Method):
    """Treat the background as what it is in each step: old classes in the labels, new ones in the teacher.

    Source: Cermelli et al., CVPR 2020: unbiased cross-entropy eq. 5, unbiased distillation eq. 8-9, classifier
    initialisation eq. 10-11. The three parts can be switched off one by one (the paper's ablation).
    """

    uses_teacher: ClassVar[bool] = True

    kd_weight: Weight = 10.0
    """Weight of the distillation term (paper: 10; the authors use 100 where a step adds one VOC class)."""
    alpha: Positive = 1.0
    """Factor on the teacher's logits before its softmax; above 1 hardens the targets (paper: 1)."""
    unbiased_ce: bool = True
    """A pixel labelled background may be background or any old class."""
    unbiased_kd: bool = True
    """The teacher's background covers the student's background and every new class."""
    init_background: bool = True
    """Start the new classifiers from the background's, its probability shared evenly among them."""
    bce: bool = False
    """Sigmoid cross-entropy summed over classes instead of any softmax cross-entropy."""

    def prepare_model(self, model, step):
        super().prepare_model(model, step)
        if self.init_background:
            for branch, num_new in step.grows.items():
                if num_new and step.num_old(branch):
                    init_from_background(model, branch)

    def losses(self, batch, ctx):
        teacher = ctx.teach(batch)
        logits = at_label_size(ctx.student(batch).logits, batch)
        terms = classification(logits, batch, ctx, bce=self.bce, unbiased=self.unbiased_ce)
        if teacher is not None:
            target = at_label_size(teacher.logits, batch)
            grown = logits.shape[1] > target.shape[1]  # without new classes both forms are the same
            loss = unbiased_distillation if self.unbiased_kd and grown else distillation
            terms["kd"] = self.kd_weight * loss(logits, target, alpha=self.alpha)
        yield terms
