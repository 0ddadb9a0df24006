"""The chart of a comparison: every seed of every group as a point (floor 6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from everseg.report import charts
from everseg.report.figures import Chart

MOST_SERIES = 6
"""More domains than that are in the table only."""


def seeds_chart(table: Mapping[str, Any], key: str) -> Chart | None:
    """Draw old, new and all (over domains: each of them) of every run; None where there is nothing to draw."""
    domains = [name for name in table["numbers"] if name.startswith("mIoU ")]
    names = domains or [name for name in ("old", "new", "all") if name in table["numbers"]]
    names = names[:MOST_SERIES]
    rows = {
        group["name"]: [[v for v in group["values"][name] if v is not None] for name in names]
        for group in table["groups"]
    }
    if not names or not charts.can_draw():
        return None
    legend = [(f"var(--s{number})", name) for number, name in enumerate(names, 1)]
    caption = "mIoU after the last step, background counted. A point per run, an upright mark at the mean over seeds."
    chart = Chart(key, "Every run", caption, legend)
    chart.svg = charts.dots(rows, key=key, title=chart.title, description=caption)
    return chart
