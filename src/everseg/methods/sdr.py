"""Sparse and Disentangled Representations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from everseg.labels import ignored_id
from everseg.losses import prototypes as by_class
from everseg.losses.bilinear import resized_at
from everseg.losses.pixelwise import full_precision
from everseg.methods.base import Method
from everseg.methods.running_prototypes import RunningPrototypes
from everseg.methods.terms import Weight, at_label_size, background_terms, init_backgrounds


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
        self.prototypes = RunningPrototypes(authors=self.form == "authors")

    def prepare_model(self, model, step):
        super().prepare_model(model, step)
        if self.init_background:
            init_backgrounds(model, step)

    def begin_step(self, ctx):
        self.prototypes.begin_step(ctx)

    def losses(self, batch, ctx):
        teacher, student = ctx.teach(batch), ctx.student(batch)
        own = background_terms(student.logits, teacher, batch, ctx, kd_weight=self.kd_weight)
        terms = at_label_size(own, student, batch, teacher)
        features = full_precision(student.features["encoder"])
        label = by_class.label_at(batch.label, features.shape[2:])
        ignored = ignored_id(student.logits.shape[1])
        rows, count = self.prototypes.collect(features.detach(), label, batch.branch, ctx)
        if teacher is None:
            yield terms
            return
        scrambled = self.form == "authors"
        how = {"background": self.attract_background, "scrambled": scrambled}
        pulled = by_class.attraction(features, label, rows, normalise=self.normalise, nested=scrambled, **how)
        terms["attraction"] = self.attraction_weight * pulled
        if self.separation == "distance":
            pushed = by_class.repulsion(features, label, len(rows), normalise=self.normalise, **how)
        else:
            largest = self.separation == "orthogonal-largest"
            pushed = by_class.orthogonality(features, label, rows, largest=largest, **how)
        terms["repulsion"] = self.repulsion_weight * pushed
        shape: dict[str, Any] = {
            "norm": self.sparsity_norm,
            "shrink": self.sparsity_shrink,
            "measure": self.sparsity_measure,
            "ignored": ignored,
        }
        terms["sparsity"] = self.sparsity_weight * by_class.sparsity(features, label, **shape)
        # Without a background the pixels of old classes are ignored ones: nothing says where they are.
        if ctx.step.spaces[batch.branch].background == 0:
            ids = resized_at(teacher.logits, batch.label.shape[1:], features.shape[2:]).argmax(dim=1)
            old = ctx.step.num_old(batch.branch)
            labelled = ctx.step.protocol == "sequential"
            # A class without features has no prototype, as all old ones in a model that another method has taught.
            hidden = by_class.hidden_label(
                label, ids, old, labelled=labelled, known=count > 0, ignored=ignored
            )
            kept = by_class.matching(features, hidden, rows, per_pixel=self.match_pixels, scrambled=scrambled)
            terms["matching"] = self.matching_weight * kept
        yield terms

    def state_dict(self):
        return self.prototypes.state_dict()

    def load_state_dict(self, state):
        self.prototypes.load_state_dict(state)
