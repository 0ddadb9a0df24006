"""Pseudo-labels, thresholds and factors against loops over pixels, and at their edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from everseg import losses

SHAPES = [((5, 4), (20, 9)), ((6, 6), (6, 6)), ((1, 1), (7, 13)), ((9, 12), (4, 5))]
"""Size of the teacher's logits and of the label."""


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def entropy(q: list[float], every: int, norm: str) -> float:
    if norm == "paper":
        return sum(-p * math.log(p) for p in q if p > 0) / math.log(len(q)) if len(q) > 1 else 0.0
    mean = sum(-p * math.log(p + 1e-8) for p in q) / len(q)
    return mean / math.log(len(q) + 1e-8) / math.log(every)


def pixels(
    small: tuple[int, int], size: tuple[int, int], num_old: int = 3, num_classes: int = 5, seed: int = 0
):
    """Teacher's logits, the same at full size as lists, and a label with old, new and ignored pixels."""
    torch.manual_seed(seed)
    logits = 3 * torch.randn(2, num_old, *small, dtype=torch.float64)
    label = torch.randint(0, num_classes, (2, *size))
    label[torch.rand(label.shape) < 0.4] = 0
    label[torch.rand(label.shape) < 0.1] = 255
    full = losses.upsample(logits, size).permute(0, 2, 3, 1).tolist()
    return logits, full, label


@pytest.mark.parametrize(("small", "size"), SHAPES)
@pytest.mark.parametrize("measure", ["entropy", "probability", None])
@pytest.mark.parametrize("norm", ["code", "paper"])
def test_labels_agree_with_a_loop_over_pixels(small, size, measure, norm):
    logits, full, label = pixels(small, size)
    limits = (
        [0.6, 0.7, 0.8]
        if measure == "probability"
        else [0.05, 0.1, 0.15]
        if norm == "code"
        else [0.4, 0.5, 0.6]
    )
    limits += [1.0, 1.0]  # of the new classes; nobody reads them
    found = losses.pseudo_labels(
        logits, label, num_classes=5, measure=measure, thresholds=torch.tensor(limits), norm=norm,
        confidence=True, band=2,
    )  # fmt: skip
    expected, kept = label.clone(), torch.zeros_like(label, dtype=torch.bool)
    certainty = torch.ones(label.shape, dtype=torch.float64)
    for b, row, column in np.ndindex(*label.shape):
        given = int(label[b, row, column])
        if given >= 3:
            continue
        q = softmax(full[b][row][column])
        best = q.index(max(q))
        certainty[b, row, column] = max(q)
        if measure == "entropy":
            accepted = entropy(q, 5, norm) < limits[best]
        else:
            accepted = measure is None or max(q) >= limits[best]
        kept[b, row, column] = accepted
        expected[b, row, column] = best if accepted else 255
    assert found.label.equal(expected)
    assert found.kept.equal(kept)
    assert found.old.equal((label < 3).sum((1, 2)))
    assert found.accepted.equal(kept.sum((1, 2)))
    assert_close(found.confidence, certainty)
    assert (
        measure is None or small == (1, 1) or 0 < int(kept.sum()) < int((label < 3).sum())
    )  # the case tests both answers


def test_rejected_pixels_keep_their_label_where_asked_for_and_errors_go():
    logits, _, label = pixels(*SHAPES[0])
    plain = losses.pseudo_labels(logits, label, num_classes=5, thresholds=0.1)
    keeping = losses.pseudo_labels(logits, label, num_classes=5, thresholds=0.1, keep_rejected=True)
    agreeing = losses.pseudo_labels(logits, label, num_classes=5, thresholds=0.1, agreeing=True)
    assert keeping.label.equal(torch.where(plain.kept | (label >= 3), plain.label, label))
    assert agreeing.label.equal(torch.where(plain.kept & (plain.label != label), 255, plain.label))
    assert agreeing.kept.equal(plain.kept)


