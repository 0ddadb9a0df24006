"""BARM: background adaptation with residual modelling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from everseg.errors import ConfigError
from everseg.losses import (
    Term,
    adapted_logits,
    binary_cross_entropy,
    completed_labels,
    icarl_distillation,
    label_cells,
    masked_feature_distance,
    pixelwise_losses,
    residual_margin,
    residual_negatives,
)
from everseg.losses.pixelwise import full_precision
from everseg.losses.readout import with_residual
from everseg.methods.base import Method, groups_of
from everseg.methods.sigmoids import check_step, unfit_steps
from everseg.methods.terms import Positive, Weight
from everseg.models.heads import HEAD, Head, Trunk, copy_trunk
from everseg.types import Batch, Readout, SegOutput

RESIDUAL = "residual"
"""Name of the outputs that lower the background, one of each later step."""


@dataclass(kw_only=True)
class BARM(Method):
    """Learn each step in a head of its own, with an output that takes its classes out of the background.

    Source: Zhang and Gao, ECCV 2024, and the authors' code.
    """

    uses_teacher: ClassVar[bool] = True

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Least sigmoid of the teacher that makes a background pixel one of an old class (authors: 0.7)."""
    triplet_weight: Weight = 5.0
    """Weight of the term that keeps the newest residual positive in the background (authors: 5)."""
    feature_weight: Weight = 4.0
    """Weight of the distillation of the older heads' features in the background (authors: 4)."""
    kd_weight: Weight = 1.0
    """Weight of the distillation of the older heads' sigmoids (authors: 1)."""
    residual_weight: Weight = 1.0
    """Weight of the term that makes the newest residual negative on new classes (authors: 1)."""
    head_width: Annotated[int, Field(ge=1)] = 256
    """Channels of the 3x3 convolution of each head (authors: 256)."""
    encoder_rate: Positive = 0.1
    """Factor on the encoder's learning rate in the first step (authors: 0.1)."""
    decoder_rate: Positive = 1.0
    """Factor on the decoder's learning rate in later steps (authors: rate 0.001 whatever the new head's)."""
    old_rate: Positive = 0.1
    """Factor on the encoder's and the older heads' in later steps (authors: rate 0.0001 whatever the new head's)."""
    ear_statistics: Literal["copied", "fresh"] = "copied"
    """Statistics of a new head's norm, which is frozen: those of the first head, whose weights it starts from, or mean
    0 and variance 1, as in the authors' code."""
    empty_background: Literal["zero", "nan"] = "zero"
    """Triplet term of a batch without a background cell: 0, or not a number, as in the authors' code."""
    freeze_norm: bool = True
    """Freeze the affine weights of all norms from step `freeze_from` on (authors: yes)."""

    def __post_init__(self) -> None:
        if self.freeze_heads == "all":
            raise ValueError("freeze_heads: barm learns in its newest head; leave it out, or choose 'old'")

    @property
    def readout(self) -> Readout:
        return Readout("sigmoid", before=True, residual=RESIDUAL)

    def unfit(self, steps):
        return unfit_steps("barm", steps, "which each later step corrects")

    def heads(self, step):
        branch = check_step("barm", step, "which each later step corrects")
        later = {} if step.is_first else {RESIDUAL: 1}
        return {branch: Head(hidden=self.head_width, beside=later)}

    def prepare_model(self, model, step):
        super().prepare_model(model, step)
        if step.is_first:
            return
        head = model.head(step.branch)
        if not isinstance(head.parts["0"], Trunk):
            raise ConfigError(
                "method 'barm' starts new heads from the first one's 3x3 convolution, which this model has not; begin "
                "with a first step of this method"
            )
        copy_trunk(head, "0", statistics=self.ear_statistics == "copied")

    def param_groups(self, model, step):
        if step.is_first:
            return groups_of(model, (model.encoder, self.encoder_rate))
        head = model.head(step.branch)
        old = [part for name, part in head.parts.items() if name != head.newest]
        return groups_of(model, ([model.encoder, *old], self.old_rate), (model.decoder, self.decoder_rate))

    def targets(self, batch: Batch, num_classes: int, teacher: SegOutput | None) -> Tensor:
        """The class that each pixel is to learn, (B, H, W): its label, completed by what the teacher is sure of."""
        return (
            batch.label if teacher is None else self._completed(teacher, batch, num_classes, self.threshold)
        )

    def losses(self, batch, ctx):
        teacher, student = ctx.teach(batch), ctx.student(batch)
        logits = student.logits
        number = logits.shape[1]
        weights = ctx.step.class_weights.get(batch.branch)
        options: dict[str, Any] = {} if weights is None else {"weight": logits.new_tensor(weights)}
        terms = {"bce": Term(binary_cross_entropy, options=options, over="valid")}
        if teacher is None:
            yield pixelwise_losses(terms, logits, batch.label)
            return
        num_old, residual = teacher.logits.shape[1], student.auxiliary[RESIDUAL]
        trained = adapted_logits(logits, residual, num_old)
        found = pixelwise_losses(terms, trained, self.targets(batch, number, teacher))
        # The labels as they came: what the teacher adds is no background, and no new class either.
        background, new = label_cells(batch.label, logits.shape[2:], num_old, number)
        newest = residual[:, -1]
        empty = 0.0 if self.empty_background == "zero" else float("nan")
        found["triplet"] = self.triplet_weight * residual_margin(newest, background, empty=empty)
        found["residual"] = self.residual_weight * residual_negatives(newest, new)
        old = [name for name in teacher.features if name.removeprefix(HEAD).isdigit()]
        distances = [
            masked_feature_distance(student.features[name], teacher.features[name], background)
            for name in old
        ]
        found["features"] = self.feature_weight * torch.stack(distances).sum()
        found["kd"] = self.kd_weight * icarl_distillation(_every(student, teacher), _every(teacher, teacher))
        yield found

    def memory_labels(self, batch, ctx, threshold):
        with ctx.autocast():
            output = ctx.module(batch.image, (batch.branch,))[batch.branch]
        return self._completed(output, batch, output.logits.shape[1], threshold)

    @staticmethod
    def _completed(output: SegOutput, batch: Batch, num_classes: int, threshold: float) -> Tensor:
        """Complete a batch's labels by a model's logits, resized before the sigmoid; its readout resizes after it."""
        logits = full_precision(output.logits)
        if RESIDUAL in output.auxiliary:
            logits = with_residual(logits, full_precision(output.auxiliary[RESIDUAL]))
        return completed_labels(logits, batch.label, num_classes=num_classes, threshold=threshold)


def _every(output: SegOutput, teacher: SegOutput) -> Tensor:
    """The logits of all heads that the teacher has, as the layers give them, residuals behind the classes."""
    maps = [output.logits[:, : teacher.logits.shape[1]]]
    if RESIDUAL in teacher.auxiliary:
        maps.append(output.auxiliary[RESIDUAL][:, : teacher.auxiliary[RESIDUAL].shape[1]])
    return torch.cat(maps, dim=1)
