"""Decide which charts a report shows, each with its legend, its caption and the rows it is drawn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from everseg.errors import some
from everseg.reports import charts
from everseg.reports.compare.columns import parts
from everseg.reports.compare.cost import IMAGES, STEP_TIME
from everseg.reports.kinds import Words
from everseg.reports.numbers import (
    Flow,
    Rows,
    class_rows,
    flow_rows,
    new_flows,
    old_flows,
    shares_of,
)
from everseg.runs.results import Track

PER_CLASS = "IoU per class"
"""Title of `classes_chart`."""
_FLOW_COLOURS = (1, 0, 2, 3, 4)
"""Number of the series' colour of each of `KINDS`; 0 = grey."""


@dataclass
class Chart:
    """A chart of the page. Without matplotlib it has only its table."""

    key: str
    title: str
    caption: str
    legend: list[tuple[str, str]] = field(default_factory=list)
    """(colour in CSS, text)."""
    rows: Rows = field(default_factory=list)
    svg: str | None = None


def _colour(number: int) -> str:
    """Colour of a series, the first being 0. From the ninth on, colours repeat with stripes."""
    colour = f"var(--s{number % 8 + 1})"
    if number < 8:
        return colour
    return f"repeating-linear-gradient({45 * (number // 8)}deg, {colour} 0 3px, var(--card) 3px 5px)"


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
        "mIoU of the classes of each step, measured after that step and every later one"
        f"{'; background counted' if track.counts_background else ''}. A falling line is forgetting.",
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


def classes_chart(
    track: Track,
    key: str,
    words: Words,
    *,
    joint: Track | None = None,
    before: Mapping[str, float | None] | None = None,
) -> Chart | None:
    """Draw the IoU per class now, earlier, and in joint training, by group, the largest loss first.

    Args:
        words: what the page says of this kind of run.
        joint: results of joint training on the same task.
        before: class -> its IoU with the deployed model, for an extension; else the earlier value is that of the step
            that taught the class.
    """
    rows, groups = [], track.group_of
    final = track.scores[-1]["class_iou"]
    bound: Sequence[float | None] = joint.scores[-1]["class_iou"] if joint else [None] * len(final)
    for c, name in enumerate(track.space.names):
        if final[c] is None:
            continue
        at = track.at_birth(c)
        known = at < len(track.steps) - 1
        mark = before.get(name) if before is not None else track.scores[at]["class_iou"][c] if known else None
        lost = (final[c] - mark) if mark is not None else 0.0
        rows.append((groups[c], lost, charts.Bar(name, final[c], mark, bound[c], groups[c])))
    if not rows:
        return None
    kept = sorted(sorted(rows, key=lambda row: row[1])[: charts.MOST_BARS], key=lambda row: row[:2])
    several = len(track.space.groups) > 1
    legend = [(_colour(number), title) for number, title in enumerate(track.group_titles)] if several else []
    caption = f"{words.per_class.format(step=track.steps[-1])}. A bar is the value now"
    if any(bar.mark is not None for _, _, bar in kept):
        legend.append(("mark", words.mark))
        caption += f"; the upright mark is the value {words.mark}"
    if joint is not None:
        legend.append(("diamond", "joint training"))
        caption += "; the diamond is joint training on the images of all steps, the upper bound"
    caption += ". The numbers beside the bars say the same"
    if any(bar.mark is not None for _, _, bar in kept):
        caption += ". Within a group of classes the largest loss comes first"
    if len(rows) > len(kept):
        caption += f". Shown are the {len(kept)} classes of {len(rows)} that lost most; the table has all"
    chart = Chart(key, PER_CLASS, f"{caption}.", legend, class_rows(track, joint))
    heads = ("\n".join(words.mark.rsplit(" ", 1)), "now", "joint")
    return _drawn(chart, charts.bars, [bar for _, _, bar in kept], heads)


