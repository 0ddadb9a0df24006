"""Mean, sample standard deviation and paired differences over seeds."""

from __future__ import annotations

import statistics
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from everseg.metrics import RESAMPLES, defined_means, group_miou, interval, resampled_sums
from everseg.reports.compare.cost import COSTS
from everseg.reports.compare.groups import Group, Result, Table, per_domain


@dataclass(frozen=True)
class Spread:
    """Values of several seeds in one number."""

    mean: float | None
    sd: float | None
    """Sample standard deviation (n - 1); None for fewer than two values."""
    count: int

    def to_json(self) -> dict[str, Any]:
        return {"mean": self.mean, "sd": self.sd, "n": self.count}


def spread(values: Iterable[float | None]) -> Spread:
    """Mean and sample standard deviation of the values that are defined.

    >>> spread([1.0, 3.0, None])
    Spread(mean=2.0, sd=1.4142135623730951, count=2)
    """
    known = [value for value in values if value is not None]
    if not known:
        return Spread(None, None, 0)
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def over_seeds(group: Group, number: str) -> Spread:
    """One number of a group."""
    return spread(run.scores.get(number) for run in group.runs)


def paired(group: Group, base: Group, number: str) -> Spread:
    """Differences group - base of the runs with the same seed; `count` is the number of pairs."""
    theirs = {run.config.seed: run.scores.get(number) for run in base.runs}
    differences = []
    for run in group.runs:
        mine, other = run.scores.get(number), theirs.get(run.config.seed)
        if mine is not None and other is not None:
            differences.append(mine - other)
    return spread(differences)


def numbers_of(table: Table) -> list[str]:
    """List the numbers a table shows: those that at least one run has, in a fixed order, with the costs last."""
    names = dict.fromkeys(
        name for run in table.runs for name, value in run.scores.items() if value is not None
    )
    order = dict.fromkeys(name for run in table.runs for name in run.scores)
    return [
        *(name for name in order if name in names and name not in COSTS),
        *(name for name in COSTS if name in names),
    ]


Draws = Mapping[str, np.ndarray]
"""Name of a number -> its value in each draw, (RESAMPLES,)."""


def draws_of(run: Result) -> Draws:
    """Compute the last step's numbers on resampled test images; {} if the run did not store counts per image."""
    found: dict[str, np.ndarray] = {}
    for track in run.tracks:
        images = run.results.step(track.steps[-1]).images.get(track.name)
        if images is None or not len(images):
            return {}
        sums = resampled_sums(images, RESAMPLES, zlib.crc32(track.name.encode()))
        means = group_miou(sums, [len(group) for group in track.space.groups], track.background)
        if run.several:
            found[per_domain(track)] = means["miou"]["all"]
            continue
        for suffix, key in (("", "miou"), (" (no bg)", "miou_without_background")):
            found |= {f"{name}{suffix}": values for name, values in means[key].items()}
    if run.several:
        found["mIoU mean"] = defined_means(np.stack([*found.values()], axis=1))
    return found


def of_scores(group: Group, draws: Mapping[int, Draws], number: str) -> list[float] | None:
    """Interval of a group's mean over seeds; None unless all of its runs stored counts per image.

    Args:
        draws: `id` of a result -> its draws.
    """
    runs = [draws[id(run)] for run in group.runs]
    return interval(one[number] for one in runs) if all(number in one for one in runs) else None


def of_differences(group: Group, base: Group, draws: Mapping[int, Draws], number: str) -> list[float] | None:
    """Interval of the mean difference of runs with the same seed. Both runs of a pair use the same resampled images."""
    theirs = {run.config.seed: draws[id(run)] for run in base.runs}
    pairs = [(draws[id(run)], theirs[run.config.seed]) for run in group.runs if run.config.seed in theirs]
    if not all(number in mine and number in other for mine, other in pairs):
        return None
    return interval(mine[number] - other[number] for mine, other in pairs)
