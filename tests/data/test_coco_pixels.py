"""COCO's polygons and run lengths have pycocotools' pixels, whatever stands in the file."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pycocotools import mask as reference

from everseg.data.datasets import coco
from everseg.data.datasets.coco_shapes import Picture, draw, run_lengths, unpack
from everseg.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # its `decode`
LIMIT = 10**8


def drawn(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The pixels of one object, (H, W) uint8."""
    return draw(Picture("a.png", height, width, [(1, segmentation)]), {1: 1}, LIMIT)


def pixels(segmentation: Any, height: int, width: int) -> np.ndarray:
    """As `annToMask` of pycocotools draws them."""
    parts = reference.frPyObjects(segmentation, height, width)
    return reference.decode(reference.merge(parts) if isinstance(parts, list) else parts)


def packed(mask: np.ndarray) -> str:
    return reference.encode(np.asfortranarray(mask))["counts"].decode()


def plain(mask: np.ndarray) -> list[int]:
    """Run lengths, counted one pixel after the other."""
    counts, value = [0], 0
    for pixel in mask.T.reshape(-1).tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


# Corners on whole and broken pixels, on the ties at .1, .3, .5, and somewhat outside of the picture.
corner = st.integers(-100, 500).map(lambda tenths: tenths / 10) | st.floats(-10, 50)
polygon = st.integers(3, 9).flatmap(lambda n: st.lists(corner, min_size=2 * n, max_size=2 * n))
side = st.integers(1, 40)


@settings(max_examples=400, deadline=None)
@given(st.lists(polygon, min_size=1, max_size=3), side, side)
def test_polygons_have_the_pixels_of_pycocotools(parts: list[list[float]], height: int, width: int) -> None:
    """Many parts, self-crossing and with corners outside."""
    assume(all(max(p[::2]) >= 0 and max(p[1::2]) >= 0 for p in parts))
    assume(all(min(p[::2]) <= width and min(p[1::2]) <= height for p in parts))
    np.testing.assert_array_equal(drawn(parts, height, width), pixels(parts, height, width))


@settings(max_examples=200, deadline=None)
@given(st.data(), side, side)
def test_run_lengths_plain_and_packed_have_the_pixels_of_pycocotools(data, height: int, width: int) -> None:
    seed, share = (
        data.draw(st.integers(0, 2**32 - 1)),
        data.draw(st.sampled_from([0.0, 0.03, 0.5, 0.97, 1.0])),
    )
    mask = (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)
    for counts in (packed(mask), plain(mask)):
        np.testing.assert_array_equal(drawn({"size": [height, width], "counts": counts}, height, width), mask)


def test_a_box_of_four_by_four_covers_sixteen_pixels_and_neighbours_do_not_overlap() -> None:
    left, right = [2, 2, 6, 2, 6, 6, 2, 6], [6, 2, 10, 2, 10, 6, 6, 6]
    expected = np.zeros((12, 16), np.uint8)
    expected[2:6, 2:6] = 1
    np.testing.assert_array_equal(drawn([left], 12, 16), expected)
    assert not (drawn([left], 12, 16) & drawn([right], 12, 16)).any()
    np.testing.assert_array_equal(drawn([left, right], 12, 16).sum(), 32)


def test_runs_of_many_characters_are_unpacked() -> None:
    """A picture so large that a run takes more than one character of either sign."""
    mask = np.zeros((700, 900), np.uint8)
    mask[100:300, 5:7] = mask[:, 300:600] = mask[650:, 899] = 1
    text = packed(mask)
    assert len(text) > len(plain(mask)) + 5
    np.testing.assert_array_equal(unpack(text), plain(mask))


def test_packed_text_by_hand() -> None:
    """Written from COCO's rule: 5 bits per character, and differences to the last but one from the fourth run on."""
    assert unpack("119").tolist() == [1, 1, 9]  # the third stands as it is
    assert unpack("1190").tolist() == [1, 1, 9, 1]  # the fourth is 1 - 1 = 0
    assert unpack("X1").tolist() == [40]  # 40 = 01000 with the flag, then 00001
    assert unpack("11O").tolist() == [1, 1, -1]  # 11111 without flag: the sign goes on
    assert unpack("").tolist() == []


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1, 2], "3 pixels"), ([13, -1], "negative"), ([1, "x"], "whole"), ([1.5, 10.5], "whole"),
        ([True, 11], "whole"), ([2**70, 1], "whole"), ([2**52, 2**52], "pixels for"), (7, "whole"),
        ("1", "1 pixel"), ("11O", "negative"), ("\x00", "hold"), ("\u0101", "hold"), ("X", "break off"),
        ("P" * 7 + "0", "hold"), ("PPPPPPO", "negative"), ("", "0 pixels"), ([], "0 pixels"),
        ("1" + "ooooo?" * 4000, "pixels for|negative"),
    ],
)  # fmt: skip
def test_run_lengths_that_do_not_fill_the_picture_are_refused(counts: Any, message: str) -> None:
    """pycocotools draws what stood in the memory for some of these, and others end the process."""
    with pytest.raises(DataError, match=message):
        run_lengths(counts, 3, 4)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([1, 2, 3, 4, 5, 6, 7], "three points"), ("1 2 3 4 5 6", "three points"),
        ([1, 2, float("nan"), 4, 5, 6], "three points"), ([1, 2, float("inf"), 4, 5, 6], "three points"),
        ([1, 2, 10**30, 4, 5, 6], "three points"), ([1, 2, True, 4, 5, 6], "three points"),
        ([1, 2, 1e12, 4, 5, 6], "around"), ([-1e6, -1e6, 1e6, 1e6] * 2000, "around"),
    ],
)  # fmt: skip
def test_polygons_that_would_end_the_process_are_refused(points: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        drawn([[1, 1, 5, 1, 5, 5], points], 12, 16)


def test_many_objects_take_no_more_memory_than_the_picture() -> None:
    height, width = 1500, 2000
    objects = [
        (1 + k % 2, [[k * 15, 10, k * 15 + 600, 10, k * 15 + 600, 1400, k * 15, 1400]]) for k in range(90)
    ]
    tracemalloc.start()
    try:
        mask = draw(Picture("a.png", height, width, objects), {1: 1, 2: 2}, LIMIT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert mask.shape == (height, width)
    assert mask.flags.c_contiguous
    assert peak < 3 * height * width, "the mask and its transpose"


def test_what_was_cached_of_masks_drawn_otherwise_is_not_used(monkeypatch, tmp_path) -> None:
    picture = Picture("a.png", 4, 4, [(1, [[0, 0, 4, 0, 4, 4]])])
    items = [(("a", "a.png", "a.json"), picture, {1: 1})]

    def names() -> tuple[str, str]:
        split = coco.CocoSplit("train", tmp_path, items)
        return split.decoding(), split.fingerprint()

    before = names()
    assert before == names()
    monkeypatch.setattr(coco, "DRAWING", coco.DRAWING + 1)
    assert all(old != new for old, new in zip(before, names(), strict=True))
