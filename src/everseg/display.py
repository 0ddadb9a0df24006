"""Display of results: text in a terminal, tables and pictures in a notebook.

Every number that people read is formatted here (`percent`, `points`, `figure`, ...). Callers pass the unrounded number.
Rounding twice would show 34.3 in one place and 34.2 in another.

The module imports rich only when something is printed, so that the lists of the command line appear at once.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_WORD = 16
"""Longest word, in letters, that a narrow table keeps whole. A longer one (a path) may be cut to the next line."""
_CELL = "padding: .15em .7em; text-align: {}; vertical-align: top"


def printable(text: object) -> str:
    """Show control characters (of file and class names) as escapes instead of sending them to the terminal."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "replace").decode()
        for c in str(text)
    )


UNDEFINED = "-"
"""Text shown for a number that is not known or not defined."""


def in_percent(value: float | None) -> float | None:
    """Convert a fraction to percent without rounding. Return None if it is undefined."""
    return None if value is None or math.isnan(value) else 100 * value


def figure(value: float | None, *, digits: int = 1, signed: bool = False) -> str:
    """Format a number for people: a dash if it is undefined, and never a minus before zero.

    >>> figure(34.25), figure(-0.01), figure(2, signed=True), figure(None)
    ('34.2', '0.0', '+2.0', '-')
    """
    if value is None or math.isnan(value):
        return UNDEFINED
    shown = round(value, digits) + 0.0  # adding 0.0 turns -0.0 into 0.0
    return f"{shown:+.{digits}f}" if signed else f"{shown:.{digits}f}"


def percent(value: float | None, *, digits: int = 1) -> str:
    """Format a fraction as percent, without the sign %.

    >>> percent(0.125), percent(0.9995), percent(float("nan"))
    ('12.5', '100.0', '-')
    """
    return figure(in_percent(value), digits=digits)


def share(value: float | None, *, digits: int = 1) -> str:
    """Format a share of pixels as percent, with the sign %. A share too small to show is not shown as zero.

    >>> share(0.125), share(0.0004), share(0.0), share(None), share(0.0004, digits=2), share(0.00004, digits=2)
    ('12.5 %', '< 0.1 %', '0.0 %', '-', '0.04 %', '< 0.01 %')
    """
    least = 10.0**-digits  # in percent
    small = value is not None and 0 < 100 * value < least
    text = f"< {least:.{digits}f}" if small else percent(value, digits=digits)
    return text if text == UNDEFINED else f"{text} %"


def capital(text: str) -> str:
    """Begin a text with a capital letter; nothing else of it changes."""
    return text[:1].upper() + text[1:]


def counted(number: int, thing: str, one: str = "", several: str = "") -> str:
    """Format a number of things, in the plural unless it is one, and what they do.

    >>> counted(1, "note"), counted(0, "entry"), counted(1200, "class"), counted(2, "day")
    ('1 note', '0 entries', '1,200 classes', '2 days')
    >>> counted(1, "file", "does not exist", "do not exist"), counted(2, "file", "does not exist", "do not exist")
    ('1 file does not exist', '2 files do not exist')
    """
    verb = one if number == 1 else several
    named = thing
    if number != 1:
        named = re.sub(r"(s|x|ch|sh)$", r"\1e", re.sub(r"(?<=[^aeiou])y$", "ie", thing)) + "s"
    return f"{number:,} {named}{' ' if verb else ''}{verb}"


def points(value: float | None) -> str:
    """Format a difference of two fractions as percentage points, with its sign.

    >>> points(-0.031)
    '-3.1'
    """
    return figure(in_percent(value), signed=True)


def interval(ends: Sequence[float] | None, *, between: str = "–", signed: bool = False) -> str:
    """Format an interval of fractions as percent, lower end first. Return a dash if it is undefined."""
    if ends is None:
        return UNDEFINED
    return f" {between} ".join(figure(in_percent(end), signed=signed) for end in ends)


def spread(mean: float | None, sd: float | None, *, sign: str = "±", signed: bool = False) -> str:
    """Format a mean and a standard deviation that are in percent or points already. A missing mean gives a dash."""
    return figure(mean, signed=signed) + ("" if mean is None or sd is None else f" {sign} {figure(sd)}")


