"""Completed labels: for deployed models, whose new images label only some of the classes that they show."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from everseg.labels import LabelSpace
from everseg.losses import Term, distillation, pixelwise_losses, pseudo_labels
from everseg.methods.base import Method, StepContext
from everseg.methods.mdil import branch_groups
from everseg.methods.plop_terms import Share
from everseg.methods.terms import Positive, Weight, at_label_size, label_terms, over_branches
from everseg.types import Batch, LossTerms, SegOutput


@dataclass(kw_only=True)
class Complete(Method):
    """For deployed models: missing labels of old classes are the model's own where it is sure, else ignored.

    For images that label only some of the classes that they show. It serves steps that add classes, steps that bring
    more images of known ones, and models without background, which most methods do not. A label is missing where an
    old class may hide: in the background of data that do not label every old class; in a model without background
    where nothing is labelled. There the teacher's class is learnt if its probability is high enough, and the pixel is
    ignored if not, or if the teacher's class is one that the data do label: then label and teacher contradict each
    other. So an old class is never taught to be background. Distillation keeps the teacher's outputs wherever no label
    contradicts its class, so that classes which the new images do not show are kept too. Where a model has several
    branches, distillation through the others holds these, and the weights that they share move slowly.

    Source: everseg's own, of parts from the literature: pseudo-labels by a threshold of the probability, the
    distillation of LwF per pixel, and for several branches that of MDIL, with its slow shared weights.
    """

    uses_teacher: ClassVar[bool] = True

    sure: Share = 0.7
    """Probability from which the teacher's class is believed, in [0, 1]."""
    kd_weight: Weight = 10.0
    """Weight of the distillation."""
    shared_lr_scale: Positive = 0.01
    """Learning rate of the weights that several branches share, relative to the trained branch's, after the first step
    (MDIL: 0.01)."""
    keep_shared_statistics: bool = True

    def param_groups(self, model, step):
        if len(step.spaces) > 1:
            return branch_groups(self, model, step, self.shared_lr_scale)
        return super().param_groups(model, step)

    def losses(self, batch, ctx):
        outputs, taught = ctx.compare(batch)
        student, teacher = outputs[batch.branch], taught.get(batch.branch)
        others = over_branches({}, {"kd": Term(distillation, weight=self.kd_weight)}, outputs, taught, batch)
        if teacher is None:  # the first step, or a new branch: nothing is old
            yield _sum(at_label_size(label_terms(student.logits, batch, ctx), student, batch), others)
            return
        label, kept = self.completed(batch, ctx, teacher)
        # Means over the pixels that count: where most labels are missing, the others still weigh fully.
        terms = {
            "ce": replace(label_terms(student.logits, batch, ctx)["ce"], over="valid"),
            "kd": Term(distillation, weight=self.kd_weight, mask=kept, over="valid"),
        }
        yield _sum(pixelwise_losses(terms, student.logits, label, teacher.logits), others)

    @torch.no_grad()
    def completed(self, batch: Batch, ctx: StepContext, teacher: SegOutput) -> tuple[Tensor, Tensor]:
        """Complete the labels of a batch by the teacher.

        Returns:
            Labels (B, H, W) int64, and where the teacher's outputs are kept (B, H, W) bool.
        """
        space = ctx.step.spaces[batch.branch]
        label = batch.label.long()
        found = pseudo_labels(
            teacher.logits,
            torch.zeros_like(label),
            num_classes=space.num_classes,
            measure=None,
            confidence=True,
        )
        best, sure = found.label, found.confidence
        assert sure is not None
        labelled = self.labelled(ctx, batch.branch)
        unlabelled = label == space.ignored
        kept = unlabelled | (best == label)
        if self.hidden(ctx, batch.branch, space):
            missing = unlabelled if space.background is None else label == space.background
            told = torch.zeros(space.num_classes, dtype=torch.bool, device=label.device)
            told[labelled] = True
            accepted = ~(sure < self.sure) & ~told[best]
            label = torch.where(missing, torch.where(accepted, best, space.ignored), label)
            kept |= missing
        return label, kept

    @staticmethod
    def labelled(ctx: StepContext, branch: str) -> list[int]:
        """Train ids that the step's data label, without the background."""
        background = ctx.step.spaces[branch].background
        found = {
            train_id
            for source in ctx.step.train
            if source.branch == branch
            for train_id in source.lut
            if train_id not in (source.ignored, background)
        }
        return sorted(found)

    def hidden(self, ctx: StepContext, branch: str, space: LabelSpace) -> bool:
        """Whether the data lack a label for some old class."""
        old = {c for c in range(ctx.step.num_old(branch)) if c != space.background}
        return not old <= set(self.labelled(ctx, branch))


def _sum(own: LossTerms, others: LossTerms) -> LossTerms:
    """Add the terms of other branches to those of the same name."""
    return {
        **others,
        **{name: value + others[name] if name in others else value for name, value in own.items()},
    }
