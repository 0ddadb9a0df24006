"""A timm encoder with one of everseg's heads, out of a state dict alone (floor 6)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from everseg.errors import CheckpointError, ConfigError
from everseg.models.adapters import timm as from_timm
from everseg.models.build import ARCHITECTURES
from everseg.models.model import SegmentationModel

ENCODERS = ("encoder.body.", "encoder.", "backbone.")
"""Beginnings of the encoder's names; the first one is everseg's."""
CLASSIFIER = re.compile(
    r"(?:heads\.(?P<path>.+)\.classifiers\.(?P<number>\d+)|classifier)\.(?P<part>weight|bias)"
)


def network(name: str, state: Mapping[str, Tensor]) -> tuple[SegmentationModel, dict[str, Tensor]]:
    """Build the network that a state dict is of, and give its tensors everseg's names.

    Args:
        name: timm's name of the encoder, without a tag.
        state: `encoder.body.*`, `encoder.*` or `backbone.*` as timm's `features_only` networks name their weights;
            `decoder.*` as everseg's all-MLP or DeepLabV3 head does; `heads.default.classifiers.0.*` (those of several
            growths are joined) or `classifier.*`.

    Returns:
        The model, grown, its weights still random, and the state to load.

    Raises:
        ConfigError: no such encoder; timm is not installed; a tag.
        CheckpointError: no such head, or no classifier behind it.
    """
    if "." in name:
        raise ConfigError(
            f"--arch timm:{name}: a tag names weights, which are those of the file here; "
            f"write timm:{name.partition('.')[0]}"
        )
    encoder = {**from_timm.describe(name, {}, None), "inputs": None}
    head, options = _head(state)
    parts = _classifier(state)
    model = ARCHITECTURES[head](encoder=encoder, **options)
    model.grow({"default": len(parts["weight"])})
    prefix = next((p for p in ENCODERS if any(key.startswith(p) for key in state)), ENCODERS[0])
    ours = {f"heads.default.classifiers.0.{part}": value for part, value in parts.items()}
    for key, value in state.items():
        if not CLASSIFIER.fullmatch(key):
            ours[ENCODERS[0] + key.removeprefix(prefix) if key.startswith(prefix) else key] = value
    return model, ours


def _head(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """The builder of the head and its dimensions, which follow from the shapes; rates and norm are the defaults."""
    try:
        if "decoder.project.0.weight" in state:
            return "mlp", {"hidden": len(state["decoder.project.0.weight"])}
        if "decoder.aspp.0.weight" in state:
            hidden, out = state["decoder.aspp.0.weight"], state["decoder.reduce.weight"]
            return "library-deeplabv3", {"hidden": len(hidden), "out_channels": len(out)}
    except KeyError as error:
        raise CheckpointError(
            f"these weights have part of a DeepLabV3 head only: {error} is missing"
        ) from None
    raise CheckpointError(
        "these weights have none of everseg's heads: neither decoder.project.0.weight (all-MLP, model.name=mlp) nor "
        "decoder.aspp.0.weight (DeepLabV3, model.name=deeplabv3) is there"
    )


def _classifier(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight and bias of all outputs, the growths of one path in their order.

    Raises:
        CheckpointError: none, several paths, or growths that do not fit each other.
    """
    found: dict[str, dict[int, Tensor]] = {"weight": {}, "bias": {}}
    paths = set[str]()
    for key, value in state.items():
        match = CLASSIFIER.fullmatch(key)
        if match:
            paths.add(f"heads.{match['path']}" if match["path"] else "classifier")
            found[match["part"]][int(match["number"] or 0)] = value
    if len(paths) > 1:
        raise CheckpointError(
            f"these weights have several classifiers ({', '.join(sorted(paths))}); a model with one path is adopted"
        )
    if not found["weight"] or found["weight"].keys() != found["bias"].keys():
        raise CheckpointError(
            "these weights have no classifier: heads.default.classifiers.0.weight and .bias, or classifier.weight and "
            ".bias, are missing"
        )
    for part, values in found.items():
        widths = {tuple(value.shape[1:]) for value in values.values()}
        if len(widths) > 1 or not all(value.dim() for value in values.values()):
            shapes = ", ".join(str(tuple(values[i].shape)) for i in sorted(values))
            raise CheckpointError(
                f"these weights are of no one head: the growths of its {part} do not fit each other ({shapes})"
            )
    return {part: torch.cat([values[i] for i in sorted(values)]) for part, values in found.items()}
