"""Group means, forgetting and backward transfer of small sequences computed by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from everseg.metrics import ConfusionMatrix, first_last_scores, sequence_scores, step_scores

# After step 0: background, cat. IoU: 8/10, 6/8 (one cat pixel called background, one background pixel called cat).
STEP0 = np.array([[8, 1], [1, 6]])
# After step 1: + dog. IoU: background 6/12, cat 2/5, dog 4/7.
STEP1 = np.array([[6, 0, 1], [3, 2, 0], [2, 0, 4]])
IOU0, IOU1 = [8 / 10, 6 / 8], [6 / 12, 2 / 5, 4 / 7]
CLOSE = {"rel": 1e-6}  # MiB's eps of 1e-6 on counts of 5 to 12 pixels


def approx(value):
    return pytest.approx(value, **CLOSE)


def test_groups_of_one_step_by_hand():
    scores = step_scores(STEP1, (2, 1), background=0)
    assert scores["miou"] == {
        "all": approx((6 / 12 + 2 / 5 + 4 / 7) / 3),
        "base": approx((6 / 12 + 2 / 5) / 2),
        "old": approx((6 / 12 + 2 / 5) / 2),
        "new": approx(4 / 7),
    }
    assert scores["miou_without_background"] == {
        "all": approx((2 / 5 + 4 / 7) / 2),
        "base": approx(2 / 5),
        "old": approx(2 / 5),
        "new": approx(4 / 7),
    }
    old, new = (6 / 12 + 2 / 5) / 2, 4 / 7
    assert scores["harmonic_mean"] == approx(2 * old * new / (old + new))
    assert scores["overall_accuracy"] == 12 / 18
    assert scores["mean_accuracy"] == approx((6 / 7 + 2 / 5 + 4 / 6) / 3)
    assert scores["frequency_weighted_iou"] == approx(7 / 18 * 6 / 12 + 5 / 18 * 2 / 5 + 6 / 18 * 4 / 7)
    assert scores["class_iou"] == approx(IOU1)
    assert scores["class_accuracy"] == approx([6 / 7, 2 / 5, 4 / 6])


def test_old_is_all_groups_but_the_last_and_base_the_first():
    counts = np.diag([1, 1, 1, 1])
    counts[1, 0], counts[2, 0], counts[3, 0] = 1, 3, 7  # IoU 1/12, 1/2, 1/4, 1/8
    means = step_scores(counts, (2, 1, 1), background=None)["miou"]
    assert means["base"] == approx((1 / 12 + 1 / 2) / 2)
    assert means["old"] == approx((1 / 12 + 1 / 2 + 1 / 4) / 3)
    assert means["new"] == approx(1 / 8)
    assert means["all"] == approx((1 / 12 + 1 / 2 + 1 / 4 + 1 / 8) / 4)


def test_first_step_has_no_old_classes_and_no_harmonic_mean():
    scores = step_scores(STEP0, (2,), background=0)
    assert scores["miou"]["old"] is None
    assert scores["harmonic_mean"] is None
    assert scores["miou"]["all"] == scores["miou"]["base"] == scores["miou"]["new"] == approx(31 / 40)
    assert scores["miou_without_background"]["new"] == approx(6 / 8)


def test_without_a_background_class_both_conventions_are_equal():
    scores = step_scores(STEP1, (2, 1), background=None)
    assert scores["miou"] == scores["miou_without_background"]


def test_background_is_left_out_of_the_group_it_stands_in():
    scores = step_scores(STEP1, (2, 1), background=2)
    assert scores["miou"]["new"] == approx(4 / 7)
    assert scores["miou_without_background"]["new"] is None
    assert scores["miou_without_background"]["old"] == scores["miou"]["old"]


def test_synthetic_background_without_true_pixels_enters_no_mean():
    counts = np.array([[0, 0, 0], [2, 4, 0], [0, 0, 3]])  # 2 pixels called background: wrong for class 1 only
    scores = step_scores(counts, (2, 1), background=0)
    assert scores["miou"] == scores["miou_without_background"]
    assert scores["miou"]["all"] == approx((4 / 6 + 1) / 2)
    assert scores["class_iou"][0] is None
    assert scores["class_accuracy"][0] is None


def test_total_forgetting_has_harmonic_mean_zero():
    counts = np.array([[0, 5], [0, 5]])
    assert step_scores(counts, (1, 1), background=None)["harmonic_mean"] == 0.0
    assert step_scores(np.array([[0, 5], [5, 0]]), (1, 1), background=None)["harmonic_mean"] == 0.0


def test_two_step_sequence_by_hand():
    scores = sequence_scores([STEP0, STEP1], [(2,), (2, 1)], background=0)
    old0, old1, new1 = (8 / 10 + 6 / 8) / 2, (6 / 12 + 2 / 5) / 2, 4 / 7
    assert scores["average_miou"] == approx((old0 + sum(IOU1) / 3) / 2)
    assert scores["average_miou_without_background"] == approx((6 / 8 + (2 / 5 + 4 / 7) / 2) / 2)
    assert scores["step_matrix"] == [[approx(old0), None], [approx(old1), approx(new1)]]
    assert scores["step_matrix_without_background"] == [[approx(6 / 8), None], [approx(2 / 5), approx(new1)]]
    assert scores["forgetting"] == {
        "mean": approx(old0 - old1),
        "groups": [approx(old0 - old1), None],
        "classes": [approx(8 / 10 - 6 / 12), approx(6 / 8 - 2 / 5), None],
    }
    assert scores["forgetting_without_background"] == {
        "mean": approx(6 / 8 - 2 / 5),
        "groups": [approx(6 / 8 - 2 / 5), None],
        "classes": [None, approx(6 / 8 - 2 / 5), None],
    }
    assert scores["backward_transfer"] == {"mean": approx(old1 - old0), "groups": [approx(old1 - old0), None]}
    assert scores["backward_transfer_without_background"]["mean"] == approx(2 / 5 - 6 / 8)


def with_ious(*ious: tuple[int, int]) -> np.ndarray:
    """Counts in which class c + 1 has IoU a/b; its misses go to class 0."""
    counts = np.diag([10] + [a for a, _ in ious])
    for c, (a, b) in enumerate(ious):
        counts[c + 1, 0] = b - a
    return counts


def test_forgetting_takes_the_best_earlier_step_and_transfer_the_first():
    steps = [with_ious((4, 10)), with_ious((9, 10), (5, 10)), with_ious((6, 10), (8, 10), (1, 2))]
    sizes = [(1, 1), (1, 1, 1), (1, 1, 1, 1)]
    scores = sequence_scores(steps, sizes, background=0)
    assert [row[1:] for row in scores["step_matrix"]] == [
        [approx(0.4), None, None],
        [approx(0.9), approx(0.5), None],
        [approx(0.6), approx(0.8), approx(0.5)],
    ]
    assert scores["forgetting_without_background"]["groups"] == [None, approx(0.3), approx(-0.3), None]
    assert scores["forgetting_without_background"]["mean"] == pytest.approx(0, abs=1e-6)
    assert scores["backward_transfer_without_background"]["groups"] == [None, approx(0.2), approx(0.3), None]
    assert scores["backward_transfer_without_background"]["mean"] == approx(0.25)
    assert scores["forgetting"]["classes"][1:] == [approx(0.3), approx(-0.3), None]


def test_improvement_is_negative_forgetting():
    scores = sequence_scores(
        [np.array([[4, 4], [0, 4]]), np.diag([8, 4, 3])], [(2,), (2, 1)], background=None
    )
    before = (4 / 8 + 4 / 8) / 2
    assert scores["forgetting"]["mean"] == approx(before - 1)
    assert scores["backward_transfer"]["mean"] == approx(1 - before)


def test_a_group_that_a_step_does_not_see_is_undefined_there():
    unseen = np.array([[0, 0, 0], [0, 0, 0], [0, 0, 4]])
    scores = sequence_scores([STEP0, unseen], [(2,), (2, 1)], background=0)
    assert scores["step_matrix"][1] == [None, approx(1.0)]
    assert scores["forgetting"] == {"mean": None, "groups": [None, None], "classes": [None, None, None]}
    assert scores["backward_transfer"]["mean"] is None
    assert scores["average_miou"] == approx((31 / 40 + 1) / 2)


def test_one_step_forgets_nothing():
    scores = sequence_scores([STEP0], [(2,)], background=0)
    assert scores["average_miou"] == approx(31 / 40)
    assert scores["step_matrix"] == [[approx(31 / 40)]]
    assert scores["forgetting"]["mean"] is None
    assert scores["backward_transfer"]["mean"] is None


def test_results_are_json():
    scores = [
        step_scores(np.zeros((3, 3), np.int64), (2, 1), background=0),
        sequence_scores([STEP0, STEP1], [(2,), (2, 1)], background=0),
    ]
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    assert scores[0]["miou"] == {"all": None, "base": None, "old": None, "new": None}
    assert scores[0]["overall_accuracy"] is None


def test_counts_of_a_matrix_are_accepted_as_they_are():
    matrix = ConfusionMatrix(3)
    matrix.merge(STEP1)
    assert step_scores(matrix.counts, (2, 1), background=0) == step_scores(STEP1, (2, 1), background=0)


@pytest.mark.parametrize("sizes", [(), (3, 1), (2,), (3, 0), (4, -1)])
def test_group_sizes_that_do_not_fit_raise(sizes):
    with pytest.raises(ValueError, match=r"group_sizes: .*sum to 3"):
        step_scores(STEP1, sizes, background=0)


def test_background_out_of_range_raises():
    with pytest.raises(ValueError, match=r"background: .*0\.\.2.*got 3"):
        step_scores(STEP1, (2, 1), background=3)


def test_sequences_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="one step"):
        sequence_scores([], [], background=0)
    with pytest.raises(ValueError, match="got 1 counts and 2 lists"):
        sequence_scores([STEP0], [(2,), (2, 1)], background=0)
    with pytest.raises(ValueError, match=r"do not continue \(2,\)"):
        sequence_scores([STEP0, STEP1], [(2,), (1, 2)], background=0)


def test_first_and_last_are_parted_after_step_0_and_absent_classes_count_0():
    """The reporting rule of PLOP's code, by hand: 2 + 1 + 1 classes, one of them without a true pixel."""
    first = np.diag([6, 2])
    second = np.array([[6, 0, 0], [1, 1, 0], [0, 0, 0]])  # IoU 6/7, 1/2, absent
    third = np.array([[3, 0, 0, 3], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 3]])  # IoU 1/2, 1, absent, 1/2
    steps, sizes = [first, second, third], (2, 1, 1)
    found = first_last_scores(steps, sizes)
    average = (1 + (6 / 7 + 1 / 2 + 0) / 3 + (1 / 2 + 1 + 0 + 1 / 2) / 4) / 3
    expected = {"first": 0.75, "last": 0.25, "all": 0.5, "harmonic_mean": 0.375, "average": average}
    assert found == pytest.approx(expected, abs=1e-6)
    skipped = first_last_scores(steps, sizes, absent="skip")
    assert [skipped["last"], skipped["all"]] == pytest.approx([0.5, 2 / 3], abs=1e-6)
    without = first_last_scores(steps, sizes, background=0)
    assert [without["first"], without["all"]] == pytest.approx([1, 0.5], abs=1e-6)
    old = step_scores(third, sizes, 0)["miou"]["old"]
    assert old == pytest.approx(0.75, abs=1e-6), (
        "everseg's old is all but the last step's, absent classes left out"
    )


def test_one_step_has_neither_last_nor_average():
    found = first_last_scores([np.diag([1, 1])], (2,))
    assert (found["last"], found["average"], found["harmonic_mean"]) == (None, None, None)
    with pytest.raises(ValueError, match="at least one"):
        first_last_scores([], (2,))
    with pytest.raises(ValueError, match="group_sizes"):
        first_last_scores([np.diag([1, 1])], (3,))
