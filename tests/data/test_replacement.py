"""Training samples that cannot be read, with a stand-in in their place: which one, whatever workers and ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from everseg.config.fields import DataConfig
from everseg.data.batches.loader import epoch_order, plain_batches, train_batches
from everseg.data.batches.samples import Loaded, View
from everseg.errors import DataError

COUNT = 16


@dataclass
class Flaky:
    """Samples of one colour each, their index; some cannot be read."""

    bad: frozenset[int]
    name: str = "flaky"

    def __len__(self) -> int:
        return COUNT

    def id(self, index: int) -> str:
        return f"{self.name}-{index}"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index in self.bad:
            raise DataError(f"{self.id(index)}: gone")
        return np.full((12, 12, 3), index, np.uint8), np.full((12, 12), index % 4, np.uint8)


def views(*bad: int) -> list[View]:
    table = np.arange(256, dtype=np.uint8)
    return [
        View(Flaky(frozenset(bad)), np.arange(COUNT), table, "one"),
        View(Flaky(frozenset(), "other"), np.arange(COUNT), table, "two"),
    ]


def batches(*bad: int, allowed: int, start: int = 0, stop: int = 24, **options) -> list[Loaded]:
    workers = options.pop("workers", 0)
    data = DataConfig(crop=8, workers=workers, skip_bad=allowed)
    return list(train_batches(views(*bad), data, seed=5, step=1, batch=4, start=start, stop=stop, **options))


def seen(loaded: Iterable[Loaded]) -> list[tuple]:
    return [(batch.ids, batch.bad, batch.image.numpy().tobytes()) for batch in loaded]


def test_only_the_places_of_bad_samples_change_and_another_of_the_same_branch_stands_there():
    plain, replaced = batches(allowed=0), batches(3, 7, allowed=2)
    met = 0
    for before, after in zip(plain, replaced, strict=True):
        assert before.branch == after.branch
        for old, new, picture in zip(before.ids, after.ids, after.image, strict=True):
            if old in ("flaky-3", "flaky-7"):
                met += 1
                assert new.startswith("flaky-")
                assert new not in ("flaky-3", "flaky-7")
                assert after.bad["", old] == f"{old}: gone"
            else:
                assert new == old
            assert picture.unique().tolist() == [int(new.split("-")[1])]
    assert met == 6, "three epochs, two bad samples"
    stand_ins = {
        n for b, a in zip(plain, replaced, strict=True) for o, n in zip(b.ids, a.ids, strict=True) if o != n
    }
    assert len(stand_ins) > 2, "not always the same one"


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_restarts_see_the_same(workers: int):
    whole = seen(batches(3, 7, 8, allowed=3))
    assert seen(batches(3, 7, 8, allowed=3, workers=workers)) == whole
    for start in (1, 6, 17):
        assert seen(batches(3, 7, 8, allowed=3, start=start)) == whole[start:]


def test_ranks_share_what_one_process_sees_and_a_higher_limit_changes_nothing():
    whole = batches(3, 7, allowed=2)
    assert seen(batches(3, 7, allowed=9)) == seen(whole)
    shares = [batches(3, 7, allowed=2, rank=rank, world=2) for rank in (0, 1)]
    for one, two, both in zip(*shares, whole, strict=True):
        assert one.ids + two.ids == both.ids
        assert {**one.bad, **two.bad} == both.bad
        assert torch.equal(torch.cat([one.image, two.image]), both.image)


def test_one_draw_that_finds_too_many_bad_ones_stops_and_names_them():
    good = int(epoch_order(5, 1, 0, COUNT)[-1])
    bad = [i for i in range(COUNT) if i != good]
    with pytest.raises(DataError, match=r"(?s)3 training samples.*data\.skip_bad.* 2:.*gone"):
        batches(*bad, allowed=2)
    with pytest.raises(DataError, match="no training sample"):
        batches(*range(COUNT), allowed=99)


@pytest.mark.parametrize("branches", [("one", "two"), ("same", "same")])
def test_samples_of_one_id_in_two_data_sets_are_two(branches: tuple[str, str]):
    table = np.arange(256, dtype=np.uint8)
    twins = [
        View(Flaky(frozenset({3})), np.arange(COUNT), table, branch, dataset)
        for branch, dataset in zip(branches, ("day", "dusk"), strict=True)
    ]
    data = DataConfig(crop=8, workers=0, skip_bad=2)
    loaded = train_batches(twins, data, seed=5, step=1, batch=4, start=0, stop=8)
    assert {key for batch in loaded for key in batch.bad} == {("day", "flaky-3"), ("dusk", "flaky-3")}


def test_measuring_never_leaves_a_sample_out():
    data = DataConfig(crop=8, workers=0, skip_bad=5)
    with pytest.raises(DataError, match=r"^flaky-3: gone$"):
        list(plain_batches(views(3), data, batch=4))
    passed = [name for batch in plain_batches(views(3), data, batch=4, replace=1) for name in batch.ids]
    assert len(passed) == 2 * COUNT
    assert "flaky-3" not in passed
