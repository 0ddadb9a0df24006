"""DFT and DFT*: direct fine-tuning, and with outputs of all steps from the start and a frozen network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from everseg.errors import ConfigError
from everseg.methods.base import Method, StepContext
from everseg.methods.terms import at_label_size, label_terms
from everseg.models.heads import FUTURE, Head
from everseg.types import SegOutput


@dataclass(kw_only=True)
class DFT(Method):
    """Learn the labels of each step with the whole network: what DFT* begins from, the same as `ft`."""

    def losses(self, batch, ctx):
        student = ctx.student(batch)
        yield at_label_size(label_terms(student.logits, batch, ctx), student, batch)


@dataclass(kw_only=True)
class DFTStar(Method):
    """Give the classes of all steps their outputs from the start; train only classifiers after the first.

    Every softmax is over the classes of all steps, so the first one makes room for those to come. The number of classes
    of each step must be known when the run begins.

    Source: "Revisiting Continual Semantic Segmentation" (DFT*, 2025), by its code.
    """

    preallocate: bool = True
    """Outputs of later steps exist from the first one on."""
    network: Literal["frozen", "trained"] = "frozen"
    """Encoder and decoder after the first step, their norms included."""
    old_classifiers: Literal["frozen", "trained"] = "frozen"
    """Classifiers of earlier steps, the background's among them."""
    future: Literal["trained", "fixed"] = "trained"
    """Whether outputs of steps to come are pushed down in every step, as in the authors' code, or in the first only."""

    def heads(self, step):
        coming = step.to_come.get(step.branch, ()) if self.preallocate and step.is_first else ()
        return {step.branch: Head(reserve=coming)} if coming else {}

    def unfit(self, steps):
        still = self.network == self.old_classifiers == "frozen"
        if self.fuse == "none" or not still or len(steps) < 2:
            return []
        return [
            "method.fuse: dft* leaves the weights of before frozen, so there is nothing to move back; leave it out"
        ]

    def prepare_model(self, model, step):
        if len(step.spaces) > 1:
            raise ConfigError(
                "method 'dft*' works on one domain only, because its features are frozen after the first step; "
                "for several domains choose a method such as mdil"
            )
        super().prepare_model(model, step)
        if step.is_first:
            return
        head = model.head(step.branch)
        newest = {head.newest} if step.grows.get(step.branch) else set()
        coming = {name for name in head.parts if name.startswith(FUTURE)}
        frozen = set() if self.old_classifiers == "trained" else set(head.parts) - newest - coming
        frozen |= coming if self.future == "fixed" else set()
        still = self.network == "frozen"
        if still and frozen == set(head.parts):
            raise ConfigError(
                f"method 'dft*' trains new classifiers only; step {step.index} has no new class; leave the step "
                "out, or choose another method"
            )
        model.freeze(encoder=still, decoder=still, norm=still, heads={step.branch: frozen})

    def losses(self, batch, ctx):
        student = ctx.student(batch)
        logits = all_outputs(student)
        terms = label_terms(logits, batch, _with_all_weights(ctx, batch.branch, logits.shape[1]))
        yield at_label_size(terms, SegOutput(logits, student.features), batch)


def all_outputs(output: SegOutput) -> Tensor:
    """Logits of the classes known, and behind them of those to come, (B, C + F, h, w)."""
    coming = output.auxiliary.get(FUTURE)
    return output.logits if coming is None else torch.cat([output.logits, coming], dim=1)


def _with_all_weights(ctx: StepContext, branch: str, number: int) -> StepContext:
    """Give outputs to come the class weight 1, which no pixel uses: none has their label."""
    weights = ctx.step.class_weights.get(branch)
    if weights is None or len(weights) == number:
        return ctx
    padded = (*weights, *[1.0] * (number - len(weights)))
    return replace(ctx, step=replace(ctx.step, class_weights={branch: padded}))
