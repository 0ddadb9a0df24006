"""Batches: the order, the shares, the augmentation and the failures, whatever the number of workers and ranks."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import re
import signal
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from types import FunctionType, ModuleType

import numpy as np
import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from everseg.config.fields import DataConfig
from everseg.data.batches import loader as loading
from everseg.data.batches.loader import (
    Loaded,
    Timed,
    View,
    epoch_length,
    epoch_order,
    plain_batches,
    train_batches,
)
from everseg.data.batches.transforms import flip_and_shift, resize_transform, sample_rng
from everseg.data.datasets.files import FileSplit
from everseg.errors import DataError
from saying import must_say

DATA = DataConfig(crop=16, size=(10, 14), workers=0)
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
    slow: dict[int, float] = field(default_factory=dict)
    home: int = field(default_factory=os.getpid)
    handed: Event = field(default_factory=mp.Event)
    """Set once the first batch has arrived: only then does a deadly sample kill its worker."""

    def __len__(self) -> int:
        return self.count

    def id(self, index: int) -> str:
        return f"{self.name}/{index:03d}.png"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index in self.bad:
            raise DataError(f"{self.id(index)}: truncated image; replace the file")
        if index in self.deadly and os.getpid() != self.home:
            assert self.handed.wait(60)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.slow.get(index, 0))
        rng = np.random.RandomState(index)
        size = self.sizes.get(index, self.size)
        return rng.randint(0, 256, (*size, 3), dtype=np.uint8), rng.randint(0, 5, size, dtype=np.uint8)

    def read_mask(self, index: int) -> np.ndarray:
        return self.read(index)[1]

    def fingerprint(self) -> str:
        return self.name


def view(
    split: Memory,
    indices: Iterable[int] | None = None,
    table: np.ndarray = TABLE,
    branch: str = "default",
) -> View:
    return View(split, np.asarray(list(range(len(split)) if indices is None else indices)), table, branch)


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
    with pytest.raises(DataError, match=r"step 1.* 2 images.* 3 processes"):
        train(Memory(2), batch=3, rank=0, world=3)


# ---------------------------------------------------------------- several branches


def domains() -> list[View]:
    """Three branches of 9, 5 and 12 samples; the second one's samples come from two splits around the third's."""
    day, dusk, night = Memory(9, "day"), Memory(3, "dusk"), Memory(12, "night")
    return [
        view(day, branch="day"),
        view(dusk, branch="dusk"),
        view(night, branch="night"),
        view(Memory(4, "dawn"), [3, 1], branch="dusk"),
    ]


def train_domains(views: list[View] | None = None, **options: object) -> list[Loaded]:
    settings = {"seed": 7, "step": 1, "batch": 2, "start": 0, "stop": 18, **options}
    return list(train_batches(domains() if views is None else views, DATA, **settings))


def test_branches_take_turns_and_start_again_when_the_shortest_has_no_whole_batch_left() -> None:
    assert epoch_length([9, 5, 12], 2) == 6
    batches = train_domains()
    assert [batch.branch for batch in batches] == ["day", "dusk", "night"] * 6
    homes = {"day": {"day"}, "dusk": {"dusk", "dawn"}, "night": {"night"}}
    for epoch in range(3):
        for branch, names in homes.items():
            shown = [n for b in batches[6 * epoch : 6 * epoch + 6] if b.branch == branch for n in b.ids]
            assert len(set(shown)) == 4, "two whole batches, no sample twice"
            assert {name.split("/")[0] for name in shown} <= names
    dusk = {name for batch in batches if batch.branch == "dusk" for name in batch.ids}
    assert len(dusk) == 5, "over three epochs every sample of the shortest branch is met"


def test_each_branch_has_an_order_of_its_own_and_the_first_that_of_a_single_branch() -> None:
    same = [view(Memory(8, "a"), branch="a"), view(Memory(8, "b"), branch="b")]
    batches = train_domains(same, batch=4, stop=4)
    shown = [[int(n[-7:-4]) for b in batches[first::2] for n in b.ids] for first in (0, 1)]
    assert shown[0] == epoch_order(7, 1, 0, 8).tolist()
    assert shown[1] == epoch_order(7, 1, 0, 8, branch=1).tolist() != shown[0]


def test_a_branch_shorter_than_a_batch_makes_smaller_batches_and_the_others_whole_ones() -> None:
    views = [view(Memory(6, "a"), branch="a"), view(Memory(3, "b"), branch="b")]
    batches = train_domains(views, batch=4, stop=4)
    assert epoch_length([6, 3], 4) == 2
    assert [len(batch.ids) for batch in batches] == [4, 3, 4, 3]


def test_a_restart_anywhere_gives_the_same_turns() -> None:
    whole = train_domains()
    for start in range(18):
        assert_equal(train_domains(start=start), whole[start:])
        assert [b.branch for b in train_domains(start=start)] == [b.branch for b in whole[start:]]


def test_the_shares_of_the_ranks_make_up_the_batches_of_each_branch() -> None:
    whole = train_domains(batch=4, stop=6)
    shares = [train_domains(batch=4, stop=6, rank=rank, world=2) for rank in range(2)]
    for parts, batch in zip(zip(*shares, strict=True), whole, strict=True):
        assert [part.branch for part in parts] == [batch.branch] * 2
        assert sum((part.ids for part in parts), ()) == batch.ids
        assert torch.equal(torch.cat([part.image for part in parts]), batch.image)


def test_a_branch_with_fewer_images_than_processes_is_named() -> None:
    views = [view(Memory(6, "a"), branch="day"), view(Memory(1, "b"), branch="dusk")]
    with pytest.raises(DataError, match=r"step 1.* 1 image.*'dusk'.* 2 processes"):
        train_domains(views, world=2)


@pytest.mark.parametrize("world", [1, 2])
def test_without_augmentation_batches_never_mix_branches(world: int) -> None:
    seen = []
    for rank in range(world):
        for batch in plain_batches(domains(), DATA, batch=4, rank=rank, world=world):
            homes = {name.split("/")[0] for name in batch.ids}
            assert homes <= {"day": {"day"}, "dusk": {"dusk", "dawn"}, "night": {"night"}}[batch.branch]
            seen += batch.ids
    expected = [v.split.id(int(index)) for v in domains() for index in v.indices]
    assert sorted(seen) == sorted(expected)


# ---------------------------------------------------------------- whole images at one size


def resized(**options: object) -> DataConfig:
    return DATA.model_copy(update={"transform": "resize", "evaluation": "resize", **options})


def test_resized_training_images_are_moved_and_padded_by_the_sample_s_own_stream() -> None:
    split = Memory(4, sizes={2: (31, 17)})
    table = np.full(256, 255, np.uint8)
    table[:5] = [3, 4, 5, 6, 7]  # class 0 of the authors' strip is train id 0, whatever raw id 0 means
    for fill in ("void", "authors"):
        data = resized(shift_fill=fill)
        (batch,) = train_batches([view(split, table=table)], data, seed=2, step=1, batch=4, start=0, stop=1)
        assert batch.image.shape == (4, 3, 10, 14)
        for name, image, label in zip(batch.ids, batch.image, batch.label, strict=True):
            x, y = resize_transform(*split.read(int(name[-7:-4])), size=(10, 14))
            rng = sample_rng(2, 1, 0, name)
            x, y = flip_and_shift(x, table[y], flip=0.5, shift=2, fill=fill, rng=rng)
            np.testing.assert_array_equal(image.numpy(), x)
            np.testing.assert_array_equal(label.numpy(), y)
        assert (0 in batch.label) == (fill == "authors")


def test_resized_evaluation_stacks_images_of_any_size_unmoved() -> None:
    split = Memory(3, sizes={1: (31, 17)})
    (batch,) = plain_batches([view(split)], resized(), batch=8)
    for index in range(3):
        x, y = resize_transform(*split.read(index), size=(10, 14))
        np.testing.assert_array_equal(batch.image[index].numpy(), x)
        np.testing.assert_array_equal(batch.label[index].numpy(), y)


# ---------------------------------------------------------------- memory and waiting


def peak(work: Callable[[], object]) -> int:
    """Bytes that Python objects and arrays take at most while `work` runs."""
    work()  # what is made once
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_iterations() -> None:
    def first(stop: int) -> Callable[[], object]:
        return lambda: next(
            train_batches([view(Memory(8))], DATA, seed=7, step=1, batch=4, start=0, stop=stop)
        )

    assert peak(first(10**9)) < 1.2 * peak(first(10)) < 1e6


def test_of_each_image_evaluation_keeps_some_bytes_only() -> None:
    """Its place in the lists of positions, 8 bytes each; no Python object per image or batch."""
    data = DATA.model_copy(update={"evaluation": "whole"})
    indices = np.zeros(100_000, np.int64)
    views = [View(Memory(1), indices, TABLE)]
    assert peak(lambda: next(plain_batches(views, data, batch=8))) < 40 * len(indices)


def test_a_split_of_files_is_a_few_objects_however_many_there_are(tmp_path: Path) -> None:
    """What a forked worker would copy page by page as it counts references."""

    def objects(count: int) -> int:
        names = [(f"{i:06d}", f"images/{i:06d}.jpg", f"masks/{i:06d}.png") for i in range(count)]
        return len(reachable(FileSplit("train", tmp_path, names)))

    assert objects(20_000) == objects(10) < 200


def reachable(root: object) -> set[int]:
    """Ids of the objects that hang on one, classes and modules left out."""
    seen: dict[int, object] = {}
    queue = [root]
    while queue:
        one = queue.pop()
        if id(one) not in seen and not isinstance(one, (type, ModuleType, FunctionType)):
            seen[id(one)] = one
            queue += gc.get_referents(one)
    return set(seen)


def test_batches_for_a_gpu_are_pinned_by_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: pinned.append(self.shape) or self)
    (batch,) = train(Memory(4), stop=1)
    again = pin_memory(batch)
    assert pinned == [(4, 3, 16, 16), (4, 16, 16)]
    assert_equal([again], [batch])


def test_the_time_spent_waiting_for_batches_is_counted() -> None:
    def slow() -> Iterator[Loaded]:
        time.sleep(0.05)
        yield from train(Memory(8), stop=2)

    batches = Timed(slow())
    next(batches)
    first = batches.seconds
    time.sleep(0.2)  # the step's own time
    batches.seconds = 0.0
    assert len(list(batches)) == 1
    assert first >= 0.05
    assert batches.seconds < 0.1


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("evaluation", ["crop", "whole", "resize", "sliding"])
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


@pytest.mark.parametrize("evaluation", ["whole", "sliding"])
def test_whole_images_keep_their_pixels_and_may_differ_in_size(evaluation: str) -> None:
    split = Memory(3, sizes={1: (31, 17)})
    data = DATA.model_copy(update={"evaluation": evaluation})
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
    must_say(caught.value, "memory/005.png", "truncated image")


def second() -> int:
    """Index of the sample that makes the second batch of `one_by_one`."""
    return int(epoch_order(7, 1, 0, 8)[1])


def one_by_one(split: Memory) -> Iterator[Loaded]:
    """Batches of one sample, read by one worker."""
    data = DATA.model_copy(update={"workers": 1})
    return train_batches([view(split)], data, seed=7, step=1, batch=1, start=0, stop=9)


def test_a_worker_that_is_killed_is_a_data_error_that_says_what_to_do() -> None:
    split = Memory(8, deadly=frozenset({second()}))
    batches = one_by_one(split)
    next(batches)
    split.handed.set()
    with pytest.raises(DataError, match=r"loader process stopped.*data\.workers=0"):
        list(batches)


def test_a_worker_that_dies_during_the_step_does_not_break_into_it() -> None:
    split, before = Memory(8, deadly=frozenset({second()})), set(mp.active_children())
    batches = one_by_one(split)
    next(batches)
    (worker,) = set(mp.active_children()) - before
    split.handed.set()
    # until it is dead; left to its parent, whose handler of torch's own would raise here
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(DataError, match="loader process stopped"):
        list(batches)


class Broken:
    """Stands for torch's loader: a batch comes as an error."""

    error: Exception

    def __init__(self, *_: object, **__: object) -> None: ...

    def __iter__(self) -> Iterator[object]:
        raise self.error
        yield


