"""Read finished runs for a comparison, and decide which of them may share a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from everseg.config import presets
from everseg.config.fields import RunConfig
from everseg.config.loading import difference, identity, in_words, load
from everseg.config.words import said
from everseg.errors import ConfigError, some
from everseg.files import real_path
from everseg.labels import policies_apart, policy_name
from everseg.metrics import class_spans, defined_mean, named_groups, relative_drop
from everseg.reports.baselines import drop_against_single
from everseg.reports.compare.cost import costs
from everseg.runs.place import what_is
from everseg.runs.results import Results, Track
from everseg.runs.run_folder import RECORD, RunFolder
from everseg.scenarios.tasks import canonical_task

CONVENTIONS = (
    "data.dataset", "data.options", "data.evaluation", "data.domains",
    "scenario.kind", "scenario.steps", "scenario.task", "scenario.protocol", "scenario.policy", "scenario.order",
    "scenario.lists", "scenario.test_split", "scenario.void_channel",
)  # fmt: skip
"""Settings in which runs of one table agree; `data.crop` or `data.size` too, where it is how test images are seen."""


@dataclass(frozen=True)
class Result:
    """One finished run."""

    results: Results
    scores: Mapping[str, float | None]
    """Name of a number -> fraction; of a cost (`cost.COSTS`) -> seconds, bytes or a count."""
    tests: Mapping[str, str]
    """Name of the last results -> SHA-256 of the test images and their labels."""
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()
    """What could not be found out about it."""

    @property
    def path(self) -> Path:
        return self.results.folder.path

    @property
    def config(self) -> RunConfig:
        return self.results.config

    @property
    def tracks(self) -> tuple[Track, ...]:
        return self.results.tracks

    @property
    def label(self) -> str:
        """The name of the method, with how it was used."""
        kind = "joint" if self.config.scenario.joint else "single" if self.config.scenario.single else ""
        method = self.method
        if kind and method == "ft":
            return kind
        return f"{kind}, {method}" if kind else method

    @property
    def method(self) -> str:
        """The method as presets name it: where they have several uses of it (ssul, ssul-m), the nearest one."""
        config, method = self.config, self.config.method.name
        uses, own = presets.variants(method), f"{config.data.dataset}-{config.scenario.task}-{method}"
        if len(uses) < 2 or own not in presets.names(every=True):
            return method
        named = {use: name for use in uses if (name := presets.variant(own, method=use))}
        # The method itself comes first, and so wins where a run is as far from both.
        return min(named, key=lambda use: len(difference(load(named[use]), config)), default=method)

    @property
    def several(self) -> bool:
        """Whether results are per domain."""
        return bool(self.config.data.domains) or len(self.tracks) > 1

    @cached_property
    def conventions(self) -> dict[str, Any]:
        """Everything that runs of one table must have in common."""
        settings = identity(self.config)
        seen = {"crop": ["data.crop"], "resize": ["data.size"]}.get(self.config.data.evaluation, [])
        keys = [
            key for key in settings if key in CONVENTIONS or key.startswith("data.domains.") or key in seen
        ]
        found = {key: settings[key] for key in keys}
        if isinstance(found.get("scenario.task"), str):
            found["scenario.task"] = canonical_task(found["scenario.task"], self.config.data.dataset)
        return {**found, "scenario.policy": self.policy, "test images": dict(self.tests)}

    @property
    def policy(self) -> str:
        """Name of the label policy, as it is today."""
        return policy_name(self.config.scenario.policy, self.config.data.dataset)

    @cached_property
    def kind(self) -> str:
        """Everything that runs of one group have in common (all but the seed), as text."""
        settings = {**identity(self.config), "scenario.policy": self.policy}
        return json.dumps({k: v for k, v in settings.items() if k != "seed"}, sort_keys=True)


@dataclass
class Group:
    """Runs that differ only in their seed."""

    name: str
    runs: list[Result] = field(default_factory=list)

    @property
    def config(self) -> RunConfig:
        return self.runs[0].config

    @property
    def is_joint(self) -> bool:
        return self.config.scenario.joint

    @property
    def seeds(self) -> list[int]:
        return [run.config.seed for run in self.runs]


@dataclass
class Table:
    """Groups that may share a table."""

    groups: list[Group]
    reasons: list[str] = field(default_factory=list)
    """In what it differs from the first table."""

    @property
    def several(self) -> bool:
        return any(run.several for group in self.groups for run in group.runs)

    @property
    def runs(self) -> list[Result]:
        return [run for group in self.groups for run in group.runs]


def found_folders(paths: Sequence[str | Path]) -> list[RunFolder]:
    """Find the run folders in `paths`, each a run or a folder of runs such as a sweep's. Other files are skipped.

    Raises:
        ConfigError: a path with no run in it, or no path at all.
    """
    folders: dict[Path, RunFolder] = {}
    problems = []
    for path in map(Path, paths):
        if path.is_file() or (path.name == "logs" and path.is_dir() and len(paths) > 1):
            continue
        inside = [path] if RunFolder(path).is_begun else sorted(p.parent for p in path.glob(f"*/{RECORD}"))
        if not inside:
            problems.append(f"{path} {what_is(path)}; this needs run folders ({RECORD}), or a folder of some")
        for one in inside:
            folders.setdefault(real_path(one), RunFolder(one))
    if not folders and not problems:
        files = f", not {some([str(path) for path in paths], 4)}" if paths else ""
        problems = [f"expected run folders, or a folder of runs{files}"]
    if problems:
        raise ConfigError(problems)
    return list(folders.values())


def read(results: Results) -> Result:
    """Read everything that a comparison needs from a finished run.

    Raises:
        CheckpointError: something in its folder is damaged.
    """
    config, tracks, sequence = results.config, results.tracks, results.sequence
    scores: dict[str, float | None] = {}
    if config.data.domains or len(tracks) > 1:
        scores |= {per_domain(track): track.scores[-1]["miou"]["all"] for track in tracks}
        scores["mIoU mean"] = defined_mean(list(scores.values()))
        scores["average"] = sequence["average_miou"]
        scores["forgetting"] = sequence["forgetting"]["mean"]
        drop = drop_against_single(results, config) if config.data.domains else None
        scores["relative drop"] = None if drop is None else drop["mean"]
    else:
        last = tracks[0].scores[-1]
        steps, growths = len(tracks[0].steps), [len(group) for group in tracks[0].space.groups]
        for suffix, key in (("", ""), (" (no bg)", "_without_background")):
            if len(growths) > 2:
                # The field's tables part such a sequence after its first step, not before its last.
                spans = class_spans(len(last["class_iou"]), growths, tracks[0].background)
                left_out = tracks[0].background if suffix else None
                later = [last["class_iou"][c] for c in named_groups(spans)["later"] if c != left_out]
                scores[f"base{suffix}"] = last[f"miou{key}"]["base"]
                scores[f"later{suffix}"] = defined_mean(value for value in later if value is not None)
            scores |= {f"{group}{suffix}": last[f"miou{key}"][group] for group in ("old", "new", "all")}
            scores[f"average{suffix}"] = sequence[f"average_miou{key}"] if steps > 1 else None
            scores[f"forgetting{suffix}"] = sequence[f"forgetting{key}"]["mean"]
    cost, notes = costs(results)
    scores |= cost
    tests = {
        source.get("domain") or source["branch"]: source["sha256"]
        for step in results.planned
        for source in step["test"]
    }
    return Result(results, scores, tests, results.record.versions, tuple(notes))


def per_domain(track: Track) -> str:
    """Name of a domain's mIoU among the scores."""
    return f"mIoU {track.name}"


