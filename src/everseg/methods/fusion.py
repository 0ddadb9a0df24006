"""The fusion of a step's weights with those from before the step."""

from __future__ import annotations

import math

import torch

from everseg.errors import ConfigError
from everseg.models.model import SegmentationModel
from everseg.scenarios.steps import Step


def new_share(step: Step) -> float:
    """Compute the weight of the new model: sqrt(N / (N + K)).

    N counts the outputs that the step adds, K those known before it, background included. In runs over domains both
    count the outputs of all branches: the shared weights serve them all.

    Returns:
        A number in [0, 1]; 0 if the step adds no output.
    """
    total = sum(space.num_classes for space in step.spaces.values())
    return math.sqrt(sum(step.grows.values()) / total)


def unfit_for_fusion(step: Step) -> str:
    """Say why a step's weights cannot be fused with those from before it; "" if they can, or if it is a first step."""
    if step.is_first or new_share(step) > 0:
        return ""
    return (
        f"step {step.index}: method.fuse gives the new weights the share sqrt(N / (N + K)), which is 0 as this step "
        "adds no class: its training would be undone; leave method.fuse out"
    )


def check_structure(model: SegmentationModel, old: SegmentationModel) -> None:
    """Check that tensors of the same name are the same things in the model and in the one from before the step.

    Raises:
        ConfigError: the step changed the structure of the network.
    """
    if model.changes != old.changes:
        added = ", ".join(dict.fromkeys(model.changes[len(old.changes) :]))
        raise ConfigError(
            f"method.fuse: this step changed the network's structure ({added}), so its weights and those from before "
            "it do not correspond; leave method.fuse out"
        )


@torch.no_grad()
def fuse(
    model: SegmentationModel, old: SegmentationModel, share: float, largest: float | None = None
) -> float:
    """Move every tensor that both models have to (1 - share) * old + share * new, in place.

    These are weights, biases and the running statistics of norms, those of frozen parts included. What only `model` has
    stays, and so do whole numbers, such as counts of batches.

    Args:
        model: the trained model.
        old: the model from before the step, on the same device.
        share: weight of the new values, in [0, 1].
        largest: fuse only this share of all elements, those that changed most; the others keep their new value. The
            smallest change among them is the cut, and elements that changed exactly as much are fused too. None = all.

    Returns:
        The cut; 0 without `largest`, infinity if `largest` selects no element.

    Raises:
        ConfigError: the step changed the structure of the network, so that tensors of one name are different things.

    Source: Xiao et al., "Endpoints Weight Fusion for Class Incremental Semantic Segmentation", CVPR 2023.
    """
    check_structure(model, old)
    before = old.state_dict()
    pairs = [
        (value, before[name])
        for name, value in model.state_dict().items()
        if name in before and value.is_floating_point()
    ]
    cut = 0.0
    if largest is not None:
        changes = torch.cat([(new - was).abs().flatten() for new, was in pairs])
        count = math.floor(largest * changes.numel())
        # The count-th largest is the (n - count + 1)-th smallest.
        cut = float(changes.kthvalue(changes.numel() - count + 1).values) if count else math.inf
    for new, was in pairs:
        # As old + share * (new - old): where nothing changed, the value stays exactly what it was.
        fused = torch.lerp(was, new, share)
        new.copy_(fused if largest is None else torch.where((new - was).abs() < cut, new, fused))
    return cut
