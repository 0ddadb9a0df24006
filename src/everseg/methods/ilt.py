"""Incremental Learning Techniques: LwF with encoder features kept in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from everseg.losses import Term, distillation, feature_distillation
from everseg.methods.base import Method
from everseg.methods.terms import Positive, Weight, label_terms, over_branches


@dataclass(kw_only=True)
class ILT(Method):
    """LwF plus the mean squared distance of the encoder's output from the teacher's.

    Source: Michieli and Zanuttigh, ICCV Workshops 2019, with the weights of Cermelli et al., CVPR 2020. The
    distance is a mean over all elements, so its weight does not depend on the image's size. With several branches
    the outputs of the old ones are distilled too, and the distance is the mean over the branches' encoder outputs.
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
        student, teacher = ctx.compare(batch)
        own = label_terms(student[batch.branch].logits, batch, ctx, bce=self.bce)
        kept = {"kd": Term(distillation, options={"alpha": self.alpha}, weight=self.kd_weight)}
        if batch.branch in teacher:  # a new branch has nothing to keep: the teacher never met it
            own |= kept
        terms = over_branches(own, kept, student, teacher, batch)
        if teacher:
            distances = [
                feature_distillation(student[branch].features["encoder"], output.features["encoder"])
                for branch, output in teacher.items()
            ]
            terms["feature"] = self.feature_weight * torch.stack(distances).mean()
        yield terms