def flow_charts(track: Track, key: str, words: Words, only: Sequence[str] | None = None) -> list[Chart]:
    """Draw what the last model predicts on the pixels of old classes and on those of all others.

    Args:
        words: what the page says of this kind of run.
        only: names of the classes to show; default all.
    """
    shown = set(track.space.names if only is None else only)
    old, rest = (
        [flow for flow in found if track.space.names[flow.train_id] in shown]
        for found in (old_flows(track), new_flows(track))
    )
    what = f"What {words.model.format(step=track.steps[-1])} predicts on the pixels of every class"
    apart = bool(old) or only is not None
    taken = "What new classes are taken for" if apart else "What classes are taken for"
    learnt = " learnt in that step" if apart else ""
    found = [
        _flow_chart(
            track, f"{key}-flow", old, "What old classes turned into", f"{what} known before that step", words
        ),
        _flow_chart(track, f"{key}-taken", rest, taken, f"{what}{learnt}", words),
    ]
    return [chart for chart in found if chart is not None]


def _flow_chart(
    track: Track, key: str, flows: Sequence[Flow], title: str, what: str, words: Words
) -> Chart | None:
    if not flows:
        return None
    shares = {flow.train_id: shares_of(flow, words.together) for flow in flows}
    names = list(next(iter(shares.values())))
    used = [n for n, name in enumerate(names) if any(one[name] for one in shares.values())]
    kept = sorted(flows, key=lambda flow: flow.shares[0])[: charts.MOST_BARS]
    legend = [(_colour(_FLOW_COLOURS[n] - 1) if _FLOW_COLOURS[n] else "var(--muted)", names[n]) for n in used]
    caption = (
        f"{what}, in percent of the class's true pixels (rows of the confusion counts). The class that is right least "
        "often comes first."
    )
    chart = Chart(key, title, caption, legend, flow_rows(track, flows, words.together))
    rows = {
        track.space.names[flow.train_id]: [shares[flow.train_id][names[n]] for n in used] for flow in kept
    }
    return _drawn(chart, charts.stacks, rows, [_FLOW_COLOURS[n] for n in used])


def training_charts(curves: Curves, key: str) -> list[Chart]:
    """Draw loss terms, learning rate and gradient norm over the iterations."""
    wanted = [
        ("Loss", "loss", {name.removeprefix("loss/"): s for name, s in curves.series.items() if "/" in name},
         "Every loss term with its weight, and their sum where there are several. Losses have no unit; smaller is "
         "better."),
        ("Learning rate", "learning rate", {k: s for k, s in curves.series.items() if k == "lr"},
         "The factor between gradient and change of the weights, as scheduled. A method may scale it for some of the "
         "weights."),
        ("Gradient norm", "gradient norm", {k: s for k, s in curves.series.items() if k == "grad_norm"},
         "Length of the gradient of all weights at the logged iterations. It has no unit. A value that falls to nearly "
         "0 or grows without end says that nothing is learnt."),
    ]  # fmt: skip
    found = []
    below = any(value < 0 for name in curves.terms for value in curves.series[f"loss/{name}"][1])
    for title, y, series, caption in wanted:
        if not series:
            continue
        if curves.averaged:
            caption += " Long curves are averaged over neighbouring lines of the journal."
        if y == "loss" and below:
            caption += " A term below 0 is no fault: some divergences leave out a part that is constant."
        numbers = _curve_colours(list(series)) if y == "loss" else [1] * len(series)
        legend = (
            [
                (_colour(number - 1) if number else "var(--muted)", name)
                for number, name in zip(numbers, series, strict=True)
            ]
            if len(series) > 1
            else []
        )
        chart = Chart(f"{key}-{y.replace(' ', '-')}", title, caption, legend)
        found.append(_drawn(chart, charts.curve, series, curves.starts, numbers, y=y))
    return found


def _curve_colours(terms: Sequence[str]) -> list[int]:
    """Number of the series' colour of each loss term. A term has the same one in every run; the sum is grey."""
    fixed = {"sum": 0, "ce": 1, "bce": 1, "icarl": 1, "kd": 2}
    free = (number for number in range(3, 3 + len(terms)))
    return [fixed[name] if name in fixed else next(free) for name in terms]


