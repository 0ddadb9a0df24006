"""Place names beside the dots of a picture so that no name covers another one, a dot or the line to another dot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]

NEAR = 5.0
"""Names whose edge is at most so far from the edge of their dot need no line to it."""
_RINGS = (2.0, 4.0, 8.0, 13.0, 19.0, 26.0, 34.0, 43.0, 53.0, 65.0, 80.0, 100.0, 125.0, 155.0, 190.0, 230.0)
"""Distances between the edge of a dot and its name that are tried, the nearest first."""
_DIRECTIONS = 24
_FAR = 0.2
"""How bad a unit of distance is. A line over a dot is as bad as 250 of them, a name over a dot as 750."""
_GAP = 1.5
"""Space that stays free around a name."""


@dataclass(frozen=True)
class Dot:
    """A dot with the size of its name. Lengths are in any unit; y grows upwards."""

    x: float
    y: float
    radius: float
    width: float
    height: float


@dataclass(frozen=True)
class Box:
    """A rectangle."""

    left: float
    bottom: float
    right: float
    top: float

    @property
    def centre(self) -> Point:
        return (self.left + self.right) / 2, (self.bottom + self.top) / 2

    def grown(self, by: float) -> Box:
        return Box(self.left - by, self.bottom - by, self.right + by, self.top + by)

    def meets(self, other: Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.bottom < other.top
            and other.bottom < self.top
        )

    def holds(self, other: Box) -> bool:
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.bottom <= other.bottom
            and other.top <= self.top
        )

    def nearest(self, point: Point) -> Point:
        """The point of the rectangle that is nearest to a point."""
        return min(max(point[0], self.left), self.right), min(max(point[1], self.bottom), self.top)

    def distance(self, point: Point) -> float:
        return math.dist(point, self.nearest(point))

    def crossed_by(self, start: Point, end: Point) -> bool:
        """Whether a line runs through it (Liang and Barsky's clipping)."""
        low, high = 0.0, 1.0
        for a, b, least, most in (
            (start[0], end[0], self.left, self.right),
            (start[1], end[1], self.bottom, self.top),
        ):
            if a == b:
                if not least < a < most:
                    return False
                continue
            first, second = sorted(((least - a) / (b - a), (most - a) / (b - a)))
            low, high = max(low, first), min(high, second)
        return low < high


@dataclass(frozen=True)
class Placed:
    """Where a name lies."""

    box: Box
    line: tuple[Point, Point] | None
    """From the edge of the dot to the name; None where the name is beside its dot."""


def place(dots: Sequence[Dot], area: Box, drawn: Sequence[Box] = ()) -> list[Placed] | None:
    """Find a place for every name; None if the area is too small for them.

    Names in a crowd are placed first, each as near to its dot as the others allow. No name ever covers another name;
    lines cross names and dots only where nothing else is left. The same dots give the same places.

    Args:
        drawn: what else names should leave free, such as whiskers.
    """
    crowd = [sum(math.dist((a.x, a.y), (b.x, b.y)) < 40 for b in dots) for a in dots]
    placed: dict[int, Placed] = {}
    for number in sorted(range(len(dots)), key=lambda n: (-crowd[n], n)):
        found = _best(number, dots, area, list(placed.values()), drawn)
        if found is None:
            return None
        placed[number] = found
    # The first ones took their places before they could know of the others: each may move once more.
    for number in list(placed):
        rest = [found for other, found in placed.items() if other != number]
        placed[number] = _best(number, dots, area, rest, drawn) or placed[number]
    return [placed[number] for number in range(len(dots))]


def _best(
    number: int, dots: Sequence[Dot], area: Box, placed: Sequence[Placed], drawn: Sequence[Box]
) -> Placed | None:
    dot = dots[number]
    others = [other for place, other in enumerate(dots) if place != number]
    best, least = None, math.inf
    for ring, distance in enumerate(_RINGS):
        for turn in range(_DIRECTIONS):
            candidate = _candidate(dot, distance, 2 * math.pi * turn / _DIRECTIONS)
            if not area.holds(candidate.box):
                continue
            cost = _cost(candidate, dot, others, placed)
            cost += 3 * sum(candidate.box.meets(one) for one in drawn)
            # Far away is worse, and to the right, where a name is looked for first, a little better.
            cost += _FAR * distance + 0.02 * turn
            if cost < least:
                best, least = candidate, cost
        if least < _FAR * _RINGS[min(ring + 1, len(_RINGS) - 1)]:  # no ring further away can be better
            break
    return best


def _candidate(dot: Dot, distance: float, angle: float) -> Placed:
    """Put a name at a distance from its dot in a direction."""
    across, up = math.cos(angle), math.sin(angle)
    reach = dot.radius + distance
    # The centre of the name lies further away the wider the name is, so that its edge has the distance.
    x = dot.x + across * reach + dot.width / 2 * max(-1.0, min(1.0, 2 * across))
    y = dot.y + up * reach + dot.height / 2 * max(-1.0, min(1.0, 2 * up))
    box = Box(x - dot.width / 2, y - dot.height / 2, x + dot.width / 2, y + dot.height / 2)
    centre, end = (dot.x, dot.y), box.nearest((dot.x, dot.y))
    length = math.dist(centre, end)
    if length <= dot.radius + NEAR:
        return Placed(box, None)
    share = dot.radius / length
    start = dot.x + share * (end[0] - dot.x), dot.y + share * (end[1] - dot.y)
    return Placed(box, (start, end))


def _cost(candidate: Placed, dot: Dot, others: Sequence[Dot], placed: Sequence[Placed]) -> float:
    """How bad a place is: infinite where names would cover each other, 0 where nothing is covered or crossed."""
    box, cost = candidate.box.grown(_GAP), 0.0
    for other in placed:
        if box.meets(other.box):
            return math.inf
        if other.line is not None and box.crossed_by(*other.line):
            cost += 400
        if candidate.line is not None:
            if other.box.grown(_GAP).crossed_by(*candidate.line):
                cost += 400
            if other.line is not None and _cross(*candidate.line, *other.line):
                cost += 60
    for one in (*others, dot):
        free = box.distance((one.x, one.y)) - one.radius
        if free < 0:
            cost += 150
        elif one is not dot and free < NEAR:
            cost += 2  # a reader could take it for this dot's name
    if candidate.line is not None:
        for one in others:
            if _passes(one, *candidate.line):
                cost += 50
    return cost


def _passes(dot: Dot, start: Point, end: Point) -> bool:
    """Whether a line runs over a dot."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = dx * dx + dy * dy
    along = 0.0 if length == 0 else ((dot.x - start[0]) * dx + (dot.y - start[1]) * dy) / length
    along = max(0.0, min(1.0, along))
    return math.dist((dot.x, dot.y), (start[0] + along * dx, start[1] + along * dy)) < dot.radius


def _cross(a: Point, b: Point, c: Point, d: Point) -> bool:
    """Whether two lines cross."""

    def side(p: Point, q: Point, r: Point) -> float:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0
