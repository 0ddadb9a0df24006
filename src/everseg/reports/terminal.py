"""Show results as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from everseg.display import UNDEFINED, Table, figure, percent, points, table, unicode_output
from everseg.errors import some
from everseg.labels import policy_name
from everseg.metrics import defined_mean
from everseg.reports.published import PLOP_RULE

BAR_CELLS = 10


def bar(value: float | None, *, cells: int = BAR_CELLS, mark: str = "▇") -> str:
    """Draw a fraction in [0, 1] as a row of blocks; empty below half a block, for None and for negative values."""
    return "" if value is None else mark * round(cells * min(max(value, 0.0), 1.0))


def step_table(run_json: Mapping[str, Any]) -> Table:
    """Make one row per step: mIoU of old, new and all classes in percent, where it differs also without background.

    Args:
        run_json: what `Run.to_json()` gives.
    """
    groups = ("old", "new", "all")
    # Without a background both means are the same numbers.
    counted = any(step["miou"] != step["miou_without_background"] for step in run_json["steps"])
    plain = groups if counted else ()
    plain_names = [f"{group} (no bg)" for group in plain]
    numbers = ["step", *groups, *plain_names, "hIoU", "accuracy"]
    columns = ["step", "new classes", *groups, *plain_names, "hIoU", "accuracy"]
    rows = [
        [
            step["index"],
            some(step["classes"], 6),
            *(percent(step["miou"].get(group)) for group in groups),
            *(percent(step["miou_without_background"].get(group)) for group in plain),
            percent(step.get("harmonic_mean")),
            percent(step.get("overall_accuracy")),
        ]
        for step in run_json["steps"]
    ]
    title = f"{run_json['name']}: mIoU in percent after each step{_labels(run_json)}"
    return table(columns, rows, title=title, right="|".join(numbers))


def _labels(run_json: Mapping[str, Any]) -> str:
    config = run_json.get("config")
    if not config:
        return ""
    return f", label policy {policy_name(config['scenario']['policy'], config['data']['dataset'])}"


def run_table(run_json: Mapping[str, Any]) -> Table:
    """Show a run's results: one row per step, and one column per domain for runs over domains.

    Args:
        run_json: what `Run.to_json()` gives.
    """
    if "table" not in run_json:
        return step_table(run_json)
    columns = list(dict.fromkeys(key for row in run_json["table"] for key in row))
    rows = []
    # The numbers in `table` are already rounded for files, so the cells are made from the scores.
    for row in run_json["table"]:
        scores = {s["name"]: s["miou"]["all"] for s in run_json["steps"] if s["index"] == row["step"]}
        scores["mean"] = defined_mean(scores.values())
        rows.append([row[key] if key in ("step", "trained") else percent(scores.get(key)) for key in columns])
    title = f"{run_json['name']}: mIoU in percent of each domain after each step{_labels(run_json)}"
    return table(columns, rows, title=title, right="|".join(c for c in columns if c != "trained"))


def sequence_text(run_json: Mapping[str, Any]) -> str:
    """State the average over steps, forgetting and backward transfer in one line; "" for runs of one step."""
    forgetting = (run_json.get("forgetting") or {}).get("mean")
    if forgetting is None:
        return ""
    transfer = (run_json.get("backward_transfer") or {}).get("mean")
    return (
        f"average over steps {percent(run_json.get('average_miou'))} · forgetting {percent(forgetting)}"
        f" · backward transfer {percent(transfer)} (points of mIoU)"
    )


def reporting_text(run_json: Mapping[str, Any]) -> str:
    """State the figures by PLOP's reporting rule in one line; "" for runs without the labels of the PLOP family."""
    found = run_json.get("plop_rule")
    if not found:
        return ""
    each = " · ".join(f"{name} {percent(found[name])}" for name in ("first", "last", "all", "average"))
    return f"by PLOP's reporting rule: {each} ({PLOP_RULE})"


def drop_text(run_json: Mapping[str, Any]) -> str:
    """State the relative drop against single-task models in one line; "" for runs on one data set."""
    if "table" not in run_json or run_json["config"]["scenario"]["single"]:
        return ""
    drop = run_json.get("relative_drop")
    if drop is None:
        return (
            "relative drop: no single-task numbers. Train them beside this run, on the same data and image size "
            "(the preset that ends in -single, or scenario.single=true), "
            "or give the numbers: scenario.single_task={DOMAIN: PERCENT, ...}"
        )
    each = ", ".join(f"{name} {points(value)}" for name, value in drop["domains"].items())
    return (
        f"relative drop (negative = worse than single-task models): {points(drop['mean'])} % "
        f"({each}; against {drop['source']})"
    )


def demo_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Show the demo's result: one row per method, with forgetting as a bar."""
    mark = "▇" if unicode_output() else "#"
    columns = ["method", "step 0: all", "step 1: old", "new", "all", "forgetting", ""]
    cells = [
        [
            row["method"],
            *(percent(row.get(key)) for key in ("first", "old", "new", "all", "forgetting")),
            bar(row.get("forgetting"), mark=mark)
            if row["method"] != "joint"
            else "(upper bound: sees all classes at once)",
        ]
        for row in rows
    ]
    return table(columns, cells, title="mIoU in percent", right="|".join(columns[1:6]))


def scenario_tables(steps: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Show what every step sees: images and leaks per step, then pixels, then images, pixels and weights per class.

    Three tables instead of one fit into a terminal of 80 columns.

    Args:
        steps: what `everseg.scenarios.summary.summarise` gives.
    """
    domains = any(step.get("domains") for step in steps)
    overview = table(
        ["step", *(["domains"] if domains else []), "new classes", "train", "test", "shared images"],
        [
            [
                step["index"],
                *([", ".join(step["domains"])] if domains else []),
                some(step["new_classes"], 8),
                step["train"],
                step["test"],
                ", ".join(f"{n} with step {i}" for i, n in step["leaks"]["shared_images"].items())
                or UNDEFINED,
            ]
            for step in steps
        ],
        title="What every step sees (shared images: training images that another step uses too)",
        right="step|train|test",
    )
    head = ["background", "ignored", "old classes", "future classes"]
    hidden = table(
        ["step", *head],
        [
            [
                step["index"],
                f"{step['background_pixels']:,}",
                f"{step['ignored_pixels']:,}",
                f"{sum(step['hidden']['old'].values()):,}",
                f"{sum(step['hidden']['future'].values()):,}",
            ]
            for step in steps
        ],
        title="Pixels trained as background, ignored, and those of them that are hidden old or future classes",
        right="|".join(["step", *head]),
    )
    weighted = any(step.get("class_weights") for step in steps)
    rows = []
    for step in steps:
        for name, entry in step["classes"].items():
            weight = step.get("class_weights", {}).get(name)
            shown = [figure(weight, digits=2)] if weighted else []
            rows.append([step["index"], name, entry["images"], f"{entry['pixels']:,}", *shown])
    columns = ["step", "class", "images", "pixels", *(["weight"] if weighted else [])]
    classes = table(columns, rows, title="Labelled in training", right="step|images|pixels|weight")
    return [overview, hidden, classes]
