"""Mean, sample standard deviation and paired differences over seeds (floor 6)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from everseg.many.results import Group, Table


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
    """Names of the numbers a table shows: those that any run has, in their order, the time last."""
    names = dict.fromkeys(
        name for run in table.runs for name, value in run.scores.items() if value is not None
    )
    order = dict.fromkeys(name for run in table.runs for name in run.scores)
    return [
        *(name for name in order if name in names and name != "time"),
        *(["time"] if "time" in names else []),
    ]
