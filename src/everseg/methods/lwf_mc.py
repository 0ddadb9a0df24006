"""LwF-MC: iCaRL without exemplars, on pixels (floor 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from everseg.losses import icarl, icarl_distillation
from everseg.methods.base import Method
from everseg.methods.parts import Weight, at_label_size, classification, over_branches


@dataclass(kw_only=True)
class LwFMC(Method):
    """Sigmoid cross-entropy on every class, with the teacher's sigmoids as targets of the old ones.

    Source: Rebuffi et al., CVPR 2017 (LwF.MC), as applied to segmentation by Cermelli et al., CVPR 2020.
    `combined` (their default) adds the distillation to the label loss; `disjoint` replaces the targets of the
    old channels, so every pixel, ignored ones too, has one target per channel. The old branches of other domains
    are always distilled as in the combined form.
    """

    uses_teacher: ClassVar[bool] = True

    form: Literal["combined", "disjoint"] = "combined"
    """How labels and teacher go together."""
    importance: Weight = 10.0
    """Weight of the distillation in the combined form (paper's code: 10)."""
    background_from_labels: bool = False
    """In the disjoint form the background's target comes from the labels, not from the teacher."""

    def losses(self, batch, ctx):
        student, teacher = ctx.compare(batch)
        logits = at_label_size(student[batch.branch].logits, batch)
        own = teacher.get(batch.branch)
        if own is not None and self.form == "disjoint" and own.logits.shape[1] < logits.shape[1]:
            target = at_label_size(teacher.pop(batch.branch).logits, batch)
            from_label = self.background_from_labels
            terms = {"icarl": icarl(logits, batch.label, target, background_from_label=from_label)}
        else:
            terms = classification(logits, batch, ctx, bce=True)
        if teacher:
            terms["kd"] = self.importance * over_branches(icarl_distillation, student, teacher, batch)
        yield terms
