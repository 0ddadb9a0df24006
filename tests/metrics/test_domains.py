"""Scores over domains: relative drop, forgetting of a branch that never grows, an output for void."""

from __future__ import annotations

import numpy as np
import pytest

from everseg.metrics import iou_eval, relative_drop, sequence_scores, step_scores

SINGLE = {"CS": 72.55, "BDD": 54.10, "IDD": 61.97}
# mIoU per domain (percent), mean drop and drops as the MDIL authors' notebook gives them
PUBLISHED = [
    ({"CS": 40.05, "BDD": 52.74}, -23.66, {"CS": -44.80, "BDD": -2.51}),
    ({"CS": 65.21, "BDD": 55.73}, -3.55, {"CS": -10.12, "BDD": 3.01}),
    ({"CS": 64.58, "IDD": 59.11}, -7.80, {"CS": -10.99, "IDD": -4.62}),
    ({"CS": 30.49, "BDD": 32.05, "IDD": 61.03}, -33.42, {"CS": -57.97, "BDD": -40.76, "IDD": -1.52}),
    ({"CS": 59.19, "BDD": 49.66, "IDD": 59.16}, -10.39, {"CS": -18.41, "BDD": -8.21, "IDD": -4.53}),
    ({"CS": 36.19, "IDD": 26.30, "BDD": 53.37}, -36.34, {"CS": -50.12, "IDD": -57.56, "BDD": -1.35}),
    ({"CS": 62.55, "IDD": 53.85, "BDD": 55.90}, -7.85, {"CS": -13.78, "IDD": -13.10, "BDD": 3.33}),
]


@pytest.mark.parametrize(("values", "mean", "domains"), PUBLISHED)
def test_relative_drop_gives_the_published_numbers(values, mean, domains):
    drop = relative_drop(values, SINGLE)
    assert 100 * drop["mean"] == pytest.approx(mean, abs=0.006)
    assert {name: 100 * value for name, value in drop["domains"].items()} == pytest.approx(domains, abs=0.006)
    assert list(drop["domains"]) == list(values)


def test_relative_drop_is_signed_and_does_not_depend_on_the_unit():
    drop = relative_drop({"day": 0.6, "dusk": 0.55}, {"day": 0.8, "dusk": 0.5, "night": 0.0})
    assert drop["domains"] == pytest.approx({"day": -0.25, "dusk": 0.1})
    assert drop["mean"] == pytest.approx(-0.075)
    percent = relative_drop({"day": 60.0, "dusk": 55.0}, {"day": 80.0, "dusk": 50.0})
    assert percent["domains"] == pytest.approx(drop["domains"])


def test_relative_drop_names_every_domain_it_cannot_compare():
    values = {"day": 0.5, "dusk": 0.5, "rain": 0.5, "snow": 0.5}
    with pytest.raises(ValueError, match=r"dusk, rain.*snow.*above 0"):
        relative_drop(values, {"day": 0.4, "snow": 0.0})
    with pytest.raises(ValueError, match=r"day.*above 0, got nan"):
        relative_drop({"day": 0.5}, {"day": float("nan")})
    with pytest.raises(ValueError, match="one domain"):
        relative_drop({}, {"day": 0.5})


def with_hits(hits: int) -> np.ndarray:
    """Of 10 pixels of class 0 so many are found, the others called class 1: IoU hits/10 and 10/(20 - hits)."""
    return np.array([[hits, 10 - hits], [0, 10]]) * 1000


def test_forgetting_of_a_domain_whose_classes_stay_is_its_best_earlier_miou_minus_its_last():
    mious = [(hits / 10 + 10 / (20 - hits)) / 2 for hits in (6, 8, 4)]
    scores = sequence_scores([with_hits(6), with_hits(8), with_hits(4)], [(2,)] * 3, background=None)
    assert scores["step_matrix"] == [[pytest.approx(value)] for value in mious]
    assert scores["average_miou"] == pytest.approx(sum(mious) / 3)
    assert scores["forgetting"]["mean"] == pytest.approx(mious[1] - mious[2])
    assert scores["forgetting"]["groups"] == [pytest.approx(mious[1] - mious[2])]
    assert scores["forgetting"]["classes"] == [pytest.approx(0.4), pytest.approx(1 / 1.2 - 1 / 1.6)]
    assert scores["backward_transfer"]["mean"] == pytest.approx(mious[2] - mious[0])


def test_an_output_for_void_without_true_pixels_enters_no_mean():
    with_void = np.array(
        [[6, 1, 3], [2, 8, 1], [0, 0, 0]]
    )  # four pixels called void: missed, no false positives
    first, second = (6 / 12, 8 / 12)
    scores = step_scores(with_void, (3,), background=None)
    assert scores["miou"]["all"] == scores["miou"]["new"] == pytest.approx((first + second) / 2)
    assert scores["class_iou"] == [pytest.approx(first), pytest.approx(second), None]
    assert scores["mean_accuracy"] == pytest.approx((6 / 10 + 8 / 11) / 2)
    assert scores["overall_accuracy"] == 14 / 21
    assert scores["miou"]["all"] == pytest.approx(iou_eval(with_void, ignore_index=2)["miou"], rel=1e-6)
    better = np.array([[9, 1, 0], [1, 10, 0], [0, 0, 0]])
    sequence = sequence_scores([better, with_void], [(3,), (3,)], background=None)
    lost = (9 / 11 + 10 / 12 - first - second) / 2
    assert sequence["forgetting"]["mean"] == pytest.approx(lost, rel=1e-6)
    assert sequence["forgetting"]["classes"][2] is None
    assert sequence["average_miou"] == pytest.approx((first + second) / 2 + lost / 2)


def test_void_output_of_a_growing_branch_stands_in_its_first_group():
    """Groups grow behind the void output; it is left out of old and base there too."""
    counts = np.array([[5, 0, 0, 5], [0, 0, 0, 0], [0, 2, 8, 0], [1, 0, 0, 9]])
    means = step_scores(counts, (2, 2), background=None)["miou"]
    assert means["old"] == means["base"] == pytest.approx(5 / 11)
    assert means["new"] == pytest.approx((8 / 10 + 9 / 15) / 2)