def tables_of(results: Sequence[Result]) -> tuple[list[Table], list[str]]:
    """Sort runs into groups that differ only in their seed, and groups into tables of the same conventions.

    Returns:
        The tables in the order of the runs, and notes.
    """
    tables: dict[str, Table] = {}
    first: dict[str, Any] = {}
    notes = []
    for result in results:
        key = json.dumps(result.conventions, sort_keys=True)
        if not first:
            first = result.conventions
        if key not in tables:
            tables[key] = Table([], [] if not tables else _reasons(first, result.conventions))
        table = tables[key]
        group = next((g for g in table.groups if g.runs[0].kind == result.kind), None)
        if group is None:
            table.groups.append(group := Group(result.label))
        if result.config.seed in group.seeds:
            twin = next(run for run in group.runs if run.config.seed == result.config.seed)
            notes.append(
                f"{result.path} is the same run as {twin.path} (same settings and seed); counted once."
            )
            continue
        group.runs.append(result)
    for table in tables.values():
        table.groups.sort(key=lambda group: group.is_joint)  # the upper bound comes last
        _name_apart(table.groups)
        _add_drops(table)
        notes += _version_notes(table)
        notes += [note for run in table.runs for note in run.notes]
        notes += [f"{run.path}: {run.results.replaced}" for run in table.runs if run.results.replaced]
    return list(tables.values()), notes


