"""Scores of one step and of a sequence of steps, by the groups in which classes were learnt.

Results are ready for JSON: floats in [0, 1] (differences in [-1, 1]) or None where undefined.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from everseg.metrics.scores import (
    Counts,
    checked_counts,
    class_accuracy,
    dice,
    frequency_weighted_iou,
    iou,
    iou_of_sums,
    mean_accuracy,
    mean_iou,
    overall_accuracy,
)


def step_scores(counts: Counts, group_sizes: Sequence[int], background: int | None) -> dict[str, Any]:
    """Score the model after one step.

    Args:
        counts: (C, C) int64, rows = truth, classes in output order.
        group_sizes: number of classes added by each growth, in order; they sum to C. VOC 15-5: (16, 5).
        background: train id of the background; None if the label space has none.

    Returns:
        * `miou`: means of the class IoUs over `all` classes, `base` (first group), `old` (all groups but the last;
          None after the first step) and `new` (last group). The background belongs to its own group: base and old.
        * `miou_without_background`: the same means with the background left out of them; its pixels still count
          for the other classes. Equal to `miou` if `background` is None.
        * `dice`, `dice_without_background`: the same two for the Dice coefficient of each class.
        * `overall_accuracy`, `mean_accuracy`, `frequency_weighted_iou`: over all classes with background.
        * `harmonic_mean`: 2 * old * new / (old + new) of `miou` (background counted); 0 if both are 0.
        * `class_iou`, `class_dice`, `class_accuracy`: per class, None for classes without a true pixel.

        Means leave out classes without a true pixel. IoU and accuracy carry MiB's eps of 1e-6, Dice none.

    Raises:
        ValueError: wrong counts, sizes that are not positive or do not sum to C, or a background out of range.

    Source: the convention with background is the one of PLOP and later papers, without it that of the MiB paper.

    >>> import numpy as np
    >>> scores = step_scores(np.diag([8, 2, 2]), (2, 1), background=0)
    >>> round(scores["miou"]["old"], 4), round(scores["harmonic_mean"], 4)
    (1.0, 1.0)
    """
    n = checked_counts(counts)
    spans = class_spans(len(n), group_sizes, background)
    means = _group_means(n, spans, None)
    dices = dice(n)
    return {
        "miou": means,
        "miou_without_background": _group_means(n, spans, background),
        "dice": _means_of(dices, spans, None),
        "dice_without_background": _means_of(dices, spans, background),
        "overall_accuracy": _defined(overall_accuracy(n)),
        "mean_accuracy": _defined(mean_accuracy(n)),
        "frequency_weighted_iou": _defined(frequency_weighted_iou(n)),
        "harmonic_mean": _harmonic_mean(means["old"], means["new"]),
        "class_iou": [_defined(value) for value in iou(n)],
        "class_dice": [_defined(value) for value in dices],
        "class_accuracy": [_defined(value) for value in class_accuracy(n)],
    }


def boundary_scores(
    sums: np.ndarray, group_sizes: Sequence[int], background: int | None
) -> dict[str, dict[str, float | None] | list[float | None]]:
    """Score the outlines of the classes, from the counts that `boundary_sums` gives, summed over the images.

    Args:
        sums: (3, C) integers: pixels of each class in the true boundary region, in the predicted one, and in both.
        group_sizes: as in `step_scores`.
        background: as in `step_scores`.

    Returns:
        `boundary_iou` and `boundary_iou_without_background`: means over `all`, `base`, `old` and `new` classes as in
        `step_scores`. `class_boundary_iou`: per class. A class without a pixel in the true region is None and enters no
        mean. Nothing is added to denominators.

    Raises:
        ValueError: sizes that are not positive or do not sum to C, or a background out of range.

    >>> boundary_scores(np.array([[4, 4], [5, 3], [4, 3]]), (2,), None)["class_boundary_iou"]
    [0.8, 0.75]
    """
    spans, each = class_spans(sums.shape[-1], group_sizes, background), iou_of_sums(sums, eps=0.0)
    return {
        "boundary_iou": _means_of(each, spans, None),
        "boundary_iou_without_background": _means_of(each, spans, background),
        "class_boundary_iou": [_defined(value) for value in each],
    }


def sequence_scores(
    step_counts: Sequence[Counts], group_sizes_per_step: Sequence[Sequence[int]], background: int | None
) -> dict[str, Any]:
    """Score a whole sequence: what was learnt, what was forgotten.

    Args:
        step_counts: the counts after each step, each on its own test set, classes in output order.
        group_sizes_per_step: for each step the sizes of all groups known by then; each continues the one before.
            VOC 15-5: [(16,), (16, 5)].
        background: train id of the background; None if there is none.

    Returns:
        With `R[i][j]` = mIoU over group j after step i, T the last step, b(j) the first step that knows group j, and
        j over the groups with b(j) < T:

        * `average_miou`: mean over steps of the mIoU over all classes known then (papers' "avg").
        * `step_matrix`: R, one row per step, one column per group; None for groups not born yet.
        * `forgetting`: `groups`: max over b(j) <= i < T of `R[i][j] - R[T][j]`; `mean` of those; `classes`: the same
          of each class's IoU. Negative = improved. None for groups and classes born in the last step.
        * `backward_transfer`: `groups`: `R[T][j] - R[b(j)][j]`, and their `mean`. Negative = forgotten.

        and `average_miou_without_background`, `step_matrix_without_background`, ... with the background left out of
        every mean. What is undefined (no true pixel) is None and left out of means.

    Raises:
        ValueError: no step, different numbers of counts and of sizes, groups that do not continue the former ones, or
            whatever `step_scores` raises.

    Source: forgetting: Chaudhry et al., ECCV 2018, eq. 3, per group of classes instead of per task and with IoU for
    accuracy; backward transfer: Lopez-Paz and Ranzato, NeurIPS 2017; average: Douillard et al. (PLOP), CVPR 2021.

    >>> import numpy as np
    >>> first, second = np.diag([5, 5]), np.array([[5, 0, 0], [0, 0, 5], [0, 0, 5]])
    >>> result = sequence_scores([first, second], [(2,), (2, 1)], background=0)
    >>> round(result["forgetting"]["mean"], 4), round(result["forgetting_without_background"]["mean"], 4)
    (0.5, 1.0)
    """
    sizes = [tuple(s) for s in group_sizes_per_step]
    if not sizes or len(sizes) != len(step_counts):
        raise ValueError(
            f"sequence_scores: expected counts and group sizes of at least one step, got {len(step_counts)} counts "
            f"and {len(sizes)} lists of sizes"
        )
    for before, after in itertools.pairwise(sizes):
        if after[: len(before)] != before:
            raise ValueError(f"sequence_scores: the groups {after} do not continue {before}")
    matrices = [checked_counts(counts) for counts in step_counts]
    spans = [class_spans(len(n), s, background) for n, s in zip(matrices, sizes, strict=True)]
    class_rows = [[_defined(value) for value in iou(n)] for n in matrices]
    classes = _forgetting(class_rows)
    result: dict[str, Any] = {}
    # Once with the background and once without it: papers of the field use both conventions.
    for suffix, left_out in (("", None), ("_without_background", background)):
        # rows[i][j]: mIoU over group j after step i. Later groups are not born yet, so rows grow longer.
        rows = [
            [_mean_iou(n, span, left_out) for span in step] for n, step in zip(matrices, spans, strict=True)
        ]
        forgetting, transfer = _forgetting(rows), _backward_transfer(rows)
        counted = [None if c == left_out else value for c, value in enumerate(classes)]
        width = len(rows[-1])
        result |= {
            f"average_miou{suffix}": defined_mean(_mean_iou(n, range(len(n)), left_out) for n in matrices),
            f"step_matrix{suffix}": [row + [None] * (width - len(row)) for row in rows],
            f"forgetting{suffix}": {
                "mean": defined_mean(forgetting),
                "groups": forgetting,
                "classes": counted,
            },
            f"backward_transfer{suffix}": {"mean": defined_mean(transfer), "groups": transfer},
        }
    return result


def first_last_scores(
    step_counts: Sequence[Counts],
    group_sizes: Sequence[int],
    background: int | None = None,
    *,
    absent: Literal["skip", "zero"] = "zero",
) -> dict[str, float | None]:
    """Score a sequence by the reporting rule of PLOP's code, which RCIL, EWF, REMINDER, NeST and UCD share.

    It differs from `step_scores` in two ways. "First" and "last" are parted after the first step, not before the last
    one. And a class without a true pixel counts 0 instead of being left out.

    Args:
        step_counts: (C, C) counts after each step, rows = truth; at least one.
        group_sizes: number of classes added by each growth, after the last step. VOC 15-1: (16, 1, 1, 1, 1, 1).
        background: train id of a background that the means leave out; None = it counts, as the rule says.
        absent: how a class without a true pixel counts; "zero" is the rule.

    Returns:
        After the last step `first` (mean over the classes of the first step, background among them), `last` (mean over
        all later ones, None if there are none), `all`, and `harmonic_mean` of first and last (None without last);
        `average`: mean over the steps of the mean over all classes known then, None for a single step.

    Raises:
        ValueError: no counts, wrong counts, or sizes that do not fit the last ones.

    Source: Douillard et al. (PLOP), CVPR 2021, as its code reports; the harmonic mean is DKD's hIoU.

    >>> import numpy as np
    >>> found = first_last_scores([np.diag([5, 5]), np.diag([5, 5, 0])], (2, 1))
    >>> round(found["first"], 4), found["last"], round(found["all"], 4), round(found["average"], 4)
    (1.0, 0.0, 0.6667, 0.8333)
    """
    if not step_counts:
        raise ValueError("first_last_scores: expected the counts of at least one step")
    first = class_spans(len(step_counts[-1]), group_sizes, background)[0].stop

    def mean(n: Counts, start: int = 0, stop: int | None = None) -> float | None:
        chosen = [c for c in range(start, len(n) if stop is None else stop) if c != background]
        return _defined(mean_iou(n, chosen, absent)) if chosen else None

    last = step_counts[-1]
    parts = {"first": mean(last, 0, first), "last": mean(last, first)}
    return {
        **parts,
        "all": mean(last),
        "harmonic_mean": _harmonic_mean(parts["first"], parts["last"]),
        "average": defined_mean(mean(n) for n in step_counts) if len(step_counts) > 1 else None,
    }


def relative_drop(values: Mapping[str, float], baselines: Mapping[str, float]) -> dict[str, Any]:
    """Change of each domain's score relative to a model trained on that domain alone (Delta-m).

    Args:
        values: domain -> score m, usually the mIoU; at least one.
        baselines: domain -> score b of the single-task model, above 0, in the unit of `values`; further domains are
            not used.

    Returns:
        `domains`: domain -> (m - b) / b as a fraction, negative = dropped; `mean` of those over the domains of
        `values`.

    Raises:
        ValueError: no domain, or domains without a baseline or with one that is not above 0.

    Source: Garg et al. (MDIL), WACV 2022, who print it in percent, in places without the sign.

    >>> relative_drop({"day": 0.75, "dusk": 0.5}, {"day": 1.0, "dusk": 0.5})
    {'mean': -0.125, 'domains': {'day': -0.25, 'dusk': 0.0}}
    """
    if not values:
        raise ValueError("relative_drop: expected the score of at least one domain")
    missing = [name for name in values if name not in baselines]
    useless = [name for name in values if name in baselines and not baselines[name] > 0]
    problems = [f"no baseline for {', '.join(missing)}"] if missing else []
    problems += [f"the baseline of {name} must be above 0, got {baselines[name]}" for name in useless]
    if problems:
        raise ValueError(f"relative_drop: {'; '.join(problems)}")
    domains = {name: (value - baselines[name]) / baselines[name] for name, value in values.items()}
    return {"mean": sum(domains.values()) / len(domains), "domains": domains}


def class_spans(num_classes: int, group_sizes: Sequence[int], background: int | None) -> list[range]:
    """Train ids of each group.

    Raises:
        ValueError: sizes that are not positive or do not sum to `num_classes`, or a background out of range.
    """
    if not group_sizes or min(group_sizes) < 1 or sum(group_sizes) != num_classes:
        raise ValueError(
            f"group_sizes: expected positive sizes that sum to {num_classes} classes, got {tuple(group_sizes)}"
        )
    if background is not None and not 0 <= background < num_classes:
        raise ValueError(f"background: expected a train id in 0..{num_classes - 1} or None, got {background}")
    # Outputs stand in the order in which they were learnt, so a group is a run of train ids.
    ends = [sum(group_sizes[: i + 1]) for i in range(len(group_sizes))]
    return [range(end - size, end) for end, size in zip(ends, group_sizes, strict=True)]


def named_groups(spans: Sequence[range]) -> dict[str, range]:
    """Train ids of the groups that scores are given of, after the last step; empty where there are none.

    >>> found = named_groups([range(0, 3), range(3, 4), range(4, 6)])
    >>> [(name, list(ids)) for name, ids in found.items() if name != "all"]
    [('base', [0, 1, 2]), ('later', [3, 4, 5]), ('old', [0, 1, 2, 3]), ('new', [4, 5])]
    """
    end = spans[-1].stop
    return {
        "base": spans[0],
        "later": range(spans[0].stop, end),
        "old": range(spans[-1].start),
        "new": spans[-1],
        "all": range(end),
    }


def _group_means(n: Counts, spans: list[range], left_out: int | None) -> dict[str, float | None]:
    return _means_of(iou(n), spans, left_out)


def _means_of(each: np.ndarray, spans: list[range], left_out: int | None) -> dict[str, float | None]:
    """Average the values of classes over the groups; classes without a value (NaN) are left out."""
    # After the first step there is one group: it is base and new, and nothing is old.
    groups = named_groups(spans)

    def mean(classes: range) -> float | None:
        known = [each[c] for c in classes if c != left_out and not math.isnan(each[c])]
        return float(np.mean(known)) if known else None

    return {name: mean(groups[name]) for name in ("all", "base", "old", "new")}


def _mean_iou(n: Counts, classes: range, left_out: int | None) -> float | None:
    return _defined(mean_iou(n, [c for c in classes if c != left_out]))


def _harmonic_mean(old: float | None, new: float | None) -> float | None:
    if old is None or new is None:
        return None
    return 2 * old * new / (old + new) if old + new else 0.0


def _forgetting(rows: list[list[float | None]]) -> list[float | None]:
    """Best value before the last row, minus the last; None for columns that only the last row has."""
    out: list[float | None] = []
    for column, final in enumerate(rows[-1]):
        earlier = [row[column] for row in rows[:-1] if column < len(row)]
        known = [value for value in earlier if value is not None]
        out.append(max(known) - final if known and final is not None else None)
    return out


def _backward_transfer(rows: list[list[float | None]]) -> list[float | None]:
    """Last value minus the one at birth; None for columns that only the last row has."""
    out: list[float | None] = []
    for column, final in enumerate(rows[-1]):
        born = next(row[column] for row in rows if column < len(row))  # the first step that knows the group
        late = all(column >= len(row) for row in rows[:-1])
        out.append(None if late or born is None or final is None else final - born)
    return out


def defined_mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None; None where there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
