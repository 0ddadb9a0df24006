"""How results show themselves: as text in a terminal, as tables and pictures in a notebook.

Every figure that people read is written here (`percent`, `points`, `figure`, ...), from the whole number and in one
step: whoever rounds first and passes the rounded number on gets 34.3 in one place and 34.2 in another.

rich is imported only when something is printed, so that the lists of the command line answer at once.
"""

from __future__ import annotations

import base64
import html
import io
import math
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_CELL = "padding: .15em .7em; text-align: {}; vertical-align: top"


def printable(text: object) -> str:
    """Show control characters (of file and class names) as escapes instead of sending them to the terminal."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "replace").decode()
        for c in str(text)
    )


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


def unicode_output() -> bool:
    """Tell whether stdout can show block characters."""
    return (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")


def escaped(text: object) -> str:
    """Text that stands in HTML as it is: control characters as escapes, markup as text."""
    return html.escape(printable(text))


@dataclass(frozen=True)
class Table:
    """A plain table; every cell is text with control characters escaped. Made by `table`."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    right: frozenset[str] = frozenset()
    """Names of the columns set to the right: numbers, which never wrap."""

    @property
    def row_count(self) -> int:
        """Rows below the heading."""
        return len(self.rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table below a heading that wraps at the terminal's width, not at the table's; a blank line behind."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        drawn = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for index, column in enumerate(self.columns):
            # In a narrow terminal headings and names wrap, numbers never.
            kept = [row[index] for row in self.rows] if column in self.right else []
            drawn.add_column(
                Text(column),
                justify="right" if column in self.right else "left",
                min_width=max(map(len, [*kept, *column.split()]), default=0),
            )
        for row in self.rows:
            drawn.add_row(*map(Text, row))
        if self.title:
            yield Text(self.title, style="table.title")
        yield drawn
        yield ""

    def __str__(self) -> str:
        from rich.console import Console

        written, width = io.StringIO(), shutil.get_terminal_size((160, 0)).columns
        Console(file=written, width=width, highlight=False, markup=False, no_color=True).print(self)
        return "\n".join(line.rstrip() for line in written.getvalue().splitlines()).rstrip()

    def _repr_html_(self) -> str:
        sides = ["right" if column in self.right else "left" for column in self.columns]
        head = "".join(
            f'<th style="{_CELL.format(side)}">{escaped(column)}</th>'
            for column, side in zip(self.columns, sides, strict=True)
        )
        body = "".join(
            "<tr>"
            + "".join(
                f'<td style="{_CELL.format(side)}">{escaped(cell)}</td>'
                for cell, side in zip(row, sides, strict=True)
            )
            + "</tr>"
            for row in self.rows
        )
        # Above the table and not its caption, which would wrap at the width of the table.
        title = f"<p>{escaped(self.title)}</p>" if self.title else ""
        return f"{title}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "", right: str = ""
) -> Table:
    """Make a table of anything that has a text.

    Args:
        title: line above it.
        right: names of right-aligned columns, separated by "|".
    """
    numbers = {printable(name) for name in right.split("|")}
    names = tuple(map(printable, columns))
    return Table(
        names,
        tuple(tuple(printable(cell) for cell in row) for row in rows),
        printable(title),
        frozenset(name for name in names if name in numbers),
    )


@dataclass(frozen=True, repr=False)
class Picture:
    """A picture in a notebook; in a terminal it is not shown."""

    png: Callable[[], bytes]
    """Gives the file when the picture is looked at; it may have been moved or deleted since (OSError)."""
    text: str
    """What it shows, for those who cannot see it, and below it."""

    def __repr__(self) -> str:
        return f"Picture({self.text!r})"

    def _repr_html_(self) -> str:
        caption = f"<figcaption>{escaped(self.text)}</figcaption>"
        try:
            uri = base64.b64encode(self.png()).decode()
            image = (
                f'<img src="data:image/png;base64,{uri}" alt="{escaped(self.text)}" style="max-width: 100%">'
            )
        except OSError as error:
            image = f"<p>{escaped(error)}</p>"
        style = "display: inline-block; margin: .3em; vertical-align: top"
        return f'<figure style="{style}">{image}{caption}</figure>'


Piece = str | Table | Picture


class Result:
    """What a verb gives: `print` shows it as the command line does, a notebook shows tables and pictures."""

    @property
    def notes(self) -> Sequence[str]:
        """What to know when reading the result; the command line prints it on stderr. A field of some results."""
        return ()

    def shown(self) -> Iterable[Piece]:
        """What there is to see, in its order: lines of text, tables, pictures."""
        raise NotImplementedError

    def to_json(self) -> Any:
        """The result as plain dictionaries, lists, texts and numbers: what `--json` prints."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(_texts(self._pieces())).rstrip()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "\n".join(
            f'<p style="white-space: pre-wrap">{escaped(piece)}</p>'
            if isinstance(piece, str)
            else piece._repr_html_()
            for piece in self._pieces()
        )

    def _pieces(self) -> Iterator[Piece]:
        yield from (f"note: {text}" for text in self.notes)
        yield from self.shown()


def _texts(pieces: Iterable[Piece]) -> Iterator[str]:
    for piece in pieces:
        if isinstance(piece, Table):
            yield f"{piece}\n"  # a blank line behind, as in the terminal
        elif isinstance(piece, str):
            yield printable(piece)


class OnceADictionary(Result):
    """A result that was a dictionary once: its keys are understood until version 0.2, with a warning."""

    def __getitem__(self, key: str) -> Any:
        warnings.warn(
            f"{type(self).__name__}[{key!r}]: results have attributes now, and to_json() gives the dictionary; "
            "reading them by key ends with version 0.2",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.to_json()[key]
