"""Draw the report's charts from plain numbers with matplotlib (the extra `plot`).

The page shows legends and tables of the same numbers beside the charts. matplotlib is imported only where it is used.
"""

from __future__ import annotations

import importlib
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any
from unicodedata import east_asian_width
from xml.etree import ElementTree

from everseg.display import percent, printable

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
    """An earlier value."""
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
                axes.plot(at, values, color=SERIES[number % 8], marker="o", markersize=5.5, linewidth=2,
                          dashes=(None, None) if number < 8 else (4, 2), clip_on=False)  # fmt: skip
        steps = sorted({int(step) for points in series.values() for step, _ in points})
        every = -(-len(steps) // 12)
        axes.set_xticks(steps[::every], [str(step) for step in steps[::every]])
        axes.set_xlim(steps[0] - 0.15, max(steps[-1], steps[0] + 1) + 0.15)
        axes.set_ylim(0, 100)
        axes.set_xlabel(x)
        axes.set_ylabel("mIoU, percent")

    return draw(3.4, paint, key=key, title=title, description=description)


def bars(rows: Sequence[Bar], *, key: str, title: str, description: str) -> str:
    """IoU per class as horizontal bars coloured by group, with a mark where it stood when it was learnt."""

    def paint(figure: Figure) -> None:
        axes = _axes(figure, [row.name for row in rows])
        at = range(len(rows))
        colours = [SERIES[row.group % 8] for row in rows]
        axes.barh(at, [100 * row.value for row in rows], height=0.62, color=colours)
        for y, row in enumerate(rows):
            if row.mark is not None:
                mark = 100 * row.mark
                axes.plot([mark, mark], [y - 0.42, y + 0.42], color=PAPER, linewidth=4.5, clip_on=False)
                axes.plot([mark, mark], [y - 0.42, y + 0.42], color=INK, linewidth=2, clip_on=False)
            end = 100 * max(row.value, row.mark or 0.0)
            axes.annotate(percent(row.value), (end, y), (5, 0), textcoords="offset points", va="center",
                          fontsize=10, color=INK)  # fmt: skip
        _names(axes, [row.name for row in rows])
        axes.set_xlim(0, 110)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel("IoU, percent")

    return draw(0.75 + _ROW * len(rows), paint, key=key, title=title, description=description)


def dots(rows: Mapping[str, Sequence[Sequence[float]]], *, key: str, title: str, description: str) -> str:
    """Draw the values (fractions) of each row's series as points, with an upright mark at each mean.

    Args:
        rows: name -> one list of values per series, the series in the order of their colours.
    """

    def paint(figure: Figure) -> None:
        axes = _axes(figure, list(rows))
        for y, series in enumerate(rows.values()):
            for number, values in enumerate(series):
                at = y + 0.22 * (number - (len(series) - 1) / 2)
                colour, shown = SERIES[number % 8], [100 * value for value in values]
                axes.plot(shown, [at] * len(shown), color=colour, marker="o", markersize=5, linestyle="none",
                          alpha=0.75, clip_on=False)  # fmt: skip
                if shown:
                    mean = sum(shown) / len(shown)
                    axes.plot([mean, mean], [at - 0.13, at + 0.13], color=colour, linewidth=2, clip_on=False)
        _names(axes, list(rows))
        axes.set_xlim(0, 100)
        axes.set_xlabel("mIoU, percent")

    most = max((len(series) for series in rows.values()), default=1)
    height = 0.75 + _ROW * max(1.0, 0.8 * most) * len(rows)
    return draw(height, paint, key=key, title=title, description=description)


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
    *,
    key: str,
    title: str,
    description: str,
    y: str,
) -> str:
    """Draw values over the iterations of all steps, with a gap where a step begins. Wide ranges get a log scale."""

    def paint(figure: Figure) -> None:
        axes = _axes(figure)
        for number, (at, values) in enumerate(series.values()):
            axes.plot(
                at, values, color=SERIES[number % 8], linewidth=1.5, marker="o" if len(at) == 1 else None
            )
        every = [value for _, values in series.values() for value in values if isfinite(value)] or [0.0]
        low, high = min(every), max(every)
        if low > 0 and high > 30 * low:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _position: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda _value, _position: "")
        elif low >= 0:
            axes.set_ylim(bottom=0)
        for step, first in starts[1:]:
            axes.axvline(first, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
            if len(starts) <= MOST_NAMED_STEPS:
                axes.annotate(f"step {step}", (first, 1), (3, -3), xycoords=("data", "axes fraction"),
                              textcoords="offset points", va="top", fontsize=9, color=MUTED)  # fmt: skip
        axes.margins(x=0.01)
        axes.set_xlabel("iteration")
        axes.set_ylabel(y)

    return draw(2.7, paint, key=key, title=title, description=description)


def _axes(figure: Figure, names: Sequence[str] = ()) -> Axes:
    """Add axes that leave room for their labels, which are row names or values.

    The room is estimated from the number of letters. A layout that measures the text would draw everything twice.
    """
    height, grid = float(figure.get_figheight()), "x" if names else "y"
    letters = max(
        (sum(2 if east_asian_width(c) in "WF" else 1 for c in short(name)) for name in names), default=6
    )
    left, bottom, right, top = 0.22 + 0.088 * letters, 0.52, 0.2, 0.1
    axes = figure.add_axes(
        (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (bottom + top) / height)
    )
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    axes.grid(axis="x" if grid == "x" else "y", which="major", color=LINE, linewidth=0.8)
    for name, spine in axes.spines.items():
        spine.set_visible(name == ("left" if grid == "x" else "bottom"))
        spine.set_color(MUTED)
    axes.tick_params(which="both", color=LINE, labelcolor=INK, length=0, labelsize=11)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    axes.xaxis.label.set_fontsize(11)
    axes.yaxis.label.set_fontsize(11)
    return axes


def _names(axes: Axes, names: Sequence[str]) -> None:
    """Label one row per name, the first on top."""
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)


def short(name: str) -> str:
    """Shorten a class name so that it fits beside a bar."""
    clean = printable(name).replace("\n", " ")
    return clean if len(clean) <= _LONGEST_NAME else clean[: _LONGEST_NAME - 1] + "…"


# Colours of a figure stand for roles; the page gives each role a colour for light, dark and print.
INK, MUTED, LINE, PAPER = "#010101", "#010102", "#010103", "#010104"
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


def draw(height: float, paint: Callable[[Figure], None], *, key: str, title: str, description: str) -> str:
    """Draw a figure and return it as an `<svg>` element. The same input gives the same text.

    Args:
        height: inches; the width is WIDTH.
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
        figure = Figure(figsize=(WIDTH, height))
        paint(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), key, title, description)


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
