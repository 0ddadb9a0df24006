"""A model in a folder of its own: its weights, and the classes.json that says what it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from everseg.config.fields import RunConfig
from everseg.errors import CheckpointError, some
from everseg.labels import LabelSpace
from everseg.models.build import from_description
from everseg.models.model import SegmentationModel
from everseg.runs.commit import load_tensors, read_document

CLASSES, WEIGHTS = "classes.json", "model.safetensors"


def _windows(config: RunConfig) -> dict[str, Any]:
    """What classes.json says of the windows that test images were seen through, if they were."""
    if config.data.evaluation != "sliding":
        return {}
    return {"window": config.data.window or config.data.crop, "overlap": config.data.overlap}


def load_model(folder: Path, builder: Any = None) -> tuple[SegmentationModel, dict[str, LabelSpace]]:
    """Rebuild a model from a finished step's folder by replaying its growth; strict.

    Raises:
        CheckpointError: weights and architecture do not fit.
    """
    classes = read_document(folder / CLASSES, "architecture", "branches")
    model = model_of(classes, load_tensors(folder / WEIGHTS), str(folder), builder)
    return model, spaces_of(classes)


def model_of(
    classes: Mapping[str, Any], state: dict[str, torch.Tensor], where: str, builder: Any = None
) -> SegmentationModel:
    """Build the model that a `classes.json` describes and give it its weights; in eval mode, on the CPU.

    Args:
        where: the model's folder, for the message.

    Raises:
        CheckpointError: weights and architecture do not fit.
    """
    model = from_description(classes["architecture"], builder=builder)
    load_strictly(model, state, where)
    model.eval()
    return model


def read_spaces(path: Path) -> dict[str, LabelSpace]:
    """Read the label space of each branch from a `classes.json`."""
    return spaces_of(read_document(path, "branches"))


def spaces_of(classes: Mapping[str, Any]) -> dict[str, LabelSpace]:
    """The label space of each branch, from what a `classes.json` holds."""
    return {
        name: LabelSpace(tuple(map(tuple, entry["groups"])), tuple(entry["names"]), entry["background"])
        for name, entry in classes["branches"].items()
    }


def read_paths(path: Path) -> dict[str, str]:
    """Read from a `classes.json` which branch each domain goes through; {} of one data set, and in older files."""
    stored = read_document(path, "branches").get("domains")
    return dict(stored) if isinstance(stored, dict) else {}


def load_strictly(model: torch.nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Load weights that must fit exactly.

    Raises:
        CheckpointError: names or shapes that differ, at most 20 of them listed.
    """
    own = model.state_dict()
    problems = [f"missing: {name}" for name in own.keys() - state.keys()]
    problems += [f"not in this model: {name}" for name in state.keys() - own.keys()]
    problems += [
        f"{name}: {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if problems:
        listing = some(sorted(problems), between="\n  ")
        raise CheckpointError(f"{where} is a checkpoint of another model:\n  {listing}")
    model.load_state_dict(state)
