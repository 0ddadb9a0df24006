"""What the report says of an extension: what was taught, and what became of the deployed model's classes.

The images of an extension need not label the old classes. Where they do not, old classes are background in them by
design. So the report says "not measured" instead of scores that would count right predictions as wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everseg.display import capital, in_percent, percent, share
from everseg.errors import some
from everseg.metrics import defined_mean
from everseg.reports.numbers import Rows
from everseg.runs.results import OnNew, Results, StepResults, Taught

NOT_MEASURED = "not measured"
ROUNDING = 1e-6
"""What a share may lack of its limit: the scores have a small number in their denominators (`metrics.scores.EPS`), so
that equal models agree on a share just below 1."""


@dataclass(frozen=True)
class Told:
    """The figures of an extension under one name of its results."""

    step: StepResults
    result: str
    taught: Sequence[Taught]
    old: Sequence[OnNew]
    hidden: Sequence[str]
    """The old classes that the new data have no label for. They may be visible all the same."""
    place: str | None = None
    """The place or device that the new images come from, where one was named."""

    @classmethod
    def of(cls, results: Results, result: str) -> Told:
        """Read them from the last step."""
        step = results.steps[-1]
        branch = step.branch_of[result]
        names, old = step.spaces[branch].names, step.old_on_new(result)
        planned = next(entry for entry in results.planned if entry["index"] == step.index)
        known = {train_id for source in planned["test"] for train_id in source["lut"]}
        hidden = [one.name for one in old if names.index(one.name) not in known]
        taught = step.taught(result, step.scores[result]["new_classes"])
        return cls(step, result, taught, old, hidden, results.config.scenario.domain)

    @property
    def labelled(self) -> list[OnNew]:
        """The old classes that the new images show and label."""
        return [one for one in self.old if one.pixels]

    @property
    def before(self) -> float | None:
        """Mean IoU of the deployed model over `labelled`."""
        return defined_mean(one.before for one in self.labelled)

    @property
    def after(self) -> float | None:
        """Mean IoU of the extended model over `labelled`."""
        return defined_mean(one.after for one in self.labelled)


def sentence(told: Told) -> str:
    """State in a sentence what an extension taught, and what is known of the old classes."""
    where = "" if told.place is None else f", in the place '{told.place}'"
    if not told.taught:
        names = some([one.name for one in told.labelled], 6) or "its classes"
        return f"Step {told.step.index} taught a deployed model more images of {names}{where}; {_old(told)}."
    names = some([one.name for one in told.taught], 6)
    taught = "; ".join(one.text for one in told.taught[:6])
    return f"Step {told.step.index} taught {names} to a deployed model{where}: {taught}; {_old(told)}."


def _old(told: Told) -> str:
    """What is known of the old classes."""
    kept, said = told.step.kept, list[str]()
    if kept.get("share") is not None:
        how = (
            "measured on labels"
            if kept["how"] == "measured"
            else "estimated from agreement with the deployed model"
        )
        said.append(f"{percent(kept['share'])} % of the old classes' quality is left, {how}")
    if told.labelled:
        of = (
            "the old classes"
            if len(told.labelled) == len(told.old)
            else f"{len(told.labelled)} of {len(told.old)} old classes, which they show and label,"
        )
        said.append(
            f"on the new images {of} went from {percent(told.before)} to {percent(told.after)} mIoU"
            if told.before is not None
            else f"on the new images {of} reach {percent(told.after)} mIoU"
        )
    elif not said:
        said.append(f"the old classes are {NOT_MEASURED}, since the new images do not label them")
    return "; ".join(said)


def gate_line(kept: Mapping[str, Any]) -> str:
    """What the gate said of an extension; "" if nothing was asked.

    Args:
        kept: as `StepResults.kept` gives it. Runs of earlier versions hold what was asked for, and no sentence.
    """
    asked, left = kept.get("gate"), kept.get("share")
    if kept.get("verdict") is not None or asked is None:
        return str(kept.get("verdict") or "")
    whole = f"at least {percent(asked)} % was asked for"
    if left is None:
        return f"FAIL, it is not known how much of the old classes' quality is left, {whole}"
    if left < asked - ROUNDING:
        return f"FAIL, {percent(left)} % of the old classes' quality is left, {whole}"
    return f"PASS, {whole}"


def cards(told: Told) -> list[tuple[str, str, str]]:
    """Summarise the extension in a few numbers: (label, value, explanation)."""
    found = [
        (one.name, percent(one.iou), f"IoU; {share(one.false_share)} of the other pixels are called so")
        for one in told.taught[:4]
    ]
    number = len(told.labelled)
    which = (
        "1 old class that these show and label"
        if number == 1
        else f"{number} old classes that these show and label"
    )
    old = (
        ("Old classes", percent(told.after), f"mIoU on the new images, of {which}")
        if told.labelled
        else ("Old classes", NOT_MEASURED, "the new images do not label old classes")
    )
    kept = told.step.kept
    if kept.get("share") is not None:
        left = ("Old classes kept", f"{percent(kept['share'])} %", f"{kept['how']}; see the note")
        return [*found, left, old]
    return [*found, old]


def notes(told: Told, method: str) -> list[str]:
    """Say what the comparison with the deployed model found, and which classes no figure here is about.

    Args:
        method: name of the run's method.
    """
    said = [f"{capital(text)}." for text in [told.step.kept.get("text", "")] if text]
    if verdict := gate_line(told.step.kept):
        said.append(f"Gate: {verdict}.")
    if method == "complete" and told.hidden:
        said.append(
            "Labels are missing in the new images where an old class may be that they do not label. There the deployed "
            "model's own class was taught where it was sure, and nothing where it was not; never that an old class is "
            "background (method complete)."
        )
    if told.hidden:
        said.append(
            f"The new images do not label {some(told.hidden, 12)}. They may be visible there and count as background, "
            "so no score of these classes, of the background or of all classes together is given."
        )
    return said


def rows(told: Told) -> Rows:
    """Make a row per class: IoU of the deployed model and of the extended one, on the new images."""
    found: Rows = [
        {
            "class": one.name,
            "known": "old",
            "IoU before": in_percent(one.before) if one.pixels else NOT_MEASURED,
            "IoU after": in_percent(one.after) if one.pixels else NOT_MEASURED,
            "test pixels": one.pixels,
        }
        for one in told.old
    ]
    counts = told.step.counts[told.result].sum(1)
    names = told.step.spaces[told.step.branch_of[told.result]].names
    return found + [
        {
            "class": one.name,
            "known": "taught now",
            "IoU before": None,
            "IoU after": in_percent(one.iou),
            "test pixels": int(counts[names.index(one.name)]),
        }
        for one in told.taught
    ]


def kept_rows(told: Told) -> Rows:
    """Make a row per class of each branch that the deployed model had, where there are several branches; else []."""
    branches = list(told.step.spaces)
    if len(branches) < 2:
        return []
    found: Rows = []
    for name, figures in told.step.kept.get("classes", {}).items():
        # Of a bundle with a single branch the names stand alone; its branch is the first one.
        branch, sign, short = name.partition(": ")
        if not sign or branch not in branches:
            branch, short = branches[0], name
        background = told.step.spaces[branch].background
        if background is not None and short == told.step.spaces[branch].names[background]:
            continue
        found.append(
            {
                "branch": branch,
                "class": short,
                "IoU before": in_percent(figures.get("deployed")),
                "IoU after": in_percent(figures.get("new")),
                "agreement": in_percent(figures.get("agreement")),
                "kept": NOT_MEASURED if figures.get("share") is None else in_percent(figures["share"]),
            }
        )
    return found


def start(results: Results) -> str:
    """Name the bundle that the run began with, with the beginning of its digest."""
    first = results.steps[0].index - 1
    # Only a damaged run begins with step 0 and names a bundle.
    parent = (StepResults(results.folder, first).final.parent if first >= 0 else None) or ""
    return f"bundle {results.config.scenario.bundle} ({parent[:12]}…)"
