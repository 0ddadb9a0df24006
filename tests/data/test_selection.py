"""Which images a memory keeps: by classes in turn, by a reservoir, at random."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.golden_memory import check_memory

from everseg.data.batches.selection import flat, reservoir, round_robin, uniform
from everseg.scenarios.class_incremental import drawn_owners

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"


def stream(seed: int = 0) -> np.random.RandomState:
    return np.random.RandomState(seed)


def pool(count: int, classes: int, seed: int) -> list[set[int]]:
    rng = np.random.RandomState(seed)
    return [set((1 + np.flatnonzero(rng.rand(classes) < 0.3)).tolist()) for _ in range(count)]


def slow_round_robin(shows, classes, size, seed):
    """The rule in other words: strike names off a list, class after class."""
    np.random.seed(seed)
    names = [*range(len(shows))]
    np.random.shuffle(names)
    turns = [*classes]
    np.random.shuffle(turns)
    kept = []
    while len(kept) < size and any(shows[n] & set(turns) for n in names):
        for c in turns:
            fitting = [n for n in names if c in shows[n]]
            if fitting and len(kept) < size:
                kept.append((c, fitting[0]))
                names.remove(fitting[0])
    return [n for c, n in sorted(kept, key=lambda pair: pair[0])]


@pytest.mark.parametrize("seed", range(6))
def test_the_round_robin_is_the_rule_in_other_words(seed):
    shows = pool(30, 5, seed)
    for size in (0, 1, 7, 12, 30, 100):
        found = flat(round_robin(shows, [1, 2, 3, 4, 5], size, stream(seed)))
        assert found == slow_round_robin(shows, [1, 2, 3, 4, 5], size, seed)
        assert len(set(found)) == len(found) <= size


def test_every_class_has_about_as_many_images_where_there_are_enough():
    taken = round_robin(pool(200, 4, 1), [1, 2, 3, 4], 10, stream())
    assert sorted(map(len, taken.values())) == [2, 2, 3, 3]


def test_a_pool_without_enough_images_ends_the_turns_and_other_classes_do_not_count():
    assert flat(round_robin([{1}, {9}, set()], [1, 2], 5, stream())) == [0]
    assert flat(round_robin([], [1, 2], 5, stream())) == []


def test_the_global_streams_are_left_alone():
    np.random.seed(5)
    random.seed(5)
    before = np.random.get_state()[1].tolist(), random.getstate()
    round_robin(pool(9, 3, 0), [1, 2, 3], 4, stream())
    reservoir(pool(9, 3, 0), [], [1, 2, 3], 4, stream(), random.Random(1))
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before


def test_a_reservoir_offers_one_image_after_the_other_to_its_rarest_class():
    # Worked out by hand, with a stream that does not shuffle: 2 places, so each of two classes may have one.
    still = SimpleNamespace(shuffle=lambda values: None)
    shows = [{1}, {1}, {1, 2}, {1}]
    found = reservoir(shows, [], [1, 2], 2, still, random.Random(0))
    # 0 and 1 fill it; 2 is rarest in class 2, which has none: one of the two of class 1 leaves; 3 finds no place.
    (left,) = found[1]
    assert found == {1: [left], 2: [2]}
    assert left in (0, 1)


def test_a_reservoir_keeps_what_it_holds_and_shrinks_from_the_largest_class():
    found = reservoir([{1}, {1}, {2}], [1, 1, 2], [1, 2, 3], 2, stream(), random.Random(0))
    assert [len(found[c]) for c in (1, 2, 3)] == [1, 1, 0]
    assert reservoir([{1}, set(), {7}], [1], [1, 2], 3, stream(), random.Random(0)) == {1: [0], 2: []}


def test_random_images_are_kept_with_one_probability_whenever_they_were_offered():
    """Three steps of 12, 6 and 18 images into 6 places: each image stays with probability 1/6."""
    count: Counter[tuple[int, int]] = Counter()
    trials = 4000
    for trial in range(trials):
        memory: list[tuple[int, int]] = []
        offered = 0
        for step, number in enumerate((12, 6, 18)):
            candidates = [*memory, *((step, image) for image in range(number))]
            kept = uniform(len(memory), offered, number, 6, stream(1000 * trial + step))
            memory, offered = [candidates[place] for place in kept], offered + number
        assert len(memory) == 6
        count.update(memory)
    share = np.array(
        [count[step, image] for step, number in enumerate((12, 6, 18)) for image in range(number)]
    )
    assert abs(share / trials - 1 / 6).max() < 0.03  # five standard deviations


@pytest.mark.parametrize(
    ("held", "before", "now", "size", "expected"),
    [(0, 0, 3, 5, 3), (4, 9, 0, 4, 4), (4, 9, 3, 2, 2), (0, 0, 0, 4, 0)],
)
def test_random_choices_of_too_few_or_too_many(held, before, now, size, expected):
    found = uniform(held, before, now, size, stream())
    assert len(set(found)) == expected
    assert set(found) <= set(range(held + now))


def test_the_authors_draw_of_owners_takes_one_number_for_every_image_with_a_class():
    assert drawn_owners([[3], [1, 2], [], [2, 1]], 4) == drawn_owners([[3], [2, 1], [], [1, 2]], 4)
    rng = np.random.RandomState(4)
    rng.choice(1)
    assert drawn_owners([[3], [5, 9, 7]], 4) == [3, [5, 7, 9][rng.choice(3)]]


@pytest.mark.golden
def test_memories_and_partitions_of_the_original_code():
    if not list(GOLDEN.glob("*_memory_*.npz")):
        pytest.skip("the golden files are not here")
    rows = check_memory(GOLDEN)
    assert len(rows) >= 8
    assert [row for row in rows if row.difference > row.limit] == []
