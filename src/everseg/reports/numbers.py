"""Compute the report's rows and its summary sentence from the counts alone.

Rows are plain mappings whose keys are the page's columns. The page also offers them as CSV and JSON.
Scores are unrounded percent, or None if undefined. `display` rounds them once, when they are shown or written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from everseg.display import in_percent, percent, share
from everseg.errors import some
from everseg.metrics import defined_mean, image_statistics
from everseg.metrics.scores import checked_counts
from everseg.reports.kinds import Kind
from everseg.reports.published import Match
from everseg.runs.results import Results, Taught, Track

Rows = list[dict[str, Any]]
BEYOND = "a bound is only as good as its own training, so train it longer"
"""Said where a run is above joint training, which nobody expects of a bound."""
GROUPS = ("old", "new", "base", "all")


def step_rows(track: Track) -> Rows:
    """Make rows of old / new / base / all after each step, in both background conventions."""
    rows = []
    for index, scores in zip(track.steps, track.scores, strict=True):
        row: dict[str, Any] = {"step": index}
        for key, suffix in (("miou", ""), ("miou_without_background", " (no background)")):
            row |= {f"{group}{suffix}": in_percent(scores[key][group]) for group in GROUPS}
        row["accuracy"] = in_percent(scores["overall_accuracy"])
        rows.append(row)
    return rows


def shown_step_rows(rows: Rows, track: Track, *, parted: bool) -> Rows:
    """Leave out of `step_rows` the columns that would say the same twice.

    The means without background stay only where they differ from the others, "old" and "new" only where a class is old,
    and "base" only where there are more than two groups of classes: with two it is "old" under another name.

    Args:
        rows: the result of `step_rows`.
        track: what the rows were made of.
        parted: whether old and new mean anything in this kind of run.
    """
    plain = " (no background)"
    same = all(row[group] == row[f"{group}{plain}"] for row in rows for group in GROUPS)
    parted = parted and any(row["old"] is not None for row in rows)
    kept = [g for g in GROUPS if g == "all" or (parted and (g != "base" or len(track.space.groups) > 2))]
    columns = ["step", *kept, *(f"{group}{plain}" for group in kept if not same), "accuracy"]
    return [{column: row[column] for column in columns} for row in rows]


def shown_group_rows(rows: Rows) -> Rows:
    """Leave out of `group_rows` the columns without background where they say the same as those with it."""
    plain = " (no background)"
    same = all(row[key] == row[f"{key}{plain}"] for row in rows for key in row if f"{key}{plain}" in row)
    return [{key: value for key, value in row.items() if not (same and key.endswith(plain))} for row in rows]


def matrix_rows(track: Track, suffix: str = "", joint: Track | None = None) -> Rows:
    """Make the step matrix: mIoU of the classes learnt in step j after step i; None above the diagonal.

    Args:
        suffix: "" or "_without_background".
        joint: results of joint training on the same task, shown as the last row.
    """
    matrix = track.sequence[f"step_matrix{suffix}"]
    rows: Rows = [
        {
            "after step": index,
            **{title: in_percent(value) for title, value in zip(track.group_titles, row, strict=True)},
        }
        for index, row in zip(track.steps, matrix, strict=True)
    ]
    if joint is not None:
        (values,) = joint.sequence[f"step_matrix{suffix}"]
        bound = {title: in_percent(value) for title, value in zip(track.group_titles, values, strict=True)}
        rows.append({"after step": "joint", **bound})
    return rows


def taught_rows(taught: Sequence[Taught]) -> Rows:
    """Make a row per class that an extension taught: IoU, and how much else is called so."""
    return [
        {
            "class": one.name,
            "IoU": in_percent(one.iou),
            "called so elsewhere": in_percent(one.false_share),
            "images without it": one.images_without,
            "called so in these": in_percent(one.false_without),
        }
        for one in taught
    ]


def group_rows(track: Track) -> Rows:
    """Make rows of forgetting and backward transfer per group of classes, in both background conventions."""
    sequence, rows = track.sequence, []
    for number, born in enumerate(track.born):
        row: dict[str, Any] = {"learnt in step": born, "classes": ", ".join(track.group_names(number))}
        for name, key in (("forgetting", "forgetting"), ("backward transfer", "backward_transfer")):
            for suffix, text in (("", ""), ("_without_background", " (no background)")):
                row[f"{name}{text}"] = in_percent(sequence[f"{key}{suffix}"]["groups"][number])
        rows.append(row)
    return rows


def class_rows(track: Track, joint: Track | None = None) -> Rows:
    """Make a row per class with true pixels: step learnt, IoU after each step, loss of IoU, Dice, share of the pixels.

    Args:
        joint: results of joint training on the same task, shown in a column of their own.
    """
    bound = joint.scores[-1]["class_iou"] if joint else None
    outlines = track.boundary_scores.get("class_boundary_iou")
    truth, total = track.counts[-1].sum(axis=1), max(int(track.counts[-1].sum()), 1)
    rows = []
    for c, name in enumerate(track.space.names):
        if not truth[c]:
            continue
        at = track.at_birth(c)
        ious = [scores["class_iou"] for scores in track.scores]
        rows.append(
            {
                "class": name,
                "learnt in step": track.steps[at],
                **{
                    f"IoU after step {index}": in_percent(ious[i][c]) if i >= at else None
                    for i, index in enumerate(track.steps)
                },
                **({"joint IoU": in_percent(bound[c])} if bound else {}),
                "forgetting": in_percent(track.sequence["forgetting"]["classes"][c]),
                "Dice": in_percent(track.scores[-1]["class_dice"][c]),
                **({"boundary IoU": in_percent(outlines[c])} if outlines else {}),
                "accuracy": in_percent(track.scores[-1]["class_accuracy"][c]),
                "share of test pixels": in_percent(truth[c] / total),
                "test pixels": int(truth[c]),
            }
        )
    return rows


def old_flows(track: Track) -> list[Flow]:
    """List what the last model predicts on the pixels of classes that were known before the last step."""
    old = set(track.old)
    return [f for f in flows(track.counts[-1], track.group_of, track.background) if f.train_id in old]


def new_flows(track: Track) -> list[Flow]:
    """List what the last model predicts on the pixels of all other classes: those that the last step taught."""
    old = set(track.old)
    return [f for f in flows(track.counts[-1], track.group_of, track.background) if f.train_id not in old]


def old_turns(track: Track) -> list[Turn]:
    """List the pairs in which old classes are confused more often than when they were learnt."""
    return turns(track.counts[-1], [track.counts[track.at_birth(c)] for c in track.old])


def shares_of(flow: Flow, together: bool) -> dict[str, float]:
    """Name the shares of a class's true pixels, in the order of `KINDS`.

    Args:
        together: all classes were taught at once, so that none was learnt before another.
    """
    if together:
        return {
            KIND_TEXT["right"]: flow.shares[0],
            KIND_TEXT["background"]: flow.shares[1],
            OTHERS: sum(flow.shares[2:]),
        }
    return {KIND_TEXT[kind]: share for kind, share in zip(KINDS, flow.shares, strict=True)}


def flow_rows(track: Track, found: Sequence[Flow], together: bool = False) -> Rows:
    """Make rows of flows, with the names of the wrong classes that are predicted most."""
    counts, names = track.counts[-1], track.space.names
    return [
        {
            "class": names[flow.train_id],
            **{name: in_percent(share) for name, share in shares_of(flow, together).items()},
            "taken for": taken_for(counts[flow.train_id], flow.train_id, names),
            "test pixels": flow.pixels,
        }
        for flow in found
    ]


def taken_for(row: np.ndarray, truth: int, names: Sequence[str], most: int = 3) -> str:
    """Name the wrong classes that the pixels of one class are taken for, the most frequent first, with their shares.

    Args:
        row: (C,) pixels of the class by predicted class.

    >>> taken_for(np.array([20, 70, 10]), 1, ["road", "car", "tree"])
    'road 20.0 %, tree 10.0 %'
    """
    total = max(int(row.sum()), 1)
    wrong = [c for c in np.argsort(-row, kind="stable").tolist() if c != truth and row[c]]
    return ", ".join(f"{names[c]} {share(row[c] / total)}" for c in wrong[:most])


OTHERS = "other classes"
"""What the last three of `KINDS` are together, where all classes were taught at once."""
KIND_TEXT = {
    "right": "right",
    "background": "background",
    "later": "classes learnt later",
    "same": "classes learnt with it",
    "earlier": "classes learnt before it",
}


def turn_rows(track: Track) -> Rows:
    """`old_turns` as rows."""
    names = track.space.names
    return [
        {
            "class": names[turn.truth],
            "taken for": names[turn.taken_for],
            "now": in_percent(turn.share),
            "when learnt": in_percent(turn.before),
            "rise": in_percent(turn.rise),
            "test pixels": turn.pixels,
        }
        for turn in old_turns(track)
    ]


MOST_CONFUSED = 60
"""Most classes in the confusion matrix of the page. The file of counts has all."""
LEAST_RISE = 0.005
"""Smallest rise of a share that is marked there."""


@dataclass(frozen=True)
class Confusion:
    """The confusion matrix of the page: classes by the step that taught them, the one least often right first."""

    names: list[str]
    groups: list[int]
    """Number of the growth that brought each class."""
    shares: list[list[float]]
    """Rows = truth: percent of the class's true pixels by predicted class."""
    rises: list[list[float | None]]
    """The same as points above the share when the class was learnt; None unless the pair is among those that grew."""
    left_out: int = 0
    """How many classes are not shown."""

    @property
    def grew(self) -> bool:
        """Whether a pair is marked."""
        return any(rise is not None for row in self.rises for rise in row)

    @property
    def size(self) -> str:
        """The size of the cells at first: with numbers where all of them fit."""
        return "middle" if len(self.names) <= 24 else "small"


