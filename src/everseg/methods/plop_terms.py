"""Parts of PLOP that other methods share: labels from the teacher, thresholds for them, and local POD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import torch
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
from everseg.methods.terms import Terms, has_background, label_terms, stage_maps
from everseg.types import Batch, LossTerms, SegOutput

Pseudo = Literal["entropy", "median", "threshold", "confidence", "naive", "none"]
"""How old pixels are labelled; the names are those of the authors' option `--pseudo`."""
COUNTED: dict[Pseudo, Measure] = {"entropy": "entropy", "median": "probability"}
"""What is counted before a step, to find a threshold of each class."""


class _Rule:
    """Settings that a method has as hyper-parameters of the same names."""

    @classmethod
    def of(cls, method: Method, **others: Any) -> Self:
        """Read the hyper-parameters of a method; those it does not have keep their defaults, or get `others`."""
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        return cls(**{name: getattr(method, name) for name in names if hasattr(method, name)} | others)


@dataclass(frozen=True, kw_only=True)
class PseudoRule(_Rule):
    """Which labels old pixels get and how they are learnt; `PLOP` says what each value means."""

    pseudo: Pseudo = "entropy"
    threshold: float = 0.001
    bins: int | None = None
    median: Median = "official"
    finite_thresholds: bool = False
    entropy_norm: EntropyNorm = "code"
    rejected: Literal["ignored", "kept", "soft"] = "ignored"
    learn: Literal["all", "agreeing", "new"] = "all"
    adaptive_factor: bool = True
    min_factor: float = 0.0
    empty_factor: float | None = None
    unbiased_ce: bool = False
    epsilon: float = 1e-6
    """Added to the number of old pixels in the adaptive factor."""


@dataclass(frozen=True, kw_only=True)
class PodRule(_Rule):
    """What local POD compares and how; `PLOP` says what each value means."""

    pod: Literal["local", "spatial"] = "local"
    pod_weight: float = 0.01
    pod_logits_weight: float | None = 0.0005
    pod_scales: tuple[int, ...] = (1, 2, 4)
    pod_square: bool = True
    pod_cells: Cells = "both"
    pod_new_logits: Channels = "sum"
    pod_schedule: bool = True
    pod_stages: int | None = None
    """Only so many of the encoder's last stages, 0 or more; None = all. `PLOP` has no such hyper-parameter: a subclass
    that has one is read, too."""


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
) -> tuple[Terms, Tensor]:
    """Build the terms that learn the labels, and the labels (B, H, W) they are to be evaluated on.

    Args:
        logits: student, small, (B, C, h, w); only its shape and type matter.
        teacher: the teacher's output of the batch's branch; None where it never met it.
        batch: images and labels.
        ctx: of the step.
        rule: how old pixels are labelled.
        thresholds: result of `find_thresholds`.

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
                epsilon=rule.epsilon,
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
