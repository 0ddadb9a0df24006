"""Parts of PLOP that other methods share: labels from the teacher, thresholds for them, and local POD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from everseg.errors import ConfigError
from everseg.labels import ignored_id
from everseg.losses import (
    Term,
    accepted_share,
    certainty_histogram,
    histogram_thresholds,
    local_pod,
    pseudo_labels,
    soft_uncertain,
)
from everseg.losses.pod import Cells, Channels
from everseg.losses.pseudo import EntropyNorm, Measure
from everseg.losses.thresholds import BINS, Median
from everseg.methods.base import Method, StepContext
from everseg.methods.terms import Terms, Weight, has_background, label_terms, stage_maps
from everseg.types import Batch, LossTerms, SegOutput

Pseudo = Literal["entropy", "median", "threshold", "confidence", "naive", "none"]
"""How old pixels are labelled; the names are those of the authors' option `--pseudo`."""
COUNTED: dict[Pseudo, Measure] = {"entropy": "entropy", "median": "probability"}
"""What is counted before a step, to find a threshold of each class."""
Share = Annotated[float, Field(ge=0, le=1)]
Scales = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]


@dataclass(kw_only=True)
class _Rule:
    """Settings that a method has as hyper-parameters of the same names: it derives from the class, or names some."""

    @classmethod
    def of(cls, method: Method, **others: Any) -> Self:
        """Read the hyper-parameters of a method; those it does not have keep their defaults, or get `others`."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: getattr(method, name) for name in names if hasattr(method, name)} | others)


@dataclass(kw_only=True)
class EntropyLabels(_Rule):
    """Hyper-parameters of every method that gives old pixels the teacher's class where its entropy is low."""

    threshold: Weight = 0.001
    """Least threshold of the entropy below which the teacher's class is accepted."""
    median: Median = "official"
    """How a class's threshold follows from its histogram: the loop of PLOP's authors over the bins, which adds bin
    numbers instead of counts, or the exact median."""
    entropy_norm: EntropyNorm = "code"
    """Scale of the entropy: the H / (K ln K ln C) of PLOP's code, or its paper's H / ln K."""
    adaptive_factor: bool = True
    """Multiply each image's classification loss by its share of accepted old pixels."""


@dataclass(kw_only=True)
class PseudoRule(EntropyLabels):
    """All that can be said of which labels old pixels get and how they are learnt."""

    pseudo: Pseudo = "entropy"
    """Accept the teacher's class by its entropy, or its probability, against a threshold of each class ("median": of
    at most `threshold`, the authors' default 0.9); by its probability against `threshold` ("threshold"); always,
    weighted by its probability ("confidence") or not ("naive"); or never ("none")."""
    bins: Annotated[int, Field(ge=1)] | None = None
    """Bins of the histograms that thresholds come from; null = 100 for "entropy", 20 for "median"."""
    finite_thresholds: bool = False
    """Replace thresholds of nan (rejects everything) and inf (accepts everything) by the base."""
    rejected: Literal["ignored", "kept", "soft"] = "ignored"
    """Old pixels that are not accepted: ignored, learnt as background, or the authors' soft term."""
    learn: Literal["all", "agreeing", "new"] = "all"
    """Pixels that are learnt: all; without accepted ones that contradict the label; or those of new classes alone."""
    min_factor: Share = 0.0
    """Least adaptive factor."""
    empty_factor: Share | None = None
    """Adaptive factor of an image without old pixels; null = 0, as in the authors' code: nothing of it is learnt."""
    unbiased_ce: bool = False
    """Learn what is not accepted by MiB's unbiased cross-entropy."""


@dataclass(kw_only=True)
class PodWeights(_Rule):
    """Hyper-parameters of every method that holds features and logits by local POD."""

    pod_weight: Weight = 0.01
    """Factor of local POD on the encoder's stages and the decoder's map (VOC 0.01, ADE 0.001)."""
    pod_logits_weight: Weight | None = 0.0005
    """Factor of local POD on the logits (VOC 0.0005, ADE 0.00001); null leaves them out."""
    pod_schedule: bool = True
    """Multiply POD by sqrt(all classes / new classes)."""


