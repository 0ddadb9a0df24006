"""Published lists and a user's own."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from everseg.config.fields import ScenarioConfig
from everseg.data.base import Dataset
from everseg.errors import ConfigError, DataError
from everseg.labels import RawLabels
from everseg.scenarios import lists, published
from everseg.scenarios.class_incremental import build
from everseg.scenarios.lists import check_list, published_lists, read_lists, resolve_lists, sha1_int64
from saying import must_say

IDS = [f"farm/{i:02d}" for i in range(8)]


@pytest.fixture
def sized(fake_split):
    """Build a data set of a name with so many training images."""
    return lambda name, length: _sized(fake_split, name, length)


def _sized(fake_split, name, length):
    labels = RawLabels({i: f"class {i}" if i else "background" for i in range({"voc": 21, "ade": 151}[name])})
    return Dataset(name, labels, {"train": fake_split("train", length)})


def test_the_checksum_is_sha1_over_int64():
    assert (
        sha1_int64(np.array([1, 2], np.int32))
        == hashlib.sha1(b"\1" + b"\0" * 7 + b"\2" + b"\0" * 7).hexdigest()
    )


def test_every_published_list_loads_and_fits_its_data():
    sizes = {}
    for name, length in (("voc", 10582), ("ade", 20210)):
        for task, protocol in published_lists(name):
            for step, indices in enumerate(published(name, task, protocol)):
                assert check_list(indices, length, "") == []
                sizes[name, task, protocol, step] = len(indices)
    # golden/README.md 1.2
    assert (sizes["ade", "100-50", "disjoint", 0], sizes["ade", "100-50", "disjoint", 1]) == (13452, 6744)
    assert len({key[:2] for key in sizes}) == 3 + 6


def test_disjoint_voc_lists_are_within_the_overlapped_ones():
    for task in ("15-5", "15-5s", "19-1"):
        pairs = zip(published("voc", task, "disjoint"), published("voc", task, "overlapped"), strict=True)
        for small, large in pairs:
            assert set(small.tolist()) <= set(large.tolist())


def test_an_alias_finds_the_lists_and_what_was_not_published_is_none():
    ours, theirs = published("voc", "15-1", "overlapped"), published("voc", "15-5s", "overlapped")
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert published("voc", "10-1", "overlapped") is None
    assert published("voc", "15-5", "partitioned") is None
    assert published("ade", "100-10c", "disjoint") is None
    assert published("ade", "100-50", "overlapped") is None
    assert published("farm", "2-1", "disjoint") is None


def test_a_damaged_table_is_noticed(monkeypatch):
    monkeypatch.setattr(lists, "_read_packed", lambda key: np.arange(5))
    with pytest.raises(DataError, match=r"voc/15-5/train-0: checksum differs"):
        published("voc", "15-5", "disjoint")


def test_published_lists_need_the_complete_data_set_and_a_published_task(sized):
    config = ScenarioConfig(task="100-50b", protocol="disjoint", lists="published")
    assert len(resolve_lists(config, sized("ade", 20210), 2)) == 2
    with pytest.raises(DataError, match=r"20210 images.* 100"):
        resolve_lists(config, sized("ade", 100), 2)
    with pytest.raises(ConfigError, match=r"ade, task 100-50b, overlapped.*published: 100-10 "):
        resolve_lists(config.model_copy(update={"protocol": "overlapped"}), sized("ade", 20210), 2)
    ordered = ScenarioConfig(task="15-5", protocol="disjoint", lists="published", order=list(range(1, 21)))
    with pytest.raises(ConfigError, match="order of your own"):
        resolve_lists(ordered, sized("voc", 10582), 2)
    explicit = ScenarioConfig(task=[[1], [2]], protocol="disjoint", lists="published")
    with pytest.raises(ConfigError, match="published lists for voc"):
        resolve_lists(explicit, sized("voc", 10582), 2)
    with pytest.raises(ConfigError, match="has no split 'train'"):
        resolve_lists(config, Dataset("ade", RawLabels({}), {}), 2)
    assert resolve_lists(ScenarioConfig(), sized("voc", 5), 2) is None


def test_own_lists_may_be_positions_or_ids_in_any_order(tmp_path):
    np.save(tmp_path / "train-0.npy", np.array([5, 1], np.int32))
    (tmp_path / "train-1.txt").write_text("# dogs\nfarm/07\n\nfarm/00\n")
    (tmp_path / "train-2.txt").write_text("3\n0\n")
    read = read_lists(tmp_path, 3, IDS)
    assert [one.tolist() for one in read] == [[5, 1], [7, 0], [3, 0]]
    assert all(one.dtype == np.int64 for one in read)


def test_numbers_that_are_ids_are_ids(tmp_path):
    (tmp_path / "train-0.txt").write_text("2\n0\n")
    assert read_lists(tmp_path, 1, ["2", "1", "0"])[0].tolist() == [0, 2]


NUMBERS = ["003", "001", "007", "000", "005"]
"""Ids of a split that are numbers, such as file names of a video."""


@pytest.mark.parametrize(
    ("lists", "facts"),
    [
        (["003\n001\n004\n"], ("train-0.txt", "'004'", "1 of 3")),  # one mistyped: 4 would be a position
        (["003\n001\n", "04\n"], ("train-1.txt", "'04'")),  # alone in a file
        (["3\n1\n0\n"], ("train-0.txt", "'3'", "position 3", "'003'", ".npy")),  # zeros lost in a spreadsheet
        (["003\n001.png\n"], ("train-0.txt", "'001.png'", "'001'")),
    ],
)
def test_a_list_of_ids_never_turns_into_positions(tmp_path, lists, facts):
    for step, text in enumerate(lists):
        (tmp_path / f"train-{step}.txt").write_text(text)
    with pytest.raises(DataError) as caught:
        read_lists(tmp_path, len(lists), NUMBERS)
    must_say(caught.value, *facts)


def test_positions_beside_numbers_are_positions_where_both_readings_agree(tmp_path):
    (tmp_path / "train-0.txt").write_text("\ufeff1\n4\n", encoding="utf-8")
    assert read_lists(tmp_path, 1, NUMBERS)[0].tolist() == [1, 4]  # '001' is at position 1, and no id means 4


def test_build_uses_own_lists(dataset, counts, tmp_path):
    (tmp_path / "train-0.txt").write_text("train/004\ntrain/000\n")
    np.save(tmp_path / "train-1.npy", [5, 1])
    np.save(tmp_path / "train-2.npy", [6])
    steps = build(ScenarioConfig(task="2-1", lists=str(tmp_path)), dataset, counts, seed=0)
    assert [step.train[0].indices for step in steps] == [(4, 0), (5, 1), (6,)]


def test_missing_double_and_superfluous_files_are_told_at_once(tmp_path):
    with pytest.raises(ConfigError, match="no folder"):
        read_lists(tmp_path / "nowhere", 2, IDS)
    np.save(tmp_path / "train-0.npy", [0])
    (tmp_path / "train-0.txt").write_text("0")
    np.save(tmp_path / "train-2.npy", [0])
    with pytest.raises(ConfigError) as caught:
        read_lists(tmp_path, 2, IDS)
    text = str(caught.value)
    must_say(text, "both", "train-0")
    must_say(text, "neither", "train-1")
    must_say(text, "train-2.npy", "2 steps")


def test_all_faults_in_own_lists_are_told_with_their_file(tmp_path):
    np.save(tmp_path / "train-0.npy", np.array([0, 8, -1]))
    np.save(tmp_path / "train-1.npy", np.array([[0.5, 1.0]]))
    (tmp_path / "train-2.txt").write_text("farm/00\nfarm/99\n")
    np.save(tmp_path / "train-3.npy", np.array([{"a": 1}], object), allow_pickle=True)
    (tmp_path / "train-4.txt").write_text("farm/01\nfarm/01\n")
    (tmp_path / "train-5.npy").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        read_lists(tmp_path, 6, IDS)
    text = str(caught.value)
    assert "train-0.npy: position 8" in text
    assert "0 to 7" in text
    must_say(text, "train-1.npy", "one row", "integers")
    must_say(text, "train-2.txt", "1 of 2 lines", "first 'farm/99'")
    must_say(text, "train-3.npy", "an array of object")
    must_say(text, "train-4.txt", "image 1", "2 times")
    assert "train-5.npy" in text
