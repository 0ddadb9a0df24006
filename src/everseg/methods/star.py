"""STAR: replay of prototypes that repairs the distribution of the training samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from everseg.errors import ConfigError
from everseg.losses import binary_negatives
from everseg.losses.pixelwise import full_precision
from everseg.losses.prototypes import label_at
from everseg.losses.repair import class_shares, masked_feature_distillation, prototype_contrast
from everseg.methods.base import Method, StepContext, groups_of
from everseg.methods.old_features import OldFeatures, moments_of, old_labels
from everseg.methods.sigmoids import (
    Unlabelled,
    candidate_labels,
    check_head,
    check_step,
    first_new,
    new_classes_term,
    rest_dropout,
    unfit_steps,
)
from everseg.methods.terms import Positive, Weight, at_label_size
from everseg.models.heads import Head
from everseg.types import Batch, LossTerms, SegOutput


@dataclass(kw_only=True)
class STAR(Method):
    """Learn each class by a sigmoid of its own, beside features drawn of the old classes and their background.

    Source: Chen et al., NeurIPS 2023, with the weights of the authors' code. With `scenario.memory` it is STAR-M.
    """

    uses_teacher: ClassVar[bool] = True

    pos_weight: Positive = 4.0
    """Factor of the loss where the label is the class (authors: 4, ADE20K 30)."""
    feature_weight: Weight = 5.0
    """Weight of the distillation of features where the teacher sees an old class (authors: 5)."""
    contrast_weight: Weight = 0.05
    """Weight of the inverse distance of new classes from old prototypes (authors: 0.05)."""
    new_lr_scale: Positive = 10.0
    """Factor on the learning rate of the new classifier in later steps, beside `train.lr_factors` (authors: 10)."""
    old_logit: Annotated[float, Field(ge=0)] = 0.5
    """Logit from which on the teacher sees an old class (authors: 0.5, which they write as if of a probability)."""
    background_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of the old steps' background that each new class takes away (authors: 0.01)."""
    noise: Literal["fixed", "authors"] = "fixed"
    """A class's features spread around its own prototype; in the authors' code those of later steps' classes are
    measured around other classes'."""
    unlabelled: Unlabelled = "left out"
    """Void pixels teach the new classes nothing, or are "negative" for all of them, as in the authors' code."""
    freeze_norm: bool = True
    """Freeze the affine weights of all norms from step `freeze_from` on (authors: yes)."""

    def __post_init__(self) -> None:
        self.old = OldFeatures()

    def unfit(self, steps):
        return unfit_steps("star", steps)

    def heads(self, step):
        branch = check_step("star", step)
        return {branch: Head(background="constant")} if step.is_first else {}

    def prepare_model(self, model, step):
        super().prepare_model(model, step)
        check_head("star", model, step)
        if not step.is_first:
            rest_dropout(model)

    def param_groups(self, model, step):
        if step.is_first:
            return super().param_groups(model, step)
        return groups_of(model, (model.head(step.branch).classifiers[-1], self.new_lr_scale))

    def begin_step(self, ctx):
        if ctx.step.is_first:
            self.old = OldFeatures()
            return
        known = 0 if self.old.kept is None else len(self.old.kept.number)
        if known != ctx.step.num_old(ctx.step.branch):
            raise ConfigError(
                f"method 'star' needs statistics of the {ctx.step.num_old(ctx.step.branch) - 1} old classes, and has "
                f"those of {max(known - 1, 0)}; train the steps before with star, too"
            )
        self.old.make_plan(ctx, self.old_logit, self.background_decay)

    def losses(self, batch, ctx):
        teacher, student = ctx.teach(batch), ctx.student(batch)
        if teacher is None:
            terms = {"mbce": new_classes_term(batch, ctx, self.pos_weight, self.unlabelled)}
            yield at_label_size(terms, student, batch)
            return
        label = old_labels(teacher.logits, batch.label, student.logits.shape[1], self.old_logit)
        found = self._repaired(student, label, batch, ctx)
        features, held = (full_precision(output.features["decoder"]) for output in (student, teacher))
        # 1 where the label is background and the teacher sees an old class, else 0; then shares of that at the cells.
        region = ((batch.label == 0) & (label > 0)).long()
        mask = class_shares(region, features.shape[2:], 1, 2)[:, 0].to(features)
        found["features"] = self.feature_weight * masked_feature_distillation(features, held, mask)
        first = first_new(ctx.step, batch.branch)
        masks = class_shares(batch.label, features.shape[2:], first, student.logits.shape[1])
        assert self.old.kept is not None
        pushed = prototype_contrast(features, masks, self.old.kept.prototypes)
        found["contrast"] = self.contrast_weight * pushed
        yield found

    def _repaired(self, student: SegOutput, label: Tensor, batch: Batch, ctx: StepContext) -> LossTerms:
        """The loss of the new classes over the images, the features drawn, and the background once more."""
        plan, new = self.old.plan, ctx.module.head(batch.branch).classifiers[-1]
        assert plan is not None
        logits = student.logits[:, first_new(ctx.step, batch.branch) :]
        seen = label_at(label, logits.shape[2:], centred=True)
        background = (seen == 0).to(logits)  # for the teacher too: it sees no old class there
        # Over all processes, which average their gradients afterwards.
        at = ctx.all_reduce(
            torch.stack([background.sum(), background.new_tensor(seen.numel()), logits.new_ones(())])
        )
        drawn = plan.share
        again = plan.background * at[0] / at[1]
        share = 1 / (1 + drawn + again)
        terms = {
            "mbce": new_classes_term(
                batch, ctx, self.pos_weight, self.unlabelled, share.expand(len(batch.label))
            )
        }
        found = at_label_size(terms, student, batch)
        if drawn:
            features = self.old.draw(cast(Tensor, new.weight))
            found["drawn"] = share * drawn * binary_negatives(new(features))
        each = binary_negatives(logits, reduction="none") * background
        found["background"] = share * again * each.sum() * at[2] / at[0].clamp(min=1)
        return found

    def end_step(self, ctx):
        moments = moments_of(ctx, ctx.epoch_batches())
        first = first_new(ctx.step, ctx.step.branch)
        self.old.keep(moments, moments, first, authors=self.noise == "authors")
        self.old.plan = None

    def memory_labels(self, batch, ctx, threshold):
        return candidate_labels(ctx.module(batch.image, (batch.branch,)), batch, threshold)

    def state_dict(self):
        return self.old.state_dict()

    def load_state_dict(self, state):
        self.old.load_state_dict(state)
