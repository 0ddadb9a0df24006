"""The bootstrap over images: how much scores would vary on other test images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from everseg.metrics.continual import class_spans, named_groups
from everseg.metrics.scores import EPS, Counts

RESAMPLES = 1000
"""Number of draws. Each takes as many images as there are, with replacement. Runs on the same images share them."""
LEVEL = 0.95
"""Share of the draws that an interval holds."""


def interval(draws: Iterable[np.ndarray]) -> list[float] | None:
    """Interval [low, high] with `LEVEL` of the draws of the mean over runs; None if draws are missing or undefined."""
    rows = list(draws)
    if not rows:
        return None
    mean = np.mean(rows, axis=0)
    if not np.isfinite(mean).all():
        return None
    rest = 50 * (1 - LEVEL)
    return [float(value) for value in np.percentile(mean, [rest, 100 - rest])]


def resampled_sums(images: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sum the counts of images drawn with replacement, as many as there are.

    Args:
        images: (N, 3, C) integers: per image and class the pixels that are truly of the class, those predicted as it,
            and those that are both.
        resamples: number of draws.
        seed: the draws depend on the seed and on N only, so two runs on the same images get the same draws.

    Returns:
        (resamples, 3, C) float64, exact integers.
    """
    # RandomState's stream is frozen by NumPy's policy; that of newer generators may change between versions.
    rng, number = np.random.RandomState(seed), len(images)
    # A draw with replacement is how often each image occurs, so all resamples are one matrix product
    # of these counts, (resamples, N), with the images' counts.
    times = np.stack(
        [np.bincount(rng.randint(0, number, number), minlength=number) for _ in range(resamples)]
    )
    # float64 products run in BLAS and are exact: pixel counts stay far below 2**53.
    flat = times.astype(np.float64) @ images.reshape(number, -1).astype(np.float64)
    return flat.reshape(resamples, *images.shape[1:])


def group_miou(
    sums: np.ndarray, group_sizes: Sequence[int], background: int | None
) -> dict[str, dict[str, np.ndarray]]:
    """Mean IoUs of many counts at once, as `step_scores` defines them.

    Args:
        sums: (R, 3, C), as `resampled_sums` gives them.
        group_sizes: number of classes added by each growth; they sum to C.
        background: train id of the background, or None.

    Returns:
        `miou` and `miou_without_background`, each with `old`, `new` and `all`, and with more than two groups also with
        `base` (the first group) and `later` (all others): (R,) in [0, 1]. Classes
        without a true pixel are left out of a mean. The mean is NaN where no class is left, so also for `old` of a
        single group; `step_scores` gives None there.

    Raises:
        ValueError: sizes that are not positive or do not sum to C, or a background out of range.

    >>> one = np.array([[[4, 4], [5, 3], [3, 2]]])
    >>> group_miou(one, (1, 1), None)["miou"]["all"].round(3).tolist()
    [0.45]
    """
    truth, predicted, both = sums[:, 0], sums[:, 1], sums[:, 2]  # (R, C) each
    iou = np.where(truth > 0, both / (truth + predicted - both + EPS), np.nan)
    spans = class_spans(sums.shape[-1], group_sizes, background)
    names = ("old", "new", "all", *(("base", "later") if len(spans) > 2 else ()))
    groups = {name: named_groups(spans)[name] for name in names}
    return {
        key: {
            name: defined_means(iou[:, [c for c in span if c != left_out]]) for name, span in groups.items()
        }
        for key, left_out in (("miou", None), ("miou_without_background", background))
    }


def defined_means(values: np.ndarray) -> np.ndarray:
    """Average each row's values that are not NaN, (R, N) -> (R,); NaN for a row without any.

    >>> defined_means(np.array([[0.5, np.nan], [np.nan, np.nan]])).tolist()
    [0.5, nan]
    """
    known = (~np.isnan(values)).sum(1)
    return np.divide(np.nansum(values, axis=1), known, out=np.full(len(values), np.nan), where=known > 0)


def sums_of(counts: Counts) -> np.ndarray:
    """Sum a confusion matrix (C, C), rows = truth, to true, predicted and both pixels per class, (3, C)."""
    n = np.asarray(counts)
    return np.stack([n.sum(1), n.sum(0), np.diag(n)])
