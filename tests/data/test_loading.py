"""Batches: the order, the shares, the augmentation and the failures, whatever the number of workers and ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from everseg.config import DataConfig
from everseg.data.loading import (
    Loaded,
    View,
    epoch_length,
    epoch_order,
    plain_batches,
    train_batches,
)
from everseg.errors import DataError

DATA = DataConfig(crop=16, workers=0)
TABLE = np.arange(256, dtype=np.uint8)


@dataclass
class Memory:
    """Samples of random pixels, made from their index; some may be bad or deadly."""

    count: int
    name: str = "memory"
    size: tuple[int, int] = (20, 24)
    bad: frozenset[int] = frozenset()
    deadly: frozenset[int] = frozenset()
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    home: int = field(default_factory=os.getpid)

    def __len__(self) -> int:
        return self.count

    def id(self, index: int) -> str:
        return f"{self.name}/{index:03d}.png"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index in self.bad:
            raise DataError(f"{self.id(index)}: truncated image; replace the file")
        if index in self.deadly and os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        rng = np.random.RandomState(index)
        size = self.sizes.get(index, self.size)
        return rng.randint(0, 256, (*size, 3), dtype=np.uint8), rng.randint(0, 5, size, dtype=np.uint8)

    def read_mask(self, index: int) -> np.ndarray:
        return self.read(index)[1]

    def fingerprint(self) -> str:
        return self.name


def view(split: Memory, indices: Iterable[int] | None = None, table: np.ndarray = TABLE) -> View:
    return View(split, np.asarray(list(range(len(split)) if indices is None else indices)), table)


def train(split: Memory, *, workers: int = 0, **options: object) -> list[Loaded]:
    settings = {"seed": 7, "step": 1, "batch": 4, "start": 0, "stop": 9, **options}
    return list(train_batches([view(split)], DATA.model_copy(update={"workers": workers}), **settings))


def ids(batches: list[Loaded]) -> list[tuple[str, ...]]:
    return [batch.ids for batch in batches]


def assert_equal(one: list[Loaded], two: list[Loaded]) -> None:
    assert ids(one) == ids(two)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.label, b.label)


# ---------------------------------------------------------------- order


def test_the_order_is_a_permutation_that_only_seed_step_and_epoch_decide() -> None:
    base = epoch_order(3, 1, 2, 50)
    np.random.seed(99)  # the global generator must not matter
    np.testing.assert_array_equal(epoch_order(3, 1, 2, 50), base)
    np.testing.assert_array_equal(np.sort(base), np.arange(50))
    for other in ((4, 1, 2), (3, 0, 2), (3, 1, 3), (31, 1, 2)):
        assert not np.array_equal(epoch_order(*other, 50), base), other


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    """Resuming elsewhere must see the same pixels; these numbers may never change."""
    assert epoch_order(0, 0, 0, 8).tolist() == ORDER_000
    assert epoch_order(3, 1, 2, 8).tolist() == ORDER_312


ORDER_000 = [7, 5, 1, 6, 2, 3, 4, 0]
ORDER_312 = [5, 6, 7, 0, 1, 2, 4, 3]


def test_an_epoch_shows_every_sample_once_but_for_the_last_incomplete_batch() -> None:
    batches = train(Memory(11), batch=4, stop=2 * 3)
    assert epoch_length([11], 4) == 2
    for epoch in range(3):
        shown = [name for batch in batches[2 * epoch : 2 * epoch + 2] for name in batch.ids]
        assert len(shown) == len(set(shown)) == 8
        order = epoch_order(7, 1, epoch, 11)[:8]
        assert shown == [f"memory/{position:03d}.png" for position in order]
    left_out = [
        set(range(11)) - {int(n[-7:-4]) for b in batches[2 * e : 2 * e + 2] for n in b.ids} for e in range(3)
    ]
    assert len(set(map(frozenset, left_out))) > 1, "each epoch drops other samples"


def test_the_same_sample_is_cut_differently_in_each_epoch_step_and_seed() -> None:
    split = Memory(1)
    pictures = [
        train(split, batch=1, stop=2),
        train(split, batch=1, stop=1, step=2),
        train(split, batch=1, stop=1, seed=8),
    ]
    flat = [batch.image.numpy().tobytes() for batches in pictures for batch in batches]
    assert len(flat) == len(set(flat)) == 4


def test_a_list_shorter_than_a_batch_makes_one_smaller_batch() -> None:
    assert epoch_length([3], 8) == 1
    batches = train(Memory(3), batch=8, stop=2)
    assert [sorted(batch.ids) for batch in batches] == [[f"memory/00{i}.png" for i in range(3)]] * 2
    assert batches[0].image.shape == (3, 3, 16, 16)


def test_labels_go_through_the_table_of_their_own_view() -> None:
    other = np.full(256, 255, np.uint8)
    other[:5] = [10, 11, 12, 13, 14]
    first, second = Memory(4, "a"), Memory(4, "b")
    views = [view(first, [0, 3]), view(second, [2], other)]
    (batch,) = train_batches(views, DATA, seed=0, step=0, batch=3, start=0, stop=1)
    for name, label in zip(batch.ids, batch.label, strict=True):
        expected = {0, 1, 2, 3, 4} if name.startswith("a/") else {10, 11, 12, 13, 14}
        assert set(label.unique().tolist()) <= expected
    assert sorted(batch.ids) == ["a/000.png", "a/003.png", "b/002.png"]


# ---------------------------------------------------------------- workers, ranks, restarts


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(workers: int) -> None:
    split = Memory(13)
    assert_equal(train(split, workers=workers), train(split))


@pytest.mark.parametrize("world", [2, 4])
def test_the_shares_of_the_ranks_make_up_the_batches_of_one_process(world: int) -> None:
    split = Memory(13)
    shares = [train(split, batch=8, rank=rank, world=world) for rank in range(world)]
    whole = train(split, batch=8)
    assert len(whole) == 9
    for parts, batch in zip(zip(*shares, strict=True), whole, strict=True):
        assert {len(part.ids) for part in parts} == {8 // world}
        assert sum((part.ids for part in parts), ()) == batch.ids
        assert torch.equal(torch.cat([part.image for part in parts]), batch.image)
        assert torch.equal(torch.cat([part.label for part in parts]), batch.label)


def test_a_restart_in_the_middle_gives_the_tail() -> None:
    split = Memory(13)
    whole = train(split, stop=11)
    for start in (1, 3, 5, 10):
        assert_equal(train(split, start=start, stop=11), whole[start:])
    assert train(split, start=11, stop=11) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restart_after_the_last_iteration_gives_nothing(workers: int) -> None:
    assert train(Memory(8), start=4, stop=4, workers=workers) == []


def test_more_processes_than_images_is_told() -> None:
    with pytest.raises(DataError, match="step 1 has 2 images, fewer than the 3 processes"):
        train(Memory(2), batch=3, rank=0, world=3)


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("evaluation", ["crop", "whole"])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_evaluation_sees_every_sample_exactly_once(evaluation: str, world: int, count: int) -> None:
    data = DATA.model_copy(update={"evaluation": evaluation})
    views = [view(Memory(count, "a")), view(Memory(4, "b"), [3, 1])]
    seen = [
        name
        for rank in range(world)
        for batch in plain_batches(views, data, batch=3, rank=rank, world=world)
        for name in batch.ids
    ]
    expected = [f"a/{i:03d}.png" for i in range(count)] + ["b/001.png", "b/003.png"]
    assert sorted(seen) == sorted(expected)


def test_whole_images_keep_their_pixels_and_may_differ_in_size() -> None:
    split = Memory(3, sizes={1: (31, 17)})
    data = DATA.model_copy(update={"evaluation": "whole"})
    for index, batch in enumerate(plain_batches([view(split)], data, batch=8)):
        image, label = split.read(index)
        np.testing.assert_array_equal(batch.image[0].permute(1, 2, 0).numpy(), image)
        np.testing.assert_array_equal(batch.label[0].numpy(), label)
    cropped = list(plain_batches([view(split)], DATA, batch=8))
    assert [tuple(batch.label.shape) for batch in cropped] == [(3, 16, 16)]


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_is_one_data_error_that_names_it(workers: int) -> None:
    with pytest.raises(DataError) as caught:
        train(Memory(8, bad=frozenset({5})), workers=workers)
    assert str(caught.value) == "memory/005.png: truncated image; replace the file"


@pytest.mark.slow
def test_a_worker_that_is_killed_is_a_data_error_that_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"loader process stopped.*data\.workers=0"):
        train(Memory(8, deadly=frozenset({5})), workers=1)


def test_pixels_that_are_not_bytes_are_told() -> None:
    class Floats(Memory):
        def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            image, label = super().read(index)
            return image.astype(np.float32), label

    with pytest.raises(DataError, match=r"memory/000\.png: images and masks must be uint8, got float32"):
        train(Floats(1), batch=1, stop=1)
