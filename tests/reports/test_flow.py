"""What classes turned into, against plain loops."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

from everseg.labels import LabelSpace
from everseg.reports import numbers as flow
from everseg.reports.numbers import flows, turns
from everseg.runs.results import Track

# background, road | car | sign: three growths; rows = truth
COUNTS = np.array(
    [
        [60, 10, 20, 10],
        [30, 40, 20, 10],
        [5, 15, 70, 10],
        [0, 0, 0, 0],
    ]
)
BORN = [0, 0, 1, 2]


def test_every_pixel_of_a_class_goes_to_one_kind() -> None:
    found = {one.train_id: one for one in flows(COUNTS, BORN, background=0)}
    assert sorted(found) == [0, 1, 2], "a class without a true pixel has no flow"
    assert found[0].shares == pytest.approx((0.6, 0.0, 0.3, 0.1, 0.0)), (
        "background: car and sign are later, road is not"
    )
    assert found[1].shares == pytest.approx((0.4, 0.3, 0.3, 0.0, 0.0))
    assert found[2].shares == pytest.approx((0.7, 0.05, 0.1, 0.0, 0.15))
    assert [found[c].pixels for c in (0, 1, 2)] == [100, 100, 100]


def test_kinds_follow_a_loop_over_random_counts() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = rng.integers(0, 50, (6, 6))
        born = sorted(rng.integers(0, 3, 6).tolist())
        background = [None, 0, 3][rng.integers(3)]
        for found in flows(counts, born, background):
            c, expected = found.train_id, dict.fromkeys(flow.KINDS, 0.0)
            for other in range(6):
                if other == c:
                    kind = "right"
                elif other == background:
                    kind = "background"
                else:
                    kind = (
                        "later" if born[other] > born[c] else "same" if born[other] == born[c] else "earlier"
                    )
                expected[kind] += counts[c, other] / counts[c].sum()
            assert found.shares == pytest.approx(tuple(expected.values()))
            assert sum(found.shares) == pytest.approx(1.0)


def test_the_largest_rises_come_first_and_what_was_not_there_counts_from_nothing() -> None:
    first = np.array([[90, 10], [50, 50]])
    found = turns(COUNTS, [first, first])
    assert [(t.truth, t.taken_for) for t in found] == [(0, 2), (1, 2), (0, 3), (1, 3)]
    assert [t.before for t in found] == [None, None, None, None]
    assert [t.rise for t in found] == pytest.approx([0.2, 0.2, 0.1, 0.1])
    better = np.array([[99, 1], [10, 90]])
    pairs = {(t.truth, t.taken_for): t for t in turns(COUNTS, [better, better])}
    assert pairs[1, 0].rise == pytest.approx(0.2), "30 % now, 10 % when it was learnt"
    assert pairs[1, 0].pixels == 30
    assert len(turns(COUNTS, [better, better], most=2)) == 2


def track(last: np.ndarray, first: np.ndarray) -> Track:
    """Two steps: background and road, then car and sign."""
    names = ("background", "road", "car", "sign")
    spaces = (
        LabelSpace(((0, 1),), names[:2], 0),
        LabelSpace(((0, 1), (2, 3)), names, 0),
    )
    return Track("default", "default", (0, 1), (first, last), spaces)


def test_the_confusion_matrix_is_sorted_by_step_then_by_what_is_right_least_often() -> None:
    counts = np.array([[60, 10, 20, 10], [30, 40, 20, 10], [5, 15, 70, 10], [10, 20, 30, 40]])
    found = flow.confusion(track(counts, np.array([[90, 10], [10, 90]])))
    assert found is not None
    assert found.names == ["road", "background", "sign", "car"]
    assert found.groups == [0, 0, 1, 1]
    assert found.shares[0] == pytest.approx([40, 30, 10, 20])
    assert found.shares[2] == pytest.approx([20, 10, 40, 30])
    assert found.rises[0] == pytest.approx([None, 20, 10, 20]), "road now background: 30 %, 10 % when learnt"
    assert found.rises[2] == [None] * 4, "new classes had no share before"
    rows = flow.count_rows(track(counts, counts[:2, :2]))
    assert rows[3] == {"true class": "sign", "called background": 10, "called road": 20, "called car": 30,
                       "called sign": 40}  # fmt: skip


def test_a_large_confusion_matrix_shows_the_classes_that_are_wrong_most() -> None:
    number = flow.MOST_CONFUSED + 5
    counts = np.diag(np.arange(1, number + 1)) + 1
    space = LabelSpace((tuple(range(number)),), tuple(f"c{i}" for i in range(number)), None)
    found = flow.confusion(Track("x", "x", (0,), (counts,), (space,)))
    assert found is not None
    assert (len(found.names), found.left_out, found.size) == (flow.MOST_CONFUSED, 5, "small")
    assert f"c{number - 1}" not in found.names, "right most often"
    assert (
        flow.confusion(Track("x", "x", (0,), (np.ones((1, 1), int),), (LabelSpace(((0,),), ("a",), 0),)))
        is None
    )


def test_new_classes_have_a_flow_with_names() -> None:
    counts = np.array([[60, 10, 20, 10], [30, 40, 20, 10], [5, 15, 70, 10], [10, 20, 30, 40]])
    made = track(counts, counts[:2, :2])
    rows = {row["class"]: row for row in flow.flow_rows(made, flow.new_flows(made))}
    assert set(rows) == {"car", "sign"}
    assert rows["sign"]["taken for"] == "car 30.0 %, road 20.0 %, background 10.0 %"
    assert rows["sign"]["classes learnt with it"] == pytest.approx(30)
    assert rows["sign"]["classes learnt before it"] == pytest.approx(20)


def test_the_examples_in_the_docstrings_hold() -> None:
    result = doctest.testmod(flow, extraglobs={"np": np})
    assert result.attempted
    assert not result.failed
