"""Numbers as text, and text made safe for the terminal.

Every figure that people read is written here, from the whole number and in one step: whoever rounds first and passes
the rounded number on gets 34.3 in one place and 34.2 in another.
"""

from __future__ import annotations

import json
import math
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

UNDEFINED = "-"
"""Stands for a number that is not known, or not defined."""


def in_percent(value: float | None) -> float | None:
    """A fraction as percent, not rounded; None where undefined."""
    return None if value is None or math.isnan(value) else 100 * value


def figure(value: float | None, *, digits: int = 1, signed: bool = False) -> str:
    """A number as people read it; a dash where undefined, never a minus before zero.

    >>> figure(34.25), figure(-0.01), figure(2, signed=True), figure(None)
    ('34.2', '0.0', '+2.0', '-')
    """
    if value is None or math.isnan(value):
        return UNDEFINED
    shown = round(value, digits) + 0.0
    return f"{shown:+.{digits}f}" if signed else f"{shown:.{digits}f}"


def percent(value: float | None, *, digits: int = 1) -> str:
    """A fraction as percent, without the sign %.

    >>> percent(0.125), percent(0.9995), percent(float("nan"))
    ('12.5', '100.0', '-')
    """
    return figure(in_percent(value), digits=digits)


def points(value: float | None) -> str:
    """A difference of two fractions as points, with its sign.

    >>> points(-0.031)
    '-3.1'
    """
    return figure(in_percent(value), signed=True)


def interval(ends: Sequence[float] | None, *, between: str = "–", signed: bool = False) -> str:
    """Two fractions as percent from the lower to the upper; a dash where undefined."""
    if ends is None:
        return UNDEFINED
    return f" {between} ".join(figure(in_percent(end), signed=signed) for end in ends)


def spread(mean: float | None, sd: float | None, *, sign: str = "±", signed: bool = False) -> str:
    """Mean and standard deviation of numbers in their own unit (percent, points); a dash where there is no mean."""
    return figure(mean, signed=signed) + ("" if mean is None or sd is None else f" {sign} {figure(sd)}")


def duration(mean: float | None, sd: float | None = None, *, sign: str = "±") -> str:
    """Seconds as minutes and seconds, with their standard deviation if there is one; a dash where undefined."""
    from everseg.progress import (
        time_text,  # not above: the command line reads this module before it says a word
    )

    if mean is None:
        return UNDEFINED
    return time_text(mean) + ("" if sd is None else f" {sign} {time_text(sd)}")


def cell(value: Any) -> str:
    """What stands in a cell of a page's table: fractional numbers with one digit, whole ones with separators."""
    if value is None or isinstance(value, float):
        return figure(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def for_files(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows as CSV, JSON and Python's tables hold them: fractional numbers with two digits."""
    return [
        {key: round(value, 2) + 0.0 if isinstance(value, float) else value for key, value in row.items()}
        for row in rows
    ]


def printable(text: object) -> str:
    """Show control characters (of file and class names) as escapes instead of sending them to the terminal."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "replace").decode()
        for c in str(text)
    )


def columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells below each other as wide as the terminal (160 for files and pipes); the first column never wraps.

    For lists that are shown at once: `report.tables` has more to choose from and takes longer to import.

    Args:
        head: names of two columns or more.
    """
    width = shutil.get_terminal_size((160, 0)).columns
    cells = [[printable(cell) for cell in row] for row in (head, *rows)]
    first, *middle, _ = (max(map(len, column)) for column in zip(*cells, strict=True))
    widths = [first, *(min(natural, width // 3) for natural in middle)]
    widths.append(max(20, width - sum(widths) - 2 * len(widths)))
    lines = []
    for row in cells:
        wrapped = [textwrap.wrap(cell, max(1, wide)) for cell, wide in zip(row, widths, strict=True)]
        for parts in zip_longest(*wrapped, fillvalue=""):
            lines.append(
                "  ".join(part.ljust(wide) for part, wide in zip(parts, widths, strict=True)).rstrip()
            )
    return "\n".join(lines)


def value_text(value: Any) -> str:
    """A setting as it would be written after `key=`."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
