"""Modeling the Background."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from everseg.methods.base import Method
from everseg.methods.terms import Positive, Weight, at_label_size, background_terms, init_backgrounds


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
    """Start the new classifiers from the background's, its probability shared evenly among them (not with `pretune`,
    which starts them in its own way)."""
    bce: bool = False
    """Sigmoid cross-entropy summed over classes instead of any softmax cross-entropy."""

    def prepare_model(self, model, step):
        super().prepare_model(model, step)  # grows first: there must be a new classifier to initialise
        if self.init_background and not self.pretune:
            init_backgrounds(model, step)

    def losses(self, batch, ctx):
        teacher = ctx.teach(batch)
        student = ctx.student(batch)
        terms = background_terms(
            student.logits,
            teacher,
            batch,
            ctx,
            kd_weight=self.kd_weight,
            alpha=self.alpha,
            unbiased_ce=self.unbiased_ce,
            unbiased_kd=self.unbiased_kd,
            bce=self.bce,
        )
        yield at_label_size(terms, student, batch, teacher)
