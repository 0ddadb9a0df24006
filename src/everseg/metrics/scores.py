"""Scores of confusion counts: IoU, accuracies, means over classes.

Everywhere `counts` is (C, C), integer, rows = truth. A class without a true pixel is *absent*: its own scores are
undefined (NaN) and, as in MiB's code, it does not enter a mean; its false positives still count against others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from torch import Tensor

Counts = Tensor | np.ndarray
EPS = 1e-6
"""Added to denominators by MiB's code: a class of n pixels found perfectly has IoU 1 - 1e-6/n."""
_IOU_EVAL_EPS = 1e-15


def checked_counts(counts: Counts) -> np.ndarray:
    """Give the counts as an int64 array.

    Raises:
        ValueError: not a square integer matrix of values >= 0.
    """
    array = counts.detach().cpu().numpy() if isinstance(counts, Tensor) else np.asarray(counts)
    square = array.ndim == 2 and array.shape[0] == array.shape[1] and array.size > 0
    if not square or not np.issubdtype(array.dtype, np.integer) or array.min() < 0:
        raise ValueError(
            f"counts: expected a square matrix of integers >= 0, got {array.dtype} of shape {array.shape}"
        )
    return array.astype(np.int64)


def iou(counts: Counts, eps: float = EPS) -> np.ndarray:
    """Intersection over union of each class: n_cc / (row_c + column_c - n_cc + eps).

    Args:
        counts: (C, C), rows = truth.
        eps: added to the denominator; by default the authors' 1e-6.

    Returns:
        (C,) float64 in [0, 1]; NaN for classes without a true pixel.

    Raises:
        ValueError: not a square matrix of integers >= 0.

    Source: MiB's code.

    >>> iou(np.array([[3, 1], [0, 4]]), eps=0.0).tolist()
    [0.75, 0.8]
    """
    n = checked_counts(counts)
    return iou_of_sums(np.stack([n.sum(1), n.sum(0), np.diag(n)]), eps)


def iou_of_sums(sums: np.ndarray, eps: float = EPS) -> np.ndarray:
    """Intersection over union of each class as `iou` gives it, from the sums of a confusion matrix.

    Args:
        sums: (3, C) integer pixels per class: true, predicted, and both (`sums_of`).

    >>> iou_of_sums(np.array([[4, 4], [3, 5], [3, 4]]), eps=0.0).tolist()
    [0.75, 0.8]
    """
    truth, predicted, hit = sums.astype(np.int64)
    return _ratio(hit, truth + predicted - hit, truth, eps)


def dice(counts: Counts) -> np.ndarray:
    """Dice coefficient (F1 score) of each class: 2 n_cc / (row_c + column_c).

    Counts of all images are summed first, so each pixel weighs alike (`image_statistics` weighs each image alike).
    Dice = 2 IoU / (1 + IoU): it is never below IoU, and both put classes in the same order.

    Args:
        counts: (C, C), rows = truth. Ignored pixels are not in it.

    Returns:
        (C,) float64 in [0, 1]; NaN for classes without a true pixel, also if they are predicted. Nothing is added to
        the denominator, so a class that is found perfectly has exactly 1.

    Raises:
        ValueError: not a square matrix of integers >= 0.

    Source: Dice, "Measures of the amount of ecologic association between species", Ecology 1945.

    >>> dice(np.array([[3, 1], [1, 5]])).round(4).tolist()
    [0.75, 0.8333]
    """
    n = checked_counts(counts)
    truth, predicted = n.sum(1), n.sum(0)
    return _ratio(2 * np.diag(n), truth + predicted, truth, 0.0)


def class_accuracy(counts: Counts, eps: float = EPS) -> np.ndarray:
    """Share of each class's true pixels that were found: n_cc / (row_c + eps).

    Args, Returns and Raises as `iou`. Source: MiB's code.

    >>> class_accuracy(np.array([[3, 1], [0, 4]]), eps=0.0).tolist()
    [0.75, 1.0]
    """
    n = checked_counts(counts)
    truth = n.sum(1)
    return _ratio(np.diag(n), truth, truth, eps)


def overall_accuracy(counts: Counts) -> float:
    """Share of all counted pixels that were right: trace / sum; NaN without any pixel.

    >>> overall_accuracy(np.array([[3, 1], [0, 4]]))
    0.875
    """
    n = checked_counts(counts)
    return float(np.trace(n) / n.sum()) if n.sum() else float("nan")


def mean_accuracy(counts: Counts, classes: Iterable[int] | None = None, *, eps: float = EPS) -> float:
    """Mean of `class_accuracy` over the classes that have true pixels; NaN if none has.

    Args:
        counts: (C, C), rows = truth.
        classes: train ids to average; None = all.
        eps: as in `class_accuracy`.

    >>> mean_accuracy(np.array([[3, 1], [0, 4]]), eps=0.0)
    0.875
    """
    return _mean(_chosen(class_accuracy(counts, eps), classes))


