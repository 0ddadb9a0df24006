"""What methods share that learn by sigmoids, with an output for unknown things beside the background (SSUL, MicroSeg).

Their losses see the outputs in the order [unknown, background, classes ...], so a train id is one below its output.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from everseg.errors import ConfigError
from everseg.labels import ignored_id
from everseg.losses import completed_labels
from everseg.methods.base import Method
from everseg.methods.terms import has_background
from everseg.models.heads import start_from
from everseg.models.model import SegmentationModel
from everseg.scenarios.steps import Step
from everseg.types import Batch, SegOutput

UNKNOWN = "unknown"
"""Name of the auxiliary output."""
SALIENCY = "saliency"
"""Name of the map in `data.extra` whose values above 0 mark what stands out in an image."""
Unknown = Literal["salient", "all", "none"]
"""Which background pixels are unknown: see `SSUL.unknown`."""
OPEN = 2
"""Outputs that are no class: unknown and background."""


def joined(output: SegOutput) -> Tensor:
    """The logits [unknown, background, classes ...], (B, 1 + C, h, w); several unknown outputs are added up."""
    return torch.cat([output.auxiliary[UNKNOWN].sum(dim=1, keepdim=True), output.logits], dim=1)


def output_labels(
    batch: Batch, num_classes: int, unknown: Unknown, *, official_memory: bool = False
) -> Tensor:
    """Turn the labels of a batch into outputs: 0 unknown, 1 background, 1 + c class c.

    Args:
        batch: train ids; with `unknown="salient"` also the map "saliency".
        num_classes: C, the classes of the branch, background included.
        unknown: which background pixels become unknown.
        official_memory: images of the memory keep their train ids as outputs, as in SSUL's code, which reads their
            labels without the offset of the unknown output: the background becomes unknown, class 1 background, and
            every other class the one before it. Saliency is not looked at.

    Returns:
        (B, H, W) int64, ignored pixels as `ignored_id(C + 1)`.
    """
    label = batch.label
    outputs = label + 1
    if unknown == "all":
        outputs = outputs.masked_fill(label == 0, 0)
    elif unknown == "salient":
        outputs = outputs.masked_fill((label == 0) & (batch.extra[SALIENCY] > 0), 0)
    if official_memory and batch.memory is not None:
        outputs = torch.where(batch.memory[:, None, None], label, outputs)
    # The unknown output may be the 256th: ignored is another number then.
    return outputs.masked_fill(label == ignored_id(num_classes), ignored_id(num_classes + 1))


def completed(teacher: SegOutput, outputs: Tensor, num_outputs: int, threshold: float) -> Tensor:
    """Fill unknown and background pixels with the classes that the teacher's sigmoids are sure of; (B, H, W)."""
    return completed_labels(
        joined(teacher), outputs, num_classes=num_outputs, threshold=threshold, num_open=OPEN
    )


def candidate_labels(output: SegOutput, batch: Batch, threshold: float) -> Tensor:
    """The labels of a memory's candidates, (B, H, W) train ids, completed by a model's output of them."""
    num_classes = output.logits.shape[1]
    outputs = completed(output, output_labels(batch, num_classes, "none"), num_classes + 1, threshold)
    return train_ids(outputs, num_classes)


def train_ids(outputs: Tensor, num_classes: int) -> Tensor:
    """Turn outputs back into train ids of C classes: unknown and background both become 0."""
    ids = (outputs - 1).clamp(min=0)
    return ids.masked_fill(outputs == ignored_id(num_classes + 1), ignored_id(num_classes))


def region_logits(maps: Tensor) -> Tensor:
    """The logits of regions, given as maps (B, O, N, 1), as (B, N, O)."""
    return maps[..., 0].transpose(1, 2)


def check_switches(name: str, method: Method) -> None:
    """Stop if a switch of any method contradicts what these methods are.

    Raises:
        ValueError: it does.
    """
    if method.freeze_heads == "all":
        raise ValueError(
            f"freeze_heads: {name} learns in its newest head, and freezes the older ones by itself"
        )
    if method.pretune:
        raise ValueError(
            f"pretune: {name} cannot use pre-tuning, because its heads are not mixtures of others; leave it out"
        )


def check_step(name: str, step: Step) -> str:
    """Return the branch that a step trains.

    Raises:
        ConfigError: the method cannot be what it is in such a step.
    """
    branch = step.branch
    if len(step.spaces) > 1:
        raise ConfigError(
            f"method '{name}' works on one domain only, because its features are frozen after the first step; "
            "for several domains choose a method such as mdil"
        )
    if not has_background(step, branch):
        raise ConfigError(
            f"method '{name}' needs a background class, since it learns apart what is unknown in it; "
            f"'{branch}' has none"
        )
    if not step.is_first and not step.grows.get(branch):
        raise ConfigError(
            f"method '{name}' adds a classifier in every later step; step {step.index} has no new class; "
            "leave the step out, or choose another method"
        )
    return branch


def start_new_classifier(model: SegmentationModel, branch: str, name: str) -> None:
    """Start the newest classifier as the unknown output, statistics included.

    Raises:
        ConfigError: the model was not trained by a method that has this output.
    """
    head = model.head(branch)
    if UNKNOWN not in head.parts:
        raise ConfigError(
            f"method '{name}': the model has no output for the unknown to start new classifiers from; begin with a "
            "model that this method has trained, or choose another method"
        )
    start_from(head, UNKNOWN)