def confusion(track: Track) -> Confusion | None:
    """Sort the confusion counts after the last step for the page; None with less than two classes.

    Classes that no test pixel shows and no prediction names are left out.
    """
    counts, groups = track.counts[-1], track.group_of
    truth, called = counts.sum(axis=1), counts.sum(axis=0)
    right = {c: float(counts[c, c] / truth[c]) if truth[c] else 1.0 for c in range(len(counts))}
    seen = [c for c in range(len(counts)) if truth[c] or called[c]]
    kept = sorted(seen, key=lambda c: right[c])[:MOST_CONFUSED]
    order = sorted(kept, key=lambda c: (groups[c], right[c]))
    if len(order) < 2:
        return None
    turns = [turn for turn in old_turns(track) if turn.rise >= LEAST_RISE]
    grown = {(turn.truth, turn.taken_for): in_percent(turn.rise) for turn in turns}
    return Confusion(
        [track.space.names[c] for c in order],
        [groups[c] for c in order],
        [
            [in_percent(float(counts[c, other]) / max(int(truth[c]), 1)) or 0.0 for other in order]
            for c in order
        ],
        [[grown.get((c, other)) for other in order] for c in order],
        len(seen) - len(order),
    )


def count_rows(track: Track) -> Rows:
    """Make a row of confusion counts per true class, with a column per predicted class, for the files."""
    names = track.space.names
    return [
        {"true class": name, **{f"called {other}": int(n) for other, n in zip(names, row, strict=True)}}
        for name, row in zip(names, track.counts[-1].tolist(), strict=True)
    ]


