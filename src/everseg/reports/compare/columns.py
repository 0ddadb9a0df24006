"""What a number of a comparison means: its unit, which direction is better, and how it is explained."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from everseg.reports.compare import cost
from everseg.reports.glossary import MEANINGS

WITHOUT = " (no bg)"
"""End of the names of numbers without background."""


@dataclass(frozen=True)
class Column:
    """One number as a column of a table."""

    unit: Literal["percent", "signed percent", "time", "seconds", "bytes", "count"]
    better: Literal["more", "less"]
    says: str
    """What it is, as a sentence without its full stop."""

    @property
    def arrow(self) -> str:
        """The direction in which the number gets better."""
        return "↑" if self.better == "more" else "↓"


_COLUMNS = {
    "base": Column("percent", "more", "mIoU of the classes of the first step, after the last step"),
    "later": Column("percent", "more", "mIoU of the classes that all later steps taught, after the last step"),
    "old": Column("percent", "more", "mIoU of the classes learnt before the last step, after the last step"),
    "new": Column("percent", "more", "mIoU of the classes that the last step taught"),
    "all": Column("percent", "more", "mIoU of all classes after the last step"),
    "mIoU mean": Column("percent", "more", "mean of the mIoU of the domains"),
    "average": Column("percent", "more", MEANINGS["average"]),
    "forgetting": Column("percent", "less", MEANINGS["forgetting"]),
    "relative drop": Column("signed percent", "more", MEANINGS["relative drop"]),
    cost.TIME: Column("time", "less",
                      "training alone, all steps, from the journal; a shared first step counts in every run"),
    cost.STEP_TIME: Column("seconds", "less", "training alone, mean over the steps after the first, from the journal"),
    cost.MEMORY: Column("bytes", "less",
                        "largest resident memory of the process while it trained the later steps (of a GPU's memory "
                        "the journal says nothing); runs of one step: in that step"),
    cost.TRAINED: Column("count", "less",
                         "parameters of the stored weights that are new or differ from those of the step before, mean "
                         "over the later steps, and their share of the network; running statistics of normalisation "
                         "are no parameters"),
    cost.PARAMETERS: Column("count", "less", "parameters of the last model"),
    cost.IMAGES: Column("count", "less",
                        "images of earlier steps in the memory at the end of the run; with their bytes where the run "
                        "copied them, else they are read from the data again"),
    cost.BYTES: Column("bytes", "less", "bytes of the images, masks and maps that the run copied"),
}  # fmt: skip


PARTS = (("base", "later"), ("old", "new"))
"""Pairs of numbers: the classes that were to be kept, and those that were to be learnt. A sequence of more than two
steps has both pairs, and the first pair says more of it."""


def parts(numbers: Collection[str]) -> tuple[str, str]:
    """The pair that says most of a comparison with these numbers."""
    return next((pair for pair in PARTS if set(pair) <= set(numbers)), PARTS[-1])


def column(number: str) -> Column:
    """Look up a number by its name.

    Raises:
        KeyError: there is no number of this name.
    """
    name = number.removesuffix(WITHOUT)
    if name not in _COLUMNS and name.startswith("mIoU "):
        return Column("percent", "more", f"mIoU of {name.removeprefix('mIoU ')} over all its classes")
    return _COLUMNS[name]


def best(values: Iterable[float | None], number: str) -> float | None:
    """Return the best of the values; None unless at least two are known and they differ."""
    known = [value for value in values if value is not None]
    if len(set(known)) < 2:
        return None
    return max(known) if column(number).better == "more" else min(known)
