"""LwF-MC: iCaRL without exemplars, on pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from everseg.losses import Term, icarl, icarl_distillation
from everseg.methods.base import Method
from everseg.methods.terms import Weight, label_terms, over_branches


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
        logits, taught = student[batch.branch].logits, teacher.get(batch.branch)
        kept = {"kd": Term(icarl_distillation, weight=self.importance)}
        # `icarl` needs a new output for the labels to teach; a step without one uses the combined form.
        if taught is not None and self.form == "disjoint" and taught.logits.shape[1] < logits.shape[1]:
            options = {"background_from_label": self.background_from_labels}
            own = {"icarl": Term(icarl, options=options)}
        else:
            own = label_terms(logits, batch, ctx, bce=True) | (kept if taught is not None else {})
        yield over_branches(own, kept, student, teacher, batch)