def speed_rows(curves: Curves) -> Rows:
    """Make rows of the iterations, throughput and memory of every step, and of every pass without gradients."""
    return [
        {
            "step": f"{step}{', pass without gradients' if passing else ''}",
            "iterations": int(values["iterations"]),
            "images per second (median)": values["images_per_second"],
            "largest memory (GiB)": values["memory"] / 2**30,
        }
        for (step, passing), values in curves.speed.items()
    ]


MOST_POINTS = 300
"""Curves with more points are averaged to about so many, in pieces of equal length. Each step gets its share."""
_GAP = (float("nan"), float("nan"))


@dataclass(frozen=True)
class Curves:
    """Values over the iterations of all steps, in the order of the steps."""

    series: dict[str, tuple[list[float], list[float]]]
    """Name -> (iteration, value), NaN between two steps; "loss/NAME" (weights applied), "lr", "grad_norm"."""
    starts: list[tuple[int, int]]
    """(step, first iteration)."""
    speed: dict[tuple[int, bool], dict[str, float]] = field(default_factory=dict)
    """(step, whether it is its pass without gradients) -> iterations (of a pass: batches), images_per_second (median)
    and memory (largest, bytes)."""
    averaged: bool = False

    @property
    def terms(self) -> list[str]:
        return [name.removeprefix("loss/") for name in self.series if name.startswith("loss/")]


def curves_of(entries: Iterable[Mapping[str, Any]]) -> Curves | None:
    """Read the curves from a journal's entries; None if nothing was logged. Damaged entries are skipped.

    A pass without gradients has a speed, and no curve.
    """
    lines: dict[int, list[Mapping[str, Any]]] = {}
    passes: dict[int, list[Mapping[str, Any]]] = {}
    for entry in entries:
        try:
            kind = {"train": lines, "pass": passes}.get(entry["event"])
            if kind is not None and isinstance(entry["iteration"], int):
                kind.setdefault(int(entry["step"]), []).append(entry)
        except (ValueError, KeyError, TypeError):
            continue
    if not lines and not passes:
        return None
    points: dict[str, list[list[tuple[float, float]]]] = {}
    starts, offset = [], 0
    speed = {
        (step, kind is passes): _speed(found) for kind in (lines, passes) for step, found in kind.items()
    }
    for step in sorted(lines):
        starts.append((step, offset))
        mine: dict[str, list[tuple[float, float]]] = {}
        for entry in lines[step]:
            for name, value in _values(entry):
                mine.setdefault(name, []).append((offset + entry["iteration"], value))
        for name, found in mine.items():
            points.setdefault(name, []).append(found)
        offset += max(entry["iteration"] for entry in lines[step])
    series = {name: _thinned(found) for name, found in points.items()}
    averaged = any(sum(map(len, found)) > MOST_POINTS for found in points.values())
    return Curves(series, starts, dict(sorted(speed.items())), averaged)


