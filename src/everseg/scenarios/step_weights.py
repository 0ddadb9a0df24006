"""Class weights of a scenario's steps: computed from the training pixels, or taken from a publication."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from everseg.data.class_weights import class_weights, published_weights
from everseg.errors import ConfigError
from everseg.labels import SYNTHETIC_VOID, spelling
from everseg.scenarios.steps import Labelled, Source, Step


def weighted(
    steps: Sequence[Step],
    kind: Literal["none", "computed", "published"],
    datasets: Mapping[str, Labelled],
    counts: Mapping[str, np.ndarray],
) -> tuple[Step, ...]:
    """Add the cross-entropy weights of the outputs to every step, for each branch that the step trains.

    Args:
        kind: "none" leaves the steps as they are.
            "computed" gives 1 / ln(1.1 + share of the pixels). The share is counted over the step's training labels,
            before images are resized or cropped. Old classes that are not labelled there count as absent.
            "published" takes the numbers that MDIL's authors give for the data set, by class name. Outputs that the
            step does not label weigh 1, because they are never a target.
            An output for void always weighs 0.
        datasets: key of the sources -> data set. The name of the data set selects the published numbers.
        counts: "key/split" -> (N, 256) pixels per raw id of every image.

    Raises:
        ConfigError: no weights are published for a data set or class, or two data sets of one branch disagree.
    """
    if kind == "none":
        return tuple(steps)
    problems: list[str] = []
    result = []
    for step in steps:
        weights: dict[str, tuple[float, ...]] = {}
        for branch in step.trained_branches:
            sources = [source for source in step.train if source.branch == branch]
            if kind == "computed":
                weights[branch] = _computed(step, branch, sources, counts)
            else:
                weights[branch], wrong = _published(step, branch, sources, datasets)
                problems += wrong
        result.append(replace(step, class_weights=weights))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return tuple(result)


def _computed(
    step: Step, branch: str, sources: Sequence[Source], counts: Mapping[str, np.ndarray]
) -> tuple[float, ...]:
    order = step.spaces[branch].order
    ignored = step.spaces[branch].ignored
    pixels = np.zeros(ignored + 1, np.int64)  # pixels per train id
    for source in sources:
        total = np.asarray(counts[f"{source.dataset}/{source.split}"])[list(source.indices)].sum(axis=0)
        np.add.at(pixels, source.table, total.astype(np.int64))
    real = [i for i, raw in enumerate(order) if raw != SYNTHETIC_VOID]
    weights = np.zeros(len(order))
    # Ignored pixels count in the shares, but have no output: their weight is cut off again.
    weights[real] = class_weights(np.append(pixels[real], pixels[ignored]))[:-1]
    return tuple(weights.tolist())


def _published(
    step: Step, branch: str, sources: Sequence[Source], datasets: Mapping[str, Labelled]
) -> tuple[tuple[float, ...], list[str]]:
    space = step.spaces[branch]
    weights: dict[str, float] = {}
    problems = []
    for source in sources:
        dataset = datasets[source.dataset].name
        try:
            table = published_weights(dataset)
        except ConfigError as error:
            return (), error.problems
        known = {spelling(name): weight for name, weight in table.items()}
        for name in (space.names[i] for i in sorted(set(source.lut) - {source.ignored})):
            weight = known.get(spelling(name))
            if weight is None:
                problems.append(
                    f"scenario.class_weights: no weight of '{name}' is published for data set '{dataset}'; "
                    "use class_weights=computed"
                )
            elif weights.setdefault(name, weight) != weight:
                problems.append(
                    f"scenario.class_weights: the published weights of '{name}' differ between the data sets of "
                    f"the branch '{branch}'; use class_weights=computed"
                )
    void = {space.names[i]: 0.0 for i, raw in enumerate(space.order) if raw == SYNTHETIC_VOID}
    return tuple({**weights, **void}.get(name, 1.0) for name in space.names), problems
