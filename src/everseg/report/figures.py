"""Which charts a report shows: each with its legend, its caption and the rows it is drawn from (floor 6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from everseg.errors import some
from everseg.report import charts
from everseg.report.curves import Curves
from everseg.report.flow import KINDS
from everseg.report.numbers import KIND_TEXT, Rows, class_rows, flow_rows, old_flows
from everseg.runs.results import Track

_FLOW_COLOURS = (1, 0, 2, 4)


@dataclass
class Chart:
    """A chart of the page; without matplotlib only its table."""

    key: str
    title: str
    caption: str
    legend: list[tuple[str, str]] = field(default_factory=list)
    """(colour in CSS, text)."""
    rows: Rows = field(default_factory=list)
    svg: str | None = None


def _colour(number: int) -> str:
    """Colour of a series, from 0."""
    return f"var(--s{number % 8 + 1})"


def _drawn(chart: Chart, draw: Callable[..., str], *given: Any, **options: Any) -> Chart:
    if charts.can_draw():
        options |= {"key": chart.key, "title": chart.title, "description": chart.caption}
        chart.svg = draw(*given, **options)
    return chart


def steps_chart(track: Track, key: str) -> Chart | None:
    """Draw the mIoU of every group of classes after each step; None for a single step."""
    if len(track.steps) < 2:
        return None
    matrix = track.sequence["step_matrix"]
    series: dict[str, list[tuple[float, float | None]]] = {}
    for number, title in enumerate(track.group_titles):
        names = some(track.group_names(number), 3)
        series[f"{title} ({names})"] = [
            (step, row[number]) for step, row in zip(track.steps, matrix, strict=True)
        ]
    every = [(step, scores["miou"]["all"]) for step, scores in zip(track.steps, track.scores, strict=True)]
    if len(series) > 1:
        series["all classes known"] = list(every)
    legend = [(_colour(number), name) for number, name in enumerate(series)]
    chart = Chart(
        key,
        "mIoU over the steps",
        "mIoU of the classes of each step, measured after that step and every later one; background counted. "
        "A falling line is forgetting.",
        legend,
    )
    return _drawn(chart, charts.lines, series)


def domains_chart(tracks: Sequence[Track], key: str) -> Chart | None:
    """Draw the mIoU of every domain after each step; None if no domain was tested twice."""
    if all(len(track.steps) < 2 for track in tracks):
        return None
    series = {
        track.name: [(s, scores["miou"]["all"]) for s, scores in zip(track.steps, track.scores, strict=True)]
        for track in tracks
    }
    legend = [(_colour(number), name) for number, name in enumerate(series)]
    caption = "mIoU of each domain over all classes it knows then. A falling line is forgetting."
    return _drawn(Chart(key, "mIoU of every domain", caption, legend), charts.lines, series)


def classes_chart(track: Track, key: str) -> Chart | None:
    """IoU per class after the last step beside what it was when learnt, in groups, most lost first."""
    rows, groups = [], track.group_of
    final, lost = track.scores[-1]["class_iou"], track.sequence["forgetting"]["classes"]
    for c, name in enumerate(track.space.names):
        if final[c] is None:
            continue
        at = track.at_birth(c)
        mark = None if at == len(track.steps) - 1 else track.scores[at]["class_iou"][c]
        rows.append((groups[c], -(lost[c] or 0.0), charts.Bar(name, final[c], mark, groups[c])))
    if not rows:
        return None
    kept = sorted(sorted(rows, key=lambda row: row[1])[: charts.MOST_BARS], key=lambda row: row[:2])
    legend = [(_colour(number), title) for number, title in enumerate(track.group_titles)]
    caption = f"IoU of each class after step {track.steps[-1]}"
    if len(track.steps) > 1:
        legend.append(("mark", "when it was learnt"))
        caption += (
            "; the upright mark is its IoU when it was learnt. Within a group the largest loss comes first"
        )
    if len(rows) > len(kept):
        caption += f". The {len(kept)} classes of {len(rows)} that lost most; the table has all"
    chart = Chart(key, "IoU per class", f"{caption}.", legend, class_rows(track))
    return _drawn(chart, charts.bars, [bar for _, _, bar in kept])


def flow_chart(track: Track, key: str) -> Chart | None:
    """What the old classes were taken for after the last step; None if there is none."""
    flows = old_flows(track)
    if not flows:
        return None
    used = [number for number in range(len(KINDS)) if any(flow.shares[number] for flow in flows)]
    kept = sorted(flows, key=lambda flow: flow.shares[0])[: charts.MOST_BARS]
    legend = [
        (_colour(_FLOW_COLOURS[n] - 1) if _FLOW_COLOURS[n] else "var(--muted)", KIND_TEXT[KINDS[n]])
        for n in used
    ]
    caption = (
        f"What the model of step {track.steps[-1]} takes the pixels of every class known before that step for "
        "(rows of the confusion counts); least often right first."
    )
    chart = Chart(key, "What old classes turned into", caption, legend, flow_rows(track))
    rows = {track.space.names[flow.train_id]: [flow.shares[n] for n in used] for flow in kept}
    return _drawn(chart, charts.stacks, rows, [_FLOW_COLOURS[n] for n in used])


def training_charts(curves: Curves, key: str) -> list[Chart]:
    """Loss terms, learning rate and gradient norm over the iterations."""
    wanted = [
        ("Loss", "loss", {name.removeprefix("loss/"): s for name, s in curves.series.items() if "/" in name},
         "Every loss term with its weight, and their sum where there are several."),
        ("Learning rate", "learning rate", {k: s for k, s in curves.series.items() if k == "lr"},
         "As scheduled; a method may scale it for some of the weights."),
        ("Gradient norm", "gradient norm", {k: s for k, s in curves.series.items() if k == "grad_norm"},
         "Length of the gradient of all weights at the logged iterations."),
    ]  # fmt: skip
    found = []
    for title, y, series, caption in wanted:
        if not series:
            continue
        if curves.averaged:
            caption += " Long curves are averaged over neighbouring lines of the journal."
        legend = [(_colour(n), name) for n, name in enumerate(series)] if len(series) > 1 else []
        chart = Chart(f"{key}-{y.replace(' ', '-')}", title, caption, legend)
        found.append(_drawn(chart, charts.curve, series, curves.starts, y=y))
    return found


def speed_rows(curves: Curves) -> Rows:
    """Iterations, throughput and memory of every step."""
    return [
        {
            "step": step,
            "iterations": int(values["iterations"]),
            "images per second (median)": round(values["images_per_second"], 1),
            "largest memory (GiB)": round(values["memory"] / 2**30, 2),
        }
        for step, values in curves.speed.items()
    ]
