"""REMINDER: PLOP, with the old classes that resemble a new one distilled on its pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from everseg.errors import ConfigError
from everseg.losses import pixelwise_losses
from everseg.methods.base import Method
from everseg.methods.plop_terms import (
    EntropyLabels,
    PodRule,
    PodWeights,
    PseudoRule,
    find_thresholds,
    pod_term,
    pseudo_terms,
)
from everseg.methods.prototypes import class_means, learns_new, similarity_term
from everseg.methods.terms import Positive, Weight, init_backgrounds


@dataclass(kw_only=True)
class REMINDER(EntropyLabels, PodWeights, Method):
    """PLOP, and on each new class's pixels a distillation of the old classes that resemble it.

    Source: Phan et al., CVPR 2022 (class-similarity-weighted distillation), on top of Douillard et al., CVPR 2021. The
    resemblance is a cosine between the class's mean feature in the batch and the old classes' prototypes.
    """

    uses_teacher: ClassVar[bool] = True
    reads_before_activation: ClassVar[bool] = True

    csw_weight: Weight = 0.5
    """Weight of the class-similarity-weighted distillation (paper's code: 0.5)."""
    delta: Weight = 0.0
    """Old classes whose share of the resemblance is below delta / K are left out (VOC 0, ADE 1)."""
    temperature: Positive = 3.0
    """Temperature of student and teacher in that distillation."""
    empty: Literal["zero", "nan"] = "zero"
    """Loss where a batch has no new pixel, and factor of an image without old pixels; "nan" as in the authors' code,
    which then stops the run."""
    init_background: bool = True
    """Start the new classifiers from the background's, as MiB does."""

    def __post_init__(self) -> None:
        self.state: dict[str, dict[str, Tensor]] = {"thresholds": {}, "prototypes": {}}

    def prepare_model(self, model, step):
        super().prepare_model(model, step)
        if self.init_background:
            init_backgrounds(model, step)

    def begin_step(self, ctx):
        for branch in ctx.step.trained_branches:
            if learns_new(ctx, branch) and branch not in self.state["prototypes"]:
                raise ConfigError(
                    f"method 'reminder': no prototypes (mean features) of the old classes of '{branch}'; train the "
                    "steps before with reminder, too"
                )
        if not self.state["thresholds"]:
            self.state["thresholds"] = find_thresholds(ctx, PseudoRule.of(self))

    def losses(self, batch, ctx):
        student, teacher = ctx.compare(batch, taps=("before_activation",) if ctx.taught(batch) else ())
        own, known = student[batch.branch], teacher.get(batch.branch)
        rule = PseudoRule.of(self, empty_factor=0.0 if self.empty == "zero" else None)
        thresholds = self.state["thresholds"]
        terms, label = pseudo_terms(own.logits, known, batch, ctx, rule, thresholds, epsilon=0.0)
        if known is not None and learns_new(ctx, batch.branch):
            old = self.state["prototypes"][batch.branch]
            terms["csw"] = similarity_term(
                own, old, batch, ctx, weight=self.csw_weight, delta=self.delta, temperature=self.temperature,
                empty=0.0 if self.empty == "zero" else math.nan,
            )  # fmt: skip
        learnt = pixelwise_losses(terms, own.logits, label, known and known.logits)
        yield learnt | pod_term(student, teacher, ctx, PodRule.of(self))

    @torch.no_grad()
    def end_step(self, ctx):
        self.state["thresholds"] = {}
        for branch, means in class_means(ctx).items():
            old = self.state["prototypes"].get(branch)
            self.state["prototypes"][branch] = (
                means if old is None else torch.cat([old.to(means), means[len(old) :]])
            )

    def state_dict(self):
        return {f"{part}/{branch}": v for part, values in self.state.items() for branch, v in values.items()}

    def load_state_dict(self, state):
        self.__post_init__()
        for key, value in state.items():
            part, _, branch = key.partition("/")
            self.state[part][branch] = value.clone()
