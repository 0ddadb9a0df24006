"""Learning without Forgetting on pixels (floor 4)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from everseg.losses import distillation
from everseg.methods.base import Method
from everseg.methods.parts import Positive, Weight, at_label_size, classification, over_branches


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
        logits = at_label_size(student[batch.branch].logits, batch)
        terms = classification(logits, batch, ctx, bce=self.bce)
        if teacher:
            loss = partial(distillation, alpha=self.alpha)
            terms["kd"] = self.kd_weight * over_branches(loss, student, teacher, batch)
        yield terms
