"""Every published setting under its name, composed of small parts (floor 1).

Names read `<data>-<task>[-<protocol>]-<method>`: voc-15-5-mib, voc-15-1-overlapped-mib, ade-100-50b-lwf,
voc-15-5-joint (all classes at once, scored in the task's groups), voc-offline-ft.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from everseg.config_yaml import parse
from everseg.errors import ConfigError

PROTOCOLS = ("disjoint", "overlapped", "sequential", "partitioned")
JOINT = "joint"
OFFLINE = "offline"


@dataclass(frozen=True)
class _Preset:
    data: str
    task: str
    protocol: str
    method: str
    """A method's name, or "joint"."""
    listed: bool
    """Shown by `names()`: a published combination under its shortest name."""


@cache
def _part(name: str) -> dict[str, Any]:
    text = resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return parse(text, f"presets/{name}.yaml").value


@cache
def _table() -> dict[str, _Preset]:
    return {
        name: _Preset(data, str(task), protocol, method, listed)
        for data in _part("data")
        for task, settings in _part("tasks")[data].items()
        for method in ([*_part("methods"), JOINT] if task != OFFLINE else ["ft"])
        for name, protocol, listed in _spellings(data, str(task), settings, method)
    }


def _spellings(
    data: str, task: str, settings: dict[str, Any], method: str
) -> Iterator[tuple[str, str, bool]]:
    """Every name of one combination of data set, task and method, with its protocol."""
    default, published = _part("data")[data]["default"], _part("data")[data]["published"]
    tasks = [task, *([settings["alias"]] if "alias" in settings else [])]
    for spelt in tasks:
        yield f"{data}-{spelt}-{method}", default, spelt == task and not settings.get("short", False)
        if task == OFFLINE:
            continue
        for protocol in PROTOCOLS:
            listed = spelt == task and protocol in published and protocol != default and method != JOINT
            yield f"{data}-{spelt}-{protocol}-{method}", protocol, listed
    if settings.get("short", False):
        yield f"{data}-{method}", default, True


def names(*, every: bool = False) -> list[str]:
    """Names of the presets.

    Args:
        every: with the aliases (15-5s = 15-1), the spelt-out defaults and the protocols nobody published.
    """
    return [name for name, preset in _table().items() if every or preset.listed]


def load_preset(name: str) -> dict[str, Any]:
    """Compose a preset.

    Returns:
        A part of a run's configuration, as a YAML file would give it; `name` is the preset's.

    Raises:
        ConfigError: unknown name, with the nearest one.
    """
    preset = _table().get(name)
    if preset is None:
        raise ConfigError(_unknown(name))
    task = _part("tasks")[preset.data][_key(preset)]
    config = copy.deepcopy(_part("data")[preset.data]["config"])
    config["scenario"] |= {"task": preset.task, "protocol": preset.protocol}
    if preset.method == JOINT:
        config["scenario"]["joint"] = True
        config["method"] = {"name": "ft"}
    else:
        if preset.protocol in task.get("lists", ()):
            config["scenario"]["lists"] = "published"
        own = task.get("method", {}).get(preset.method, {})
        config["method"] = {"name": preset.method, **_part("methods")[preset.method], **own}
    return {"name": name, **config}


def _key(preset: _Preset) -> str | int:
    tasks = _part("tasks")[preset.data]
    return preset.task if preset.task in tasks else int(preset.task)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, list(_table()), n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    data = next((data for data in _part("data") if name.startswith(f"{data}-")), None)
    own = f"; for another task: everseg run {_example(data)} scenario.task=..." if data else ""
    return f"no preset and no file '{name}'{hint} (everseg list presets{own})"


def _example(data: str) -> str:
    tasks = _part("tasks")[data]
    task = next(task for task, settings in tasks.items() if task != OFFLINE and "method" not in settings)
    return f"{data}-{task}-mib"
