"""Results over domains: the relative drop against single-task models, and where their numbers come from (floor 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from everseg.config.fields import RunConfig
from everseg.config.loading import to_json
from everseg.errors import EversegError
from everseg.metrics import defined_mean, relative_drop
from everseg.runs.commit import read_document
from everseg.runs.folder import RunFolder
from everseg.runs.results import run_sequence


def drop_against_single(folder: RunFolder, config: RunConfig) -> dict[str, Any] | None:
    """Relative drop of the last step's mIoU against models trained on one domain each.

    Args:
        folder: of a run over domains with at least one scored step.
        config: its configuration; `scenario.single_task` gives the single-task mIoU in percent, else they are
            looked up in a finished run beside this one with `scenario.single`, in which these domains have the same
            data and were tested on the same classes.

    Returns:
        `mean` and `domains` (fractions, negative = worse than single-task), `baselines` (domain -> mIoU as a
        fraction) and `source` (what gave them); None where no baseline is known for every domain.
    """
    values = {name: v for name, v in run_sequence(folder).get("miou", {}).items() if v is not None}
    given = config.scenario.single_task
    if given is not None:
        found, source = {name: value / 100 for name, value in given.items()}, "scenario.single_task"
    elif config.scenario.single:
        return None
    else:
        found, source = _beside(folder, config, list(values))
    if not values or not values.keys() <= found.keys() or not all(found[name] for name in values):
        return None
    baselines = {name: found[name] for name in values}
    return {**relative_drop(values, baselines), "baselines": baselines, "source": source}


def _beside(folder: RunFolder, config: RunConfig, domains: Sequence[str]) -> tuple[dict[str, float], str]:
    """Single-task mIoU of the first finished single-task run, by name, that lies beside a run and compares with it."""
    scored = _scored_classes(folder)
    for path in sorted(folder.path.resolve().parent.glob("*/run.json")):
        other = RunFolder(path.parent)
        try:
            theirs = other.config()
            if (
                not theirs.scenario.single
                or _data(theirs, domains) != _data(config, domains)
                or not other.is_finished(theirs)
            ):
                continue
            found = _scored_classes(other)
            if any(found.get(name) != scored[name] for name in domains):
                continue
            values = run_sequence(other)["miou"]
        except EversegError:  # a damaged or foreign neighbour is no baseline
            continue
        return {name: value for name, value in values.items() if value is not None}, path.parent.name
    return {}, ""


def _data(config: RunConfig, domains: Sequence[str]) -> Any:
    """What two runs must share to be compared: these domains' data and how test images are seen and labelled.

    Runs cut short by `train.max_iterations` compare with those cut alike only.
    """
    text = to_json(config)
    entries = {name: {**text["data"]["domains"].get(name, {}), "root": None} for name in domains}
    seen = {key: text["data"][key] for key in ("evaluation", "size", "crop", "window", "overlap")}
    cut = text["train"]["max_iterations"]
    return entries, seen, cut, text["scenario"]["test_split"], text["scenario"]["policy"]


def _scored_classes(folder: RunFolder) -> dict[str, set[str]]:
    """Domain -> classes that its last test had pixels of."""
    found = {}
    for index in folder.finished_steps:
        for name, scores in folder.metrics(index)["branches"].items():
            ious = zip(scores["classes"], scores["class_iou"], strict=True)
            found[name] = {label for label, value in ious if value is not None}
    return found


def taught(folder: RunFolder) -> dict[int, str]:
    """Step -> domains whose images it trained on."""
    steps = read_document(folder.path / "scenario.json", "steps")["steps"]
    return {s["index"]: ", ".join(dict.fromkeys(source["dataset"] for source in s["train"])) for s in steps}


def domain_rows(steps: Sequence[Mapping[str, Any]], learnt: Mapping[int, str]) -> list[dict[str, Any]]:
    """One row per step: the domains trained, and the mIoU (percent) of every domain tested, and their mean.

    Args:
        steps: rows of `Run.steps`, one per step and domain.
        learnt: what `taught` gives.
    """
    names = dict.fromkeys(row["name"] for row in steps)
    rows = []
    for index in dict.fromkeys(row["index"] for row in steps):
        scores = {row["name"]: row["miou"]["all"] for row in steps if row["index"] == index}
        values = {name: scores.get(name) for name in names} | {"mean": defined_mean(scores.values())}
        percent = {name: None if value is None else round(100 * value, 2) for name, value in values.items()}
        rows.append({"step": index, "trained": learnt.get(index, ""), **percent})
    return rows
