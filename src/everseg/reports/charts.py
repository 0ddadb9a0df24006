"""Draw the report's charts from plain numbers with matplotlib (the extra `plot`).

The page shows legends and tables of the same numbers beside the charts. matplotlib is imported only where it is used.
"""

from __future__ import annotations

import importlib
import io
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal
from unicodedata import east_asian_width
from xml.etree import ElementTree

from everseg.display import percent, printable
from everseg.reports.label_layout import Box, Dot, place

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROW = 0.27
"""Inches per horizontal bar."""
_LONGEST_NAME = 20
MOST_BARS = 60
"""Most classes in a chart with a row per class. The tables have all classes."""
MOST_NAMED_STEPS = 6
"""With more steps than this, curves mark the steps without their names."""


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    try:
        importlib.import_module("matplotlib")
    except Exception:  # a broken installation counts as missing
        return False
    return True


@dataclass(frozen=True)
class Bar:
    """One class in a bar chart."""

    name: str
    value: float
    """Fraction."""
    mark: float | None = None
    """An earlier value: when the class was learnt, or with the deployed model."""
    joint: float | None = None
    """The value of joint training."""
    group: int = 0


def lines(
    series: Mapping[str, Sequence[tuple[float, float | None]]],
    *,
    key: str,
    title: str,
    description: str,
    x: str = "after step",
) -> str:
    """Draw mIoU over the steps, one line per name in the order of the series' colours; values are fractions."""

    def paint(figure: Figure) -> None:
        axes = _axes(figure)
        for number, points in enumerate(series.values()):
            known = [(step, 100 * value) for step, value in points if value is not None]
            if known:
                at, values = zip(*known, strict=True)
                axes.plot(at, values, color=SERIES[number % 8], marker=MARKERS[number % 8], markersize=5.5, linewidth=2,
                          dashes=(None, None) if number < 8 else (4, 2), clip_on=False)  # fmt: skip
        steps = sorted({int(step) for points in series.values() for step, _ in points})
        every = -(-len(steps) // 12)
        axes.set_xticks(steps[::every], [str(step) for step in steps[::every]])
        axes.set_xlim(steps[0] - 0.15, max(steps[-1], steps[0] + 1) + 0.15)
        axes.set_ylim(0, 100)
        axes.set_xlabel(x)
        axes.set_ylabel("mIoU, percent")

    return draw(3.4, paint, key=key, title=title, description=description)


_COLUMN = 0.55
"""Inches per column of numbers beside bars."""
_HEADS = 0.42
"""Inches for the heads of these columns."""
_HATCHES = (None, "////", "....", "xxxx", "----")


def bars(rows: Sequence[Bar], heads: tuple[str, str, str], *, key: str, title: str, description: str) -> str:
    """Draw IoU per class as horizontal bars coloured by group, with the numbers in columns beside them.

    A bar is the value now. An upright mark is the earlier value, a diamond that of joint training. Each has a column of
    its own, so no number can be read as another one. From the ninth group on, colours repeat with a hatching.

    Args:
        heads: of the columns of the earlier value, of the value now, and of joint training. A column without a value is
            left out.
    """
    columns = [(head, [getattr(row, name) for row in rows], name == "value")
               for head, name in zip(heads, ("mark", "value", "joint"), strict=True)
               if any(getattr(row, name) is not None for row in rows)]  # fmt: skip

    def paint(figure: Figure) -> None:
        axes = _axes(figure, [row.name for row in rows], right=0.15 + _COLUMN * len(columns), top=_HEADS)
        for y, row in enumerate(rows):
            hatch = _HATCHES[row.group // 8 % len(_HATCHES)]
            axes.barh([y], [100 * row.value], height=0.62, color=SERIES[row.group % 8], hatch=hatch,
                      edgecolor=PAPER if hatch else "none", linewidth=0)  # fmt: skip
            if row.mark is not None:
                mark = 100 * row.mark
                axes.plot([mark, mark], [y - 0.42, y + 0.42], color=PAPER, linewidth=4.5, clip_on=False)
                axes.plot([mark, mark], [y - 0.42, y + 0.42], color=INK, linewidth=2, clip_on=False)
            if row.joint is not None:
                axes.plot([100 * row.joint], [y], marker="D", markersize=5.5, markerfacecolor=PAPER,
                          markeredgecolor=INK, markeredgewidth=1.2, clip_on=False)  # fmt: skip
        for number, (head, values, now) in enumerate(columns):
            from_edge = 72 * (_COLUMN * (number + 1) + 0.05)
            axes.annotate(head, (1, 1), (from_edge, 5), xycoords="axes fraction",
                          textcoords="offset points", ha="right", va="bottom",
                          fontsize=9.5, color=INK if now else MUTED, linespacing=1.05)  # fmt: skip
            for y, value in enumerate(values):
                axes.annotate(percent(value), (1, y), (from_edge, 0), xycoords=("axes fraction", "data"),
                              textcoords="offset points", ha="right", va="center", fontsize=10.5 if now else 10,
                              fontweight="bold" if now else "normal", color=INK if now else MUTED)  # fmt: skip
        _names(axes, [row.name for row in rows])
        axes.tick_params(axis="y", pad=8)  # a diamond at 0 reaches to the left of the axis
        axes.set_xlim(0, 100)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel("IoU, percent")

    return draw(0.65 + _HEADS + _ROW * len(rows), paint, key=key, title=title, description=description)


def dots(rows: Mapping[str, Sequence[Sequence[float]]], *, key: str, title: str, description: str) -> str:
    """Draw the values (fractions) of each row's series as points, with an upright mark at each mean.

    Args:
        rows: name -> one list of values per series, the series in the order of their colours.
    """

    def paint(figure: Figure) -> None:
        names = [wrapped(name) for name in rows]
        axes = _axes(figure, names)
        for y, series in enumerate(rows.values()):
            for number, values in enumerate(series):
                at = y + 0.22 * (number - (len(series) - 1) / 2)
                colour, shown = SERIES[number % 8], [100 * value for value in values]
                axes.plot(shown, [at] * len(shown), color=colour, marker="o", markersize=5, linestyle="none",
                          alpha=0.75, clip_on=False)  # fmt: skip
                if shown:
                    mean = sum(shown) / len(shown)
                    axes.plot([mean, mean], [at - 0.13, at + 0.13], color=colour, linewidth=2, clip_on=False)
        _names(axes, names)
        axes.set_xlim(-2, 100)  # else points at 0 lie on the names
        axes.set_xlabel("mIoU, percent")

    most = max((len(series) for series in rows.values()), default=1)
    height = 0.75 + _ROW * max(1.0, 0.8 * most) * len(rows)
    return draw(height, paint, key=key, title=title, description=description)


@dataclass(frozen=True)
class Mark:
    """One dot of `against`."""

    name: str
    x: float
    """Fraction, like `y` and the deviations."""
    y: float
    x_deviation: float | None = None
    y_deviation: float | None = None
    seconds: float | None = None
    """Cost, drawn as the dot's area; None = not known, drawn as a small ring."""
    kind: int = 0
    """Number of the entry of `kinds`."""


_NARROW = 5.3
"""Width in inches of a picture whose names must still be read where a phone makes it smaller."""
_LARGEST, _SMALLEST, _UNKNOWN, _DIAMOND = 12.0, 2.4, 3.5, 6.0
"""Radii in points: of the dearest dot, of the cheapest, so that it is seen, of one without cost, of a diamond."""
_NAME, _LETTER, _LINE = 10.5, 6.5, 12.0
"""Size of the names' font in points; width of a letter and height of a line in the widest font that readers have."""
_ROUND = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1200, 3600, 7200, 18000, 36000, 86400, 259200)
"""Seconds that the legend of sizes may show."""


def against(
    marks: Sequence[Mark],
    kinds: Sequence[str],
    *,
    x: str,
    y: str,
    cost: str,
    key: str,
    title: str,
    description: str,
) -> str:
    """Draw one number against another as a dot per name, the cost as its area, with whiskers of the deviations.

    Every dot has its name beside it or at the end of a line. Where there is no room for all names, the picture becomes
    higher.

    Args:
        kinds: what the colours say. The last one is drawn as diamonds without cost: it is what the others are measured
            by.
        x, y: what the axes say.
        cost: what the dots' areas say.
    """
    names = [printable(mark.name).replace("\n", " ") for mark in marks]
    dearest = max((mark.seconds for mark in marks if mark.seconds), default=0.0)
    used = sorted({mark.kind for mark in marks})
    left, bottom, right, top = 44.0, 40.0, 8.0, 8.0 + 17.0 * len(used) + 26.0 * (dearest > 0)
    width, height = 72 * _NARROW - left - right, 300.0
    x_ends = _ends([(mark.x, mark.x_deviation) for mark in marks])
    y_ends = _ends([(mark.y, mark.y_deviation) for mark in marks])

    def across(percents: float) -> float:
        return left + width * (percents - x_ends[0]) / (x_ends[1] - x_ends[0])

    def up(percents: float) -> float:
        return bottom + height * (percents - y_ends[0]) / (y_ends[1] - y_ends[0])

    while True:
        dots = [
            Dot(
                across(100 * mark.x),
                up(100 * mark.y),
                _radius(mark.seconds, dearest) if mark.kind < len(kinds) - 1 else _DIAMOND,
                _LETTER * sum(2 if east_asian_width(c) in "WF" else 1 for c in name),
                _LINE,
            )
            for mark, name in zip(marks, names, strict=True)
        ]
        inside = Box(left + 2, bottom + 2, left + width, bottom + height)
        whiskers = [
            Box(across(100 * a) - 1, up(100 * b) - 1, across(100 * c) + 1, up(100 * d) + 1)
            for mark in marks
            for a, b, c, d in _reach(mark)
        ]
        placed = place(dots, inside, whiskers)
        if placed is not None or height > 2000:
            break
        height *= 1.25

    def paint(figure: Figure) -> None:
        whole = 72 * _NARROW, bottom + height + top
        axes = figure.add_axes((left / whole[0], bottom / whole[1], width / whole[0], height / whole[1]))
        _styled(axes, "xy")
        axes.set_xlim(*x_ends)
        axes.set_ylim(*y_ends)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        # Everything else is drawn on a sheet whose unit is a point, as the places of the names were found.
        sheet = figure.add_axes((0, 0, 1, 1))
        sheet.set_axis_off()
        sheet.set_xlim(0, whole[0])
        sheet.set_ylim(0, whole[1])
        for a, b, c, d in (ends for mark in marks for ends in _reach(mark)):
            sheet.plot([across(100 * a), across(100 * c)], [up(100 * b), up(100 * d)], color=INK, linewidth=0.8,
                       marker="|" if b == d else "_", markersize=5, zorder=2)  # fmt: skip
        # Small dots lie on large ones.
        for number in sorted(range(len(marks)), key=lambda n: -dots[n].radius):
            mark, dot = marks[number], dots[number]
            _dot(sheet, dot.x, dot.y, dot.radius, mark.kind, kinds, filled=mark.seconds is not None)
        for name, dot, found in zip(names, dots, placed or [], strict=False):
            if found.line is not None:
                sheet.plot(*zip(*found.line, strict=True), color=MUTED, linewidth=0.7, zorder=3)
            # In a narrower font than the one the place was made for, a name stays close to its dot.
            side = "left" if found.box.left >= dot.x else "right" if found.box.right <= dot.x else "center"
            at = {"left": found.box.left, "right": found.box.right, "center": found.box.centre[0]}[side]
            sheet.text(at, found.box.centre[1], name, ha=side, va="center_baseline", fontsize=_NAME,
                       color=INK, zorder=5)  # fmt: skip
        _against_legend(sheet, [(kind, kinds[kind]) for kind in used], kinds, cost, dearest,
                        left, bottom + height + top - 8)  # fmt: skip

    return draw(
        (bottom + height + top) / 72, paint, key=key, title=title, description=description, width=_NARROW
    )


def _ends(values: Sequence[tuple[float, float | None]]) -> tuple[float, float]:
    """Ends of an axis in percent: all values with their deviations, and room around them."""
    low = min(100 * (value - (deviation or 0.0)) for value, deviation in values)
    high = max(100 * (value + (deviation or 0.0)) for value, deviation in values)
    room = max(0.07 * (high - low), 1.0)
    return low - room, high + room


def _radius(seconds: float | None, dearest: float) -> float:
    """Radius of a dot whose area is the cost."""
    if not seconds or not dearest:
        return _UNKNOWN
    return max(_SMALLEST, _LARGEST * (seconds / dearest) ** 0.5)


def _reach(mark: Mark) -> list[tuple[float, float, float, float]]:
    """Give the ends of a dot's whiskers: left, bottom, right and top of each, as fractions."""
    x, y = mark.x_deviation, mark.y_deviation
    level = [(mark.x - x, mark.y, mark.x + x, mark.y)] if x else []
    upright = [(mark.x, mark.y - y, mark.x, mark.y + y)] if y else []
    return [*level, *upright]


def _dot(
    sheet: Axes, x: float, y: float, radius: float, kind: int, kinds: Sequence[str], *, filled: bool
) -> None:
    from matplotlib.patches import Circle, RegularPolygon

    if kind == len(kinds) - 1:
        sheet.add_patch(RegularPolygon((x, y), 4, radius=radius, facecolor=PAPER, edgecolor=INK, linewidth=1.6,
                                       zorder=4))  # fmt: skip
        return
    colour = SERIES[kind % 8]
    sheet.add_patch(Circle((x, y), radius, facecolor=colour if filled else PAPER,
                           edgecolor=PAPER if filled else colour, linewidth=0.7 if filled else 1.4,
                           alpha=0.8 if filled else 1.0, zorder=4))  # fmt: skip


def _against_legend(
    sheet: Axes,
    entries: Sequence[tuple[int, str]],
    kinds: Sequence[str],
    cost: str,
    dearest: float,
    left: float,
    top: float,
) -> None:
    """Say above the picture what colours and areas mean."""
    y = top - 6.0
    for kind, text in entries:
        radius = _DIAMOND if kind == len(kinds) - 1 else 4.5
        _dot(sheet, left + 8, y, radius, kind, kinds, filled=True)
        sheet.text(left + 20, y, text, ha="left", va="center_baseline", fontsize=_NAME, color=INK)
        y -= 17.0
    if not dearest:
        return
    x, y = left + 2.0, y - 3.0
    for seconds in _legend_seconds(dearest):
        radius = _radius(seconds, dearest)
        x += max(radius, 3.0)
        _dot(sheet, x, y, radius, 0, ["", ""], filled=False)
        unit, length = next(
            one for one in (("h", 3600), ("min", 60), ("s", 1)) if seconds >= one[1] or one[1] == 1
        )
        text = f"{seconds / length:g} {unit}"
        sheet.text(x + radius + 4, y, text, ha="left", va="center_baseline", fontsize=_NAME, color=INK)
        x += radius + 10 + _LETTER * len(text) + 8
    sheet.text(x, y, cost, ha="left", va="center_baseline", fontsize=_NAME, color=INK)


def _legend_seconds(dearest: float) -> list[float]:
    """Choose up to three round times whose dots are apart in size."""
    chosen: list[float] = []
    for seconds in sorted((one for one in _ROUND if one <= dearest), reverse=True):
        if len(chosen) < 3 and (not chosen or seconds <= chosen[-1] / 3.9):
            chosen.append(seconds)
    return chosen[::-1] or [dearest]


def stacks(
    rows: Mapping[str, Sequence[float]], colours: Sequence[int], *, key: str, title: str, description: str
) -> str:
    """Shares that sum to 1 as stacked horizontal bars.

    Args:
        rows: name -> shares.
        colours: number of the series' colour of each share, from 1; 0 = grey.
    """

    def paint(figure: Figure) -> None:
        axes = _axes(figure, list(rows))
        left = [0.0] * len(rows)
        for number, colour in enumerate(colours):
            widths = [100 * shares[number] for shares in rows.values()]
            fill = MUTED if colour == 0 else SERIES[colour - 1]
            axes.barh(
                range(len(rows)), widths, left=left, height=0.7, color=fill, edgecolor=PAPER, linewidth=0.8
            )
            left = [a + b for a, b in zip(left, widths, strict=True)]
        _names(axes, list(rows))
        axes.set_xlim(0, 100)
        axes.set_xlabel("percent of the class's pixels")

    return draw(0.75 + _ROW * len(rows), paint, key=key, title=title, description=description)


def curve(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    starts: Sequence[tuple[int, int]],
    colours: Sequence[int],
    *,
    key: str,
    title: str,
    description: str,
    y: str,
) -> str:
    """Draw values over the iterations of all steps, with a gap where a step begins. Wide ranges get a log scale.

    Args:
        colours: number of the series' colour of each curve, from 1; 0 = grey.
    """
    from matplotlib.ticker import MaxNLocator

    named = 1 < len(starts) <= MOST_NAMED_STEPS

    def paint(figure: Figure) -> None:
        axes = _axes(figure, top=0.28 if named else 0.14, letters=9)
        for (at, values), number in zip(series.values(), colours, strict=True):
            axes.plot(at, values, color=SERIES[(number - 1) % 8] if number else MUTED, linewidth=1.5,
                      dashes=(None, None) if number <= 8 else (4, 2), zorder=3 if number else 2,
                      marker="o" if len(at) == 1 else None)  # fmt: skip
        every = [value for _, values in series.values() for value in values if isfinite(value)] or [0.0]
        low, high = min(every), max(every)
        if low > 0 and high > 30 * low:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _position: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda _value, _position: "")
            axes.set_ylim(low / (high / low) ** 0.06, high * (high / low) ** 0.06)
        elif low >= 0:
            axes.set_ylim(0, 1.06 * high or 1.0)
        for number, (step, first) in enumerate(starts):
            if number:
                axes.axvline(first, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
            if named:  # above the curves, where nothing is drawn
                axes.annotate(f"step {step}", (first, 1), (0, 4), xycoords=("data", "axes fraction"),
                              textcoords="offset points", va="bottom", fontsize=10, color=MUTED)  # fmt: skip
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.set_xlabel("iteration")
        axes.set_ylabel(y)

    return draw(2.7, paint, key=key, title=title, description=description)


def _axes(
    figure: Figure, names: Sequence[str] = (), *, right: float = 0.2, top: float = 0.14, letters: int = 6
) -> Axes:
    """Add axes that leave room for their labels, which are row names or values.

    The room is estimated from the number of letters. A layout that measures the text would draw everything twice.
    """
    height, grid = float(figure.get_figheight()), "x" if names else "y"
    letters = max(
        (
            sum(2 if east_asian_width(c) in "WF" else 1 for c in line)
            for name in names
            for line in short(name).split("\n")
        ),
        default=letters,
    )
    left, bottom = 0.22 + 0.088 * letters, 0.52
    axes = figure.add_axes(
        (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (bottom + top) / height)
    )
    _styled(axes, "x" if grid == "x" else "y")
    return axes


def _styled(axes: Axes, grid: Literal["x", "y", "xy"]) -> None:
    """Give axes a grid across the values and a line where the values begin."""
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    axes.grid(axis="both" if grid == "xy" else grid, which="major", color=LINE, linewidth=0.8)
    for name, spine in axes.spines.items():
        spine.set_visible((name == "left" and "x" in grid) or (name == "bottom" and "y" in grid))
        spine.set_color(MUTED)
    axes.tick_params(which="both", color=LINE, labelcolor=INK, length=0, labelsize=11)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    axes.xaxis.label.set_fontsize(11)
    axes.yaxis.label.set_fontsize(11)


def _names(axes: Axes, names: Sequence[str]) -> None:
    """Label one row per name, the first on top."""
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)