def _reasons(first: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    found, policy = list[str](), None
    for key in dict.fromkeys([*first, *here]):
        if first.get(key) == here.get(key):
            continue
        if key == "test images":
            if not found:
                found.append("other test images or labels (scenario.json)")
        else:
            values = [
                json.dumps(one[key], ensure_ascii=False) if key in one else "not used"
                for one in (first, here)
            ]
            found.append(f"{in_words(key)}: {values[0]} there, {values[1]} here")
            if key == "scenario.policy":
                policy = len(found) - 1
    if policy is not None:
        there, mine = first["scenario.policy"], here["scenario.policy"]
        found[policy] += "".join(f"; {text}" for text in policies_apart(there, mine))
        if len(found) == 1:
            found[policy] += (
                f". Such figures are not of one kind; for one table train all runs with one of the two, as with "
                f"scenario.policy={there}"
            )
    return found


MOST_LETTERS = 40
"""Of a group's name. Longer ones would leave no room for numbers; then the run's own name stands instead."""
_TELLING = ("scenario.memory.size", "model.name", "model.encoder", "method.", "train.", "data.", "")
"""Beginnings of settings, first those that say most about a run."""


def _name_apart(groups: Sequence[Group]) -> None:
    """Rename groups of the same method so that each name says in words how it differs from the others.

    As few settings as tell all of them apart are named; the page lists the others.
    """
    for label in {group.name for group in groups}:
        same = [group for group in groups if group.name == label]
        if len(same) < 2:
            continue
        own = [_each(identity(group.config)) for group in same]
        chosen = _telling(own)
        names = [", ".join([label, *(said(key, values.get(key)) for key in chosen)]) for values in own]
        if len(set(names)) < len(names) or max(map(len, names)) > MOST_LETTERS:
            names = [f"{label}, {_run_name(group)}" for group in same]
        for number, (group, name) in enumerate(zip(same, names, strict=True), 1):
            group.name = name if names.count(name) == 1 else f"{name} ({number})"


def _each(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Take apart the settings that are mappings, such as `scenario.memory`."""
    parts = ({f"{k}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {k: value}
             for k, value in settings.items())  # fmt: skip
    return {key: value for part in parts for key, value in part.items()}


def _telling(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Choose a few settings whose values, together, are different for all of the groups."""

    def rank(key: str) -> int:
        return next(number for number, start in enumerate(_TELLING) if key.startswith(start))

    def kinds(keys: Sequence[str]) -> int:
        return len({json.dumps([one.get(key) for key in keys], sort_keys=True) for one in settings})

    known = dict.fromkeys(key for one in settings for key in one if key != "seed")
    left = sorted((key for key in known if kinds([key]) > 1), key=rank)
    chosen: list[str] = []
    while left and kinds(chosen) < len(settings):
        chosen.append(max(left, key=lambda key: kinds([*chosen, key])))  # of equals, the first
        left.remove(chosen[-1])
    return chosen


def _run_name(group: Group) -> str:
    """The name that the user gave the first run, without its seed."""
    return group.config.name.removesuffix(f"-s{group.config.seed}")


def _add_drops(table: Table) -> None:
    """Add the relative drop against the single-task run of the same seed, if the table has one."""
    singles = {run.config.seed: run for run in table.runs if run.config.scenario.single}
    for group in table.groups:
        for number, run in enumerate(group.runs):
            single = singles.get(run.config.seed)
            names = [per_domain(track) for track in run.tracks]
            if (
                single is None
                or run is single
                or run.config.scenario.single
                or run.config.scenario.single_task
            ):
                continue
            values = {n: v for n in names if (v := run.scores[n]) is not None}
            bases = {n: v for n in names if (v := single.scores.get(n)) is not None and v > 0}
            if values and values.keys() <= bases.keys():
                drop = relative_drop(values, bases)["mean"]
                scores = {**run.scores, "relative drop": drop}
                group.runs[number] = replace(run, scores=scores)


def _version_notes(table: Table) -> list[str]:
    seen: dict[str, list[str]] = {}
    for run in table.runs:
        for package, version in run.versions.items():
            seen.setdefault(package, [])
            if version not in seen[package]:
                seen[package].append(version)
    return [f"The runs were made with different versions of {package}: {', '.join(versions)}."
            for package, versions in seen.items() if len(versions) > 1]  # fmt: skip


def settings_apart(table: Table, base: Group) -> list[dict[str, Any]]:
    """List the settings, other than seed and method, in which the groups of a table differ from `base`."""
    rows = []
    for group in table.groups:
        changed = [
            text
            for text in difference(base.config, group.config)
            if not text.startswith(
                ("seed:", "method.", "scenario.joint:", "scenario.single:", "scenario.policy:")
            )
        ]
        if group is not base and changed:
            parts = (text.partition(":") for text in changed)
            told = "; ".join(f"{in_words(key)}: {value.strip()}" for key, _, value in parts)
            rows.append({"group": group.name, f"differs from {base.name} in": told})
    return rows