def domain_group_rows(tracks: Sequence[Track]) -> Rows:
    """Make rows of forgetting and backward transfer per domain: means over the groups of its classes."""
    return [
        {
            "domain": track.name,
            "first tested after step": track.steps[0],
            "mIoU then": in_percent(track.scores[0]["miou"]["all"]),
            "mIoU now": in_percent(track.scores[-1]["miou"]["all"]),
            "forgetting": in_percent(track.sequence["forgetting"]["mean"]),
            "backward transfer": in_percent(track.sequence["backward_transfer"]["mean"]),
        }
        for track in tracks
    ]


def reporting_rows(found: Mapping[str, float | None]) -> Rows:
    """Make the row of `Results.plop_figures`; the harmonic mean is not part of the rule."""
    return [{name: in_percent(found[name]) for name in ("first", "last", "all", "average")}]


def published_rows(match: Match, results: Results, method: str, drop: float | None) -> Rows:
    """Make rows of one source's numbers, preceded by this run's numbers in the same columns and convention.

    Args:
        drop: mean relative drop of the run as a fraction.
    """
    return [{"method": f"this run ({method})", **match.own(results, drop)}, *match.rows]


def sentence(kind: Kind, tracks: Sequence[Track], *, taught: Mapping[int, str], domains: bool) -> str:
    """State the result of a run in a sentence. Extensions have their own (`extension.sentence`).

    Args:
        kind: of the run.
        taught: step -> the domains or the data set that it trained on.
        domains: whether the run is one over domains.
    """
    last = max(track.steps[-1] for track in tracks)
    overall = percent(defined_mean(t.scores[-1]["miou"]["all"] for t in tracks if t.steps[-1] == last))
    if kind is Kind.SINGLE:
        each = ", ".join(f"{t.name} {percent(t.scores[-1]['miou']['all'])}" for t in tracks)
        return f"Models trained on one domain each reach {each} mIoU."
    if domains:
        return _domain_sentence(tracks, kind is Kind.JOINT, taught, last)
    track = tracks[0]
    names = [track.space.names[c] for c in range(track.space.num_classes) if c != track.background]
    if kind is Kind.JOINT:
        return f"Taught all {len(names)} classes at once, the model reaches {overall} mIoU."
    if kind is Kind.FIRST:
        return f"The model learnt {some(names, 6)}; it reaches {overall} mIoU."
    if len(track.steps) == 1:
        return f"After its first step the model reaches {overall} mIoU on {some(names, 6)}."
    now = track.scores[-1]["miou"]
    if track.spaces[-1].groups == track.spaces[-2].groups:
        return (
            f"Step {last} added no class: all classes together went from "
            f"{percent(track.scores[-2]['miou']['all'])} to {overall} mIoU."
        )
    before = percent(track.scores[-2]["miou"]["all"])
    return (
        f"Step {last} added {some(track.group_names(len(track.space.groups) - 1), 6)}: the old classes went from "
        f"{before} to {percent(now['old'])} mIoU, the new ones reach {percent(now['new'])}, all together {overall}."
    )