@pytest.mark.parametrize("band", [1, 3, 100, None])
def test_the_size_of_a_band_changes_nothing(band):
    logits, _, label = pixels(*SHAPES[0])
    whole = losses.pseudo_labels(logits, label, num_classes=5, thresholds=0.1)
    found = losses.pseudo_labels(logits, label, num_classes=5, thresholds=0.1, band=band)
    assert found.label.equal(whole.label)
    counts = losses.certainty_histogram(logits, label, num_classes=5, band=band)
    assert counts.equal(losses.certainty_histogram(logits, label, num_classes=5))


def test_several_threads_give_the_same(monkeypatch):
    logits, _, label = pixels(*SHAPES[0])
    one = losses.pseudo_labels(logits, label, num_classes=5, thresholds=0.1, band=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        several = losses.pseudo_labels(logits, label, num_classes=5, thresholds=0.1, band=1)
    finally:
        torch.set_num_threads(threads)
    assert several.label.equal(one.label)
    assert several.kept.equal(one.kept)


def test_nothing_old_and_all_ignored():
    logits = torch.randn(2, 3, 4, 4)
    for value in (4, 255):
        label = torch.full((2, 8, 8), value)
        found = losses.pseudo_labels(logits, label, num_classes=5, thresholds=0.1)
        assert found.label.equal(label)
        assert found.old.tolist() == found.accepted.tolist() == [0, 0]
        assert losses.certainty_histogram(logits, label, num_classes=5).sum() == 0


def test_thresholds_of_inf_and_nan_accept_and_reject_everything_by_entropy():
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 1, 1] = 1.0  # the second row is of class 1
    label = torch.zeros(1, 2, 2, dtype=torch.long)
    limits = torch.tensor([math.inf, math.nan])
    assert losses.pseudo_labels(logits, label, num_classes=3, thresholds=limits).label.tolist() == [
        [[0, 0], [255, 255]]
    ]


@pytest.mark.parametrize("norm", ["code", "paper"])
def test_a_teacher_of_one_class_is_certain(norm):
    found = losses.pseudo_labels(
        torch.randn(1, 1, 2, 2),
        torch.tensor([[[0, 1], [255, 0]]]),
        num_classes=2,
        thresholds=0.001,
        norm=norm,
    )
    assert found.label.tolist() == [[[0, 1], [255, 0]]]
    assert found.accepted.tolist() == [2]
    counts = losses.certainty_histogram(
        torch.randn(1, 1, 2, 2), torch.zeros(1, 2, 2).long(), num_classes=2, norm=norm
    )
    assert counts[0, 0] == 4


def test_half_precision_is_computed_in_single():
    logits, _, label = pixels(*SHAPES[0])
    half = logits.bfloat16()
    ours = losses.pseudo_labels(half, label, num_classes=5, thresholds=0.1)
    assert ours.label.equal(losses.pseudo_labels(half.float(), label, num_classes=5, thresholds=0.1).label)


@pytest.mark.parametrize("measure", ["entropy", "probability"])
@pytest.mark.parametrize("bins", [1, 7, None])
def test_histogram_agrees_with_a_loop_over_pixels(measure, bins):
    logits, full, label = pixels((5, 4), (20, 9))
    found = losses.certainty_histogram(logits, label, num_classes=5, measure=measure, bins=bins, band=3)
    number = bins or (100 if measure == "entropy" else 20)
    expected = np.zeros((5, number), int)
    for b, row, column in np.ndindex(*label.shape):
        if label[b, row, column] == 0:
            q = softmax(full[b][row][column])
            value = entropy(q, 5, "code") if measure == "entropy" else max(q)
            expected[q.index(max(q)), min(number - 1, int(value * number))] += 1
    assert found.tolist() == expected.tolist()
    assert found.sum() == (label == 0).sum()


def quantile(counts: list[int]) -> float:
    """The exact median once more: walk over single pixels, each at its share of its bin."""
    places = [(bin + (i + 1) / n) / len(counts) for bin, n in enumerate(counts) for i in range(n)]
    half = len(places) / 2
    if not places:
        return 0.0
    if half == int(half):
        return places[int(half) - 1]
    upper = places[int(half)]
    here = next(n for bin, n in enumerate(counts) if upper <= (bin + 1) / len(counts) + 1e-12)
    return upper - 0.5 / here / len(counts)


