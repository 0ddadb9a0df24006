"""SSUL: semantic segmentation with unknown labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from everseg.losses import Term, binary_cross_entropy, pixelwise_losses
from everseg.methods.base import Method, groups_of
from everseg.methods.terms import Positive, Weight
from everseg.methods.unknown import (
    SALIENCY,
    UNKNOWN,
    Unknown,
    candidate_labels,
    check_step,
    check_switches,
    completed,
    joined,
    output_labels,
    start_new_classifier,
)
from everseg.models.heads import Head
from everseg.types import Readout, SegOutput


@dataclass(kw_only=True)
class SSUL(Method):
    """Learn each step in a head of its own, on features frozen after the first; what stands out is unknown.

    Source: Cha et al., NeurIPS 2021, and the authors' code. With `scenario.memory` it is SSUL-M.
    """

    uses_teacher: ClassVar[bool] = True

    unknown: Unknown = "salient"
    """Background pixels that are unknown: those above 0 in the map "saliency" of `data.extra` (the authors' on VOC),
    all (theirs on ADE20K: the background's own output never sees a positive), or none."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Least sigmoid of the teacher that makes a pixel of no class one of an old class (authors: 0.7)."""
    head_width: Annotated[int, Field(ge=1)] = 256
    """Channels of the 3x3 convolution of each head (authors: 256)."""
    encoder_rate: Positive = 0.1
    """Factor on the encoder's learning rate in the first step (authors: 0.1)."""
    background_rate: Weight = 0.0001
    """Factor on the learning rate of the background's head in later steps (authors: 0.0001)."""
    memory_offset: Literal["fixed", "official"] = "fixed"
    """Whether labels of memory images mean their own outputs; in the authors' code each means the output before, and
    background the unknown (with scenario.memory.labels=seen)."""

    def __post_init__(self) -> None:
        check_switches("ssul", self)

    @property
    def readout(self) -> Readout:
        return Readout("sigmoid", merge=(UNKNOWN,))

    @property
    def needs_extra(self) -> tuple[str, ...]:
        return (SALIENCY,) if self.unknown == "salient" else ()

    def heads(self, step):
        branch = check_step("ssul", step)
        if not step.is_first:
            return {branch: Head(hidden=self.head_width)}
        return {branch: Head(hidden=self.head_width, background="own", auxiliary={UNKNOWN: 1})}

    def prepare_model(self, model, step):
        super().prepare_model(model, step)
        if not step.is_first:
            start_new_classifier(model, step.branch, "ssul")
            head = model.head(step.branch)
            kept = set(head.parts) - {head.newest, UNKNOWN, "background"}
            # Dropout stays on, and the norms of the newest head are frozen with all others.
            model.freeze(
                encoder=True, decoder=True, norm=True, statistics=self.frozen_statistics,
                heads={step.branch: kept},
            )  # fmt: skip

    def param_groups(self, model, step):
        if step.is_first:
            return groups_of(model, (model.encoder, self.encoder_rate))
        return groups_of(model, (model.head(step.branch).parts["background"], self.background_rate))

    def targets(self, batch, num_classes: int, teacher: SegOutput | None) -> Tensor:
        """The output that each pixel is to learn, (B, H, W); see `output_labels`."""
        outputs = output_labels(
            batch, num_classes, self.unknown, official_memory=self.memory_offset == "official"
        )
        return outputs if teacher is None else completed(teacher, outputs, num_classes + 1, self.threshold)

    def losses(self, batch, ctx):
        teacher, student = ctx.teach(batch), ctx.student(batch)
        label = self.targets(batch, student.logits.shape[1], teacher)
        weights = ctx.step.class_weights.get(batch.branch)
        options = {} if weights is None else {"weight": student.logits.new_tensor((1.0, *weights))}
        terms = {"bce": Term(binary_cross_entropy, options=options, over="valid")}
        yield pixelwise_losses(terms, joined(student), label)

    def memory_labels(self, batch, ctx, threshold):
        with ctx.autocast():
            output = ctx.module(batch.image, (batch.branch,))[batch.branch]
        return candidate_labels(output, batch, threshold)
