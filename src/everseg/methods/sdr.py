"""Sparse and Disentangled Representations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from everseg.losses import prototypes as by_class
from everseg.losses.bilinear import resized_at
from everseg.losses.pixelwise import full_precision
from everseg.methods.base import Method, StepContext
from everseg.methods.terms import Weight, at_label_size, background_terms, init_backgrounds
from everseg.types import Batch, LossTerms, SegOutput


@dataclass(kw_only=True)
class SDR(Method):
    """Keep every class's encoder features near its running prototype, away from other classes', and sparse.

    MiB's two losses, and four on the encoder's last map: attraction to the prototype of the labelled class, repulsion
    between class means, matching of what the teacher takes for an old class with that class's prototype, and sparsity.
    The prototypes are means over all features met since the first step, over all processes. The background has one
    where its pixels hold nothing else: in the first step of the protocol "disjoint", and in every step of "sequential",
    where old classes are also read from the label instead of the teacher.

    Source: Michieli and Zanuttigh, CVPR 2021, with the weights of the authors' code.
    """

    uses_teacher: ClassVar[bool] = True

    kd_weight: Weight = 100.0
    """Weight of MiB's distillation (paper's code: 100)."""
    attraction_weight: Weight = 1e-3
    """Weight of the distance of features to their class's prototype (paper's code: 0.001)."""
    repulsion_weight: Weight = 1e-3
    """Weight of the inverse distance between class means (paper's code: 0.001)."""
    matching_weight: Weight = 1e-2
    """Weight of the distance of old classes' mean features to their prototypes (paper's code: 0.01)."""
    sparsity_weight: Weight = 1e-3
    """Weight of the sparsity of a pixel's features (paper's code: 0.001)."""
    form: Literal["fixed", "authors"] = "fixed"
    """"authors" restores three slips of the released code: a class's features are gathered with their channels mixed
    where a process has several images, the first class of a batch is not collected where the background is meant, and
    attraction divides by the number of classes once per class."""
    separation: Literal["distance", "orthogonal", "orthogonal-largest"] = "distance"
    """What repels classes: 1 / distance of their means, or the mean or largest product of means with prototypes."""
    normalise: bool = False
    """Attraction and repulsion by distance see features of norm 1."""
    attract_background: bool = True
    """The background takes part in attraction and repulsion."""
    match_pixels: bool = False
    """Matching compares every pixel's features with the prototype, not their mean."""
    sparsity_norm: by_class.Norm = "class_max"
    """What features are divided by before their sparsity is measured."""
    sparsity_shrink: by_class.Shrink = "exponential"
    """What makes large features count more in the sparsity's ratio."""
    sparsity_measure: by_class.Measure = "ratio"
    """Sparsity as the ratio of shrunk to plain sums, as entropy, or as the L1 norm of the raw features."""
    init_background: bool = False
    """Start the new classifiers from the background's, as `mib` (paper's code: off)."""

    def __post_init__(self) -> None:
        self.prototypes: dict[str, tuple[Tensor, Tensor]] = {}
        """Branch -> prototypes (C, D) float64 and numbers of features (C,) int64; 0 for classes not met yet."""
        self._step = -1

    def prepare_model(self, model, step):
        super().prepare_model(model, step)
        if self.init_background:
            init_backgrounds(model, step)

    def begin_step(self, ctx):
        if self._step != ctx.step.index and ctx.step.is_first:  # not in a step that is continued
            self.prototypes = {}
        self._step = ctx.step.index

    def losses(self, batch, ctx):
        teacher, student = ctx.teach(batch), ctx.student(batch)
        own = background_terms(student.logits, teacher, batch, ctx, kd_weight=self.kd_weight)
        terms = at_label_size(own, student, batch, teacher)
        features = full_precision(student.features["encoder"])
        label = by_class.label_at(batch.label, features.shape[2:])
        prototypes = self._collect(features.detach(), label, batch.branch, ctx)
        if teacher is not None:
            terms |= self._feature_terms(features, label, prototypes, batch, teacher, ctx)
        yield terms

    def _collect(self, features: Tensor, label: Tensor, branch: str, ctx: StepContext) -> Tensor:
        """Take a batch's features into the branch's prototypes; returns these."""
        space, authors = ctx.step.spaces[branch], self.form == "authors"
        first = ctx.step.num_old(branch) == 0
        # Only there do pixels labelled background hold no class of another step.
        pure = ctx.step.protocol == "sequential" or (ctx.step.protocol == "disjoint" and first)
        sums, number = by_class.class_sums(features, label, space.num_classes, scrambled=authors)
        collected = by_class.collected(
            number, background=pure or space.background is None, first_dropped=authors
        )
        # One reduction for both: the numbers are exact in float64.
        both = ctx.all_reduce(torch.cat([sums, number[:, None]], dim=1) * collected[:, None])
        rows, count = self.prototypes.get(branch, (both[:0, :-1], number[:0]))
        added = space.num_classes - len(count)  # classes that this branch has not met yet
        rows = torch.cat([rows.to(both), both.new_zeros(added, sums.shape[1])])
        count = torch.cat([count.to(number), number.new_zeros(added)])
        self.prototypes[branch] = by_class.updated_prototypes(rows, count, both[:, :-1], both[:, -1].long())
        return self.prototypes[branch][0]

    def _feature_terms(
        self,
        features: Tensor,
        label: Tensor,
        prototypes: Tensor,
        batch: Batch,
        teacher: SegOutput,
        ctx: StepContext,
    ) -> LossTerms:
        space, scrambled = ctx.step.spaces[batch.branch], self.form == "authors"
        how = {"background": self.attract_background, "scrambled": scrambled}
        pulled = by_class.attraction(
            features, label, prototypes, normalise=self.normalise, nested=scrambled, **how
        )
        if self.separation == "distance":
            pushed = by_class.repulsion(features, label, len(prototypes), normalise=self.normalise, **how)
        else:
            largest = self.separation == "orthogonal-largest"
            pushed = by_class.orthogonality(features, label, prototypes, largest=largest, **how)
        sparse = by_class.sparsity(
            features,
            label,
            norm=self.sparsity_norm,
            shrink=self.sparsity_shrink,
            measure=self.sparsity_measure,
        )
        terms = {
            "attraction": self.attraction_weight * pulled,
            "repulsion": self.repulsion_weight * pushed,
            "sparsity": self.sparsity_weight * sparse,
        }
        if (
            space.background == 0
        ):  # without one, pixels of old classes are ignored: nothing says where they are
            ids = resized_at(teacher.logits, batch.label.shape[1:], features.shape[2:]).argmax(dim=1)
            hidden = by_class.hidden_label(
                label, ids, ctx.step.num_old(batch.branch), labelled=ctx.step.protocol == "sequential"
            )
            matched = by_class.matching(
                features, hidden, prototypes, per_pixel=self.match_pixels, scrambled=scrambled
            )
            terms["matching"] = self.matching_weight * matched
        return terms

    def state_dict(self):
        state = {"step": torch.tensor(self._step)}
        for branch, (prototypes, count) in self.prototypes.items():
            state |= {f"prototypes/{branch}": prototypes, f"count/{branch}": count}
        return state

    def load_state_dict(self, state):
        self._step = int(state["step"])
        branches = [key.partition("/")[2] for key in state if key.startswith("prototypes/")]
        self.prototypes = {
            b: (state[f"prototypes/{b}"].clone(), state[f"count/{b}"].clone()) for b in branches
        }