@pytest.mark.parametrize("bins", [1, 5, 20, 100])
def test_exact_median(bins):
    rng = np.random.default_rng(bins)
    counts = rng.integers(0, 6, (12, bins)) * (rng.random((12, bins)) < 0.5)
    counts[0] = 0
    found = losses.histogram_thresholds(torch.from_numpy(counts), -1.0, median="exact")
    assert_close(found, torch.tensor([quantile(row) for row in counts.tolist()], dtype=torch.float64))


def test_official_median_stops_where_the_numbers_of_the_bins_reach_half():
    # 10 pixels in bin 0 of 20, 9 in bin 19. Half is 9.5: bin 0 stops at once.
    first = [10, *[0] * 18, 9]
    # 2 in bin 0 and 8 in bin 6: half is 5. The loop has added 0 + 1 + 2 when it meets bin 3, ..., 15 after bin 5: the
    # bins are empty while the sum passes 5, so it never stops, and the last bin is empty: 5 < 190 gives -inf.
    never = [2, *[0] * 5, 8, *[0] * 13]
    # 2 pixels: half is 1, and after bin 1 the loop has added 1: it stops at the empty bin 2 with 0 / 0.
    empty = [0, 0, 0, 2, *[0] * 16]
    counts = torch.tensor([first, never, empty, [0] * 20])
    found = losses.histogram_thresholds(counts, -math.inf)
    assert found[0] == 9.5 / 10 / 20
    assert found[1] == -math.inf
    assert found[2].isnan()
    assert found[3] == 0
    assert losses.histogram_thresholds(counts, 0.3, finite=True).tolist() == [0.3] * 4
    assert losses.histogram_thresholds(counts, 0.01).tolist()[:2] == [0.0475, 0.01]
    assert losses.histogram_thresholds(counts, 0.01, measure="probability").tolist()[3] == 0


def test_accepted_share():
    old, accepted = torch.tensor([8, 0, 4]), torch.tensor([2, 0, 4])
    assert losses.accepted_share(old, accepted).tolist() == [2 / (8 + 1e-6), 0, 4 / (4 + 1e-6)]
    assert losses.accepted_share(old, accepted, minimum=0.5, epsilon=0, empty=1.0).tolist() == [0.5, 1.0, 1.0]
    assert losses.accepted_share(old, accepted, epsilon=0)[1].isnan()


def test_soft_uncertain_agrees_with_a_loop():
    torch.manual_seed(1)
    x, t = torch.randn(1, 4, 2, 3, dtype=torch.float64), torch.randn(1, 2, 2, 3, dtype=torch.float64)
    found = losses.soft_uncertain(x, t, reduction="none")
    for row, column in np.ndindex(2, 3):
        p, q = softmax(x[0, :2, row, column].tolist()), softmax(t[0, :, row, column].tolist())
        expected = sum(a * math.log(b) for a, b in zip(p, q, strict=True))
        assert found[0, row, column].item() == pytest.approx(expected)
    assert_close(losses.soft_uncertain(x, t, authors_sign=False, reduction="none"), -found)