def short(name: str) -> str:
    """Shorten the lines of a name so that it fits beside a bar."""
    lines = printable(name).split("\n")
    return "\n".join(
        line if len(line) <= _LONGEST_NAME else line[: _LONGEST_NAME - 1] + "…" for line in lines
    )


def wrapped(name: str) -> str:
    """Set a name in lines that fit beside a row."""
    return "\n".join(textwrap.wrap(printable(name), _LONGEST_NAME))


# Colours of a figure stand for roles; the page gives each role a colour for light, dark and print.
INK, MUTED, LINE, PAPER = "#010101", "#010102", "#010103", "#010104"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
"""Of points in a chart of lines, so that colours are not the only difference."""
SERIES = tuple(f"#0101{number:02x}" for number in range(0x11, 0x19))
"""Eight series, safe for colour-blind eyes."""
ROLES = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    PAPER: "var(--card)",
    **{colour: f"var(--s{number})" for number, colour in enumerate(SERIES, 1)},
}
WIDTH = 6.1
"""Inches; one unit of the drawing is 1/72 inch."""
_FONT = re.compile(r"font-family: [^;]*; ?")
_LONG_NUMBER = re.compile(r"(\d\.\d\d)\d+")
_ROLE = re.compile("|".join(ROLES))
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "everseg",
    "font.family": ["DejaVu Sans"],
    "font.size": 12,
    "text.parse_math": False,
    "axes.unicode_minus": False,
    "path.simplify": True,
}


