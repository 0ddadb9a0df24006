"""The weights inside another project's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from everseg.errors import CheckpointError, ConfigError, some


def weights_at(given: str | Path, todo: str) -> Path:
    """Return the path of a file of weights, with `~` expanded.

    Args:
        todo: end of the message, what to give instead.

    Raises:
        ConfigError: there is no such file.
    """
    path = Path(given).expanduser()
    if not path.is_file():
        raise ConfigError(f"'{given}': {'is a folder' if path.is_dir() else 'no such file'}; {todo}")
    return path


def tensors_of(checkpoint: Mapping[str, Any], key: str, project: str, where: str) -> dict[str, Tensor]:
    """Take the weights from under a key, if there is such a key, and strip `module.` off their names.

    Args:
        checkpoint: as read from the file.
        key: the key under which the project keeps its weights.
        project: the project's name, for messages.
        where: the file's name, for messages.

    Raises:
        CheckpointError: no weights, or something else than tensors among them.
    """
    # DataParallel puts `module.` before every name; published files come with and without it.
    inner = checkpoint.get(key, checkpoint)
    if not isinstance(inner, Mapping) or not inner:
        raise CheckpointError(f"{where}: no checkpoint of {project}'s code: it holds no weights")
    state = {str(name).removeprefix("module."): value for name, value in inner.items()}
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(f"{where}: no checkpoint of {project}'s code: {some(others)} hold no tensors")
    return state
