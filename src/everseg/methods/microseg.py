"""MicroSeg: classes and unseen things in proposals of regions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, cast

from pydantic import Field
from torch import Tensor

from everseg.losses import Term, binary_cross_entropy, pixelwise_losses
from everseg.losses.regions import cluster_separation, completed_by_regions, region_binary_cross_entropy
from everseg.methods.base import Method, groups_of
from everseg.methods.terms import Positive, Weight
from everseg.methods.unknown import (
    OPEN,
    UNKNOWN,
    check_step,
    check_switches,
    joined,
    output_labels,
    region_logits,
    train_ids,
)
from everseg.models.heads import Head
from everseg.models.region_head import PROPOSALS, RegionPart
from everseg.types import REGIONS, Batch, Readout, SegOutput, of_regions


@dataclass(kw_only=True)
class MicroSeg(Method):
    """SSUL in given regions, each classified as a whole; the unknown are several clusters that are kept apart.

    Source: Zhang et al., NeurIPS 2022, from a description of what the authors' code (no licence, not opened) computes.
    With `scenario.memory` it is MicroSeg-M.
    """

    uses_teacher: ClassVar[bool] = True

    proposals: Annotated[int, Field(ge=1, le=255)] = 100
    """Regions of an image: the map "proposals" of `data.extra` holds 0 to one less, and other values mean none."""
    clusters: Annotated[int, Field(ge=1)] = 5
    """Outputs for the unknown (authors: 5); they are added up before everything but the term that keeps them apart."""
    unseen_weight: Weight = 1.0
    """Weight of the term that keeps the clusters apart (authors: 1)."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Least sigmoid of the teacher that makes a region of no class one of an old class (authors: 0.7)."""
    head_width: Annotated[int, Field(ge=1)] = 256
    """Channels of the convolutions of each head (authors: 256)."""
    encoder_rate: Positive = 0.1
    """Factor on the encoder's learning rate in the first step (authors: 0.1)."""
    memory_offset: Literal["fixed", "official"] = "fixed"
    """As in `SSUL`: whether labels of memory images mean their own outputs."""

    def __post_init__(self) -> None:
        check_switches("microseg", self)

    @property
    def readout(self) -> Readout:
        return Readout("sigmoid", merge=(UNKNOWN,), regions=PROPOSALS)

    @property
    def needs_extra(self) -> tuple[str, ...]:
        return (PROPOSALS,)

    def heads(self, step):
        branch = check_step("microseg", step)
        if not step.is_first:
            return {branch: Head(hidden=self.head_width)}
        first = Head(
            kind=REGIONS, hidden=self.head_width, background="own", auxiliary={UNKNOWN: self.clusters},
            regions=self.proposals,
        )  # fmt: skip
        return {branch: first}

    def prepare_model(self, model, step):
        super().prepare_model(model, step)
        if step.is_first:
            return
        # New heads start at random, frozen norms included.
        head = model.head(step.branch)
        trained = {head.newest, UNKNOWN, "background"}
        model.freeze(
            encoder=True, decoder=True, norm=True, statistics=self.frozen_statistics,
            heads={step.branch: set(head.parts) - trained},
        )  # fmt: skip
        # No loss reads what they make of cells any more.
        for name in trained:
            for module in cast(RegionPart, head.parts[name]).dense:
                module.requires_grad_(False)

    def param_groups(self, model, step):
        return groups_of(model, *([(model.encoder, self.encoder_rate)] if step.is_first else []))

    def targets(self, batch, num_classes: int, teacher: SegOutput | None) -> Tensor:
        """The output that each pixel is to learn, (B, H, W); see `output_labels`."""
        outputs = output_labels(batch, num_classes, "all", official_memory=self.memory_offset == "official")
        return (
            outputs if teacher is None else _completed(teacher, batch, outputs, num_classes, self.threshold)
        )

    def losses(self, batch, ctx):
        teacher, student = ctx.teach(batch), ctx.student(batch)
        regions = batch.extra[PROPOSALS]
        label = self.targets(batch, student.logits.shape[1], teacher)
        inside = of_regions(student)
        terms = {"bce": region_binary_cross_entropy(region_logits(joined(inside)), regions, label)}
        clusters = region_logits(inside.auxiliary[UNKNOWN])
        terms["unseen"] = self.unseen_weight * cluster_separation(clusters, regions)
        if teacher is None:  # later steps learn from regions alone
            dense = {"bce_pixel": Term(binary_cross_entropy, over="valid")}
            terms |= pixelwise_losses(dense, joined(student), label)
        yield terms

    def memory_labels(self, batch, ctx, threshold):
        with ctx.autocast():
            output = ctx.module(batch.image, (batch.branch,), extra=batch.extra)[batch.branch]
        num_classes = output.logits.shape[1]
        outputs = output_labels(batch, num_classes, "none")
        return train_ids(_completed(output, batch, outputs, num_classes, threshold), num_classes)


def _completed(
    output: SegOutput, batch: Batch, outputs: Tensor, num_classes: int, threshold: float
) -> Tensor:
    """Fill unknown and background pixels with the classes that the sigmoids of their regions are sure of."""
    return completed_by_regions(
        region_logits(joined(of_regions(output))), batch.extra[PROPOSALS], outputs,
        num_classes=num_classes + 1, threshold=threshold, num_open=OPEN,
    )  # fmt: skip
