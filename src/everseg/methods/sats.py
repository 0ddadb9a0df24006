"""SATS: self-attention transfer for networks with attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from everseg.losses import pixelwise_losses
from everseg.losses.attention import Keys, attention_distance
from everseg.losses.pseudo import EntropyNorm
from everseg.losses.thresholds import Median
from everseg.methods.base import Method
from everseg.methods.plop_terms import PseudoRule, find_thresholds, pseudo_terms
from everseg.methods.terms import Weight, background_terms, init_backgrounds
from everseg.models.blocks import ATTENTION


@dataclass(kw_only=True)
class SATS(Method):
    """PLOP's labels and MiB's distillation, and what each class's region attends to is kept in every block.

    Source: Qiu et al., Pattern Recognition 2023. No numbers of its authors' code were at hand: built from the formulas.
    """

    uses_teacher: ClassVar[bool] = True
    reads_attention: ClassVar[bool] = True

    attention_weight: Weight = 20.0
    """Weight of the distance between student's and teacher's attention, mean over the blocks (paper: 20)."""
    attention_keys: Keys = "cells"
    """Compare the attention that a class's region pays to every cell, or its sum over every class's region."""
    kd_weight: Weight = 20.0
    """Weight of MiB's distillation (paper: 20)."""
    threshold: Weight = 0.001
    """Least threshold of the entropy below which the teacher's class is accepted."""
    median: Median = "official"
    """PLOP's loop over the bins, which adds bin numbers instead of counts, or the exact median."""
    entropy_norm: EntropyNorm = "code"
    """Scale of the entropy: PLOP's code's H / (K ln K ln C), or its paper's H / ln K."""
    adaptive_factor: bool = True
    """Multiply each image's cross-entropy by its share of accepted old pixels."""
    init_background: bool = True
    """Start the new classifiers from the background's, as MiB does."""

    def __post_init__(self) -> None:
        self.thresholds: dict[str, torch.Tensor] = {}

    def prepare_model(self, model, step):
        super().prepare_model(model, step)
        if self.init_background and not self.pretune:
            init_backgrounds(model, step)

    def begin_step(self, ctx):
        if not self.thresholds:  # else they come from a checkpoint inside this step
            self.thresholds = find_thresholds(ctx, PseudoRule.of(self))

    def losses(self, batch, ctx):
        student, teacher = ctx.compare(batch, taps=("attention",) if ctx.taught(batch) else ())
        own, known = student[batch.branch], teacher.get(batch.branch)
        terms, label = pseudo_terms(own.logits, known, batch, ctx, PseudoRule.of(self), self.thresholds)
        kept = background_terms(own.logits, known, batch, ctx, kd_weight=self.kd_weight)
        terms |= {name: term for name, term in kept.items() if name == "kd"}
        found = pixelwise_losses(terms, own.logits, label, known and known.logits)
        distances = [
            attention_distance(
                student[branch].features[name], taught, label,
                num_classes=own.logits.shape[1], keys=self.attention_keys,
            )
            for branch, output in teacher.items()
            for name, taught in output.features.items()
            if name.startswith(ATTENTION)
        ]  # fmt: skip
        if distances:
            found["attention"] = self.attention_weight * torch.stack(distances).mean()
        yield found

    def end_step(self, ctx):
        self.thresholds = {}  # they belong to the step

    def state_dict(self):
        return {f"thresholds/{branch}": value for branch, value in self.thresholds.items()}

    def load_state_dict(self, state):
        self.thresholds = {key.removeprefix("thresholds/"): value.clone() for key, value in state.items()}
