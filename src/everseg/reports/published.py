"""Published numbers that ship as data, and the choice of those that a run may be compared with.

A number is comparable only if data set, task, protocol, backbone, initial weights, background convention and the way
test images are prepared are the same as in the run. Other numbers for the same data and task are listed with their
differences, but never beside the run's numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import numpy as np

from everseg.config.fields import DataConfig, ModelConfig, ScenarioConfig
from everseg.config.yaml import parse
from everseg.display import in_percent
from everseg.labels import LabelSpace
from everseg.metrics import mean_iou
from everseg.runs.results import Results, source_name
from everseg.scenarios.tasks import canonical_task

Background = Literal["excluded", "included", "none", "not stated"]
BACKGROUND_TEXT: dict[str, str] = {
    "excluded": "background left out of the means",
    "included": "background counted",
    "none": "no background class",
    "not stated": "not stated whether background counts",
}
_WITHOUT_NORM_KIND = {"iabn": "abn", "abn": "abn", "bn": "bn"}
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
    """"1-15" = classes in the order they are learnt, "all", a data set, or "relative drop"."""
    methods: Mapping[str, tuple[float | None, ...]]
    """Method -> numbers in percent, one per column; None = not retrievable."""
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
        return f"{self.paper.partition(':')[0]}, {self.table}: {' '.join(filter(None, what))}"


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
        return [BACKGROUND_TEXT[entry.background], f"mean {entry.mean}", *self.remarks]

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
            values = own_numbers(entry, results.tracks[0].counts[-1], results.tracks[0].space)
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
    domains = tuple(raw.get("domains", ()))
    return Published(**{**raw, "columns": columns, "methods": methods, "domains": domains})


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
            _same_domains(entry, scenario, domains)
            if several
            else _same_task(entry, data.dataset, scenario.task)
        )
    ]
    return sorted(found, key=lambda match: not match.comparable)


def _same_task(entry: Published, name: str, task: str | list[list[int | str]]) -> bool:
    if entry.dataset != name or entry.task is None or not isinstance(task, str):
        return False
    return canonical_task(entry.task, name) == canonical_task(task, name)


def _same_domains(entry: Published, scenario: ScenarioConfig, domains: Sequence[str]) -> bool:
    if scenario.joint or not domains or not entry.domains:
        return False
    if entry.single or scenario.single:
        return entry.single and scenario.single and set(domains) <= set(entry.domains)
    return entry.domains == tuple(domains)


def _differences(
    entry: Published, data: DataConfig, scenario: ScenarioConfig, model: ModelConfig, cut: int | None
) -> list[str]:
    stride, norm = model.output_stride or _DEFAULT_STRIDE, model.norm or _DEFAULT_NORM
    theirs = entry.backbone
    found = []
    if entry.protocol is not None and entry.protocol != scenario.protocol and not scenario.joint:
        found.append(f"protocol {entry.protocol} there, {scenario.protocol} here")
    if entry.background == "not stated":
        found.append(BACKGROUND_TEXT["not stated"])
    if not entry.single_run:
        found.append(f"{entry.orders} there, one order here")
    if scenario.order is not None:
        found.append("class order of its own here")
    options = {key for key in model.options if key != "per_branch"}
    if theirs["model"] != model.name or options:
        ours = model.name + (f" with {', '.join(sorted(options))} changed" if options else "")
        found.append(f"backbone {theirs['model']} there, {ours} here")
    elif "output_stride" in theirs and theirs["output_stride"] != stride:
        found.append(f"output stride {theirs['output_stride']} there, {stride} here")
    elif "output_stride" in theirs and _WITHOUT_NORM_KIND[theirs["norm"]] != _WITHOUT_NORM_KIND[norm]:
        found.append(f"norm {theirs['norm']} there, {norm} here")
    if model.weights is None:
        found.append(f"starts from {theirs['weights']} weights there, from random ones here")
    size = (
        data.crop if data.evaluation == "crop" else list(data.size) if data.evaluation == "resize" else None
    )
    if (entry.evaluation["kind"], entry.evaluation["size"]) != (data.evaluation, size):
        seen = f"{data.evaluation} {_size(size)}".strip()
        found.append(
            f"test images seen as {entry.evaluation['kind']} {_size(entry.evaluation['size'])} there, {seen} here"
        )
    if scenario.test_split != "val":
        found.append(f"split val there, {scenario.test_split} here")
    if cut is not None:
        found.append(f"training cut short here (train.max_iterations={cut})")
    return found


def _remarks(entry: Published, model: ModelConfig) -> list[str]:
    found = [f"seeds: {entry.seeds}"]
    if model.weights is not None:
        found.append(f"{entry.backbone['weights']} weights there; here {model.weights}")
    norm = model.norm or _DEFAULT_NORM
    if "output_stride" in entry.backbone and entry.backbone["norm"] != norm:
        found.append(f"norm {entry.backbone['norm']} there, {norm} here")
    return found


def _size(size: Any) -> str:
    return "x".join(map(str, size)) if isinstance(size, list) else str(size or "")


def own_numbers(entry: Published, counts: np.ndarray, space: LabelSpace) -> tuple[float | None, ...]:
    """Give a run's numbers in the columns and the background convention of a published entry, in percent.

    Args:
        entry: published entry of a class-incremental task.
        counts: (C, C) after the last step, rows = truth.
        space: label space of these counts.
    """
    real = [c for c in range(space.num_classes) if c != space.background]
    with_background = entry.background == "included" and space.background is not None
    numbers = []
    for column in entry.columns:
        if column == "all":
            first, last = 1, len(real)
        else:
            first, last = map(int, column.split("-"))
        chosen = real[first - 1 : last]
        if with_background and first == 1 and space.background is not None:
            chosen = [space.background, *chosen]
        value = mean_iou(counts, chosen) if chosen and last <= len(real) else float("nan")
        numbers.append(in_percent(value))
    return tuple(numbers)


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
