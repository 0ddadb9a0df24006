"""The campaigns against everseg: what is done to it, how often, and what came of it.

A campaign is a generator of trials. Each trial does one thing to everseg and says whether it held what is promised.
The test run does a few trials of each (`test_campaigns.py`), `python -m tests.faults --long` all of them.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Trial(NamedTuple):
    """One attempt, and what was wrong with what happened."""

    what: str
    """Names the case, so that it can be done again: the fault, its place, the seed."""
    problem: str = ""
    """What of the promise was broken; "" if nothing."""
    harmless: str = ""
    """Why the fault could not be noticed and need not be; "" if it was told."""
    skipped: str = ""
    """Why it could not be tried on this machine. Such a trial shows nothing, and does not count."""


Trials = Callable[[Path, int], Iterator[Trial]]


@dataclass(frozen=True)
class Campaign:
    """A kind of fault and the number of times that it is tried."""

    name: str
    run: Trials
    everyday: int
    """Trials in every run of the tests."""
    long: int
    """Trials of the long command."""

    @property
    def about(self) -> str:
        """The fault and the promise, in a sentence."""
        return " ".join((self.run.__doc__ or "").split())


CAMPAIGNS: dict[str, Campaign] = {}


def campaign(name: str, *, everyday: int, long: int) -> Callable[[Trials], Trials]:
    """Register a generator of trials. It gets an empty folder and the number of trials to make."""

    def register(run: Trials) -> Trials:
        assert name not in CAMPAIGNS, f"two campaigns are called {name}"
        assert run.__doc__, f"campaign {name} says neither its fault nor its promise"
        CAMPAIGNS[name] = Campaign(name, run, everyday, long)
        return run

    return register


def all_campaigns() -> dict[str, Campaign]:
    """Those of every file *_faults.py beside this one."""
    for path in sorted(HERE.glob("*_faults.py")):
        importlib.import_module(path.stem)
    return CAMPAIGNS


@dataclass
class Outcome:
    """What came of a campaign."""

    campaign: Campaign
    tried: int = 0
    harmless: list[Trial] = field(default_factory=list)
    broken: list[Trial] = field(default_factory=list)
    skipped: list[Trial] = field(default_factory=list)
    seconds: float = 0.0
    slowest: float = 0.0
    """Seconds of the longest trial."""

    def __str__(self) -> str:
        held = self.tried - len(self.broken)
        quiet = f", {len(self.harmless)} of them harmless" if self.harmless else ""
        left_out = f", {len(self.skipped)} skipped ({self.skipped[0].skipped})" if self.skipped else ""
        return (
            f"{self.campaign.name}: {held} of {self.tried} held{quiet}{left_out}; {self.seconds:.0f} s, "
            f"the longest {self.slowest:.1f} s"
        )


def carry_out(campaign: Campaign, number: int, tell: Callable[[Trial], object] = lambda _: None) -> Outcome:
    """Do so many trials of a campaign in a folder that is deleted afterwards.

    Args:
        tell: told of each trial as soon as it is done.
    """
    outcome = Outcome(campaign)
    began = last = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="everseg-faults-") as place:
        for trial in campaign.run(Path(place).resolve(), number):
            now = time.monotonic()
            tell(trial)
            if trial.skipped:
                outcome.skipped.append(trial)
                continue
            outcome.tried, outcome.slowest, last = outcome.tried + 1, max(outcome.slowest, now - last), now
            if trial.problem:
                outcome.broken.append(trial)
            elif trial.harmless:
                outcome.harmless.append(trial)
    outcome.seconds = time.monotonic() - began
    return outcome