@pytest.mark.parametrize(
    "error",
    [EOFError(), ConnectionResetError(), OSError("got end of file during message"),
     RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
     RuntimeError("Too many open files. Raise it")],
)  # fmt: skip
def test_a_pipe_that_breaks_tells_of_the_loader(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(loading, "DataLoader", Broken)
    monkeypatch.setattr(Broken, "error", error, raising=False)
    what = re.escape(str(error) or type(error).__name__)
    with pytest.raises(DataError, match=rf"loader process .*hung \({what}\)"):
        train(Memory(8), workers=1)


@pytest.mark.parametrize(
    ("error", "workers"),
    [(ConnectionError("Caught ConnectionError in DataLoader worker process 0."), 1),
     (RuntimeError("request timed out"), 1), (EOFError("no data left"), 0), (ConnectionError("no answer"), 0)],
)  # fmt: skip
def test_an_error_of_the_users_own_reader_stays_what_it_is(
    monkeypatch: pytest.MonkeyPatch, error: Exception, workers: int
) -> None:
    monkeypatch.setattr(loading, "DataLoader", Broken)
    monkeypatch.setattr(Broken, "error", error, raising=False)
    with pytest.raises(type(error)) as caught:
        train(Memory(8), workers=workers)
    assert caught.value is error


@pytest.mark.slow
def test_a_slow_sample_is_waited_for_and_a_hung_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "LOOK_EVERY", 1)
    assert len(train(Memory(4, slow={1: 2.5}), workers=1, stop=1)) == 1
    monkeypatch.setattr(loading, "PATIENCE", 1)
    with pytest.raises(DataError, match=r"loader process .*hung"):
        train(Memory(4, slow={1: 60.0}), workers=1, stop=1)


def test_pixels_that_are_not_bytes_are_told() -> None:
    class Floats(Memory):
        def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            image, label = super().read(index)
            return image.astype(np.float32), label

    with pytest.raises(DataError, match=r"memory/000\.png.*float32.*uint8"):
        train(Floats(1), batch=1, stop=1)
