"""Published numbers that ship as data, and the choice of those that a run may be compared with.

A number is comparable only if data set, task, protocol, label policy, backbone, initial weights, background convention,
the scored checkpoint and the way test images are prepared are the same as in the run. Other numbers for the same data
and task are listed with their differences, but never beside the run's numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Literal

import numpy as np

from everseg.config.fields import DataConfig, ModelConfig, ScenarioConfig
from everseg.config.yaml import parse
from everseg.display import counted, in_percent
from everseg.labels import LabelSpace, policy_name
from everseg.metrics import first_last_scores, mean_iou
from everseg.runs.results import Results, source_name
from everseg.scenarios.tasks import canonical_task

Background = Literal["excluded", "included", "none", "not stated"]
BACKGROUND_TEXT: dict[str, str] = {
    "excluded": "background left out of the means",
    "included": "background counted",
    "none": "no background class",
    "not stated": "not stated whether background counts",
}
NOT_STATED = "not stated"
Kind = Literal["paper", "README", "log", "notebook", "quoted", "third-party listing"]
KIND_TEXT: dict[str, str] = {
    "paper": "table of the paper",
    "README": "the authors' read-me",
    "log": "released results of single runs",
    "notebook": "the authors' notebook",
    "quoted": "quoted by others",
    "third-party listing": "a listing by others",
}


@dataclass(frozen=True)
class Reporting:
    """How a source takes its means."""

    absent: Literal["skip", "zero"]
    """What a class without a true pixel does: it is left out, or counts 0 (`metrics.mean_iou`)."""
    text: str


REPORTING: dict[str, Reporting] = {
    "mib": Reporting("skip", "classes without test pixels are left out of the means (MiB's rule)"),
    "plop": Reporting("zero", "classes without test pixels count 0 in the means (PLOP's rule)"),
    NOT_STATED: Reporting(
        "skip", "how classes without test pixels count is not stated; here they are left out"
    ),
}
"""Reporting rules by name. "first", "last" and "average" (`COLUMN_TEXT`) mean the same under each."""
COLUMN_TEXT = {
    "first": "first = the classes of step 0",
    "last": "last = all classes of later steps",
    "average": "average = mean over the steps of all",
    "hIoU": "hIoU = harmonic mean of first and last",
}
PLOP_RULE = "; ".join(
    [
        *(COLUMN_TEXT[name] for name in ("first", "last", "average")),
        REPORTING["plop"].text,
        "background counted",
    ]
)
"""The reporting rule of PLOP's code in words, for `Results.plop_figures`."""
_WITHOUT_NORM_KIND = {"iabn": "abn", "abn": "abn", "bn": "bn"}
_OF_METHODS = {"per_branch", "compensation", "last_conv", "dropout", "encoder_momentum", "pool_size"}
"""Options with which a method (MDIL, RCIL, SSUL, DKD) adds its own parts to the same backbone, or trains its head."""
_DEFAULT_STRIDE, _DEFAULT_NORM = 16, "abn"


