"""What the estimate of the old classes' quality counts, on predictions written by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from everseg.config.fields import DataConfig
from everseg.deploy import old_classes as kept
from everseg.labels import LabelSpace
from saying import must_say

OLD = LabelSpace(((0, 1, 2),), ("background", "road", "tree"))
NEW = LabelSpace(((0, 1, 2), (3,)), ("background", "road", "tree", "car"))
PAIR = kept.Pair("before", "after", OLD, NEW, "default")


@pytest.fixture
def estimate(monkeypatch: pytest.MonkeyPatch):
    """Estimate from one row of pixels: label, what the deployed model says, what the new one says."""

    def of(label: list[int], before: list[int], after: list[int]) -> kept.Kept:
        said = {"before": before, "after": after}
        monkeypatch.setattr(
            kept, "through", lambda model, *rest: torch.tensor([[said[model]]], dtype=torch.uint8)
        )
        monkeypatch.setattr(
            kept,
            "_batches",
            lambda *rest: iter([(torch.zeros(1, 3, 1, len(label)), torch.tensor([[label]]))]),
        )
        return kept.estimated(PAIR, SimpleNamespace(), {}, DataConfig(), SimpleNamespace(), batch=1)

    return of


def test_a_new_class_where_it_is_labelled_is_no_loss(estimate):
    """The deployed model took the cars for road and trees: rightly they are neither now."""
    found = estimate(label=[3, 3, 3, 0, 0, 0], before=[1, 1, 2, 1, 2, 0], after=[3, 3, 3, 1, 2, 0])
    assert found.share == pytest.approx(1, abs=1e-5)
    assert found.figures["agreement"] == 1
    assert found.figures["became_new"] == 0


def test_nor_is_what_the_new_model_says_instead_of_a_labelled_new_class(estimate):
    assert estimate([3, 0, 0], [1, 1, 2], [2, 1, 2]).share == pytest.approx(1, abs=1e-5)


def test_every_other_change_counts_by_what_it_became(estimate):
    """Eight pixels of road and two of trees; a void pixel counts, whoever is right."""
    found = estimate(
        label=[0, 0, 0, 0, 0, 0, 0, 255, 0, 0, 0],
        before=[1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 0],
        after=[1, 1, 1, 1, 3, 2, 0, 3, 2, 2, 3],
    )
    assert found.share == pytest.approx((4 / 8 + 2 / 2) / 2, abs=1e-5)
    assert found.figures["agreement"] == pytest.approx(6 / 11)
    shares = [found.figures[f"became_{what}"] for what in ("new", "old", "background")]
    assert shares == pytest.approx([2 / 10, 1 / 10, 1 / 10])
    must_say(found.text, "20.0 % became a new class", "10.0 % another old class", "10.0 % background")
    must_say(found.text, "new class", "Not counted")


def test_a_change_for_the_better_is_no_loss(estimate):
    """The label is a tree, the deployed model said road: that it says tree now is what more labels are for."""
    assert estimate([2, 1], [1, 1], [2, 1]).share == pytest.approx(1, abs=1e-5)
    # but a change to another wrong class is one, and so is a change where nothing is labelled
    assert estimate([2, 1], [1, 1], [3, 1]).share == pytest.approx(0.5, abs=1e-5)
    assert estimate([0, 1], [1, 1], [0, 1]).share == pytest.approx(0.5, abs=1e-5)


def test_the_text_names_the_classes_that_are_not_judged(estimate):
    """The deployed model finds no tree, so nothing is said of trees."""
    must_say(estimate([0, 0], [1, 1], [1, 1]).text, "1 of 2", "tree")
    must_say(estimate([0, 0], [1, 2], [1, 2]).text, "2 of 2")


def test_and_background_that_becomes_an_old_class_does_not_count(estimate):
    """All old pixels stay, and half of what is now called road is background: here it is more."""
    assert estimate([0, 1], [0, 1], [1, 1]).share == pytest.approx(1, abs=1e-5)


def test_without_old_classes_there_is_nothing_to_estimate(estimate):
    assert estimate([3, 0], [1, 0], [3, 0]).share is None


def test_the_figures_add_up_on_random_predictions(estimate):
    rng = np.random.RandomState(0)
    label, before, after = rng.randint(0, 4, 999), rng.randint(0, 3, 999), rng.randint(0, 4, 999)
    found = estimate(label.tolist(), before.tolist(), after.tolist()).figures
    righted = (label > 0) & (before != label) & (after == label)
    old = (label < 3) & (before > 0) & ~righted
    changed = (old & (before != after)).sum() / old.sum()
    assert sum(found[f"became_{what}"] for what in ("new", "old", "background")) == pytest.approx(changed)
