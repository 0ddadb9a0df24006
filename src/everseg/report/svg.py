"""A matplotlib figure as SVG that stands inside a page: its colours, its font, text alternatives (floor 6)."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    """Draw a figure and give it as an `<svg>` element; the same input gives the same text.

    Args:
        height: inches; the width is WIDTH.
        paint: puts axes into the figure; colours only by their roles.
        key: begins every id of the drawing, which must be the page's only one.
        title: short name for those who do not see it.
        description: what it shows, in a sentence or two.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with rc_context(SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that its font lacks are drawn by the browser's
        figure = Figure(figsize=(WIDTH, height))
        paint(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), key, title, description)


def _inline(text: str, key: str, title: str, description: str) -> str:
    """Strip what only a file needs, turn colours into roles, make ids unique, add the text alternatives."""
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
    for parent in [root, *root.findall("defs")]:  # its style sheet would reach the whole page
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
