"""Thresholds per class for pseudo-labels, from histograms of the teacher's certainty."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from everseg.losses.pseudo import EntropyNorm, Measure, checked_pair, entropy_of, over_bands

Median = Literal["official", "exact"]
"""How a class's median is read from its histogram: see `histogram_thresholds`."""
BINS: dict[Measure, int] = {"entropy": 100, "probability": 20}
"""Bins of PLOP's histograms."""


@torch.no_grad()
def certainty_histogram(
    teacher_logits: Tensor,
    label: Tensor,
    *,
    num_classes: int,
    measure: Measure = "entropy",
    bins: int | None = None,
    norm: EntropyNorm = "code",
    band: int | None = None,
    align_corners: bool = False,
) -> Tensor:
    """Count the background pixels of a batch by the teacher's class and its certainty about it.

    Histograms of several batches, or of several processes, are added.

    Args:
        teacher_logits: (B, K, h, w), any resolution and floating type.
        label: (B, H, W) integers; only pixels with label 0 are counted.
        num_classes: C >= K, the classes known now: rows of the result.
        measure: "entropy" (see `uncertainty`) or "probability", the largest one.
        bins: equal bins on [0, 1]; None = 100 for the entropy and 20 for the probability, as in PLOP's code.
        norm: scale of the entropy.
        band: rows per band; None chooses.
        align_corners: of the bilinear resizing.

    Returns:
        (C, bins) int64; values outside [0, 1] count in the first or last bin. Rows of new classes are 0.

    Raises:
        ValueError: shapes that do not fit, no bin, or C below 2 or K.

    Source: Douillard et al. (PLOP), CVPR 2021: code.

    >>> logits = torch.tensor([[[[9.0, 0.1]], [[0.0, 0.0]]]])
    >>> certainty_histogram(logits, torch.zeros(1, 1, 2).long(), num_classes=2, measure="probability", bins=2).tolist()
    [[0, 2], [0, 0]]
    """
    teacher_logits = checked_pair("certainty_histogram", teacher_logits, label, num_classes)
    bins = BINS[measure] if bins is None else bins
    if bins < 1:
        raise ValueError(f"certainty_histogram: expected at least one bin, got {bins}")
    # Which cell of the histogram each pixel falls in; the last number stands for pixels that do not count. Counting
    # comes after the bands, so that threads need no lock.
    cells = torch.full(label.shape, num_classes * bins, dtype=torch.int64, device=teacher_logits.device)

    def work(number: int, here: slice, logits: Tensor) -> None:
        probabilities = torch.softmax(logits, dim=0)
        largest, best = probabilities.max(dim=0)
        value = entropy_of(probabilities, num_classes, norm) if measure == "entropy" else largest
        place = best * bins + (value * bins).floor().long().clamp(0, bins - 1)
        cells[number, here] = torch.where(label[number, here] == 0, place, cells[number, here])

    over_bands(teacher_logits, label.shape[1:], work, band=band, align_corners=align_corners)
    counts = torch.bincount(cells.flatten(), minlength=num_classes * bins + 1)
    return counts[:-1].view(num_classes, bins)


def histogram_thresholds(
    histogram: Tensor,
    base: float,
    *,
    measure: Measure = "entropy",
    median: Median = "official",
    finite: bool = False,
) -> Tensor:
    """A threshold of each class: the median in its histogram, limited by a base.

    Args:
        histogram: (C, bins) counts, over [0, 1].
        base: the threshold is at least the base for the entropy, and at most the base for the probability.
        measure: what was counted.
        median: "exact" interpolates the median in its bin. "official" is the loop of PLOP's code: it adds the number
            of the bin, where the pixels counted so far belong, and its numbers of bins are cut off floating-point
            products (28 for bin 29 of 100). Where all pixels of a class lie in the first bin both agree.
        finite: replace nan and inf, which the official loop gives where it stops at an empty bin, by the base.

    Returns:
        (C,) float64. A class without pixels has the median 0, so the base for the entropy and 0 for the probability.

    Raises:
        ValueError: not (C, bins), or an unknown measure or form of the median.

    Source: Douillard et al. (PLOP), CVPR 2021: code; section 3.3 speaks of the class's median entropy.

    >>> counts = torch.tensor([[4, 0, 0, 0], [2, 4, 0, 0]])
    >>> histogram_thresholds(counts, 0.001).tolist()
    [0.125, 0.4375]
    >>> histogram_thresholds(counts, 0.001, median="exact").tolist()
    [0.125, 0.3125]
    """
    if histogram.dim() != 2 or not histogram.shape[1]:
        raise ValueError(
            f"histogram_thresholds: expected counts (C, bins), got shape {tuple(histogram.shape)}"
        )
    if median not in get_args(Median) or measure not in get_args(Measure):
        raise ValueError(f"histogram_thresholds: unknown median {median!r} or measure {measure!r}")
    medians = [_median(row, median) for row in histogram.double().tolist()]
    found = torch.tensor(medians, dtype=torch.float64, device=histogram.device)
    limit = torch.tensor(
        base, dtype=found.dtype, device=found.device
    )  # a plain number would be rounded to float32
    # Comparisons with nan are false: nan stays.
    found = torch.where(limit > found if measure == "entropy" else limit < found, limit, found)
    return torch.where(found.isfinite(), found, limit) if finite else found


def _median(counts: list[float], form: Median) -> float:
    """Median of one class; may be nan or infinite in the official form."""
    bins, half = len(counts), sum(counts) / 2
    if half == 0:
        return 0.0
    passed, edge, here = 0.0, 0.0, 0.0
    for number in range(bins):
        edge = number / bins
        place = int(edge * bins) if form == "official" else number
        here = counts[place]
        if passed <= half <= passed + here:
            break
        passed += edge * bins if form == "official" else here
    rest = half - passed
    if here == 0:
        return float("nan") if rest == 0 else float("inf") if rest > 0 else float("-inf")
    return edge + rest / here / bins