@dataclass(frozen=True)
class Published:
    """The numbers of one source for one task and protocol, with the conventions it used."""

    paper: str
    table: str
    source: str
    """Where it was read."""
    url: str
    background: Background
    backbone: Mapping[str, Any]
    """model, norm, weights and, of DeepLabV3, output_stride."""
    evaluation: Mapping[str, Any]
    """kind ("crop", "resize") and size of test images."""
    mean: str
    seeds: str
    columns: tuple[str, ...]
    """"1-15" = classes in the order they are learnt, "all", one of `COLUMN_TEXT`, "step 3" = all after that step, a
    data set, or "relative drop"."""
    methods: Mapping[str, tuple[float | None, ...]]
    """Method -> numbers in percent, one per column; None = not retrievable."""
    kind: Kind
    checkpoint: str
    """"last", or which one was scored; "mixed: ..." where rows differ, which is told but refuses nothing."""
    policy: str | None = None
    """Label policy; None where all classes are taught at once."""
    reporting: str | None = None
    """Name in `REPORTING`; None over domains."""
    commit: str | None = None
    """Of the repository in which the numbers were read."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """Method -> training images that it keeps."""
    cannot: tuple[str, ...] = ()
    """Why the numbers are compared with no run."""
    notes: tuple[str, ...] = ()
    dataset: str | None = None
    task: str | None = None
    protocol: str | None = None
    domains: tuple[str, ...] = ()
    """Data sets in the order they are learnt, of domain-incremental results."""
    single: bool = False
    """Single-task models."""
    single_run: bool = True
    """False: a mean over several different runs, so no single run is like it."""
    orders: str = ""

    @property
    def title(self) -> str:
        what = [" → ".join(self.domains)] if self.domains else [self.dataset, self.task, self.protocol]
        single = " (one model per domain)" if self.single else ""
        return f"{self.paper.partition(':')[0]}, {self.table}: {' '.join(filter(None, what))}{single}"


@dataclass(frozen=True)
class Match:
    """Published numbers for a run's data and task, and the differences that prevent a comparison."""

    published: Published
    differences: tuple[str, ...]
    """Why they must not be compared; empty = they may."""
    remarks: tuple[str, ...]
    """What a reader has to know all the same."""

    @property
    def comparable(self) -> bool:
        return not self.differences

    @property
    def conventions(self) -> list[str]:
        """How the source counted, and other remarks."""
        entry = self.published
        return [
            BACKGROUND_TEXT[entry.background],
            *([] if entry.policy is None else [f"label policy {entry.policy}"]),
            f"mean {entry.mean}",
            *(COLUMN_TEXT[column] for column in entry.columns if column in COLUMN_TEXT),
            *([] if entry.reporting is None else [REPORTING[entry.reporting].text]),
            f"checkpoint {entry.checkpoint}",
            KIND_TEXT[entry.kind] + (f" (commit {entry.commit})" if entry.commit else ""),
            *self.remarks,
        ]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The source's numbers, one row per method; None = not available."""
        entry = self.published
        return [
            {"method": name, **dict(zip(entry.columns, values, strict=True))}
            for name, values in entry.methods.items()
        ]

    def own(self, results: Results, drop: float | None) -> dict[str, float | None]:
        """Give a run's numbers in the columns and convention of the source, in percent.

        Args:
            results: of the run.
            drop: its mean relative drop as a fraction, None if unknown.
        """
        entry, domains = self.published, results.config.data.domains
        if domains or len(results.tracks) > 1:
            tracks = {track.name: track for track in results.tracks if track.name in domains}
            miou = {domains[name].dataset: t.scores[-1]["miou"]["all"] for name, t in tracks.items()}
            values = own_domain_numbers(entry, miou, drop)
        else:
            values = own_numbers(entry, results.tracks[0].counts, results.tracks[0].space)
        return dict(zip(entry.columns, values, strict=True))


@cache
def published() -> tuple[Published, ...]:
    """Read all published numbers that ship, one entry per source, task and protocol."""
    text = resources.files(__package__ or "").joinpath("published.yaml").read_text(encoding="utf-8")
    found = []
    for table in parse(text, "report/published.yaml").value:
        shared = {key: value for key, value in table.items() if key != "results"}
        found += [_entry({**shared, **result}) for result in table["results"]]
    return tuple(found)


def _entry(raw: Mapping[str, Any]) -> Published:
    columns = tuple(raw["columns"])
    methods = {
        method: (None,) * len(columns) if numbers is None else tuple(numbers)
        for method, numbers in raw["methods"].items()
    }
    if wrong := [method for method, numbers in methods.items() if len(numbers) != len(columns)]:
        raise ValueError(f"report/published.yaml: {', '.join(wrong)} do not fit the columns {columns}")
    lists = {key: tuple(raw.get(key, ())) for key in ("domains", "cannot", "notes")}
    return Published(**{**raw, **lists, "columns": columns, "methods": methods})


def matches_of(results: Results) -> list[Match]:
    """Published numbers of a run's data and task, those that may be compared first."""
    config = results.config
    cut = config.train.max_iterations
    return matches(config.data, config.scenario, config.model, learnt_sets(results), cut=cut)


