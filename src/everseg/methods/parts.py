"""Loss terms that several methods share (floor 4)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from everseg.losses import binary_cross_entropy, cross_entropy, unbiased_cross_entropy
from everseg.losses.pixelwise import upsample
from everseg.methods.base import StepContext
from everseg.types import Batch, LossTerms

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

    Args:
        logits: student at label size, (B, C, H, W).
        batch: labels; ignored pixels add 0 and count in the denominator.
        ctx: tells how many outputs are old.
        bce: sigmoid cross-entropy summed over classes; wins over `unbiased`, as in the authors' code.
        unbiased: MiB's cross-entropy, where the background label stands for background or any old class.

    Returns:
        {"bce": scalar} or {"ce": scalar}. Where nothing is old (first step, new branch) or nothing new: the
        plain loss.
    """
    if bce:
        return {"bce": binary_cross_entropy(logits, batch.label)}
    num_old = ctx.step.num_old(batch.branch)
    if unbiased and 0 < num_old < logits.shape[1]:
        return {"ce": unbiased_cross_entropy(logits, batch.label, num_old=num_old)}
    return {"ce": cross_entropy(logits, batch.label)}
