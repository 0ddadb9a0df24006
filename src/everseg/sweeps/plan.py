"""The runs of a sweep: their names, configurations, states, and which of them share a first step."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from everseg.config import presets
from everseg.config.checks import method_problems
from everseg.config.fields import DataConfig, RunConfig
from everseg.config.loading import difference, load
from everseg.engine.sharing import first_step_hash, has_first_step, obstacle, share_first_step
from everseg.errors import ConfigError, EversegError, near_miss
from everseg.methods.build import build_method
from everseg.runs.commit import read_document, write_json
from everseg.runs.documents import SWEEP
from everseg.runs.run_folder import RunFolder

FILE = "sweep.json"
EVERY = "all"
"""In place of methods: every method that has a preset of this data and task."""
_GIVEN = {"name": "the sweep's folder and --methods", "out": "--out", "seed": "--seeds", "method": "--methods",
          "method.name": "--methods"}  # fmt: skip
"""Settings that the grid itself decides -> where to give them instead."""
PACKAGES = {"hf": "transformers", "timm": "timm"}
"""Beginning of an encoder's name -> the package that it comes from."""


@dataclass(frozen=True)
class GridRun:
    """One run of a sweep."""

    name: str
    method: str
    seed: int
    task: str | None
    source: str
    """The preset or file that the run comes from."""
    overrides: tuple[str, ...]
    config: RunConfig

    @cached_property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.config.out) / self.name)

    @cached_property
    def first_step(self) -> str | None:
        """Hash of everything that decides the first step; None = never shared."""
        return first_step_hash(self.config)

    @property
    def is_finished(self) -> bool:
        return self.folder.is_begun and self.folder.is_finished(self.config)

    @property
    def command(self) -> list[str]:
        """The command that trains the run, in a process of its own."""
        return [
            sys.executable,
            "-m",
            "everseg",
            "run",
            self.source,
            *self.overrides,
            "--quiet",
            "--json",
        ]


