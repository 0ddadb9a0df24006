"""Uncertainty-aware Contrastive Distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F

from everseg.labels import ignored_id
from everseg.losses.contrast import contrast, contrast_labels
from everseg.losses.pixelwise import full_precision
from everseg.methods.base import Method
from everseg.methods.terms import Positive, Weight, at_label_size, background_terms, init_backgrounds


@dataclass(kw_only=True)
class UCD(Method):
    """MiB, with pixels of one class held together and apart from all others, as far as the teacher is certain.

    The contrast is between the decoder's features of all pixels of a batch, the student's and the teacher's. The class
    of a background pixel is the teacher's guess.

    Source: Yang et al., TPAMI 2022. The released code does not run as it is, so its intent was replayed.
    """

    uses_teacher: ClassVar[bool] = True

    kd_weight: Weight = 10.0
    """Weight of MiB's distillation (paper's code: 10)."""
    contrast_weight: Weight = 0.01
    """Weight of the contrast (paper's code: 1/100, which the paper does not mention)."""
    temperature: Positive = 0.07
    """Divisor of the products of two features (paper: 0.07)."""
    certainty: bool = True
    """Weigh a pair of old classes by the teacher's probability that both pixels show the same one."""
    form: Literal["fixed", "authors"] = "fixed"
    """"authors" restores three slips of the released code: negatives are not shifted with the positives, labels are
    resized bilinearly and cut to integers (so borders show other classes, and every class above 20 becomes background),
    and new classes start at the smallest label of the batch."""
    freeze_first_head: bool = True
    """Keep every branch's first classifier as it was drawn, from its first step on, as the authors' code does."""
    init_background: bool = True
    """Start the new classifiers from the background's, as `mib`."""

    def prepare_model(self, model, step):
        super().prepare_model(model, step)
        if self.freeze_first_head:
            kept = model.frozen.heads
            heads = {branch: max(1, kept.get(branch, 0)) for branch in model.branches}
            model.freeze(**vars(model.frozen) | {"heads": heads})
        if self.init_background:
            init_backgrounds(model, step)

    def losses(self, batch, ctx):
        teacher, student = ctx.teach(batch), ctx.student(batch)
        own = background_terms(student.logits, teacher, batch, ctx, kd_weight=self.kd_weight)
        terms = at_label_size(own, student, batch, teacher)
        # Without a background no label can hide an old class, and class 0 is one like the others.
        if teacher is not None and ctx.step.spaces[batch.branch].background == 0:
            features, size = student.features["decoder"], student.features["decoder"].shape[2:]
            logits, authors = teacher.logits, self.form == "authors"
            if logits.shape[2:] != size:  # a decoder whose classifiers enlarge its map
                logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            terms["contrast"] = self.contrast_weight * contrast(
                features,
                full_precision(teacher.features["decoder"]),
                contrast_labels(batch.label, size, interpolated=authors),
                logits,
                first_new=None if authors else ctx.step.num_old(batch.branch),
                temperature=self.temperature,
                certainty=self.certainty,
                shifted=authors,
                ignored=ignored_id(student.logits.shape[1]),
            )
        yield terms
