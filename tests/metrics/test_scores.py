"""Scores of counts against hand-computed values, a slow oracle and the golden numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from everseg import metrics

#                  predicted: 0   1  2  3
HAND = np.array([[50, 10, 0, 0], [5, 25, 0, 0], [0, 0, 0, 0], [5, 0, 0, 5]])  # class 2 is absent


def test_class_scores_by_hand():
    assert metrics.iou(HAND, eps=0.0)[[0, 1, 3]].tolist() == [50 / 70, 25 / 40, 5 / 10]
    assert metrics.class_accuracy(HAND, eps=0.0)[[0, 1, 3]].tolist() == [50 / 60, 25 / 30, 5 / 10]
    assert math.isnan(metrics.iou(HAND)[2])
    assert math.isnan(metrics.class_accuracy(HAND)[2])


def test_authors_eps_is_the_default():
    assert metrics.iou(HAND)[3] == 5 / (10 + 1e-6)
    assert metrics.class_accuracy(HAND)[3] == 5 / (10 + 1e-6)


def test_means_by_hand():
    assert metrics.overall_accuracy(HAND) == 80 / 100
    assert metrics.mean_accuracy(HAND, eps=0.0) == pytest.approx((50 / 60 + 25 / 30 + 5 / 10) / 3, rel=1e-15)
    assert metrics.mean_accuracy(HAND, [3, 2], eps=0.0) == 0.5
    expected = 0.6 * 50 / 70 + 0.3 * 25 / 40 + 0.1 * 5 / 10
    assert metrics.frequency_weighted_iou(HAND, eps=0.0) == pytest.approx(expected, rel=1e-15)


def test_absent_classes_are_skipped_or_count_zero():
    total = 50 / 70 + 25 / 40 + 5 / 10
    assert metrics.mean_iou(HAND, eps=0.0) == pytest.approx(total / 3, rel=1e-15)
    assert metrics.mean_iou(HAND, absent="zero", eps=0.0) == pytest.approx(total / 4, rel=1e-15)
    assert metrics.mean_iou(HAND, [1, 2], eps=0.0) == 25 / 40
    assert metrics.mean_iou(HAND, [1, 2], "zero", eps=0.0) == 25 / 80
    assert math.isnan(metrics.mean_iou(HAND, [2]))
    assert math.isnan(metrics.mean_iou(HAND, []))


def test_false_positives_on_an_absent_class_still_hurt_the_others():
    counts = np.array([[3, 1], [0, 0]])
    assert metrics.mean_iou(counts, eps=0.0) == 3 / 4


def test_no_pixels_give_nan_not_zero():
    empty = np.zeros((3, 3), np.int64)
    for score in (
        metrics.overall_accuracy,
        metrics.mean_accuracy,
        metrics.frequency_weighted_iou,
        metrics.mean_iou,
    ):
        assert math.isnan(score(empty))


def test_perfect_predictions_score_one():
    counts = np.diag([5, 7, 11])
    assert metrics.iou(counts, eps=0.0).tolist() == [1, 1, 1]
    assert metrics.overall_accuracy(counts) == 1
    assert metrics.frequency_weighted_iou(counts, eps=0.0) == 1


def test_iou_equals_that_of_pixel_sets():
    rng = np.random.default_rng(0)
    label, prediction = rng.integers(0, 4, 300), rng.integers(0, 5, 300)
    matrix = metrics.ConfusionMatrix(5)
    matrix.update(torch.from_numpy(prediction), torch.from_numpy(label))
    for c in range(4):
        truth, found = set(np.flatnonzero(label == c)), set(np.flatnonzero(prediction == c))
        assert metrics.iou(matrix.counts, eps=0.0)[c] == len(truth & found) / len(truth | found)
        assert metrics.class_accuracy(matrix.counts, eps=0.0)[c] == len(truth & found) / len(truth)
    assert math.isnan(metrics.iou(matrix.counts)[4])


def test_tensors_and_arrays_give_the_same_and_are_left_alone():
    tensor = torch.from_numpy(HAND.copy())
    np.testing.assert_array_equal(metrics.iou(tensor), metrics.iou(HAND))
    assert metrics.mean_iou(tensor) == metrics.mean_iou(HAND)
    assert torch.equal(tensor, torch.from_numpy(HAND))


def test_iou_eval_by_hand():
    counts = np.array([[4, 1, 1], [2, 6, 0], [7, 7, 7]])  # void is class 2
    result = metrics.iou_eval(counts, ignore_index=2)
    assert result["tp"].tolist() == [4, 6]
    assert result["fp"].tolist() == [2, 1]  # the 7s have void truth
    assert result["fn"].tolist() == [2, 2]  # a prediction of void is a miss
    np.testing.assert_allclose(result["iou"], [4 / 8, 6 / 9], rtol=1e-14)
    assert result["miou"] == pytest.approx((4 / 8 + 6 / 9) / 2, rel=1e-14)


def test_iou_eval_takes_any_void_class_and_none():
    counts = np.array([[4, 1, 1], [2, 6, 0], [7, 7, 7]])
    order = [2, 0, 1]
    moved = metrics.iou_eval(counts[np.ix_(order, order)], ignore_index=0)
    np.testing.assert_array_equal(moved["iou"], metrics.iou_eval(counts, 2)["iou"])
    assert metrics.iou_eval(counts, 19)["fp"].tolist() == [9, 8, 1]
    absent = metrics.iou_eval(np.array([[4, 0], [0, 0]]), -1)
    assert absent["miou"] == pytest.approx(0.5, rel=1e-14)
    with pytest.raises(ValueError, match=r"void .*only class"):
        metrics.iou_eval(np.array([[4]]), 0)


@pytest.mark.parametrize(
    "counts",
    [
        np.zeros((2, 3), np.int64),
        np.zeros(4, np.int64),
        np.zeros((0, 0), np.int64),
        np.zeros((2, 2)),
        np.full((2, 2), -1),
    ],
)
def test_what_is_no_confusion_matrix_raises(counts):
    for score in (metrics.iou, metrics.class_accuracy, metrics.overall_accuracy, metrics.mean_iou):
        with pytest.raises(ValueError, match=r"square matrix .*>= 0"):
            score(counts)


def test_unknown_classes_and_options_raise():
    with pytest.raises(ValueError, match=r"classes: \[4\].*0\.\.3"):
        metrics.mean_iou(HAND, [0, 4])
    with pytest.raises(ValueError, match=r"classes: \[-1\] out of range"):
        metrics.mean_accuracy(HAND, [-1])
    with pytest.raises(ValueError, match="expected 'skip' or 'zero'"):
        metrics.mean_iou(HAND, absent="one")


@pytest.fixture(scope="module")
def arrays(golden):
    with np.load(golden / "metrics_A.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.mark.golden
def test_agrees_with_mib(arrays):
    matrix = metrics.ConfusionMatrix(int(arrays["n_classes"]))
    for prediction, label in zip(arrays["pred"], arrays["gt"], strict=True):
        matrix.update(torch.from_numpy(prediction), torch.from_numpy(label))
    counts = matrix.counts
    np.testing.assert_array_equal(counts.numpy(), arrays["mib/confusion"])
    np.testing.assert_allclose(matrix.iou().numpy(), arrays["mib/class_iou"], rtol=1e-12)
    np.testing.assert_allclose(matrix.accuracy().numpy(), arrays["mib/class_acc"], rtol=1e-12)
    for score, name in (
        (metrics.overall_accuracy, "Overall_Acc"),
        (metrics.mean_accuracy, "Mean_Acc"),
        (metrics.frequency_weighted_iou, "FreqW_Acc"),
        (metrics.mean_iou, "Mean_IoU"),
    ):
        assert score(counts) == pytest.approx(float(arrays[f"mib/{name}"]), rel=1e-12)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["void_last", "no_ignore", "default_arg"])
@pytest.mark.parametrize("form", ["argmax", "onehot_y"])
def test_agrees_with_mdil(arrays, case, form):
    stored = {key: arrays[f"mdil/{case}/{form}/{key}"] for key in ("tp", "fp", "fn", "iou", "miou")}
    void = int(arrays["n_classes"])
    prediction, label = arrays["pred"].copy(), arrays["gt"].copy()
    prediction[..., 0:2, 0:3] = void
    label[label == 255] = void
    matrix = metrics.ConfusionMatrix(void + 1)
    matrix.update(torch.from_numpy(prediction), torch.from_numpy(label))
    result = metrics.iou_eval(matrix.counts, {"void_last": void, "no_ignore": -1, "default_arg": 19}[case])
    for key in ("tp", "fp", "fn"):
        np.testing.assert_array_equal(result[key], stored[key])
    np.testing.assert_allclose(result["iou"], stored["iou"], rtol=1e-12)
    assert result["miou"] == pytest.approx(float(stored["miou"]), rel=1e-12)