def learnt_sets(results: Results) -> list[str]:
    """List the data sets in the order in which their domains were learnt as a whole; [] for mixed runs."""
    config = results.config
    if not config.data.domains or any(s.classes or s.add for s in config.scenario.steps or []):
        return []
    order = [source_name(source) for step in results.planned for source in step["train"]]
    return [config.data.domains[name].dataset for name in dict.fromkeys(order) if name in config.data.domains]


def matches(
    data: DataConfig,
    scenario: ScenarioConfig,
    model: ModelConfig,
    domains: Sequence[str] = (),
    *,
    cut: int | None = None,
) -> list[Match]:
    """Published numbers of the run's data and task, those that may be compared first.

    Args:
        data: of a run on one data set, or over domains.
        scenario: of the run.
        model: of the run.
        domains: for a run over domains, the data sets in the order they were learnt; () if the run is mixed.
        cut: number of iterations at which every step was cut short; None = trained to its end.
    """
    several = bool(data.domains)
    found = [
        Match(entry, tuple(_differences(entry, data, scenario, model, cut)), tuple(_remarks(entry, model)))
        for entry in published()
        if (
            _same_domains(entry, data, scenario, domains)
            if several
            else _same_task(entry, data.dataset, scenario.task)
        )
    ]
    return sorted(found, key=lambda match: not match.comparable)


def _same_task(entry: Published, name: str, task: str | list[list[int | str]]) -> bool:
    if entry.dataset != name or entry.task is None or not isinstance(task, str):
        return False
    return canonical_task(entry.task, name) == canonical_task(task, name)


def _same_domains(
    entry: Published, data: DataConfig, scenario: ScenarioConfig, domains: Sequence[str]
) -> bool:
    # Steps that are parts of one data set are listed, with the reason why they are not compared.
    if entry.protocol == "domain-incremental":
        return {domain.dataset for domain in data.domains.values()} == {entry.dataset}
    if scenario.joint or not domains or not entry.domains:
        return False
    if entry.single or scenario.single:
        return entry.single and scenario.single and set(domains) <= set(entry.domains)
    return entry.domains == tuple(domains)


def _differences(
    entry: Published, data: DataConfig, scenario: ScenarioConfig, model: ModelConfig, cut: int | None
) -> list[str]:
    found = [*_of_labels(entry, data, scenario), *_of_model(entry, model), *_of_tests(entry, data)]
    if scenario.test_split != "val":
        found.append(f"split val there, {scenario.test_split} here")
    if cut is not None:
        found.append(f"training cut short here (train.max_iterations={cut})")
    return found


def _of_labels(entry: Published, data: DataConfig, scenario: ScenarioConfig) -> list[str]:
    """List the differences in the source itself, in the images of the steps, and in their labels."""
    found = list(entry.cannot)
    if entry.kind in ("quoted", "third-party listing"):
        found.append(f"{KIND_TEXT[entry.kind]}, so it is not known how each row was made")
    if entry.protocol is not None and entry.protocol != scenario.protocol and not scenario.joint:
        found.append(f"protocol {entry.protocol} there, {scenario.protocol} here")
    policy = policy_name(scenario.policy, data.dataset)
    if entry.policy == NOT_STATED:
        found.append(f"label policy not known there, {policy} here")
    elif entry.policy is not None and entry.policy != policy:
        found.append(f"label policy {entry.policy} there, {policy} here")
    if entry.background == "not stated":
        found.append(BACKGROUND_TEXT["not stated"])
    if not entry.single_run:
        found.append(f"{entry.orders} there, one order here")
    if scenario.order is not None:
        found.append("class order of its own here")
    return found


def _of_model(entry: Published, model: ModelConfig) -> list[str]:
    stride, norm = model.output_stride or _DEFAULT_STRIDE, model.norm or _DEFAULT_NORM
    theirs, found = entry.backbone, list[str]()
    options = model.options.keys() - _OF_METHODS
    if theirs["model"] != model.name or options:
        ours = model.name + (f" with {', '.join(sorted(options))} changed" if options else "")
        found.append(f"backbone {theirs['model']} there, {ours} here")
    elif "output_stride" in theirs and theirs["output_stride"] != stride:
        found.append(f"output stride {theirs['output_stride']} there, {stride} here")
    elif "output_stride" in theirs and theirs["norm"] == NOT_STATED:
        found.append("norm not stated there")
    elif "output_stride" in theirs and _WITHOUT_NORM_KIND[theirs["norm"]] != _WITHOUT_NORM_KIND[norm]:
        found.append(f"norm {theirs['norm']} there, {norm} here")
    if model.weights is None:
        found.append(f"starts from {theirs['weights']} weights there, from random ones here")
    return found