def test_bad_input_is_named():
    logits, label = torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2).long()
    with pytest.raises(ValueError, match="expected an integer label"):
        losses.pseudo_labels(logits, label.float(), num_classes=3, thresholds=1.0)
    with pytest.raises(ValueError, match="needs thresholds"):
        losses.pseudo_labels(logits, label, num_classes=3)
    with pytest.raises(ValueError, match=r"one threshold .* 3 classes"):
        losses.pseudo_labels(logits, label, num_classes=3, thresholds=torch.zeros(2))
    with pytest.raises(ValueError, match="measure: expected"):
        losses.pseudo_labels(logits, label, num_classes=3, measure="median", thresholds=1.0)
    with pytest.raises(ValueError, match="num_classes must be at least"):
        losses.pseudo_labels(logits, label, num_classes=2, thresholds=1.0)
    with pytest.raises(ValueError, match=r"band .* at least 1 row"):
        losses.pseudo_labels(logits, label, num_classes=3, thresholds=1.0, band=0)
    with pytest.raises(ValueError, match="norm: expected"):
        losses.uncertainty(logits, 3, "bits")
    with pytest.raises(ValueError, match="num_classes must be at least"):
        losses.uncertainty(logits, 2)
    with pytest.raises(ValueError, match="at least one bin"):
        losses.certainty_histogram(logits, label, num_classes=3, bins=0)
    with pytest.raises(ValueError, match="expected counts"):
        losses.histogram_thresholds(torch.zeros(3), 0.1)
    with pytest.raises(ValueError, match="unknown median"):
        losses.histogram_thresholds(torch.zeros(3, 2), 0.1, median="mean")


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


@pytest.mark.parametrize(("small", "size"), SHAPES)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "none"])
@pytest.mark.parametrize("num_open", [1, 2])
@pytest.mark.parametrize("ignore_unsure", [False, True])
def test_completed_labels_agree_with_a_loop_over_pixels(small, size, activation, num_open, ignore_unsure):
    logits, full, label = pixels(small, size, num_old=4, num_classes=6)
    found = losses.completed_labels(
        logits, label, num_classes=6, threshold=0.6, num_open=num_open, activation=activation, band=2,
        ignore_unsure=ignore_unsure,
    )  # fmt: skip
    expected = label.clone()
    for b, row, column in np.ndindex(*label.shape):
        values = full[b][row][column]
        scores = {"sigmoid": [sigmoid(v) for v in values], "softmax": softmax(values), "none": values}
        q = scores[activation]
        best = q.index(max(q))
        if int(label[b, row, column]) < num_open and best >= num_open:
            if q[best] >= 0.6:
                expected[b, row, column] = best
            elif ignore_unsure:
                expected[b, row, column] = 255
    assert found.equal(expected)
    open_pixels = int((label < num_open).sum())
    filled = int((found != label).sum())
    assert small == (1, 1) or 0 < filled < open_pixels  # the case tests both answers


def test_completed_labels_at_the_threshold_and_with_equal_scores():
    logits = torch.tensor([0.0, 80.0, 90.0, -9.0]).view(1, 1, 1, 4).expand(1, 3, 1, 4).clone()
    logits[0, :2, 0, 0] = -1.0  # exactly 0.5 for the last output
    label = torch.zeros(1, 1, 4, dtype=torch.long)
    found = losses.completed_labels(logits, label, num_classes=3, threshold=0.5)
    # Saturated sigmoids are equal: the first output counts, and that is an open one.
    assert found.tolist() == [[[2, 0, 0, 0]]]
    logits[0, 0] = -20.0
    found = losses.completed_labels(logits, label, num_classes=3, threshold=0.5)
    assert found.tolist() == [[[2, 1, 1, 0]]]


def test_completed_labels_leave_ignored_and_labelled_pixels_alone():
    logits = torch.full((1, 3, 2, 2), 5.0)
    logits[:, 0] = -5.0
    label = torch.tensor([[[255, 2], [1, 4]]])
    assert losses.completed_labels(logits, label, num_classes=5, threshold=0.0).equal(label)
    wide = torch.tensor([[[65535, 255], [0, 299]]])
    found = losses.completed_labels(logits, wide, num_classes=300, threshold=0.0)
    assert found.tolist() == [[[65535, 255], [1, 299]]]


def test_completed_labels_refuse_what_they_cannot_do():
    logits, label = torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2).long()
    with pytest.raises(ValueError, match="activation"):
        losses.completed_labels(logits, label, num_classes=3, threshold=0.5, activation="tanh")
    with pytest.raises(ValueError, match="open"):
        losses.completed_labels(logits, label, num_classes=3, threshold=0.5, num_open=0)
    with pytest.raises(ValueError, match="num_classes"):
        losses.completed_labels(logits, label, num_classes=2, threshold=0.5)