def grid(
    source: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    tasks: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> list[GridRun]:
    """List every run of a sweep with its configuration checked; runs that train a first step for others come first.

    Args:
        source: a preset, with or without its method (camvid-6-5-mib, camvid-6-5), or a YAML file.
        methods: names of `everseg list methods` or of presets (joint, multi, single), or your own file.py:Name.
            Where a preset of this data, task and method exists its settings are used, else the method's defaults.
        seeds: seeds of the runs.
        tasks: tasks instead of the preset's own.
        out: folder of the runs; default runs/<preset>-sweep.
        overrides: "key=value" for all runs.

    Raises:
        ConfigError: all problems of all runs.
    """
    problems = [
        f"{what}: expected at least one"
        for what, given in (("--methods", methods), ("--seeds", seeds))
        if not given
    ]
    problems += [
        f"{key}: the sweep decides it; use {_GIVEN[key]}"
        for key in (text.partition("=")[0].strip() for text in overrides)
        if key in _GIVEN
    ]
    for what, given in (("--methods", methods), ("--seeds", seeds), ("--tasks", tasks)):
        problems += [
            f"{what}: {value} is given twice"
            for value in dict.fromkeys(given)
            if list(given).count(value) > 1
        ]
    if problems:
        raise ConfigError(problems)
    label = _label(source)
    folder = str(out) if out is not None else f"runs/{label}-sweep"
    found: list[GridRun] = []
    for task in tasks or (None,):
        for seed in seeds:
            for method in methods:
                name = f"{label}-{_slug(method)}-s{seed}" + (f"-{_slug(task)}" if task else "")
                preset, changes = _origin(source, method, task)
                given = (*changes, *overrides, f"name={name}", f"out={folder}", f"seed={seed}")
                try:
                    found.append(GridRun(name, method, seed, task, preset, given, load(preset, given)))
                except ConfigError as error:
                    problems += [f"{method}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)), "the sweep")
    _check_folders(found)
    return _leaders_first(found)


def every_method(source: str, overrides: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """List the methods that have a preset of some data and task, joint training included.

    Args:
        source: a preset, with or without its method.
        overrides: "key=value" for all runs.

    Returns:
        The methods, and a sentence for each that cannot run as it stands: further maps that nobody named, or a package
        that is not installed.

    Raises:
        ConfigError: no preset has this name. A file says nothing of the methods that suit its data.
    """
    label, known = _label(source), presets.names(every=True)
    named = [name for name in known if presets.without_method(name) == label]
    if not named:
        hint = near_miss(label, dict.fromkeys(map(presets.without_method, known)))
        raise ConfigError(
            f"--methods {EVERY}: means all presets of a data set and task, and there is none of '{source}'{hint}; name "
            "the methods"
        )
    methods, left_out = [], []
    for name in named:
        method, config = name.removeprefix(f"{label}-"), load(name, overrides)
        needed = build_method(config.method).needs_extra
        missing = [f"data.extra.{one}=DIR" for one in needed if one not in config.data.extra]
        encoder = (config.model.encoder or "").partition(":")[0]
        if missing:
            left_out.append(
                f"{method}: left out, as it reads maps beside the images; give {' '.join(missing)}"
            )
        elif encoder in PACKAGES and find_spec(PACKAGES[encoder]) is None:
            left_out.append(
                f"{method}: left out, as its encoder needs {PACKAGES[encoder]}, which is not installed"
            )
        else:
            methods.append(method)
    return methods, left_out


def _label(source: str) -> str:
    """Return the first part of the runs' names: the preset without its method, or the file's stem."""
    if source.endswith((".yaml", ".yml")) or "/" in source:
        return _slug(Path(source).stem)
    preset, network = presets.split(source)
    return _slug(presets.without_method(preset) + network if presets.is_preset(source) else source)


def _origin(source: str, method: str, task: str | None) -> tuple[str, list[str]]:
    """Return the preset (or file) of one run, and the overrides that make it this run."""
    preset, network = presets.split(source)
    found, changes = _without_network(preset, method, task)
    return found + network, changes


def _without_network(source: str, method: str, task: str | None) -> tuple[str, list[str]]:
    """The same for a source that names no network."""
    known = presets.names(every=True)
    preset: str | None = source
    if not (source.endswith((".yaml", ".yml")) or "/" in source or Path(source).is_file()):
        if source not in known:
            base = next((f"{source}-{m}" for m in (method, "ft", "mdil") if f"{source}-{m}" in known), None)
            if base is None:
                hint = near_miss(source, dict.fromkeys([*map(presets.without_method, known), *known]))
                raise ConfigError(f"no preset and no file '{source}'{hint} (everseg list presets)")
            source = base
        # Best is the published preset of this very method and task. Next best is one of the task, with the method's
        # defaults. Otherwise task and method are both overrides.
        preset = presets.variant(source, method=method, task=task)
        if preset is not None:
            return preset, []
        preset = presets.variant(source, task=task) if task else source
        if preset is not None:
            return preset, _method_change(method)
    return source, [*([f"scenario.task={task}"] if task else []), *_change_in_file(source, method)]


def _change_in_file(source: str, method: str) -> list[str]:
    """Overrides that make the run of a file one of another method; over domains the methods of the presets count."""
    variants = presets.domain_methods()
    if method not in variants:
        return _method_change(method)
    try:
        config = load(source, import_own=False)
    except ConfigError:
        return _method_change(method)  # whoever reads the file next says what is wrong with it
    if not config.data.domains:
        return _method_change(method)
    wanted = variants[method]
    as_it_is = [name for name, part in variants.items() if not _differences(config, part)]
    if method in as_it_is:
        return []
    own = config.method.name == wanted["method"]["name"] == method and not as_it_is
    return [text for text in _differences(config, wanted) if not (own and text.startswith("method="))]


def _differences(config: RunConfig, part: Mapping[str, Any]) -> list[str]:
    """Overrides that give a configuration the settings of a method of the domain presets."""
    scenario, options = part.get("scenario", {}), part.get("model", {}).get("options", {})
    changes = [
        f"scenario.{key}={json.dumps(scenario.get(key, False))}"
        for key in ("joint", "single")
        if getattr(config.scenario, key) != scenario.get(key, False)
    ]
    fill = part.get("data", {}).get("shift_fill", DataConfig().shift_fill)
    changes += [f"data.shift_fill={fill}"] if config.data.shift_fill != fill else []
    if config.model.name == "erfnet":  # what a branch owns is an option of this model
        given = config.model.options
        changes += [
            f"model.options.{key}={value}" for key, value in options.items() if given.get(key) != value
        ]
    full, _ = method_problems(part["method"])
    if config.method.model_dump() != full:
        changes.append(f"method={json.dumps(full)}")
    return changes


def _method_change(method: str) -> list[str]:
    return ["scenario.joint=true", "method=ft"] if method == "joint" else [f"method={method}"]


def _slug(text: str) -> str:
    # As presets do: without the asterisk, dft* would have the folder of dft.
    text = text.replace("*", "-star")
    return re.sub(r"[^\w.+-]+", "-", text.rpartition("/")[2]).strip("-.") or "run"


def _check_folders(runs: Sequence[GridRun]) -> None:
    """Stop before anything is trained where a folder holds a run with other settings."""
    names = [run.name for run in runs]
    problems = [
        f"{name}: two runs would have this name" for name in dict.fromkeys(names) if names.count(name) > 1
    ]
    for run in runs:
        if run.folder.is_begun:
            changed = difference(run.folder.config(), run.config)
            if changed:
                problems.append(f"{run.folder.path} holds a run with other settings: {'; '.join(changed)}")
    if problems:
        raise ConfigError([*problems, "give the sweep another folder (--out), or delete these"])


def _leaders_first(runs: Sequence[GridRun]) -> list[GridRun]:
    """Put in front the first run of each group of several that share a first step; the order stays otherwise."""
    # A run whose first step nobody else shares is no leader: there is no reason to start it early.
    firsts: dict[str, GridRun] = {}
    for run in runs:
        if run.first_step is not None:
            firsts.setdefault(run.first_step, run)
    leads = [run for run in runs if run.first_step is not None and firsts[run.first_step] is run]
    shared = {run.first_step for run in runs if run.first_step is not None and run not in leads}
    first = [run for run in leads if run.first_step in shared]
    return [*first, *(run for run in runs if run not in first)]


def donor(run: GridRun, runs: Sequence[GridRun]) -> GridRun | None:
    """Find another run of the grid that has finished a first step which this run can take over."""
    if run.first_step is None:
        return None
    same = (other for other in runs if other is not run and other.first_step == run.first_step)
    return next((other for other in same if has_first_step(other.folder)), None)


def begin(run: GridRun, runs: Sequence[GridRun], threads: int) -> str:
    """Copy into a run that has not begun the first step that another run has finished.

    Args:
        threads: CPU threads the run will have: a step trained with another number is not copied.

    Returns:
        A note for the log about what was done; "" = the run trains its first step itself.
    """
    other = donor(run, runs)
    if other is None or run.folder.step(0).exists():
        return ""
    try:
        reason = obstacle(other.folder, run.config.train.threads or threads)
        if reason:
            return f"trains its first step itself: {reason}"
        copied = share_first_step(other.folder, run.folder, run.config.data.skip_bad)
    except EversegError as error:
        return f"trains its first step itself: {error}"
    return f"first step copied from {other.name}" if copied else "has begun already, with other settings"


def state_of(run: GridRun) -> str:
    """`finished`, `unfinished` (the same command continues it) or `new`."""
    if run.is_finished:
        return "finished"
    return "unfinished" if run.folder.is_begun or run.folder.step(0).exists() else "new"


def planned_first_step(run: GridRun, runs: Sequence[GridRun]) -> str:
    """Name the run from which a run's first step will be copied; "" = it trains its first step itself."""
    same = [other for other in runs if run.first_step is not None and other.first_step == run.first_step]
    if state_of(run) != "new" or not same or same[0] is run:
        return ""
    ready = donor(run, runs)
    return (ready or same[0]).name


def stored(out: Path) -> dict[str, Any]:
    """Read the sweep.json of a folder; {} where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = out / FILE
    if not path.is_file():
        return {}
    return read_document(path, shape=SWEEP, advice="delete it")


def store(
    out: Path, given: dict[str, Any], threads: int, runs: Sequence[GridRun], results: dict[str, Any]
) -> None:
    """Write sweep.json: the grid, and per run its state, first step, exit code and error; earlier runs are kept."""
    before = {entry["name"]: entry for entry in stored(out).get("runs", [])}
    for run in runs:
        entry = {"name": run.name, "method": run.method, "seed": run.seed, "task": run.task,
                 "state": state_of(run), "first_step": run.first_step, "command": run.command[3:]}  # fmt: skip
        # Where a first step came from, and its job, are known once: a later call must not forget them.
        kept = {
            key: before[run.name][key] for key in ("shared_from", "job") if key in before.get(run.name, {})
        }
        before[run.name] = {**entry, **kept, **results.get(run.name, {})}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / FILE, {"format": 1, **given, "threads": threads, "runs": list(before.values())})
