"""Loss terms that several methods share."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from everseg.losses import (
    Term,
    binary_cross_entropy,
    cross_entropy,
    distillation,
    pixelwise_losses,
    unbiased_cross_entropy,
    unbiased_distillation,
)
from everseg.losses.pixelwise import Over
from everseg.methods.base import StepContext
from everseg.models.blocks import PRE, is_stage
from everseg.models.model import SegmentationModel, init_from_background
from everseg.scenarios.steps import Step
from everseg.types import Batch, LossTerms, SegOutput

Terms = dict[str, Term]
"""Pixel-wise losses by name, not yet evaluated."""
Weight = Annotated[float, Field(ge=0)]
"""Type of a term's weight: checked where a configuration is read."""
Positive = Annotated[float, Field(gt=0)]


def label_terms(
    logits: Tensor, batch: Batch, ctx: StepContext, *, bce: bool = False, unbiased: bool = False
) -> Terms:
    """Build the term that learns the labels.

    Without class weights it is the mean over all pixels, ignored ones adding 0, as in MiB's code. Where the step has
    class weights, the cross-entropy is the weighted mean over the pixels that are not ignored, sum(w nll) / sum(w),
    as in MDIL's code; with `bce` they weigh each class's sigmoid, and the mean is over the number of those pixels.

    Args:
        logits: student, small, (B, C, h, w); only its shape and type matter.
        batch: the branch.
        ctx: says how many outputs are old, and holds the class weights.
        bce: sigmoid cross-entropy summed over classes; wins over `unbiased`, as in the authors' code.
        unbiased: MiB's cross-entropy, where the background label stands for background or any old class.

    Returns:
        {"bce": term} or {"ce": term}. `unbiased` has no effect where nothing is old (first step, new branch), where
        nothing is new, or where the branch has no background: the term is the plain loss then.
    """
    weights = ctx.step.class_weights.get(batch.branch)
    options: dict[str, Any] = {}
    if weights is not None:
        options["weight"] = _on_device(tuple(weights), logits.device)
    over: Over = "all" if weights is None else "valid"
    if bce:
        return {"bce": Term(binary_cross_entropy, options=options, over=over)}
    # The unbiased form needs an old and a new class, and channel 0 as background.
    num_old = ctx.step.num_old(batch.branch)
    if unbiased and 0 < num_old < logits.shape[1] and has_background(ctx.step, batch.branch):
        return {"ce": Term(unbiased_cross_entropy, options={"num_old": num_old, **options}, over=over)}
    return {"ce": Term(cross_entropy, options=options, over=over)}


@lru_cache(maxsize=16)
def _on_device(weights: tuple[float, ...], device: torch.device) -> Tensor:
    """Class weights, copied to the device once: a copy makes the host wait."""
    return torch.tensor(weights, dtype=torch.float64, device=device)


def background_terms(
    logits: Tensor,
    teacher: SegOutput | None,
    batch: Batch,
    ctx: StepContext,
    *,
    kd_weight: float,
    alpha: float = 1.0,
    unbiased_ce: bool = True,
    unbiased_kd: bool = True,
    bce: bool = False,
) -> Terms:
    """MiB's two terms inside one branch: the labels', and the distillation of what the teacher knew of it.

    Args:
        logits: student, small, (B, C, h, w).
        teacher: the teacher's output of the same branch; None where it never met it.

    Returns:
        "ce" (or "bce"), and "kd" where there is a teacher.
    """
    terms = label_terms(logits, batch, ctx, bce=bce, unbiased=unbiased_ce)
    if teacher is not None:
        # Without new classes both forms are the same. Without a background there is no old output that could have
        # covered the new classes.
        hidden = logits.shape[1] > teacher.logits.shape[1] and has_background(ctx.step, batch.branch)
        loss = unbiased_distillation if unbiased_kd and hidden else distillation
        terms["kd"] = Term(loss, options={"alpha": alpha}, weight=kd_weight)
    return terms


def at_label_size(
    terms: Mapping[str, Term], student: SegOutput, batch: Batch, teacher: SegOutput | None = None
) -> LossTerms:
    """Evaluate terms of one branch at the label's size, bilinearly and in at least float32, a band at a time."""
    target = None if teacher is None else teacher.logits
    return pixelwise_losses(terms, student.logits, batch.label, target)


def over_branches(
    own: Mapping[str, Term],
    others: Mapping[str, Term],
    student: Mapping[str, SegOutput],
    teacher: Mapping[str, SegOutput],
    batch: Batch,
) -> LossTerms:
    """Evaluate terms on the batch's own branch, and on every other branch that the teacher was run through.

    Args:
        own: terms of the batch's branch; may be empty.
        others: terms of each of the other branches. None of them may read the label: it is not in their label space.
        student: the student's outputs of all these branches.
        teacher: the teacher's outputs of the branches it knows.

    Returns:
        One scalar per name. A name that occurs in several branches gets their sum.
    """
    total: LossTerms = {}
    for branch in dict.fromkeys((batch.branch, *teacher)):  # the own branch first, each once
        terms = own if branch == batch.branch else others
        if terms:
            found = at_label_size(terms, student[branch], batch, teacher.get(branch))
            total |= {name: total[name] + value if name in total else value for name, value in found.items()}
    return total


def stage_maps(output: SegOutput, *, before_activation: bool) -> dict[str, Tensor]:
    """The maps of the encoder's stages by name, finest first.

    Args:
        output: of student or teacher, run with `before_activation` where it is asked for here.
        before_activation: the map before the stage's last activation, where the stage has one.
    """
    maps = output.features
    return {
        name: maps.get(name + PRE, map) if before_activation else map
        for name, map in maps.items()
        if is_stage(name)
    }


def init_backgrounds(model: SegmentationModel, step: Step, *, biases: bool = True) -> None:
    """MiB's classifier initialisation in every branch that grows and has a background; `biases` as there."""
    for branch, number in step.grows.items():
        if number and step.num_old(branch) and has_background(step, branch):
            init_from_background(model, branch, biases=biases)


def has_background(step: Step, branch: str) -> bool:
    """Whether output 0 of a branch is the background, as MiB's forms take it to be."""
    return step.spaces[branch].background == 0
