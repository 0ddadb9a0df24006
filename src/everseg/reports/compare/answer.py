"""The answer that a comparison gives, for the first screen of its page: who is best at what, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everseg.errors import some
from everseg.reports.compare.columns import best, parts
from everseg.reports.compare.cost import STEP_TIME
from everseg.reports.compare.wording import text
from everseg.reports.numbers import BEYOND

Json = Mapping[str, Any]

OVERALL = ("all", "mIoU mean")
"""Numbers over everything that was taught: of classes, of domains."""


@dataclass(frozen=True)
class Winner:
    """Who is best in one number."""

    what: str
    """In which sense."""
    names: str
    value: str
    """The number with its name as in the tables; of a time the number alone."""
    more: str
    """What the reader should know beside it; "" if nothing."""


def overall(table: Json) -> str | None:
    """Name of the number over everything that was taught; None if no run has one."""
    return next((name for name in OVERALL if name in table["numbers"]), None)


def winners(table: Json) -> list[Winner]:
    """List who is best over everything, at the old, at the new, and at the time of a later step.

    Joint training is the upper bound and takes no part. Numbers in which all are equal are left out.
    """
    taught = [group for group in table["groups"] if not group["joint"]]
    whole, (kept, learnt) = overall(table), parts(table["numbers"])
    found = []
    for number, what, beside in (
        (whole, "Best over all", None),
        (kept, "Keeps the old best", learnt),
        (learnt, "Learns the new best", kept),
        ("forgetting" if whole == OVERALL[1] else None, "Forgets least", whole),
        (STEP_TIME, "Fastest later step", whole),
    ):
        if number is None or number not in table["numbers"]:
            continue
        leader = best((group["scores"][number]["mean"] for group in taught), number)
        if leader is None:
            continue
        shown = text(number, {"mean": leader, "sd": None})
        first = [g for g in taught if text(number, {**g["scores"][number], "sd": None}) == shown]
        more = _bound(table, number, leader) if number == whole else ""
        if number == whole:
            more = "; ".join(filter(None, [more, _close(taught, first, number)]))
        elif beside is not None and beside in table["numbers"] and len(first) == 1:
            more = f"{beside}: {text(beside, first[0]['scores'][beside])}"
        value = text(number, first[0]["scores"][number]) if len(first) == 1 else shown
        named = value if number == STEP_TIME else f"{number} {value}"
        found.append(Winner(what, some([g["name"] for g in first], 3), named, more))
    return found


def _bound(table: Json, number: str, leader: float) -> str:
    """Say what joint training reaches, and what it means if the leader is above it; "" without joint training."""
    joint = [g for g in table["groups"] if g["joint"] and g["scores"][number]["mean"] is not None]
    if not joint:
        return ""
    found = joint[0]["scores"][number]
    above = f", below it: {BEYOND}" if leader > found["mean"] else ""
    return f"joint training: {text(number, found)}{above}"


def _close(groups: Sequence[Json], first: Sequence[Json], number: str) -> str:
    """Name the groups whose mean lies within the leader's deviation; "" if there are none, or no deviation."""
    mean, sd = first[0]["scores"][number]["mean"], first[0]["scores"][number]["sd"]
    near = [
        g["name"]
        for g in groups
        if g not in first and sd and g["scores"][number]["mean"] is not None
        and abs(g["scores"][number]["mean"] - mean) <= sd
    ]  # fmt: skip
    return f"within its ±: {some(near, 4)}" if near else ""
