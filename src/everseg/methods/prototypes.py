"""Mean features of classes over batches and processes, and the distillation that REMINDER makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

from everseg.losses import Term, class_similarity, class_sums, similarity_distillation
from everseg.methods.base import StepContext
from everseg.types import Batch, SegOutput


def learns_new(ctx: StepContext, branch: str) -> bool:
    """Whether the branch has old classes, which the teacher knows, and gains new ones."""
    return ctx.teacher is not None and 0 < ctx.step.num_old(branch) < ctx.step.spaces[branch].num_classes


@torch.no_grad()
def class_means(ctx: StepContext) -> dict[str, Tensor]:
    """Mean feature (of the decoder's map) of each class by branch, the model in evaluation mode.

    It is the plain mean over the batches of an epoch that show the class, as in REMINDER's code; a batch's own mean is
    over its pixels in all processes.

    Returns:
        Branch -> (C, D); the row of a class that no batch shows is 0.
    """
    totals: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    training = ctx.module.training
    ctx.module.eval()
    for batch in ctx.epoch_batches():
        with ctx.autocast():
            output = ctx.module(batch.image, (batch.branch,))[batch.branch]
        sums, pixels, _ = _batch_sums(output, batch, ctx)
        means = sums / pixels.clamp(min=1)[:, None]
        totals[batch.branch] = totals.get(batch.branch, 0) + means
        counts[batch.branch] = counts.get(batch.branch, 0) + (pixels > 0)
    ctx.module.train(training)
    return {branch: total / counts[branch].clamp(min=1)[:, None] for branch, total in totals.items()}


def similarity_term(
    student: SegOutput,
    old: Tensor,
    batch: Batch,
    ctx: StepContext,
    *,
    weight: float,
    delta: float,
    temperature: float,
    empty: float,
) -> Term:
    """Build REMINDER's term of a batch: old classes that resemble a new one, distilled on its pixels.

    Args:
        student: the student's output of the batch's branch.
        old: prototypes (K, D) of the old classes.
        batch: images and labels.
        ctx: of the step.
        weight: of the term.
        delta: resemblances below delta / K are left out.
        temperature: of student and teacher.
        empty: value where no process has a new pixel.
    """
    sums, pixels, processes = _batch_sums(student, batch, ctx, first=len(old))
    similarity = class_similarity(
        sums / pixels.clamp(min=1)[:, None], old.to(device=sums.device, dtype=sums.dtype), delta=delta
    )
    # The mean is over the new pixels of all processes, which average their gradients afterwards. Elsewhere the loss is
    # 0, so a factor of the whole image does it.
    number = pixels.sum()
    factor = torch.where(number > 0, batch.label.numel() * processes / number, empty)
    return Term(
        similarity_distillation,
        options={"similarity": similarity, "temperature": temperature},
        weight=weight,
        image_weight=factor.expand(len(batch.label)),
    )


def _batch_sums(
    output: SegOutput, batch: Batch, ctx: StepContext, first: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of a batch summed by class, (C, D), pixels (C,), and the number of processes, over all of these."""
    classes = ctx.step.spaces[batch.branch].num_classes
    sums, pixels = class_sums(
        output.features["decoder"].detach(), batch.label, classes, first=first, align_corners=True
    )
    packed = ctx.all_reduce(torch.cat([sums, pixels[:, None], torch.ones_like(pixels)[:, None]], dim=1))
    return packed[:, :-2], packed[:, -2], packed[0, -1]
