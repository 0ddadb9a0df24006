"""LwF-MC: iCaRL without exemplars, on pixels (floor 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from everseg.losses import binary_cross_entropy, icarl, icarl_distillation
from everseg.methods.base import Method
from everseg.methods.parts import Weight, at_label_size


@dataclass(kw_only=True)
class LwFMC(Method):
    """Sigmoid cross-entropy on every class, with the teacher's sigmoids as targets of the old ones.

    Source: Rebuffi et al., CVPR 2017 (LwF.MC), as applied to segmentation by Cermelli et al., CVPR 2020.
    `combined` (their default) adds the distillation to the label loss; `disjoint` replaces the targets of the
    old channels, so every pixel, ignored ones too, has one target per channel.
    """

    uses_teacher: ClassVar[bool] = True

    form: Literal["combined", "disjoint"] = "combined"
    """How labels and teacher go together."""
    importance: Weight = 10.0
    """Weight of the distillation in the combined form (paper's code: 10)."""
    background_from_labels: bool = False
    """In the disjoint form the background's target comes from the labels, not from the teacher."""

    def losses(self, batch, ctx):
        teacher = ctx.teach(batch)
        logits = at_label_size(ctx.student(batch).logits, batch)
        if teacher is None:
            yield {"bce": binary_cross_entropy(logits, batch.label)}
            return
        target = at_label_size(teacher.logits, batch)
        grown = logits.shape[1] > target.shape[1]
        if self.form == "disjoint" and grown:
            from_label = self.background_from_labels
            yield {"icarl": icarl(logits, batch.label, target, background_from_label=from_label)}
            return
        yield {
            "bce": binary_cross_entropy(logits, batch.label),
            "kd": self.importance * icarl_distillation(logits, target),
        }
