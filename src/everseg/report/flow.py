"""What the pixels of a class turned into: confusion counts as shares per true class (floor 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from everseg.metrics.scores import checked_counts

KINDS = ("right", "background", "later", "others")
"""found · called background · called a class learnt later · called another class known at the same time or before."""


@dataclass(frozen=True)
class Flow:
    """Where the true pixels of one class went."""

    train_id: int
    pixels: int
    shares: tuple[float, float, float, float]
    """Of KINDS; they sum to 1."""


@dataclass(frozen=True)
class Turn:
    """Pixels of one class taken for another."""

    truth: int
    taken_for: int
    pixels: int
    share: float
    """Of the class's true pixels, after the last step."""
    before: float | None
    """The same when the class was learnt; None if the other class (or a true pixel) was not there yet."""

    @property
    def rise(self) -> float:
        return self.share - (self.before or 0.0)


def flows(counts: np.ndarray, group_of: Sequence[int], background: int | None) -> list[Flow]:
    """Share of every class's true pixels per kind of prediction, for classes that have true pixels.

    Args:
        counts: (C, C), rows = truth.
        group_of: train id -> number of the growth that brought it.
        background: its train id, or None.

    >>> flows(np.array([[3, 1], [2, 2]]), [0, 1], background=0)[1].shares
    (0.5, 0.5, 0.0, 0.0)
    """
    table = checked_counts(counts)
    born = np.asarray(group_of)
    result = []
    for c, row in enumerate(table):
        total = int(row.sum())
        if not total:
            continue
        kinds = [0, 0, 0, 0]
        for other, number in enumerate(row.tolist()):
            if other == c:
                kinds[0] += number
            elif other == background:
                kinds[1] += number
            elif born[other] > born[c]:
                kinds[2] += number
            else:
                kinds[3] += number
        right, called_background, later, others = (number / total for number in kinds)
        result.append(Flow(c, total, (right, called_background, later, others)))
    return result


def turns(last: np.ndarray, first: Sequence[np.ndarray], *, most: int = 10) -> list[Turn]:
    """The pairs of classes whose confusion grew most since the class was learnt.

    Args:
        last: (C, C) counts after the last step.
        first: per class that is asked for, by train id from 0, the counts after the step that taught it.
        most: at most so many pairs, those with the largest rise first; pairs that did not grow are left out.
    """
    table = checked_counts(last)
    found = []
    for c, born in enumerate(first):
        total, before_total = int(table[c].sum()), int(born[c].sum())
        if not total:
            continue
        for other in np.flatnonzero(table[c]).tolist():
            if other == c:
                continue
            known = other < len(born) and before_total
            before = float(born[c, other] / before_total) if known else None
            found.append(Turn(c, other, int(table[c, other]), float(table[c, other] / total), before))
    grown = [turn for turn in found if turn.rise > 0]
    return sorted(grown, key=lambda turn: (-turn.rise, turn.truth, turn.taken_for))[:most]
