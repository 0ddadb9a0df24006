"""Readers of data sets, one file per layout, and how a configuration names them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from everseg import registry
from everseg.config.fields import DataConfig
from everseg.config.yaml import read
from everseg.data.base import Dataset
from everseg.data.datasets.options import SHARED
from everseg.data.datasets.own import require_own
from everseg.data.datasets.relabel import compact, relabelled
from everseg.display import counted
from everseg.errors import ConfigError, DataError, near_miss
from everseg.files import real_path
from everseg.labels import RawLabels


def load_dataset(data: DataConfig) -> Dataset:
    """Open the data set a configuration names.

    Args:
        data: `dataset` is a built-in or installed name, a `data.yaml`, or `file.py:build`; `root` and `options`
            are the builder's arguments.

    Raises:
        ConfigError: unknown name or option, missing root.
        DataError: the data set's files are not as its layout wants them.
    """
    name, given, root = data.dataset, dict(data.options), data.root
    if data.dataset.lower().endswith((".yaml", ".yml")):
        name, given, root = _described(data)
    _refuse_a_place(name)
    builder = registry.resolve("dataset", name)
    if not callable(builder):
        raise ConfigError(f"data.dataset: '{data.dataset}' is not a function that returns a Dataset")
    _check_options(name, builder, given)
    dataset = builder(root, **given)
    if not isinstance(dataset, Dataset):
        raise ConfigError(
            f"data.dataset: '{data.dataset}' returned {type(dataset).__name__}, expected everseg.data.base.Dataset"
        )
    if not builder.__module__.startswith("everseg."):
        require_own(dataset, data.dataset)
    dataset = compact(dataset)
    return replace(dataset, extra=dict(data.extra)) if data.extra else dataset


def _refuse_a_place(name: str) -> None:
    """Refuse the path of a folder or file where a data set's name is wanted: it is no unknown name."""
    if ":" in name or name in registry.names("dataset"):
        return
    place = Path(name).expanduser()
    if any((place / file).is_file() for file in ("run.json", "MANIFEST.json")):
        raise ConfigError(
            f"data.dataset: '{name}' is a run or a model of everseg, not a data set; give a description FILE.yaml"
        )
    if place.is_dir():
        described = place / "data.yaml"
        known = f"the description in it: {described}" if described.is_file() else None
        raise ConfigError(
            f"data.dataset: '{name}' is a folder; give {known or f'a description of it: everseg data init {name}'}"
        )
    if place.is_file() and place.suffix != ".py":
        raise ConfigError(
            f"data.dataset: '{name}' is a file; give a description, whose name ends in .yaml (everseg data init makes "
            "one), or code, file.py:NAME"
        )
    if "/" in name:
        raise ConfigError(
            f"data.dataset: '{name}' does not exist; give a description FILE.yaml (everseg data init makes one), a "
            "name of everseg list datasets, or file.py:NAME"
        )


def _described(data: DataConfig) -> tuple[str, dict[str, Any], str | None]:
    """Reader, its options and root for a data.yaml: plain folders, or another reader that its `layout` names."""
    file = Path(data.dataset).expanduser()
    content = read(file).value
    layout = content.get("layout", "folders") if isinstance(content, dict) else "folders"
    if layout == "folders":
        return "folder", {"descriptor": data.dataset, **data.options}, data.root
    known = [name for name in registry.names("dataset") if name not in ("folder", "demo")]
    if layout not in known:
        hint = near_miss(layout, known, f"; known: folders, {', '.join(known)}")
        raise ConfigError(f"layout: no reader '{layout}'{hint}", str(file))
    given = {key: value for key, value in content.items() if key not in ("layout", "root")}
    here = real_path(file).parent
    if isinstance(given.get("skip"), str):
        given["skip"] = str(here / Path(given["skip"]).expanduser())
    root = content.get("root", ".")
    if not isinstance(root, str):
        raise ConfigError(f"root: expected a folder, got {root!r}", str(file))
    return layout, {**given, **data.options}, data.root or str(here / Path(root).expanduser())


def load_domains(data: DataConfig) -> dict[str, Dataset]:
    """Open the data set of every domain, its classes renamed where the configuration says so.

    Args:
        data: its `domains`; `root` is that of the domains without their own.

    Returns:
        Domain name -> data set, in the order of the configuration.

    Raises:
        ConfigError: settings that do not fit, or two data sets under one name whose ids mean different classes; every
            problem with its domain.
        DataError: files that are not as their layout wants them.
    """
    opened: dict[str, Dataset] = {}
    renamed: dict[str, Dataset] = {}
    settings: list[str] = []
    faults: list[str] = []
    for name, domain in data.domains.items():
        own = {"dataset": domain.dataset, "root": domain.root or data.root, "options": domain.options}
        own["extra"] = domain.extra or data.extra
        try:
            opened[name] = load_dataset(data.model_copy(update=own))
            renamed[name] = relabelled(opened[name], domain.rename)
        except ConfigError as error:
            settings += [_in_domain(name, problem) for problem in error.problems]
        except DataError as error:
            faults.append(_in_domain(name, str(error)))
    settings += _contradictions(opened)
    if settings:
        raise ConfigError([*settings, *faults])
    if faults:
        raise DataError(
            "\n  ".join(faults if len(faults) == 1 else [counted(len(faults), "problem"), *faults])
        )
    return renamed


def _in_domain(name: str, problem: str) -> str:
    """Say of a data set's problem whose it is: "data.root: ..." -> "data.domains.dusk.root: ..."."""
    problem = problem.replace("data.root=DIR", f"data.domains.{name}.root=DIR")
    if problem.startswith(("data.", "rename")):
        return f"data.domains.{name}.{problem.removeprefix('data.')}"
    if problem.startswith("dataset: "):
        return f"data.domains.{name}.{problem}"
    return f"data.domains.{name}: {problem}"


def _contradictions(opened: Mapping[str, Dataset]) -> list[str]:
    """Pairs of domains whose data sets go by one name, but whose masks mean different classes by the same id."""
    problems = []
    domains = list(opened)
    for position, second in enumerate(domains):
        for first in domains[:position]:
            if opened[first].name != opened[second].name:
                continue
            meanings = [_meanings(opened[domain].labels) for domain in (first, second)]
            differ = [
                raw for raw in meanings[0] if meanings[1].get(raw, meanings[0][raw]) != meanings[0][raw]
            ]
            if differ:
                raw = differ[0]
                problems.append(
                    f"data.domains.{second}: data set '{opened[second].name}' has other classes than in domain "
                    f"'{first}': id {raw} is '{meanings[1][raw]}' here and '{meanings[0][raw]}' there; give the data "
                    "sets different names, or read both with the same classes (rename changes names afterwards)"
                )
    return problems


def _meanings(labels: RawLabels) -> dict[int, str]:
    return {**labels.names, **dict.fromkeys(labels.void, "void")}


def _check_options(name: str, builder: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Compare the options with the builder's signature and report all that do not fit."""
    parameters = list(inspect.signature(builder).parameters.values())[1:]
    rest = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    if rest not in (None, "shared"):
        return
    parameters = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    known = [*(p.name for p in parameters), *(SHARED if rest else ())]
    problems = []
    for key in given:
        if key not in known:
            hint = near_miss(key, known, f"; it has {', '.join(known) or 'none'}")
            problems.append(f"data.options.{key}: data set '{name}' has no such option{hint}")
    for p in parameters:
        if p.default is p.empty and p.kind is not p.VAR_POSITIONAL and p.name not in given:
            problems.append(f"data.options.{p.name}: data set '{name}' needs this option")
    if problems:
        raise ConfigError(problems)
