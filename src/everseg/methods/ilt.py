"""Incremental Learning Techniques: LwF with encoder features kept in place (floor 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from everseg.losses import distillation, feature_distillation
from everseg.methods.base import Method
from everseg.methods.parts import Positive, Weight, at_label_size, classification


@dataclass(kw_only=True)
class ILT(Method):
    """LwF plus the mean squared distance of the encoder's output from the teacher's.

    Source: Michieli and Zanuttigh, ICCV Workshops 2019, with the weights of Cermelli et al., CVPR 2020. The
    distance is a mean over all elements, so its weight does not depend on the image's size.
    """

    uses_teacher: ClassVar[bool] = True

    kd_weight: Weight = 100.0
    """Weight of the output distillation (paper's code: 100)."""
    feature_weight: Weight = 100.0
    """Weight of the encoder's feature distillation (paper's code: 100)."""
    alpha: Positive = 1.0
    """Factor on the teacher's logits before its softmax; above 1 hardens the targets (paper: 1)."""
    bce: bool = False
    """Sigmoid cross-entropy summed over classes instead of softmax cross-entropy."""

    def losses(self, batch, ctx):
        teacher = ctx.teach(batch)
        student = ctx.student(batch)
        logits = at_label_size(student.logits, batch)
        terms = classification(logits, batch, ctx, bce=self.bce)
        if teacher is not None:
            target = at_label_size(teacher.logits, batch)
            distance = feature_distillation(student.features["encoder"], teacher.features["encoder"])
            terms["kd"] = self.kd_weight * distillation(logits, target, alpha=self.alpha)
            terms["feature"] = self.feature_weight * distance
        yield terms
