"""PLOP: learning without forgetting by pseudo-labels and local distillation of features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from everseg.losses import pixelwise_losses
from everseg.methods.base import Method
from everseg.methods.plop_terms import KeepsThresholds, PodRule, PseudoRule, pod_term, pseudo_terms
from everseg.methods.terms import init_backgrounds


@dataclass(kw_only=True)
class PLOP(KeepsThresholds, PseudoRule, PodRule, Method):
    """Label old classes by the teacher where it is certain, and keep pooled features of all depths in place.

    Source: Douillard et al., CVPR 2021: local POD eq. 3-6, pseudo-labels eq. 7-8, adaptive factor eq. 9. The defaults
    are those of the authors' code on VOC, whose entropies and thresholds differ from the paper's.
    """

    uses_teacher: ClassVar[bool] = True
    reads_before_activation: ClassVar[bool] = True

    init_background: bool = True
    """Start the new classifiers from the background's, as MiB does."""

    def __post_init__(self) -> None:
        if self.unbiased_ce and (self.pseudo == "confidence" or self.rejected != "ignored"):
            raise ValueError(
                "unbiased_ce: it says how pixels that are not accepted are learnt, so it does not go with "
                "pseudo=confidence, rejected=kept or rejected=soft"
            )
        super().__post_init__()

    def prepare_model(self, model, step):
        super().prepare_model(model, step)
        if self.init_background:
            init_backgrounds(model, step)

    def losses(self, batch, ctx):
        student, teacher = ctx.compare(batch, taps=("before_activation",) if ctx.taught(batch) else ())
        own, known = student[batch.branch].logits, teacher.get(batch.branch)
        terms, label = pseudo_terms(own, known, batch, ctx, self, self.thresholds)
        learnt = pixelwise_losses(terms, own, label, known and known.logits)
        yield learnt | pod_term(student, teacher, ctx, self)
