"""Loss terms that several methods share (floor 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from everseg.losses import (
    binary_cross_entropy,
    cross_entropy,
    distillation,
    unbiased_cross_entropy,
    unbiased_distillation,
)
from everseg.losses.pixelwise import upsample
from everseg.methods.base import StepContext
from everseg.models.model import SegmentationModel, init_from_background
from everseg.scenarios.steps import Step
from everseg.types import Batch, LossTerms, SegOutput

Weight = Annotated[float, Field(ge=0)]
"""Type of a term's weight: checked where a configuration is read."""
Positive = Annotated[float, Field(gt=0)]


def at_label_size(logits: Tensor, batch: Batch) -> Tensor:
    """Bring logits (B, C, h, w) to the label's (H, W), bilinearly, in at least float32."""
    return upsample(logits, batch.label.shape[-2:])


def classification(
    logits: Tensor, batch: Batch, ctx: StepContext, *, bce: bool = False, unbiased: bool = False
) -> LossTerms:
    """Build the term that learns the labels.

    Without class weights it is the mean over all pixels, ignored ones adding 0, as in MiB's code. Where the step has
    class weights, the cross-entropy is the weighted mean over the pixels that are not ignored, sum(w nll) / sum(w),
    as in MDIL's code; with `bce` they weigh each class's sigmoid, and the mean is over the number of those pixels.

    Args:
        logits: student at label size, (B, C, H, W).
        batch: labels.
        ctx: tells how many outputs are old, and the class weights.
        bce: sigmoid cross-entropy summed over classes; wins over `unbiased`, as in the authors' code.
        unbiased: MiB's cross-entropy, where the background label stands for background or any old class.

    Returns:
        {"bce": scalar} or {"ce": scalar}. Where nothing is old (first step, new branch) or nothing new, or the branch
        has no background: the plain loss.
    """
    weights = ctx.step.class_weights.get(batch.branch)
    options: dict[str, Any] = {}
    if weights is not None:
        options = {"weight": torch.tensor(weights, dtype=logits.dtype, device=logits.device), "over": "valid"}
    if bce:
        return {"bce": binary_cross_entropy(logits, batch.label, **options)}
    num_old = ctx.step.num_old(batch.branch)
    if unbiased and 0 < num_old < logits.shape[1] and _has_background(ctx.step, batch.branch):
        return {"ce": unbiased_cross_entropy(logits, batch.label, num_old=num_old, **options)}
    return {"ce": cross_entropy(logits, batch.label, **options)}


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
) -> LossTerms:
    """MiB's two terms inside one branch: the labels', and the distillation of what the teacher knew of it.

    Args:
        logits: student at label size, (B, C, H, W).
        teacher: the teacher's output of the same branch; None where it never met it.

    Returns:
        "ce" (or "bce"), and "kd" where there is a teacher.
    """
    terms = classification(logits, batch, ctx, bce=bce, unbiased=unbiased_ce)
    if teacher is not None:
        target = at_label_size(teacher.logits, batch)
        # without new classes both forms are the same; without background the new ones were nothing before
        hidden = logits.shape[1] > target.shape[1] and _has_background(ctx.step, batch.branch)
        loss = unbiased_distillation if unbiased_kd and hidden else distillation
        terms["kd"] = kd_weight * loss(logits, target, alpha=alpha)
    return terms


def init_backgrounds(model: SegmentationModel, step: Step) -> None:
    """MiB's classifier initialisation in every branch that grows and has a background."""
    for branch, number in step.grows.items():
        if number and step.num_old(branch) and _has_background(step, branch):
            init_from_background(model, branch)


def _has_background(step: Step, branch: str) -> bool:
    """Whether output 0 of a branch is the background, as MiB's forms take it to be."""
    return step.spaces[branch].background == 0


def over_branches(
    loss: Callable[[Tensor, Tensor], Tensor],
    student: Mapping[str, SegOutput],
    teacher: Mapping[str, SegOutput],
    batch: Batch,
) -> Tensor:
    """Sum a distillation over every branch the teacher was run through.

    Args:
        loss: (student's logits, teacher's logits), both (B, ., H, W) at label size, to a scalar.
        teacher: at least one branch.
    """
    terms = [
        loss(at_label_size(student[branch].logits, batch), at_label_size(output.logits, batch))
        for branch, output in teacher.items()
    ]
    return torch.stack(terms).sum()
