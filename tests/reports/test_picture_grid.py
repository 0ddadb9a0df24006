"""The rule by which pictures are chosen, and what the last column shows."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from everseg.data.class_colours import BACKGROUND_COLOUR
from everseg.labels import LabelSpace
from everseg.reports.picture_grid import (
    CHANGES,
    Looked,
    change,
    choose,
    css,
    drawn,
    grids,
    places,
    ranked_over,
)
from everseg.runs.results import Track
from everseg.scenarios.steps import Source


def looked(number: int, wrong: int, name: str = "default") -> Looked:
    """Ten pixels of class 1, so many of them taken for background."""
    label = np.ones((1, 10), np.uint8)
    after = label.copy()
    after[0, :wrong] = 0
    return Looked(name, f"{number:02d}", np.zeros((1, 10, 3), np.uint8), label, {0: label.copy(), 1: after})


def test_the_worst_the_median_and_the_best_by_the_given_classes_then_a_seeded_draw() -> None:
    images = [looked(number, wrong) for number, wrong in enumerate([3, 9, 0, 5, 7, 1, 2, 8, 4])]
    chosen = choose(images, {"default": [0, 1]}, {"default": 2}, 1, seed=0)
    assert [(one.kind, one.id) for one in chosen[:3]] == [("worst", "01"), ("median", "08"), ("best", "02")]
    assert chosen[0].score == pytest.approx(0.1), "IoU of class 1; background has no true pixel"
    assert len(chosen) == 4
    assert chosen[3].kind == "random"
    assert chosen[3].id not in {"01", "08", "02"}
    again = choose([replace(one) for one in images], {"default": [0, 1]}, {"default": 2}, 1, seed=0)
    assert [one.id for one in again] == [one.id for one in chosen]
    draws = {choose(images, {"default": [0, 1]}, {"default": 2}, 1, seed=s)[3].id for s in range(20)}
    assert len(draws) > 2, "another seed may draw another image"


def test_images_without_any_of_the_classes_are_no_candidates_and_few_images_are_not_shown_twice() -> None:
    images = [looked(0, 5), looked(1, 2)]
    assert choose(images, {"default": [0]}, {"default": 2}, 2, seed=0) == []
    assert [one.id for one in choose(images, {"default": [1]}, {"default": 2}, 2, seed=0)] == ["00", "01"]


def test_every_name_has_its_own_ranking() -> None:
    images = [looked(0, 9, "day"), looked(1, 1, "day"), looked(2, 5, "dusk")]
    ids = {"day": [1], "dusk": [1]}
    chosen = choose(images, ids, {"day": 2, "dusk": 2}, 1, seed=0)
    assert [(one.name, one.kind, one.id) for one in chosen] == [
        ("day", "worst", "00"), ("day", "best", "01"), ("dusk", "worst", "02")
    ]  # fmt: skip


def test_the_change_of_every_pixel() -> None:
    label = np.array([[0, 1, 1, 0, 255]], np.uint8)
    first = np.array([[0, 1, 0, 1, 0]], np.uint8)
    last = np.array([[0, 0, 1, 1, 0]], np.uint8)
    one = Looked("x", "x", np.zeros((1, 5, 3), np.uint8), label, {0: first, 1: last})
    assert [CHANGES[i] for i in change(one)[0]] == ["right", "forgotten", "learnt", "wrong", "ignored"]
    one.predictions = {0: label, 1: first, 2: last}
    assert [CHANGES[i] for i in change(one)[0]][:4] == ["right", "forgotten", "right", "forgotten"], (
        "any earlier step"
    )
    one.predictions = {1: last}
    assert [CHANGES[i] for i in change(one)[0]][:4] == ["right", "wrong", "right", "wrong"]


def test_images_are_drawn_evenly_with_the_seed_and_stay_in_order() -> None:
    sources = [Source(name, name, "val", tuple(range(100)), bytes(256), name) for name in ("day", "dusk")]
    found = drawn(sources, 10, seed=1)
    assert [len(source.indices) for source in found] == [5, 5]
    assert all(list(s.indices) == sorted(set(s.indices)) for s in found)
    assert found == drawn(sources, 10, seed=1)
    assert found != drawn(sources, 10, seed=2)
    assert [len(s.indices) for s in drawn(sources, 1000, seed=1)] == [100, 100]


def test_numbers_stand_in_the_middle_of_the_thickest_part_of_a_class() -> None:
    ids = np.zeros((40, 80), np.uint8)
    ids[10:30, 40:70] = 3
    ids[2, :] = 3  # a thin line of the same class
    ids[39, 79] = 5  # too small
    found = {one.name: one for one in places(ids, [f"c{i}" for i in range(20)])}
    assert set(found) == {"c0", "c3"}
    assert found["c3"].text == "3"
    assert 0.55 < found["c3"].left < 0.85
    assert 0.4 < found["c3"].top < 0.6
    row, column = int(found["c0"].top * 40), int(found["c0"].left * 80)
    assert ids[row, column] == 0
    assert places(ids, ()) == []


def test_old_and_new_classes_are_scored_apart_and_background_does_not_rank() -> None:
    """The best image by old classes alone would be one whose new class is missed whole."""
    names = ("background", "road", "cat")
    spaces = (LabelSpace(((0, 1),), names[:2], 0), LabelSpace(((0, 1), (2,)), names, 0))
    track = Track("default", "default", (0, 1), (np.eye(2, dtype=int), np.eye(3, dtype=int)), spaces)
    label = np.array([[0, 0, 0, 0, 1, 1, 2, 2, 2, 2]], np.uint8)
    missed = np.array([[0, 0, 0, 0, 1, 1, 0, 0, 0, 0]], np.uint8)
    photo = np.zeros((1, 10, 3), np.uint8)
    images = [
        Looked("default", "missed", photo, label, {0: missed, 1: missed}),
        Looked("default", "right", photo, label, {0: missed, 1: label}),
    ]
    assert ranked_over(track) == [1, 2]
    (grid,) = grids(images, [track], 64, 1, seed=0)
    rows = {row.detail.split(" · ")[0]: row for row in grid.rows}
    assert rows["missed"].title == "Worst"
    assert rows["missed"].detail.endswith("mean IoU 50.0 · old classes 100.0 (road) · new classes 0.0 (cat)")
    assert "old: road; new: cat" in grid.ranking
    notes = [picture.note if picture else None for picture in rows["right"].pictures]
    assert notes == ["", "", "mIoU 100.0", "mIoU 100.0", ""], "the first model knew no cat"
    assert rows["missed"].pictures[3].note == "mIoU 50.0"


@pytest.mark.parametrize(("background", "dark"), [(None, 0), (0, 2)])
def test_no_class_is_near_black_where_there_is_no_background(background: int | None, dark: int) -> None:
    spaces = (LabelSpace(((0, 1),), ("road", "car"), background),)
    track = Track("city", "city", (0,), (np.eye(2, dtype=int),), spaces)
    ids = np.array([[0, 0, 1, 1]], np.uint8)
    image = Looked("city", "a", np.zeros((1, 4, 3), np.uint8), ids, {0: ids}, background=background)
    (grid,) = grids([image], [track], 64, 1, seed=0)
    for picture in grid.rows[0].pictures[1:3]:
        shown = Image.open(io.BytesIO(base64.b64decode(picture.uri.split(",")[1]))).convert("RGB")
        assert (np.asarray(shown) == BACKGROUND_COLOUR).all(2).sum() == dark
    assert (css(BACKGROUND_COLOUR) in dict(grid.legend)) == (dark > 0)