def frequency_weighted_iou(counts: Counts, *, eps: float = EPS) -> float:
    """Sum over classes of (share of all true pixels) * IoU; NaN without any pixel.

    Source: MiB's code.

    >>> frequency_weighted_iou(np.array([[3, 1], [0, 4]]), eps=0.0)
    0.775
    """
    n = checked_counts(counts)
    truth, each = n.sum(1), iou(n, eps)
    return float((truth[truth > 0] * each[truth > 0]).sum() / n.sum()) if n.sum() else float("nan")


def false_share(sums: np.ndarray) -> np.ndarray:
    """False-positive share of each class: of the pixels that are another class, the part that is called this one.

    Args:
        sums: (3, C) integer pixels per class: true, predicted, and both (`sums_of`).

    Returns:
        (C,) float64 in [0, 1]; NaN for a class that every pixel belongs to.

    >>> false_share(np.array([[4, 4], [3, 5], [3, 4]])).tolist()
    [0.0, 0.25]
    """
    truth, predicted, both = sums.astype(np.int64)
    others = truth.sum() - truth
    return _ratio(predicted - both, others, others, 0.0)


def mean_iou(
    counts: Counts,
    classes: Iterable[int] | None = None,
    absent: Literal["skip", "zero"] = "skip",
    *,
    eps: float = EPS,
) -> float:
    """Mean IoU over classes.

    Args:
        counts: (C, C), rows = truth.
        classes: train ids to average; None = all.
        absent: classes without a true pixel are left out ("skip", MiB) or count 0 ("zero", MDIL's iouEval).
        eps: as in `iou`.

    Returns:
        In [0, 1]; NaN if no class is left.

    Raises:
        ValueError: wrong counts, a class out of range, or an unknown `absent`.

    >>> mean_iou(np.array([[2, 2, 0], [0, 4, 0], [0, 0, 0]]), eps=0.0)
    0.5833333333333333
    """
    if absent not in ("skip", "zero"):
        raise ValueError(f"absent: expected 'skip' or 'zero', got {absent!r}")
    each = _chosen(iou(counts, eps), classes)
    return _mean(np.nan_to_num(each) if absent == "zero" else each)


def iou_eval(counts: Counts, ignore_index: int) -> dict[str, Any]:
    """IoU as MDIL's `iouEval` counts it, with a void class.

    Pixels whose truth is void are removed; a true pixel predicted as void is missed (false negative) but no false
    positive of a scored class. IoU = tp / (tp + fp + fn + 1e-15); absent classes count 0 in the mean.

    Args:
        counts: (C, C), rows = truth, the void class included.
        ignore_index: train id of void; outside [0, C) nothing is ignored.

    Returns:
        `tp`, `fp`, `fn` (int64) and `iou` (float64) of the classes other than void, in order, and their `miou`.

    Raises:
        ValueError: not a square matrix of integers >= 0, or void is the only class.

    Source: MDIL-SS (Garg et al., WACV 2022), which took it from ERFNet.

    >>> iou_eval(np.array([[3, 1, 0], [0, 4, 0], [5, 5, 0]]), ignore_index=2)["iou"].round(4).tolist()
    [0.75, 0.8]
    """
    n = checked_counts(counts)
    scored = np.array([c for c in range(len(n)) if c != ignore_index], dtype=np.int64)
    if not len(scored):
        raise ValueError("iou_eval: void is the only class")
    # False positives count rows of scored classes only (void truth is removed); false negatives count all columns, so
    # a true pixel predicted as void is missed.
    tp = np.diag(n)[scored]
    fp = n[np.ix_(scored, scored)].sum(0) - tp
    fn = n[scored].sum(1) - tp
    each = tp / (tp + fp + fn + _IOU_EVAL_EPS)
    return {"tp": tp, "fp": fp, "fn": fn, "iou": each, "miou": float(each.mean())}


def _ratio(part: np.ndarray, whole: np.ndarray, truth: np.ndarray, eps: float) -> np.ndarray:
    # NaN marks absent classes. Only the present ones are divided, so no 0 / 0 warning arises.
    out = np.full(len(part), np.nan)
    present = truth > 0
    out[present] = part[present] / (whole[present] + eps)
    return out


def _chosen(values: np.ndarray, classes: Iterable[int] | None) -> np.ndarray:
    if classes is None:
        return values
    index = np.array(list(classes), dtype=np.int64)
    wrong = index[(index < 0) | (index >= len(values))]
    if len(wrong):
        raise ValueError(f"classes: {wrong.tolist()} out of range; expected 0..{len(values) - 1}")
    return values[index]


def _mean(values: np.ndarray) -> float:
    """Mean of the defined values; NaN if there is none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")
