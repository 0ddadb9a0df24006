"""Boundary IoU against a slow computation that erodes one mask at a time, and against values counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from everseg.labels import IGNORED
from everseg.metrics import boundary_scores, boundary_sums, boundary_width, iou_of_sums


def eroded(mask: np.ndarray, times: int) -> np.ndarray:
    """Erode by 3x3 again and again, pixel by pixel; what is outside of the image is not in the mask."""
    for _ in range(times):
        height, width = mask.shape
        smaller = np.zeros_like(mask)
        for y, x in np.ndindex(mask.shape):
            around = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            smaller[y, x] = all(0 <= b < height and 0 <= a < width and mask[b, a] for b, a in around)
        mask = smaller
    return mask


def slow_sums(
    prediction: np.ndarray, label: np.ndarray, num_classes: int, width: int, ignored: int = IGNORED
) -> np.ndarray:
    """Class after class: the mask without its erosion; ignored pixels erode nothing, and count nowhere."""
    without = label == ignored
    sums = np.zeros((3, num_classes), np.int64)
    for c in range(num_classes):
        regions = []
        for ids in (label, prediction):
            mask = (ids == c) & ~without
            regions.append(mask & ~eroded(mask | without, width))
        sums[:, c] = regions[0].sum(), regions[1].sum(), (regions[0] & regions[1]).sum()
    return sums


def blobs(rng: np.random.Generator, height: int, width: int, classes: int) -> np.ndarray:
    coarse = rng.integers(0, classes, (-(-height // 5), -(-width // 5)), dtype=np.uint8)
    return coarse.repeat(5, 0).repeat(5, 1)[:height, :width]


@pytest.mark.parametrize(
    ("height", "width", "share"), [(17, 23, 0.02), (20, 14, 0.09), (3, 40, 0.1), (12, 12, 0.5)]
)
def test_sums_are_those_of_masks_eroded_one_by_one(height, width, share):
    rng = np.random.default_rng(height)
    reach = max(1, round(share * (height**2 + width**2) ** 0.5))
    for trial in range(4):
        label, prediction = (blobs(rng, height, width, 4) for _ in range(2))
        prediction = np.where(rng.random(label.shape) < 0.7, label, prediction)
        if trial % 2:
            label = np.where(blobs(rng, height, width, 4) == 3, np.uint8(IGNORED), label)
        found = boundary_sums(torch.from_numpy(prediction), torch.from_numpy(label), 4, share=share)
        np.testing.assert_array_equal(found, slow_sums(prediction, label, 4, reach))


def test_many_classes_use_their_own_ignored_label():
    rng = np.random.default_rng(0)
    label, prediction = (300 - blobs(rng, 10, 12, 3).astype(np.int32) for _ in range(2))
    label[2:5, 3:9] = 65535
    found = boundary_sums(torch.from_numpy(prediction), torch.from_numpy(label), 301)
    np.testing.assert_array_equal(found, slow_sums(prediction, label, 301, 1, 65535))


def test_a_square_shifted_by_one_pixel_as_counted_by_hand():
    """Squares of 6x6 with a rim of 20 pixels; shifted by one, their rims meet in two rows of 5."""
    label, prediction = torch.zeros(40, 40, dtype=torch.uint8), torch.zeros(40, 40, dtype=torch.uint8)
    label[10:16, 10:16] = 1
    prediction[10:16, 11:17] = 1
    truth, predicted, both = boundary_sums(prediction, label, 2)[:, 1].tolist()
    assert boundary_width(40, 40) == 1
    assert (truth, predicted, both) == (20, 20, 10)


def test_the_width_is_two_percent_of_the_diagonal():
    assert [boundary_width(h, w) for h, w in ((1024, 2048), (3, 4), (375, 500))] == [46, 1, 12]


def test_what_lies_under_ignored_pixels_changes_nothing():
    rng = np.random.default_rng(1)
    label = blobs(rng, 24, 24, 3)
    label[5:15, 4:20] = IGNORED
    perfect = np.where(label == IGNORED, blobs(rng, 24, 24, 3), label)
    scores = iou_of_sums(
        boundary_sums(torch.from_numpy(perfect), torch.from_numpy(label), 3).numpy(), eps=0.0
    )
    np.testing.assert_array_equal(scores, 1.0)
    others = [
        np.where(label == IGNORED, np.uint8(k), blobs(np.random.default_rng(9), 24, 24, 3)) for k in (0, 2)
    ]
    first, second = (boundary_sums(torch.from_numpy(p), torch.from_numpy(label), 3) for p in others)
    assert torch.equal(first, second)


def test_means_follow_the_groups_and_leave_out_absent_classes():
    sums = np.array([[10, 8, 0, 5], [10, 4, 3, 5], [5, 4, 0, 5]])
    found = boundary_scores(sums, (2, 2), background=0)
    a, b, d = 5 / 15, 4 / 8, 1.0
    assert found["class_boundary_iou"] == [a, b, None, d]
    assert found["boundary_iou"] == pytest.approx(
        {"all": (a + b + d) / 3, "base": (a + b) / 2, "old": (a + b) / 2, "new": d}
    )
    assert found["boundary_iou_without_background"] == pytest.approx(
        {"all": (b + d) / 2, "base": b, "old": b, "new": d}
    )


def test_sizes_that_differ_are_refused():
    with pytest.raises(ValueError, match="same size"):
        boundary_sums(torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(3, 2, dtype=torch.uint8), 2)