def _values(entry: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    terms = {k: v for k, v in (entry.get("terms") or {}).items() if isinstance(v, int | float)}
    if len(terms) > 1:
        yield "loss/sum", float(sum(terms.values()))
    yield from ((f"loss/{name}", float(value)) for name, value in terms.items())
    for name in ("lr", "grad_norm"):
        if isinstance(entry.get(name), int | float):
            yield name, float(entry[name])


def _speed(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    images = [e["images_per_second"] for e in entries if isinstance(e.get("images_per_second"), int | float)]
    memory = [e["memory"] for e in entries if isinstance(e.get("memory"), int | float)]
    return {
        "iterations": max(e["iteration"] for e in entries),
        "images_per_second": float(np.median(images)) if images else 0.0,
        "memory": float(max(memory, default=0)),
    }


def _thinned(steps: list[list[tuple[float, float]]]) -> tuple[list[float], list[float]]:
    """Reduce a curve to about MOST_POINTS means of neighbours. Every value counts, and no mean spans two steps."""
    share = min(1.0, MOST_POINTS / sum(map(len, steps)))
    kept: list[tuple[float, float]] = []
    for points in steps:
        pieces = np.array_split(np.array(points, dtype=np.float64), max(1, round(share * len(points))))
        kept += [
            *([_GAP] if kept else []),
            *((float(x), float(y)) for x, y in (p.mean(axis=0) for p in pieces)),
        ]
    return [x for x, _ in kept], [y for _, y in kept]


MOST_SERIES = 6
"""Most domains in a chart. With more, only the table shows them."""


def seeds_chart(table: Mapping[str, Any], key: str, *, counted: bool = False) -> Chart | None:
    """Draw the mIoU of kept, learnt and all classes of every run, or of every domain; None if there is nothing.

    Args:
        table: one table of `compare.collect`.
        counted: whether there is a background, which then counts.
    """
    domains = [name for name in table["numbers"] if name.startswith("mIoU ")]
    names = domains or [name for name in (*parts(table["numbers"]), "all") if name in table["numbers"]]
    names = names[:MOST_SERIES]
    rows = {
        group["name"]: [[v for v in group["values"][name] if v is not None] for name in names]
        for group in table["groups"]
    }
    if not names or not charts.can_draw():
        return None
    legend = [(f"var(--s{number})", name) for number, name in enumerate(names, 1)]
    counts = ", background counted" if counted else ""
    caption = f"mIoU after the last step{counts}. A point per run, an upright mark at the mean over seeds."
    chart = Chart(key, "Every run", caption, legend)
    chart.svg = charts.dots(rows, key=key, title=chart.title, description=caption)
    return chart


KEPT_KINDS = (
    "keeps no images of earlier steps",
    "keeps images of earlier steps",
    "joint training: all images at once",
)


def old_new_chart(table: Mapping[str, Any], key: str, *, counted: bool = False) -> Chart | None:
    """Draw the old classes against the new ones, a dot per group; over domains the first against the last.

    None if there are not two numbers to draw, or no group has both.

    Args:
        table: one table of `compare.collect`.
        counted: whether there is a background, which then counts as an old class.
    """
    domains = [name for name in table["numbers"] if name.startswith("mIoU ") and name != "mIoU mean"]
    x, y = (domains[0], domains[-1]) if len(domains) > 1 else parts(table["numbers"])
    groups = [
        group
        for group in table["groups"]
        if all(name in group["scores"] and group["scores"][name]["mean"] is not None for name in (x, y))
    ]
    if not groups:
        return None

    def mark(group: Mapping[str, Any]) -> charts.Mark:
        scores = group["scores"]
        seconds = scores.get(STEP_TIME, {}).get("mean")
        kept = bool(scores.get(IMAGES, {}).get("mean"))
        return charts.Mark(
            group["name"], scores[x]["mean"], scores[y]["mean"], scores[x]["sd"], scores[y]["sd"],
            None if group["joint"] else seconds, 2 if group["joint"] else int(kept),
        )  # fmt: skip

    what = (
        (f"mIoU of {x.removeprefix('mIoU ')}", f"mIoU of {y.removeprefix('mIoU ')}")
        if domains
        else {"old": ("mIoU of the old classes", "mIoU of the new classes"),
              "base": ("mIoU of the first step's classes", "mIoU of the classes taught later")}[x]
    )  # fmt: skip
    named = {"base": "first classes", "later": "later ones"}
    title = f"{named.get(x, x.removeprefix('mIoU '))} against {named.get(y, y.removeprefix('mIoU '))}".capitalize()
    caption = (
        f"{what[0]} and {what[1].removeprefix('mIoU ')} after the last step"
        f"{', background counted' if counted else ''}. "
        "Further right and further up is better. A dot is the mean over seeds, whiskers reach one sample standard "
        "deviation to each side. The area of a dot is the training time of a later step; the smallest dots are drawn "
        "a little larger, so that they are seen."
    )
    chart = Chart(key, title, caption)
    return _drawn(
        chart, charts.against, [mark(group) for group in groups], KEPT_KINDS,
        x=f"{what[0]}, percent → better", y=f"{what[1]}, percent → better", cost="training time per later step",
    )  # fmt: skip
