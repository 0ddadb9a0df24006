"""Learning without Forgetting on pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from everseg.losses import Term, distillation
from everseg.methods.base import Method
from everseg.methods.terms import Positive, Weight, label_terms, over_branches


@dataclass(kw_only=True)
class LwF(Method):
    """Keep the softmax over the old classes as the teacher had it.

    Source: Li and Hoiem, ECCV 2016, eq. 2, as applied to segmentation by Cermelli et al., CVPR 2020 (values of
    their code). The student's softmax runs over the old classes only; ignored pixels are distilled too. With
    several branches the old ones' outputs on the new images are kept as well: Li and Hoiem's own setting.
    """

    uses_teacher: ClassVar[bool] = True

    kd_weight: Weight = 100.0
    """Weight of the distillation term (paper's code: 100)."""
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
        yield over_branches(own, kept, student, teacher, batch)