def _of_tests(entry: Published, data: DataConfig) -> list[str]:
    """List the differences in which weights were tested, and in how test images were seen."""
    found = list[str]()
    if entry.checkpoint == NOT_STATED:
        found.append("not stated there which checkpoint was scored")
    elif entry.checkpoint != "last" and not entry.checkpoint.startswith("mixed"):
        found.append(f"checkpoint scored: {entry.checkpoint} there, the last one here")
    size = (
        data.crop if data.evaluation == "crop" else list(data.size) if data.evaluation == "resize" else None
    )
    if entry.evaluation["kind"] == NOT_STATED:
        found.append("not stated there how test images were seen")
    elif (entry.evaluation["kind"], entry.evaluation["size"]) != (data.evaluation, size):
        seen = f"{data.evaluation} {_size(size)}".strip()
        found.append(
            f"test images seen as {entry.evaluation['kind']} {_size(entry.evaluation['size'])} there, {seen} here"
        )
    return found


def _remarks(entry: Published, model: ModelConfig) -> list[str]:
    found = [f"seeds: {entry.seeds}", *entry.notes]
    found += [
        f"{method} keeps {counted(number, 'training image')}" for method, number in entry.memory.items()
    ]
    if model.weights is not None:
        found.append(f"{entry.backbone['weights']} weights there; here {model.weights}")
    norm = model.norm or _DEFAULT_NORM
    if "output_stride" in entry.backbone and entry.backbone["norm"] != norm:
        found.append(f"norm {entry.backbone['norm']} there, {norm} here")
    return found


def _size(size: Any) -> str:
    return "x".join(map(str, size)) if isinstance(size, list) else str(size or "")


def own_numbers(
    entry: Published, counts: Sequence[np.ndarray], space: LabelSpace
) -> tuple[float | None, ...]:
    """Give a run's numbers in the columns, the background convention and the reporting rule of an entry, in percent.

    Args:
        entry: published entry of a class-incremental task.
        counts: (C, C) after each step, rows = truth.
        space: label space of the last ones.
    """
    counted = entry.background == "included"
    absent = REPORTING[entry.reporting or NOT_STATED].absent
    left_out = None if counted else space.background
    parts = first_last_scores(counts, [len(group) for group in space.groups], left_out, absent=absent)
    parts["hIoU"] = parts.pop("harmonic_mean")
    return tuple(
        in_percent(parts[column] if column in parts else _of_column(column, counts, space, counted, absent))
        for column in entry.columns
    )


def _of_column(
    column: str,
    counts: Sequence[np.ndarray],
    space: LabelSpace,
    counted: bool,
    absent: Literal["skip", "zero"],
) -> float | None:
    """Give the mean of "1-15" (classes by number, with the background if it counts), or of "step 3", as a fraction."""
    if column.startswith("step "):
        step = int(column.removeprefix("step "))
        if step >= len(counts):
            return None
        known = [c for c in range(len(counts[step])) if counted or c != space.background]
        return mean_iou(counts[step], known, absent)
    real = [c for c in range(space.num_classes) if c != space.background]
    first, last = map(int, column.split("-"))
    chosen = real[first - 1 : last]
    if counted and first == 1 and space.background is not None:
        chosen = [space.background, *chosen]
    return mean_iou(counts[-1], chosen, absent) if chosen and last <= len(real) else None


def own_domain_numbers(
    entry: Published, miou: Mapping[str, float | None], drop: float | None
) -> tuple[float | None, ...]:
    """Give the numbers of a run over domains in the columns of a published entry.

    Args:
        miou: data set -> mIoU as a fraction after the last step.
        drop: mean relative drop as a fraction, None if unknown.
    """
    known: dict[str, float | None] = {**miou, "relative drop": drop}
    values = [known.get(column) for column in entry.columns]
    return tuple(in_percent(value) for value in values)
