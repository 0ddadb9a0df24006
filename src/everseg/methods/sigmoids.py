"""What methods share that learn each class by a sigmoid.

Most of it is of those whose background has no output of its own (DKD, STAR). There a pixel is background where no
class's sigmoid is above 0.5. The model gives the background the logit 0, so that the arg-max of the logits says the
same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from everseg.errors import ConfigError
from everseg.losses import Term, binary_cross_entropy, completed_labels
from everseg.methods.base import StepContext
from everseg.methods.terms import has_background
from everseg.models.model import SegmentationModel
from everseg.scenarios.steps import Step
from everseg.types import Batch, SegOutput

Unlabelled = Literal["left out", "negative"]
"""What the new classes' sigmoids learn where the label is void: nothing, or that no class is there."""
_NEVER = -1e4
"""A logit that no class's falls below."""


def unfit_steps(
    name: str, steps: Sequence[Step], background: str = "which is where no class's sigmoid is above 0.5"
) -> list[str]:
    """List what such a method cannot do in a run, each as a sentence.

    Args:
        name: of the method.
        steps: all steps of the run.
        background: what it needs a background class for, said of that class.
    """
    found = []
    if any(len(step.spaces) > 1 for step in steps):
        found.append(
            f"method '{name}' works on one domain only; for several domains choose a method such as mdil, or "
            "scenario.kind=class-incremental"
        )
    elif any(not has_background(step, step.branch) for step in steps):
        found.append(f"method '{name}' needs a background class, {background}; '{steps[0].branch}' has none")
    idle = [step.index for step in steps if not step.is_first and not step.grows.get(step.branch)]
    if idle and not found:
        found.append(
            f"method '{name}' learns new classes in every later step; step {idle[0]} has no new class; leave "
            "the step out, or choose another method"
        )
    return found


def check_step(name: str, step: Step, *background: str) -> str:
    """Return the branch that a step trains; the arguments are those of `unfit_steps`.

    Raises:
        ConfigError: the method cannot be what it is in such a step.
    """
    if problems := unfit_steps(name, [step], *background):
        raise ConfigError(" ".join(problems))
    return step.branch


def check_head(name: str, model: SegmentationModel, step: Step, auxiliary: str | None = None) -> None:
    """Check that a grown model has the outputs that the method trains.

    Args:
        name: of the method.
        auxiliary: output that it needs beside the classes.

    Raises:
        ConfigError: another method has begun it, or its classifiers are no 1x1 convolutions.
    """
    head = model.head(step.branch)
    if head.growths[0].head.background != "constant" or (auxiliary and auxiliary not in head.others):
        raise ConfigError(
            f"method '{name}' can continue only a model that it trained itself (without an output for the background"
            + (f", with the output '{auxiliary}'" if auxiliary else "")
            + "); begin with a first step of this method, or choose another one"
        )
    plain = [isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) for part in head.classifiers]
    if not all(plain):
        raise ConfigError(
            f"method '{name}' reads the weights of 1x1 classifiers, and this network has none; choose another "
            "model.name, such as deeplabv3-resnet101"
        )


def rest_dropout(model: SegmentationModel) -> None:
    """Freeze what is frozen already, and the dropout."""
    model.freeze(**vars(replace(model.frozen, dropout=True)))


def new_classes_term(
    batch: Batch,
    ctx: StepContext,
    pos_weight: float,
    unlabelled: Unlabelled,
    image_weight: Tensor | None = None,
) -> Term:
    """The term that learns the step's classes: one sigmoid each, a mean over all pixels, summed over the classes."""
    options: dict[str, Any] = {
        "first": first_new(ctx.step, batch.branch),
        "pos_weight": pos_weight,
        "unlabelled": unlabelled,
    }
    weights = ctx.step.class_weights.get(batch.branch)
    if weights is not None:
        options["weight"] = torch.tensor(weights, device=batch.label.device)
    return Term(binary_cross_entropy, options=options, image_weight=image_weight)


def first_new(step: Step, branch: str) -> int:
    """The first class that a step teaches; class 0 is the background."""
    return max(step.num_old(branch), 1)


def candidate_labels(outputs: Mapping[str, SegOutput], batch: Batch, threshold: float) -> Tensor:
    """Complete the labels of a memory's candidates, (B, H, W).

    Where the label is background, it becomes the class of the largest sigmoid, if that is at least the threshold.
    """
    logits = outputs[batch.branch].logits
    return completed_labels(
        without_background(logits), batch.label, num_classes=logits.shape[1], threshold=threshold
    )


def without_background(logits: Tensor, instead: Tensor | None = None) -> Tensor:
    """The logits (B, C, h, w) with another map (B, 1, h, w) in the background's place; None = one that never wins."""
    if instead is None:
        instead = torch.full_like(logits[:, :1], _NEVER)
    return torch.cat([instead.to(logits), logits[:, 1:]], dim=1)