def count(value: float | None, deviation: float | None = None, *, sign: str = "±") -> str:
    """Format a large number of things with three digits: thousands as k, millions as M.

    >>> count(640), count(62_347), count(1_474_560, 2000), count(None)
    ('640', '62.3 k', '1.47 M', '-')
    """
    return _scaled(value, deviation, sign, 1000, ("", "k", "M", "G", "T"))


def size(value: float | None, deviation: float | None = None, *, sign: str = "±") -> str:
    """Format bytes with three digits.

    >>> size(512), size(463_028_224, 1_400_000), size(None)
    ('512 B', '442 ± 1 MiB', '-')
    """
    return _scaled(value, deviation, sign, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(value: float | None, deviation: float | None, sign: str, base: int, units: Sequence[str]) -> str:
    """Format a number and its deviation in the unit that leaves the number three digits."""
    if value is None:
        return UNDEFINED
    power = 0
    # From 999.5 on, three digits would show the next unit's 1.
    while abs(value) / base**power >= 999.5 and power < len(units) - 1:
        power += 1
    shown = abs(value) / base**power
    digits = 0 if power == 0 or shown >= 99.95 else 1 if shown >= 9.995 else 2
    text = figure(value / base**power, digits=digits)
    spread_text = figure(deviation and deviation / base**power, digits=digits)
    if deviation is not None and float(spread_text):  # a deviation that would be shown as zero says nothing
        text += f" {sign} {spread_text}"
    return f"{text} {units[power]}".rstrip()


def cell(value: Any) -> str:
    """Format a table cell of a page: fractional numbers with one digit, whole numbers with separators."""
    if value is None or isinstance(value, float):
        return figure(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def for_files(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Round the fractional numbers of rows to two digits, for CSV, JSON and tables in Python."""
    return [
        {key: round(value, 2) + 0.0 if isinstance(value, float) else value for key, value in row.items()}
        for row in rows
    ]


def unicode_output() -> bool:
    """Return whether stdout can show block characters."""
    return (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")


def escaped(text: object) -> str:
    """Escape a text for HTML: control characters appear as escapes, and markup appears as text."""
    return html.escape(printable(text))


_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def for_csv(value: object) -> object:
    """Escape a text for CSV: spreadsheets run a cell that begins like a formula, so it gets an apostrophe before it.

    Numbers stay as they are.

    >>> for_csv("=HYPERLINK(1)"), for_csv("-12.5"), for_csv(-3.5)
    ("'=HYPERLINK(1)", '-12.5', -3.5)
    """
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if value.startswith(_FORMULA) and not _NUMERIC.fullmatch(value) else text


_NUMERIC = re.compile(r"[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?(?: .*[0-9])?")
"""A number, also one with its deviation or interval."""
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~])")


def for_markdown(value: object) -> str:
    r"""Escape a text for a cell or a line of Markdown.

    >>> print(for_markdown("a|b <img>"))
    a\|b \<img\>
    """
    return _MARKDOWN.sub(r"\\\1", " ".join(printable(value).split()))


_TEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
        "|": r"\textbar{}", '"': "''", "\n": " ", "±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"}  # fmt: skip


def for_latex(value: object) -> str:
    """Escape a text for LaTeX. Letters beyond ASCII stay as they are (UTF-8)."""
    return "".join(_TEX.get(letter, letter) for letter in printable(value))


@dataclass(frozen=True)
class Table:
    """A plain table, made by `table`. Every cell is text, with control characters escaped."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    right: frozenset[str] = frozenset()
    """Names of the right-aligned columns. They hold numbers, which never wrap."""

    @property
    def row_count(self) -> int:
        """Number of rows below the heading."""
        return len(self.rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the title, the table and a blank line. The title wraps at the terminal's width, not at the table's.

        In a narrow terminal, headings and names wrap between words; numbers never do. If they still do not fit, the
        other columns follow below, each part with the first column.
        """
        from rich import box
        from rich.cells import cell_len
        from rich.table import Table as RichTable
        from rich.text import Text

        if self.title:
            yield Text(self.title, style="table.title")
        least = [self._least(index) for index in range(len(self.columns))]
        whole = [
            max(map(cell_len, [name, *(row[i] for row in self.rows)])) for i, name in enumerate(self.columns)
        ]
        for part in _parts(least, options.max_width):
            drawn = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
            widths = _fitted([whole[i] for i in part], [least[i] for i in part], options.max_width)
            for index, wide in zip(part, widths, strict=True):
                justify: Literal["left", "right"] = "right" if self.columns[index] in self.right else "left"
                drawn.add_column(Text(self.columns[index]), justify=justify, width=wide)
            for row in self.rows:
                drawn.add_row(*(Text(row[index]) for index in part))
            yield drawn
            yield ""

    def _least(self, index: int) -> int:
        """Smallest width of a column: that of its longest number, or of its longest word."""
        from rich.cells import cell_len  # in a terminal, letters of Chinese or Japanese are two columns wide

        column, cells = self.columns[index], [row[index] for row in self.rows]
        kept = cells if column in self.right else [w for c in cells for w in c.split() if len(w) <= _WORD]
        return max(map(cell_len, [*kept, *column.split()]), default=0)

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
        # A caption would wrap at the width of the table, so the title is a paragraph above it.
        title = f"<p>{escaped(self.title)}</p>" if self.title else ""
        return f"{title}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_BETWEEN = 2
"""Spaces between two columns in a terminal."""


def _parts(least: Sequence[int], width: int) -> list[list[int]]:
    """Divide the columns of a table into parts that fit a width; every part begins with the first column.

    >>> _parts([6, 20, 20, 20], 80), _parts([6, 20, 20, 20], 60)
    ([[0, 1, 2, 3]], [[0, 1, 2], [0, 3]])
    """
    parts = [[0]] if least else [[]]
    for index in range(1, len(least)):
        used = sum(least[i] + _BETWEEN for i in parts[-1])
        if len(parts[-1]) > 1 and used + least[index] > width:
            parts.append([0])
        parts[-1].append(index)
    return parts


def _fitted(whole: Sequence[int], least: Sequence[int], width: int) -> list[int]:
    """Reduce the widths of columns, the widest first and none below its least, until they fit.

    >>> _fitted([30, 9, 9], [8, 9, 4], 40)
    [18, 9, 9]
    """
    found = list(whole)
    while sum(found) + _BETWEEN * (len(found) - 1) > width:
        spare = [i for i in range(len(found)) if found[i] > least[i]]
        if not spare:
            break
        found[max(spare, key=lambda i: found[i])] -= 1
    return found


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "", right: str = ""
) -> Table:
    """Make a table. Each value is converted to text with `str`.

    Args:
        title: the line above the table.
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
    """A picture that notebooks show. Terminals leave it out."""

    png: Callable[[], bytes]
    """Reads the file when the picture is displayed. Raises OSError if the file was moved or deleted meanwhile."""
    text: str
    """Description of the picture, used as its caption and as its alternative text."""

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
    """The result of a command. `print` shows it as the command line does; a notebook shows tables and pictures."""

    @property
    def notes(self) -> Sequence[str]:
        """Remarks that help to read the result, printed on stderr by the command line. A field of some results."""
        return ()

    def shown(self) -> Iterable[Piece]:
        """Return the lines of text, tables and pictures to show, in order."""
        raise NotImplementedError

    def to_json(self) -> Any:
        """Return the result as plain dictionaries, lists, texts and numbers. `--json` prints this."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(_texts(self._pieces())).rstrip()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_of(self._pieces())

    def _pieces(self) -> Iterator[Piece]:
        yield from (f"note: {text}" for text in self.notes)
        yield from self.shown()


def html_of(pieces: Iterable[Piece]) -> str:
    """Write text, tables and pictures as HTML for a notebook."""
    return "\n".join(
        f'<p style="white-space: pre-wrap">{escaped(piece)}</p>'
        if isinstance(piece, str)
        else piece._repr_html_()
        for piece in pieces
    )


def _texts(pieces: Iterable[Piece]) -> Iterator[str]:
    for piece in pieces:
        if isinstance(piece, Table):
            yield f"{piece}\n"  # a blank line after it, as in the terminal
        elif isinstance(piece, str):
            yield printable(piece)


class OnceADictionary(Result):
    """A result that used to be a dictionary. Reading it by key works with a warning until version 0.2."""

    def __getitem__(self, key: str) -> Any:
        warnings.warn(
            f"{type(self).__name__}[{key!r}]: results have attributes now, and to_json() gives the dictionary; "
            "reading them by key ends with version 0.2",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.to_json()[key]