def _domain_sentence(tracks: Sequence[Track], joint: bool, taught: Mapping[int, str], last: int) -> str:
    now = {t.name: t.scores[-1]["miou"]["all"] for t in tracks if t.steps[-1] == last}
    each = ", ".join(f"{name} {percent(value)}" for name, value in now.items())
    if joint or last == 0:
        return f"Trained on {taught.get(last, 'all domains')}, the model reaches {each} mIoU."
    older = [t for t in tracks if len(t.steps) > 1 and t.name in now]
    fell = "; ".join(
        f"{t.name} went from {percent(t.scores[-2]['miou']['all'])} to {percent(now[t.name])}" for t in older
    )
    fresh = ", ".join(f"{n} reaches {percent(v)}" for n, v in now.items() if n not in {t.name for t in older})
    return (
        f"Step {last} trained on {taught.get(last, '')}: " + "; ".join(filter(None, [fell, fresh])) + " mIoU."
    )


def data_rows(results: Results) -> Rows:
    """Make rows of what scenario.json records about the images of every step."""
    finished = set(results.finished)
    return [
        {
            "step": step["index"],
            "trained on": results.taught[step["index"]],
            "training images": sum(s["images"] for s in step["train"]),
            "validation images": sum(s["images"] for s in step.get("val", [])),
            "test images": sum(s["images"] for s in step["test"]),
            "state": "done" if step["index"] in finished else "not finished",
        }
        for step in results.planned
    ]


