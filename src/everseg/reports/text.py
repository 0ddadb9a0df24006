"""Set names and settings in columns for the terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from everseg.display import printable


def columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Align cells in columns, as wide as the terminal (160 for files and pipes). The first column never wraps.

    Lists that must appear at once use this: the tables of `everseg.display` offer more but take longer to import.

    Args:
        head: names of two columns or more.
    """
    width = shutil.get_terminal_size((160, 0)).columns
    cells = [[printable(cell) for cell in row] for row in (head, *rows)]
    first, *middle, _ = (max(map(len, column)) for column in zip(*cells, strict=True))
    widths = [first, *(min(natural, width // 5) for natural in middle)]
    widths.append(max(20, width - sum(widths) - 2 * len(widths)))
    lines = []
    for row in cells:
        wrapped = [textwrap.wrap(cell, max(1, wide)) for cell, wide in zip(row, widths, strict=True)]
        for parts in zip_longest(*wrapped, fillvalue=""):
            lines.append(
                "  ".join(part.ljust(wide) for part, wide in zip(parts, widths, strict=True)).rstrip()
            )
    return "\n".join(lines)
