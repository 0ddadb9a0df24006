"""Statistics of single images against sets of pixels counted one by one."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from everseg.metrics import dice, image_statistics, iou

CLASSES = 3


def counts_of(label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    known = label != 255
    return np.array(
        [
            [int(((label == c) & known).sum()) for c in range(CLASSES)],
            [int(((prediction == c) & known).sum()) for c in range(CLASSES)],
            [int(((prediction == c) & (label == c)).sum()) for c in range(CLASSES)],
        ]
    )


@pytest.fixture(scope="module")
def maps() -> list[tuple[np.ndarray, np.ndarray]]:
    """Images of one to three classes, one of them without a labelled pixel."""
    rng = np.random.default_rng(3)
    made = []
    for number in range(9):
        label = rng.integers(0, 1 + number % CLASSES, (6, 7))
        label[:2, :number] = 255
        if number == 4:
            label[:] = 255
        made.append(
            (label, np.where(rng.random(label.shape) < 0.6, label % 5, rng.integers(0, CLASSES, label.shape)))
        )
    return made


def sets(label: np.ndarray, prediction: np.ndarray, c: int) -> tuple[set, set]:
    places = [(y, x) for y, x in np.ndindex(label.shape) if label[y, x] != 255]
    return {p for p in places if label[p] == c}, {p for p in places if prediction[p] == c}


def test_statistics_are_those_of_sets_of_pixels(maps):
    names = [f"val/{i}" for i in range(len(maps))]
    found = image_statistics(np.stack([counts_of(*pair) for pair in maps]), names, worst=3)
    per_class: dict[str, list[list[float]]] = {key: [[] for _ in range(CLASSES)] for key in ("iou", "dice")}
    per_image: dict[str, dict[str, float]] = {"iou": {}, "dice": {}}
    alarms = [0] * CLASSES
    for name, (label, prediction) in zip(names, maps, strict=True):
        own: dict[str, list[float]] = {"iou": [], "dice": []}
        for c in range(CLASSES):
            truth, predicted = sets(label, prediction, c)
            if not truth:
                alarms[c] += bool(predicted)
                continue
            values = {
                "iou": len(truth & predicted) / len(truth | predicted),
                "dice": 2 * len(truth & predicted) / (len(truth) + len(predicted)),
            }
            for key, value in values.items():
                per_class[key][c].append(value)
                own[key].append(value)
        for key, values_of_image in own.items():
            if values_of_image:
                per_image[key][name] = statistics.fmean(values_of_image)
    for key in ("iou", "dice"):
        for what, of in (("mean", statistics.fmean), ("median", statistics.median), ("lowest", min)):
            assert found[key][what] == pytest.approx(of(per_image[key].values()), rel=1e-12)
            expected = [of(values) for values in per_class[key]]
            assert found[f"class_{key}"][what] == pytest.approx(expected, rel=1e-12)
    assert found["images"] == 9
    assert found["class_images"] == [len(values) for values in per_class["iou"]]
    assert found["class_false_alarms"] == alarms
    assert any(alarms)
    worst = sorted(per_image["iou"], key=lambda name: per_image["iou"][name])[:3]
    assert [one["image"] for one in found["worst"]] == worst
    assert "val/4" not in per_image["iou"], "an image without a labelled pixel decides nothing"


def test_nothing_to_count_is_none_and_no_warning():
    found = image_statistics(np.zeros((2, 3, 2), np.uint32))
    assert found["iou"] == {"mean": None, "median": None, "lowest": None}
    assert found["class_dice"]["median"] == [None, None]
    assert found["worst"] == []
    with pytest.raises(ValueError, match="N names"):
        image_statistics(np.zeros((2, 3, 2), np.uint32), ["a"])


def test_dice_of_a_data_set_is_that_of_its_sets_of_pixels(maps):
    counts = np.zeros((CLASSES, CLASSES), np.int64)
    for label, prediction in maps:
        for y, x in np.ndindex(label.shape):
            if label[y, x] != 255:
                counts[label[y, x], prediction[y, x]] += 1
    pairs = [[sets(label, prediction, c) for label, prediction in maps] for c in range(CLASSES)]
    expected = [
        2 * sum(len(t & p) for t, p in each) / sum(len(t) + len(p) for t, p in each) for each in pairs
    ]
    assert dice(counts) == pytest.approx(expected, rel=1e-15)
    assert dice(counts) == pytest.approx(2 * iou(counts, eps=0.0) / (1 + iou(counts, eps=0.0)), rel=1e-14)
    assert np.isnan(dice(np.array([[2, 1], [0, 0]]))[1])
    assert dice(np.diag([5, 3])).tolist() == [1.0, 1.0]