@dataclass(kw_only=True)
class PodRule(PodWeights):
    """All that can be said of what local POD compares and how."""

    pod: Literal["local", "spatial"] = "local"
    """Cells at several scales, or sums over whole rows and columns, without the logits."""
    pod_stages: Annotated[int, Field(ge=0)] | None = None
    """Compare only so many of the encoder's stages, the last ones; null = all."""
    pod_scales: Scales = (1, 2, 4)
    """Numbers of cells along each axis."""
    pod_square: bool = True
    """Square the maps before they are pooled."""
    pod_cells: Cells = "both"
    """Cells share height and width; or the width alone, as in the authors' code. Square maps give the same."""
    pod_new_logits: Channels = "sum"
    """New classes' logits are added to the background's before the comparison, or left out ("trim")."""


class KeepsThresholds:
    """What a method with `find_thresholds` has beside its losses: the step's thresholds, safe over a restart."""

    def __post_init__(self) -> None:
        self.thresholds: dict[str, Tensor] = {}
        """Branch -> (C,), from `begin_step` to `end_step`."""

    def begin_step(self, ctx: StepContext) -> None:
        """Find the thresholds, unless they come from a checkpoint inside this step."""
        if not self.thresholds:
            self.thresholds = find_thresholds(ctx, PseudoRule.of(self))  # type: ignore[arg-type]

    def end_step(self, ctx: StepContext) -> None:
        """Forget them: they belong to the step."""
        self.thresholds = {}

    def state_dict(self) -> dict[str, Tensor]:
        """What a restart inside the step needs."""
        return {f"thresholds/{branch}": value for branch, value in self.thresholds.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.thresholds = {key.removeprefix("thresholds/"): value.clone() for key, value in state.items()}


def hides_old(ctx: StepContext, branch: str) -> bool:
    """Whether old classes may stand under the background label of a branch, where the teacher sees them."""
    old, every = ctx.step.num_old(branch), ctx.step.spaces[branch].num_classes
    return ctx.teacher is not None and 0 < old < every and has_background(ctx.step, branch)


def find_thresholds(ctx: StepContext, rule: PseudoRule) -> dict[str, Tensor]:
    """Find the thresholds of every trained branch that hides old classes: one teacher pass over an epoch's batches.

    The histograms of all processes are added, so they agree on the thresholds.

    Returns:
        Branch -> (C,); {} where the rule needs none.
    """
    measure = COUNTED.get(rule.pseudo)
    branches = [branch for branch in ctx.step.trained_branches if hides_old(ctx, branch)]
    if measure is None or not branches:
        return {}
    bins = rule.bins or BINS[measure]
    device = next(ctx.module.parameters()).device
    classes = {branch: ctx.step.spaces[branch].num_classes for branch in branches}
    counts = {b: torch.zeros(number, bins, dtype=torch.int64, device=device) for b, number in classes.items()}
    for batch in ctx.epoch_batches():
        teacher = ctx.teach(batch) if batch.branch in counts else None
        if teacher is not None:
            counts[batch.branch] += certainty_histogram(
                teacher.logits,
                batch.label,
                num_classes=classes[batch.branch],
                measure=measure,
                bins=bins,
                norm=rule.entropy_norm,
            )
    return {
        branch: histogram_thresholds(
            ctx.all_reduce(count),
            rule.threshold,
            measure=measure,
            median=rule.median,
            finite=rule.finite_thresholds,
        )
        for branch, count in counts.items()
    }


def pseudo_terms(
    logits: Tensor,
    teacher: SegOutput | None,
    batch: Batch,
    ctx: StepContext,
    rule: PseudoRule,
    thresholds: Mapping[str, Tensor],
    *,
    epsilon: float = 1e-6,
) -> tuple[Terms, Tensor]:
    """Build the terms that learn the labels, and the labels (B, H, W) they are to be evaluated on.

    Args:
        logits: student, small, (B, C, h, w); only its shape and type matter.
        teacher: the teacher's output of the batch's branch; None where it never met it.
        batch: images and labels.
        ctx: of the step.
        rule: how old pixels are labelled.
        thresholds: result of `find_thresholds`.
        epsilon: added to the number of old pixels in the adaptive factor.

    Returns:
        Terms, and labels. The terms are "ce"; with `unbiased_ce` also "pseudo", the accepted old pixels, which "ce"
        then leaves out; with `rejected="soft"` also "soft". Where nothing old is hidden they are the plain
        cross-entropy and the batch's labels.
    """
    label, num_old = batch.label, ctx.step.num_old(batch.branch)
    if teacher is None or not hides_old(ctx, batch.branch):
        return label_terms(logits, batch, ctx), label
    old = label < num_old
    measure = {"naive": None, "confidence": None, "threshold": "probability"}.get(
        rule.pseudo, COUNTED.get(rule.pseudo)
    )
    terms, factor = label_terms(logits, batch, ctx, unbiased=rule.unbiased_ce), None
    if rule.pseudo != "none":
        found = pseudo_labels(
            teacher.logits,
            label,
            num_classes=logits.shape[1],
            measure=measure,  # type: ignore[arg-type]
            thresholds=thresholds[batch.branch] if rule.pseudo in COUNTED else rule.threshold,
            norm=rule.entropy_norm,
            keep_rejected=rule.rejected == "kept" or rule.unbiased_ce,
            agreeing=rule.learn == "agreeing",
            confidence=rule.pseudo == "confidence",
        )
        label = found.label
        if rule.adaptive_factor:
            factor = accepted_share(
                found.old,
                found.accepted,
                minimum=rule.min_factor,
                epsilon=epsilon,
                empty=rule.empty_factor,
                dtype=logits.dtype,
            )
        if rule.unbiased_ce:
            # A rejected old pixel stays "background or any old class"; an accepted one is exactly its class.
            plain = label_terms(logits, batch, ctx)["ce"]
            terms = {"ce": replace(terms["ce"], mask=~found.kept), "pseudo": replace(plain, mask=found.kept)}
        elif found.confidence is not None:
            terms["ce"] = replace(terms["ce"], mask=found.confidence)
        if rule.rejected == "soft":
            terms["soft"] = Term(soft_uncertain, mask=old & ~found.kept)
    if rule.learn == "new":
        label = label.masked_fill(old, ignored_id(logits.shape[1]))
    return {name: replace(term, image_weight=factor) for name, term in terms.items()}, label


def pod_term(
    student: Mapping[str, SegOutput], teacher: Mapping[str, SegOutput], ctx: StepContext, rule: PodRule
) -> LossTerms:
    """Local POD of the encoder's stages, the decoder's map and the logits; the mean over the teacher's branches.

    Returns:
        {"pod": scalar}, weights applied; {} without a teacher, or where nothing is compared.
    """
    distances = []
    for branch, output in teacher.items():
        own = student[branch]
        ours, theirs = (
            {
                **_last(stage_maps(one, before_activation=True), rule.pod_stages),
                "decoder": one.features["decoder"],
            }
            for one in (own, output)
        )
        compared = [(rule.pod_weight, ours[name], theirs[name]) for name in ours]
        if rule.pod_logits_weight is not None and rule.pod == "local":
            compared.append((rule.pod_logits_weight, own.logits, output.logits))
        number, new = own.logits.shape[1], own.logits.shape[1] - output.logits.shape[1]
        scale = (number / new) ** 0.5 if rule.pod_schedule and new else 1.0
        distances += [
            scale * weight * _distance(ours, mapped, rule) / len(compared)
            for weight, ours, mapped in compared
        ]
    return {"pod": torch.stack(distances).sum() / len(teacher)} if distances else {}


def _last(maps: Mapping[str, Tensor], number: int | None) -> dict[str, Tensor]:
    """Keep the last maps; all where no number is given."""
    return dict(list(maps.items())[0 if number is None else max(0, len(maps) - number) :])


def _distance(features: Tensor, teacher_features: Tensor, rule: PodRule) -> Tensor:
    if rule.pod == "spatial":
        return local_pod(features, teacher_features, scales=(1,), square=rule.pod_square, pool="sum")
    try:
        return local_pod(
            features,
            teacher_features,
            scales=rule.pod_scales,
            square=rule.pod_square,
            cells=rule.pod_cells,
            channels=rule.pod_new_logits,
        )
    except ValueError as error:  # what the configuration asks for does not fit the maps
        key = (
            "pod_cells"
            if rule.pod_cells == "width" and features.shape[2] < features.shape[3]
            else "pod_scales"
        )
        raise ConfigError(f"method.{key}: {error}") from error