def draw(
    height: float,
    paint: Callable[[Figure], None],
    *,
    key: str,
    title: str,
    description: str,
    width: float = WIDTH,
) -> str:
    """Draw a figure and return it as an `<svg>` element. The same input gives the same text.

    Args:
        height: inches; `width` too.
        paint: draws axes into the figure, using only role colours.
        key: prefix of every id in the drawing; must be unique in the page.
        title: short name for readers who cannot see the drawing.
        description: what it shows, in a sentence or two.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with rc_context(SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the browser replaces letters that matplotlib's font lacks
        figure = Figure(figsize=(width, height))
        paint(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), key, title, description)


def file_of(svg: str, style: str) -> str:
    """Turn a drawing of `draw` into the text of a file of its own, in light colours on white.

    Args:
        style: the page's style sheet, whose first rule gives the colours of the roles.
    """
    root = ElementTree.fromstring(svg)
    colours = re.search(r":root\s*{([^}]*)}", style)
    if colours is None:
        raise ValueError("the style sheet begins with no rule of the colours")
    _, _, width, height = root.attrib["viewBox"].split()
    root.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "xmlns:xlink": "http://www.w3.org/1999/xlink"}
    root.attrib |= {"width": str(round(float(width) * 4 / 3)), "height": str(round(float(height) * 4 / 3))}
    for node in root.iter():
        if "href" in node.attrib:
            node.attrib["xlink:href"] = node.attrib.pop("href")
    rule = ElementTree.Element("style")
    rule.text = (
        f":root {{{colours[1].replace('light dark', 'light')}}} "
        "svg { color: var(--ink); background: var(--card); "
        "font-family: system-ui, 'Liberation Sans', Arial, sans-serif; } "
        "text { paint-order: stroke; stroke: var(--card); stroke-width: 2.5px; stroke-linejoin: round; }"
    )
    root.insert(2, rule)
    return f"{ElementTree.tostring(root, encoding='unicode')}\n"


def _inline(text: str, key: str, title: str, description: str) -> str:
    """Prepare an SVG for the page.

    This strips what only a file needs, turns colours into roles, makes ids unique and adds text alternatives.
    """
    root = ElementTree.fromstring(text)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": f"{key}-title {key}-desc",
        "class": "chart",
    }
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        node.attrib = {
            name.rpartition("}")[2]: _value(name, value, key) for name, value in node.attrib.items()
        }
    for parent in [root, *root.findall("defs")]:  # matplotlib's style sheet would apply to the whole page
        for node in [child for child in parent if child.tag in ("metadata", "style")]:
            parent.remove(node)
    for name, content in (("desc", description), ("title", title)):
        node = ElementTree.Element(name, {"id": f"{key}-{name}"})
        node.text = content
        root.insert(0, node)
    return ElementTree.tostring(root, encoding="unicode")


def _value(name: str, value: str, key: str) -> str:
    if name == "id":
        return value if value.startswith(f"{key}-") else f"{key}-{value}"
    if name.endswith("href"):
        return value.replace("#", f"#{key}-", 1)
    if name == "style":
        value = _FONT.sub("", value)
    if name == "d":
        return _LONG_NUMBER.sub(r"\1", value)
    return _ROLE.sub(lambda found: ROLES[found[0]], value).replace("url(#", f"url(#{key}-")
