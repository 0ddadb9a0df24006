"""MDIL across domains and MiB within a domain that grows, for sequences of new classes and new domains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from everseg.losses import Term, kl_divergence
from everseg.methods.base import Method
from everseg.methods.mdil import branch_groups, grow_from_previous
from everseg.methods.terms import (
    Positive,
    Weight,
    background_terms,
    init_backgrounds,
    over_branches,
)


@dataclass(kw_only=True)
class MDILMiB(Method):
    """Combine both methods: MiB holds a branch that grows, MDIL holds the branches of other domains.

    Where a step brings a new domain this is `mdil`; where classes are added in the only domain it is `mib`, its
    shared weights at MDIL's small rate.

    Source: Cermelli et al., CVPR 2020, and Garg et al., WACV 2022, in their corrected forms; the combination is
    everseg's.
    """

    uses_teacher: ClassVar[bool] = True

    kd_weight: Weight = 0.1
    """Weight of MDIL's distillation, summed over the old branches (paper: 0.1)."""
    background_kd_weight: Weight = 10.0
    """Weight of MiB's distillation inside the branch that grows (paper: 10)."""
    alpha: Positive = 1.0
    """MiB's factor on the teacher's logits; above 1 hardens the targets (paper: 1)."""
    shared_lr_scale: Positive = 0.01
    """Learning rate of the shared weights relative to the trained branch's, after the first step."""
    keep_shared_statistics: bool = True

    def prepare_model(self, model, step):
        super().prepare_model(model, step)
        init_backgrounds(model, step)

    def grow(self, model, step):
        grow_from_previous(model, step)

    def param_groups(self, model, step):
        return branch_groups(self, model, step, self.shared_lr_scale)

    def losses(self, batch, ctx):
        student, teacher = ctx.compare(batch)
        own = background_terms(
            student[batch.branch].logits,
            teacher.get(batch.branch),
            batch,
            ctx,
            kd_weight=self.background_kd_weight,
            alpha=self.alpha,
        )
        others = {"kd_domains": Term(kl_divergence, weight=self.kd_weight)}
        yield over_branches(own, others, student, teacher, batch)
