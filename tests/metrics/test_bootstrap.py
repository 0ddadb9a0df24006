"""The bootstrap over images against whole confusion matrices, one draw at a time."""

from __future__ import annotations

import numpy as np
import pytest

from everseg.metrics import group_miou, resampled_sums, step_scores, sums_of


@pytest.fixture
def matrices() -> np.ndarray:
    """Seven images of four classes; the last class has true pixels in the first image only."""
    counts = np.random.RandomState(0).randint(0, 30, (7, 4, 4))
    counts[1:, 3] = 0
    return counts


def test_every_draw_is_what_step_scores_makes_of_its_images(matrices):
    images = np.stack([sums_of(one) for one in matrices]).astype(np.uint32)
    found = group_miou(resampled_sums(images, 50, seed=3), (2, 1, 1), background=0)
    rng = np.random.RandomState(3)
    missing = 0
    for draw in range(50):
        chosen = matrices[rng.randint(0, 7, 7)].sum(0)
        scores = step_scores(chosen, (2, 1, 1), background=0)
        missing += chosen[3].sum() == 0
        for key in ("miou", "miou_without_background"):
            for group in ("old", "new", "all"):
                expected = scores[key][group]
                value = found[key][group][draw]
                assert np.isnan(value) if expected is None else value == pytest.approx(expected, abs=1e-12)
            assert found[key]["base"][draw] == pytest.approx(scores[key]["base"], abs=1e-12)
        later = [value for value in scores["class_iou"][2:] if value is not None]
        assert found["miou"]["later"][draw] == pytest.approx(np.mean(later), abs=1e-12)
    assert 0 < missing < 50, "the rare class is absent in some draws and in others not"


def test_the_draws_depend_on_seed_and_number_only(matrices):
    images = np.stack([sums_of(one) for one in matrices])
    again = resampled_sums(images, 20, seed=1)
    np.testing.assert_array_equal(resampled_sums(images, 20, seed=1), again)
    assert (resampled_sums(images, 20, seed=2) != again).any()
    np.testing.assert_array_equal(resampled_sums(2 * images, 20, seed=1), 2 * again)


def test_the_first_draws_are_these_on_every_machine():
    images = np.zeros((5, 3, 1), np.uint32)
    images[:, 0, 0] = [1, 10, 100, 1000, 10000]
    assert resampled_sums(images, 2, seed=0)[:, 0, 0].tolist() == [FIRST, SECOND]


FIRST, SECOND = 13001, 11111
