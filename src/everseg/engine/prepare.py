"""Prepare a run before it trains: open the data, index the classes, build the steps. Quick: it needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from everseg import registry
from everseg.config.fields import DataConfig, ScenarioConfig
from everseg.data.base import Dataset
from everseg.data.batches.index import class_counts
from everseg.data.datasets import load_dataset, load_domains
from everseg.data.label_meaning import require_meaning
from everseg.errors import CheckpointError, ConfigError
from everseg.progress import Progress
from everseg.scenarios.domain_incremental import needed_domains
from everseg.scenarios.extension import Known
from everseg.scenarios.steps import Step, missing_splits, with_outlook
from everseg.scenarios.summary import naming_notes


@dataclass(frozen=True)
class Prepared:
    """The data sets of a run, their class index, and the steps built from them."""

    datasets: Mapping[str, Dataset]
    """Domain -> data set; in runs on one data set its own name -> it."""
    counts: Mapping[str, np.ndarray]
    """"key/split" -> (N, 256) pixels per raw id of every image."""
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()
    """How class names were treated that differ in spelling, that the reader left out, or that no step teaches."""


def prepare(data: DataConfig, scenario: ScenarioConfig, progress: Progress, *, seed: int) -> Prepared:
    """Open the data, index their classes (cached) and build the scenario.

    The built-in scenario over domains opens only the domains that some step teaches. A scenario that the user wrote
    gets all domains.

    Args:
        seed: of the run; some scenarios draw images with it.

    Raises:
        ConfigError, DataError: the data or the scenario lack something; the message says what.
    """
    several = bool(data.domains)
    if scenario.kind in registry.BUILTIN["scenario"] and several != (scenario.kind == "domain-incremental"):
        raise ConfigError(
            f"scenario.kind: '{scenario.kind}' needs data.domains (domain name -> its data)"
            if not several
            else f"scenario.kind: '{scenario.kind}' takes one data set, but data.domains names "
            f"{', '.join(data.domains)}; use scenario.kind=domain-incremental"
        )
    if scenario.kind == "domain-incremental":
        kept = {name: data.domains[name] for name in needed_domains(scenario.steps, data.domains)}
        data = data.model_copy(update={"domains": kept})
    datasets = open_datasets(data)
    wanted = sorted({"train", scenario.test_split} | ({"val"} if scenario.validation == "split" else set()))
    whose = "domain" if several else "data set"
    if missing := [
        text
        for key, dataset in datasets.items()
        for text in missing_splits(f"{whose} '{key}'", wanted, dataset.splits)
    ]:
        raise ConfigError(missing)
    counts = {
        f"{key}/{name}": _indexed(dataset, name, f"{key}/{name}", progress)
        for key, dataset in datasets.items()
        for name in wanted
    }
    for key, dataset in datasets.items():
        require_meaning(dataset, {name: counts[f"{key}/{name}"] for name in wanted})
    build = registry.resolve("scenario", scenario.kind)
    if several:
        steps = build(scenario, datasets, counts, seed=seed)
    else:
        ((key, dataset),) = datasets.items()
        # Only an extension reads a bundle. It gets the reader as an argument, because `everseg.scenarios` may not
        # import `everseg.runs`, which stands above it.
        more = {"read": known_in} if scenario.kind == "extension" else {}
        steps = build(scenario, dataset, {n: counts[f"{key}/{n}"] for n in wanted}, seed=seed, **more)
    _check_spaces(steps)
    left_out = [
        f"{text} (domain '{key}')" if several else text for key, one in datasets.items() for text in one.notes
    ]
    return Prepared(
        datasets, counts, with_outlook(steps), (*left_out, *naming_notes(steps, datasets, counts))
    )


def _check_spaces(steps: Sequence[Step]) -> None:
    """Stop before training if a model file could not hold the classes, for example two classes of one name."""
    wrong = {
        f"branch '{branch}': {problem}": None
        for step in steps
        for branch, space in step.spaces.items()
        for problem in space.problems()
    }
    if wrong:
        raise ConfigError(list(wrong), "the classes of the scenario")


def known_in(bundle: Path) -> Known:
    """Read which classes the model of a bundle knows.

    Raises:
        CheckpointError: the folder is no bundle, or it is damaged.
    """
    from everseg.runs.model_folder import (  # imported here because it imports torch
        is_bundle,
        read_lineage,
        read_model_file,
    )
    from everseg.runs.place import what_is

    if not is_bundle(bundle):
        raise CheckpointError(
            f"{bundle} {what_is(bundle)}; this needs a bundle (everseg export RUN makes one)"
        )
    about, lineage = read_model_file(bundle), read_lineage(bundle)
    return Known(about.spaces, about.lasting_ids(bundle).next_id, lineage["steps"], bundle)


def open_datasets(data: DataConfig) -> dict[str, Dataset]:
    """Open a run's data. The keys are the names of the domains, or the name of the single data set."""
    if data.domains:
        return load_domains(data)
    dataset = load_dataset(data)
    return {dataset.name: dataset}


def _indexed(dataset: Dataset, name: str, title: str, progress: Progress) -> np.ndarray:
    """Count the pixels per raw id of every image of a split, (N, 256), and show the progress."""
    split = dataset.splits[name]
    progress.begin(f"indexing the classes of {title}", len(split))
    counts = class_counts(split, dataset.labels, progress=lambda done, _total: progress.update(done))
    progress.end()
    return counts
