"""Readers of data sets, one file per layout, and how a configuration names them (floor 2)."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from everseg import registry
from everseg.config import DataConfig
from everseg.data.base import Dataset
from everseg.errors import ConfigError


def load_dataset(data: DataConfig) -> Dataset:
    """Open the data set a configuration names.

    Args:
        data: `dataset` is a built-in or installed name, a `data.yaml`, or `file.py:build`; `root` and `options`
            are the builder's arguments.

    Raises:
        ConfigError: unknown name or option, missing root.
        DataError: the data set's files are not as its layout wants them.
    """
    if data.dataset.lower().endswith((".yaml", ".yml")):
        name, given = "folder", {"descriptor": data.dataset, **data.options}
    else:
        name, given = data.dataset, dict(data.options)
    builder = registry.resolve("dataset", name)
    if not callable(builder):
        raise ConfigError(f"data.dataset: '{data.dataset}' is not a function that returns a Dataset")
    _check_options(name, builder, given)
    dataset = builder(data.root, **given)
    if not isinstance(dataset, Dataset):
        raise ConfigError(
            f"data.dataset: '{data.dataset}' returned {type(dataset).__name__}, expected everseg.data.base.Dataset"
        )
    return dataset


def _check_options(name: str, builder: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Compare the options with the builder's signature and report all that do not fit."""
    parameters = list(inspect.signature(builder).parameters.values())[1:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters]
    problems = []
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(known) or 'none'}"
            problems.append(f"data.options.{key}: data set '{name}' has no such option; {hint}")
    for p in parameters:
        if p.default is p.empty and p.kind is not p.VAR_POSITIONAL and p.name not in given:
            problems.append(f"data.options.{p.name}: data set '{name}' needs this option")
    if problems:
        raise ConfigError(problems)