KINDS = ("right", "background", "later", "same", "earlier")
"""right · called background · called a class learnt later · called one of the same step · called an earlier one."""


@dataclass(frozen=True)
class Flow:
    """What the true pixels of one class are predicted as."""

    train_id: int
    pixels: int
    shares: tuple[float, float, float, float, float]
    """Of KINDS; they sum to 1."""


@dataclass(frozen=True)
class Turn:
    """Pixels of one class that are predicted as another."""

    truth: int
    taken_for: int
    pixels: int
    share: float
    """Of the class's true pixels, after the last step."""
    before: float | None
    """The same when the class was learnt; None if the other class (or a true pixel) was not there yet."""

    @property
    def rise(self) -> float:
        return self.share - (self.before or 0.0)


def image_rows(images: np.ndarray | None) -> Rows:
    """Make a row per score of single images: mean, median and lowest over the images, in percent.

    Args:
        images: (N, 3, C), as `metrics.image_statistics` takes them; None gives no rows.
    """
    if images is None or len(images) < 2:
        return []
    found = image_statistics(images)
    return [
        {"score": name, **{key: in_percent(found[score][key]) for key in ("mean", "median", "lowest")}}
        for name, score in (("IoU", "iou"), ("Dice", "dice"))
    ]


def class_image_rows(images: np.ndarray | None, track: Track) -> Rows:
    """Make a row per class: its scores over the images that show it, and in how many others it is found."""
    if images is None or len(images) < 2:
        return []
    found = image_statistics(images)
    return [
        {
            "class": name,
            "images that show it": found["class_images"][c],
            **{f"IoU: {key}": in_percent(found["class_iou"][key][c]) for key in ("mean", "median", "lowest")},
            "Dice: mean": in_percent(found["class_dice"]["mean"][c]),
            "other images where it is found": found["class_false_alarms"][c],
        }
        for c, name in enumerate(track.space.names)
    ]


def flows(counts: np.ndarray, group_of: Sequence[int], background: int | None) -> list[Flow]:
    """Compute the share of each class's true pixels per kind of prediction, for classes that have true pixels.

    Args:
        counts: (C, C), rows = truth.
        group_of: train id -> number of the growth that brought it.
        background: its train id, or None.

    >>> flows(np.array([[3, 1], [2, 2]]), [0, 1], background=0)[1].shares
    (0.5, 0.5, 0.0, 0.0, 0.0)
    """
    table = checked_counts(counts)
    born = np.asarray(group_of)
    result = []
    for c, row in enumerate(table):
        total = int(row.sum())
        if not total:
            continue
        kinds = [0, 0, 0, 0, 0]
        for other, number in enumerate(row.tolist()):
            if other == c:
                kinds[0] += number
            elif other == background:
                kinds[1] += number
            elif born[other] > born[c]:
                kinds[2] += number
            elif born[other] == born[c]:
                kinds[3] += number
            else:
                kinds[4] += number
        right, called_background, later, same, earlier = (number / total for number in kinds)
        result.append(Flow(c, total, (right, called_background, later, same, earlier)))
    return result


def turns(last: np.ndarray, first: Sequence[np.ndarray], *, most: int = 10) -> list[Turn]:
    """Find the pairs of classes whose confusion grew most since the class was learnt.

    Args:
        last: (C, C) counts after the last step.
        first: for each requested class, by train id from 0, the counts after the step that taught it.
        most: maximum number of pairs. The largest rise comes first; pairs without a rise are left out.
    """
    table = checked_counts(last)
    found = []
    for c, born in enumerate(first):
        total, before_total = int(table[c].sum()), int(born[c].sum())
        if not total:
            continue
        for other in np.flatnonzero(table[c]).tolist():
            if other == c:
                continue
            known = other < len(born) and before_total
            before = float(born[c, other] / before_total) if known else None
            found.append(Turn(c, other, int(table[c, other]), float(table[c, other] / total), before))
    grown = [turn for turn in found if turn.rise > 0]
    return sorted(grown, key=lambda turn: (-turn.rise, turn.truth, turn.taken_for))[:most]
