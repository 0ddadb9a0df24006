"""Batches with images of a memory and with further maps: which, where, and moved as the image is."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from everseg.config.fields import DataConfig
from everseg.data.base import Dataset
from everseg.data.batches.extra import MapFolder, missing_maps
from everseg.data.batches.loader import plain_batches, train_batches
from everseg.data.batches.memory import memory_draws, memory_places
from everseg.data.batches.samples import Samples, View
from everseg.data.batches.transforms import parted, with_maps
from everseg.errors import DataError
from everseg.labels import RawLabels
from everseg.types import Batch

TABLE = np.arange(256, dtype=np.uint8)
DATA = DataConfig(crop=32, workers=0)


class Pictures:
    """Images of noise whose grey is that of the mask."""

    def __init__(self, name: str, count: int, bad: frozenset[int] = frozenset()) -> None:
        self.name, self.count, self.bad = name, count, bad

    def __len__(self) -> int:
        return self.count

    def id(self, index: int) -> str:
        return f"{self.name}{index}"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index in self.bad:
            raise DataError(f"{self.id(index)} is broken")
        rng = np.random.RandomState(index + 100 * len(self.name))
        mask = rng.randint(0, 5, (44, 50)).astype(np.uint8)
        return np.stack([mask * 20] * 3, axis=2), mask

    def read_mask(self, index: int) -> np.ndarray:
        return self.read(index)[1]

    def fingerprint(self) -> str:
        return self.name


class Shifted:
    """A further map: the mask plus 100, in 8 or 16 bits."""

    def __init__(self, split: Pictures, kind: type = np.uint8) -> None:
        self.split, self.kind = split, kind

    def read(self, index: int) -> np.ndarray:
        return (self.split.read_mask(index) + 100).astype(self.kind)


def views(
    new: int = 10, old: int = 5, *, maps: bool = False, bad: frozenset[int] = frozenset()
) -> list[View]:
    a, b = Pictures("a", new), Pictures("mem", old, bad)
    extra = [{"sal": Shifted(split), "deep": Shifted(split, np.uint16)} if maps else {} for split in (a, b)]
    return [
        View(a, np.arange(new), TABLE, extra=extra[0]),
        View(b, np.arange(old), TABLE, extra=extra[1], memory=True),
    ]


def batches(given=None, data: DataConfig = DATA, start: int = 0, stop: int = 8, batch: int = 4, **options):
    given = views() if given is None else given
    return list(train_batches(given, data, seed=5, step=1, batch=batch, start=start, stop=stop, **options))


def digest(batch) -> str:
    parts = [batch.image, batch.label, batch.memory, *batch.extra.values()]
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


# ---------------------------------------------------------------- which images


@pytest.mark.parametrize("share", [0.5, 0.25, 0.75])
def test_a_share_of_every_batch_comes_from_the_memory(share):
    found = batches(memory_share=share, stop=20)
    assert [int(batch.memory.sum()) for batch in found] == [int(4 * share)] * 20
    for batch in found:
        assert [name.startswith("mem") for name in batch.ids] == batch.memory.tolist()
    # All places take part, and all images of the memory are shown equally often.
    assert {place for batch in found for place in np.flatnonzero(batch.memory)} == {0, 1, 2, 3}
    seen = Counter(name for batch in found for name in batch.ids if name.startswith("mem"))
    assert len(seen) == 5
    assert max(seen.values()) - min(seen.values()) <= 1


def test_the_other_places_hold_what_they_hold_without_memory():
    with_memory, without = batches(memory_share=0.5), batches(views()[:1])
    for one, other in zip(with_memory, without, strict=True):
        for place, from_memory in enumerate(one.memory.tolist()):
            if not from_memory:
                assert one.ids[place] == other.ids[place]
                assert torch.equal(one.image[place], other.image[place])
    assert all(batch.memory is None for batch in without)


def test_appended_images_are_shown_once_in_an_epoch_like_the_others():
    found = batches(stop=3, batch=5)
    assert Counter(name for batch in found for name in batch.ids) == Counter(
        [f"a{i}" for i in range(10)] + [f"mem{i}" for i in range(5)]
    )


@pytest.mark.parametrize("share", [None, 0.5, 0.3])
def test_ranks_restarts_and_workers_see_the_same(share):
    whole = batches(memory_share=share, batch=6)
    for world in (2, 3):
        shares = [batches(memory_share=share, batch=6, rank=rank, world=world) for rank in range(world)]
        for one, *parts in zip(whole, *shares, strict=True):
            assert one.ids == sum((part.ids for part in parts), ())
            assert torch.equal(one.image, torch.cat([part.image for part in parts]))
            assert torch.equal(one.memory, torch.cat([part.memory for part in parts]))
            if share == 0.5 and world == 3:  # every process has its share
                assert [int(part.memory.sum()) for part in parts] == [1, 1, 1]
    later = batches(memory_share=share, batch=6, start=5)
    assert [digest(batch) for batch in later] == [digest(batch) for batch in whole[5:]]
    two = batches(memory_share=share, batch=6, data=DATA.model_copy(update={"workers": 2}))
    assert [digest(batch) for batch in two] == [digest(batch) for batch in whole]


def test_an_image_shown_again_is_augmented_anew():
    found = batches(views(old=1), memory_share=0.25, stop=4)
    images = [batch.image[batch.memory][0] for batch in found]
    assert len({image.numpy().tobytes() for image in images}) == 4


def test_an_unreadable_image_of_the_memory_is_replaced_by_another_of_the_memory():
    data = DATA.model_copy(update={"skip_bad": 1})
    found = batches(views(bad=frozenset({2})), data, memory_share=0.5)
    assert all(int(batch.memory.sum()) == 2 for batch in found)
    assert {key for batch in found for key in batch.bad} == {("", "mem2")}
    assert all(name.startswith("mem") for b in found for name, m in zip(b.ids, b.memory, strict=True) if m)


def test_places_are_those_of_their_stretch_and_change_with_every_argument():
    base = memory_places(1, 2, 3, 24, 0.5)
    assert [place // 2 for place in base] == list(range(12))
    assert all(memory_places(*key, 24, 0.5) != base for key in [(0, 2, 3), (1, 0, 3), (1, 2, 0)])
    assert memory_places(1, 2, 3, 3, 0.3) == []
    assert len(memory_places(1, 2, 3, 100, 0.29)) == 29


def test_the_stream_goes_through_the_memory_again_and_again():
    whole = memory_draws(1, 2, 0, 12, 5)
    assert whole == [draw for first in (0, 3, 6, 9) for draw in memory_draws(1, 2, first, 3, 5)]
    assert [epoch for epoch, _ in whole] == [0] * 5 + [1] * 5 + [2] * 2
    assert sorted(number for _, number in whole[:5]) == list(range(5))
    assert [n for _, n in whole[:5]] != [n for _, n in whole[5:10]]


# ---------------------------------------------------------------- further maps

GEOMETRIES = {
    "crop": {},
    "scale range": {"scale_range": (0.3, 1.6)},
    "resize": {"transform": "resize", "size": (36, 28), "shift": 4},
    "resize, authors": {"transform": "resize", "size": (36, 28), "shift": 4, "shift_fill": "authors"},
    "turned": {"rotate": 1.0, "vertical_flip": 0.5},
    "colours": {"brightness": (0.5, 1.5), "blur": (0.0, 2.0), "hue": (-0.1, 0.1)},
}


@pytest.mark.parametrize("how", GEOMETRIES, ids=str)
def test_maps_are_moved_as_the_labels_are(how):
    data = DataConfig(crop=32, workers=0, **GEOMETRIES[how])
    found = batches(views(maps=True), data, memory_share=0.5)
    plain = batches(views(), data, memory_share=0.5)
    outside = 0
    for batch, without in zip(found, plain, strict=True):
        # Nothing that was there before has changed.
        assert torch.equal(batch.image, without.image)
        assert torch.equal(batch.label, without.label)
        label, sal, deep = (one.int() for one in (batch.label, *batch.extra.values()))
        inside = sal != 255
        assert torch.equal(sal[inside], label[inside] + 100)
        assert torch.equal(deep[inside], label[inside] + 100)
        assert (deep[~inside] == 65535).all()
        assert ((label[~inside] == 255) | (label[~inside] == 0)).all()
        outside += int((~inside).sum())
    assert (outside > 0) == (how in ("scale range", "resize", "resize, authors"))


@pytest.mark.parametrize("evaluation", ["crop", "whole", "resize"])
def test_test_images_have_their_maps_too(evaluation):
    data = DataConfig(crop=32, workers=0, size=(36, 28), evaluation=evaluation)
    for batch in plain_batches(views(maps=True)[:1], data, batch=3):
        assert torch.equal(batch.extra["sal"].int(), batch.label.int() + 100)


def test_a_batch_on_a_device_holds_maps_and_memory_and_is_cut_with_them():
    (loaded,) = batches(views(maps=True), memory_share=0.5, stop=1)
    batch = loaded.on(torch.device("cpu"), "imagenet")
    assert batch.extra["sal"].dtype == batch.extra["deep"].dtype == torch.int64
    assert batch.memory is not None
    assert batch.memory.dtype == torch.bool
    halves = batch.split(2)
    assert [int(half.memory.sum()) for half in halves] == [1, 1]
    assert torch.equal(torch.cat([half.extra["sal"] for half in halves]), batch.extra["sal"])
    assert Batch(batch.image, batch.label, "a").split(2)[0].memory is None


def test_a_wide_table_translates_the_label_and_leaves_the_maps():
    label = np.array([[1, 2], [3, 255]], np.uint8)
    joined = with_maps(label, {"label": label, "b": label})  # a map may have any name
    found, maps = parted(joined)
    assert np.array_equal(found, label)
    assert list(maps) == ["label", "b"]
    wide = np.arange(256, dtype=np.uint16) + 300
    samples = Samples(
        [View(Pictures("a", 1), np.arange(1), wide, extra={"sal": Shifted(Pictures("a", 1))})], DATA, 0, 0
    )
    sample, _ = samples[0, 0]
    assert sample.label.dtype == np.uint16
    assert sample.extra["sal"].dtype == np.uint8
    assert np.array_equal(sample.label, sample.extra["sal"].astype(np.uint16) + 200)


def write(path, array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_maps_are_found_in_the_folder_of_the_split_or_in_the_folder(tmp_path):
    split = Pictures("train", 2)
    write(tmp_path / "train0.png", np.full((44, 50), 7, np.uint8))
    assert MapFolder(tmp_path, split).read(0).max() == 7
    write(tmp_path / "train" / "train0.png", np.full((44, 50), 300, np.uint16))
    found = MapFolder(tmp_path, split).read(0)
    assert (found.dtype, int(found.max())) == (np.uint16, 300)
    low = np.full((44, 50), 3, np.uint16)  # the file has 16 bits, whatever its values are
    write(tmp_path / "train" / "train1.png", low)
    assert MapFolder(tmp_path, split).read(1).dtype == np.uint16


def test_missing_maps_are_told_all_at_once(tmp_path):
    datasets = {
        "d": Dataset(
            "d",
            RawLabels({0: "background", 1: "x"}, 0),
            {"train": Pictures("t", 30)},
            extra={"sal": str(tmp_path), "none": str(tmp_path / "no")},
        )
    }
    write(tmp_path / "t0.png", np.zeros((44, 50), np.uint8))
    first, second = missing_maps({("d", "train"): range(30)}, datasets)
    for part in ("data.extra.sal", "29 images", "t1.png", "t19.png"):
        assert part in first
    assert "data.extra.none" in second
    assert (
        missing_maps(
            {("d", "train"): [0]},
            {"d": Dataset("d", datasets["d"].labels, datasets["d"].splits, extra={"sal": str(tmp_path)})},
        )
        == []
    )


def test_a_map_of_another_size_is_named_with_both_sizes(tmp_path):
    split = Pictures("train", 1)
    write(tmp_path / "train0.png", np.zeros((44, 51), np.uint8))
    samples = Samples(
        [View(split, np.arange(1), TABLE, extra={"sal": MapFolder(tmp_path, split)})], DATA, 0, 0
    )
    error = samples[0, 0]
    assert isinstance(error, DataError)
    for part in ("train0.png", "51x44", "50x44"):
        assert part in str(error)


def test_a_fingerprint_changes_with_contents_and_names_not_with_the_place(tmp_path):
    split = Pictures("train", 2)
    for folder in ("one", "two"):
        for index in (0, 1):
            write(tmp_path / folder / f"train{index}.png", np.full((44, 50), index, np.uint8))
    one, two = (MapFolder(tmp_path / folder, split) for folder in ("one", "two"))
    assert one.fingerprint([0, 1]) == two.fingerprint([0, 1]) != one.fingerprint([0])
    write(tmp_path / "two" / "train1.png", np.full((44, 50), 9, np.uint8))
    assert one.fingerprint([0, 1]) != two.fingerprint([0, 1])
