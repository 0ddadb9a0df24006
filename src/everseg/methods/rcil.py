"""Representation Compensation Networks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from everseg.errors import ConfigError
from everseg.losses import Term, distillation, pooled_cube_distillation
from everseg.losses.pooled_cube import PooledCube
from everseg.methods.base import Method
from everseg.methods.terms import (
    Positive,
    Weight,
    background_terms,
    init_backgrounds,
    over_branches,
    stage_maps,
)
from everseg.models.compensation import MERGE, MERGE_EXACTLY, compensated, forget_eps, recall_eps
from everseg.types import SegOutput


@dataclass(kw_only=True)
class RCIL(Method):
    """Learn in new convolutions beside frozen ones, and keep squared features, pooled in space and channels.

    Source: Zhang et al., CVPR 2022, with the labels' and the output's terms of MiB. The network needs new convolutions
    beside the old ones (`model.options.compensation=true`). Both are merged into the old ones before each later step.
    """

    uses_teacher: ClassVar[bool] = True
    restructures: ClassVar[bool] = True

    kd_weight: Weight = 100.0
    """Weight of MiB's distillation of the outputs (the authors' code: 100)."""
    alpha: Positive = 1.0
    """Factor on the teacher's logits before its softmax (the authors' code: 1)."""
    spatial_weight: Weight = 0.01
    """Factor of the distance pooled over windows, of the stages' and the decoder's maps."""
    spatial_logits_weight: Weight = 0.0005
    """The same of the logits."""
    channel_weight: Weight = 0.01
    """Factor of the distance pooled over channels, of the stages' maps."""
    channel_decoder_weight: Weight = 0.0005
    """The same of the decoder's map. The authors' factor for logits falls on it, as this term has no logits."""
    growth_factor: bool = True
    """Multiply the distances of a branch that gains N classes, C in all, by sqrt(C / N), as the authors' code does."""
    init_background: Literal["weights", "all", "none"] = "weights"
    """What new classifiers take over from the background's: its weights, as the authors' code for VOC and ADE; "all",
    biases as in MiB too; or nothing."""
    merge: Literal["official", "exact"] = "official"
    """How convolutions are merged. In the authors' code an identity norm remains, whose eps scales the convolution's
    output by sqrt(1 + 1e-5) once the model is read from disk; "exact" leaves no norm."""

    def __post_init__(self) -> None:
        for name in ("freeze_encoder", "freeze_decoder"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}: rcil learns in the new convolutions of encoder and decoder; leave it false"
                )

    def grow(self, model, step):
        if not compensated(model):
            raise ConfigError(
                "method 'rcil' needs a network with new convolutions beside the old ones: give "
                "model.options.compensation=true, with everseg's own DeepLabV3 on a ResNet (deeplabv3-...)"
            )
        super().grow(model, step)
        if step.is_first:
            return
        if self.init_background != "none":
            init_backgrounds(model, step, biases=self.init_background == "all")
        # Before freezing, which takes the gradient from what is merged.
        model.restructure(MERGE if self.merge == "official" else MERGE_EXACTLY)
        if self.merge == "official":
            forget_eps(model)

    def finish_model(self, ctx):
        recall_eps(ctx.module)

    def losses(self, batch, ctx):
        student, teacher = ctx.compare(batch)
        own = background_terms(
            student[batch.branch].logits, teacher.get(batch.branch), batch, ctx,
            kd_weight=self.kd_weight, alpha=self.alpha,
        )  # fmt: skip
        kept = {"kd": Term(distillation, options={"alpha": self.alpha}, weight=self.kd_weight)}
        terms = over_branches(own, kept, student, teacher, batch)
        cubes = [self._cube(student[branch], output) for branch, output in teacher.items()]
        for name in ("spatial", "channel") if cubes else ():
            terms[name] = torch.stack([getattr(cube, name) for cube in cubes]).mean()
        yield terms

    def _cube(self, student: SegOutput, teacher: SegOutput) -> PooledCube:
        outputs, old = student.logits.shape[1], teacher.logits.shape[1]
        growth = math.sqrt(outputs / (outputs - old)) if self.growth_factor and outputs > old else 1.0
        maps = [
            [*stage_maps(output, before_activation=False).values(), output.features["decoder"], output.logits]
            for output in (student, teacher)
        ]
        return pooled_cube_distillation(
            *maps,
            spatial=(growth * self.spatial_weight, growth * self.spatial_logits_weight),
            channel=(growth * self.channel_weight, growth * self.channel_decoder_weight),
        )
