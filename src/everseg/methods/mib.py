"""Modeling the Background."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from everseg.losses import Term, replayed_cross_entropy
from everseg.losses.replayed import Void
from everseg.methods.base import Method, groups_of
from everseg.methods.plop_terms import hides_old
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
    memory_loss: Literal["augmented", "plain"] = "augmented"
    """Cross-entropy of images from the memory, with `unbiased_ce`: "augmented" = their background may be any new class
    (MiB-AugM), "plain" = as that of all other images."""
    memory_void: Void = "ignored"
    """What ignored pixels of images from the memory count as in "augmented"; the authors' code: "background"."""
    later_rate: Positive = 1.0
    """Factor on the learning rate of decoder and classifiers in later steps (MiB-AugM's code: 10)."""
    decay_encoder: bool = True
    """Weight decay acts on encoder and decoder in later steps too; MiB-AugM's code leaves it to the classifiers."""

    def prepare_model(self, model, step):
        super().prepare_model(model, step)  # grows first: there must be a new classifier to initialise
        if self.init_background and not self.pretune:
            init_backgrounds(model, step)

    def param_groups(self, model, step):
        if step.is_first or (self.later_rate == 1 and self.decay_encoder):
            return super().param_groups(model, step)
        shared = None if self.decay_encoder else 0.0
        return groups_of(
            model,
            (model.encoder, 1.0, shared),
            (model.decoder, self.later_rate, shared),
            (model.heads, self.later_rate),
        )

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
        augmented = self.memory_loss == "augmented" and self.unbiased_ce and not self.bce
        if batch.memory is not None and augmented and hides_old(ctx, batch.branch):
            # Both are means over all images: with half of the batch from the memory each counts one half, as published.
            options = {"num_old": ctx.step.num_old(batch.branch), "void": self.memory_void}
            terms["ce"] = replace(terms["ce"], image_weight=~batch.memory)
            terms["memory"] = Term(replayed_cross_entropy, options=options, image_weight=batch.memory)
        yield at_label_size(terms, student, batch, teacher)
