"""A second check reads what changed; the skip list and the lock file go to disk and back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trees

from everseg.config.fields import DataConfig
from everseg.data.datasets import load_dataset
from everseg.data.datasets.options import read_skiplist, skiplist_line
from everseg.data.doctor import doctor, examine
from everseg.data.doctor import doctor as check_cache
from everseg.data.doctor import findings as check_files
from everseg.data.doctor.findings import Report, finding
from everseg.errors import ConfigError
from saying import must_say


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the samples that a check decodes; a fresh cache, and files count as settled at once."""
    names: list[str] = []
    really = examine._examine
    monkeypatch.setattr(
        examine,
        "_examine",
        lambda split, i, name, paths: (names.append(name), really(split, i, name, paths))[1],
    )
    monkeypatch.setattr(examine, "RECENT", -1.0)
    monkeypatch.setenv("EVERSEG_CACHE", str(tmp_path / "cache"))
    return names


def check(tmp_path: Path, **options: object) -> Report:
    return doctor.check(load_dataset(DataConfig(dataset=str(tmp_path / "data.yaml"))), **options)


def test_the_second_check_reads_only_what_changed(tmp_path: Path, read: list[str]) -> None:
    trees.folder(tmp_path)
    first = check(tmp_path)
    assert read == ["a_0", "a_1", "a_2", "a_0"]
    read.clear()
    again = check(tmp_path)
    assert read == []
    assert (again.findings, again.classes, again.images) == (first.findings, first.classes, first.images)
    assert again.digests == first.digests
    path = tmp_path / "masks/train/a_1.png"
    times = path.stat()
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 255
    path.write_bytes(changed)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same time
    assert "unreadable-mask" in [f.code for f in check(tmp_path).findings if f.level == "error"]
    assert read == ["a_1"]


def test_an_unchanged_file_with_a_new_time_is_known_by_its_content(tmp_path: Path, read: list[str]) -> None:
    trees.folder(tmp_path)
    check(tmp_path)
    read.clear()
    (tmp_path / "images/train/a_2.png").touch()
    check(tmp_path)
    assert read == []


@pytest.mark.parametrize("tiled", [False, True])
def test_a_changed_file_of_further_channels_is_read_again(
    tmp_path: Path, read: list[str], tiled: bool
) -> None:
    trees.folder(tmp_path)
    for image in [*tmp_path.glob("images/*/*.png")]:
        trees.save(tmp_path / "nir" / image.parent.name / image.name, trees.mask_of([3]))
    file = tmp_path / "data.yaml"
    file.write_text(file.read_text() + "channels: {count: 4, folders: ['nir/{split}']}\n")
    if tiled:
        file.write_text(file.read_text() + "tiles: {size: 64, overlap: 0}\n")
    first = check(tmp_path)
    read.clear()
    assert check(tmp_path).digests == first.digests
    assert read == []
    (tmp_path / "nir/train/a_1.png").touch()
    check(tmp_path)
    assert read == []  # of the same content
    trees.save(tmp_path / "nir/train/a_1.png", trees.mask_of([4]))
    changed = check(tmp_path)
    assert [name.split("@")[0] for name in read] == ["a_1"]
    assert [
        key[1].split("@")[0] for key, digest in changed.digests.items() if first.digests[key] != digest
    ] == ["a_1"]
    (tmp_path / "nir/train/a_2.png").write_bytes(b"")
    found = [f for f in check(tmp_path).findings if f.code == "unreadable-image"]
    assert [f.sample.split("@")[0] for f in found] == ["a_2"]
    must_say(found[0].message, "nir/train/a_2.png")


def test_a_fresh_file_is_not_trusted_by_its_time(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examine, "RECENT", 60.0)
    trees.folder(tmp_path)
    dataset = load_dataset(DataConfig(dataset=str(tmp_path / "data.yaml")))
    doctor.check(dataset)
    known = check_cache.load_cache(check_cache.cache_file(dataset.splits["train"]))
    assert [k.stamp for k in known.values()] == [(), (), ()]


def test_faults_are_looked_at_every_time_and_other_reading_is_another_check(
    tmp_path: Path, read: list[str]
) -> None:
    trees.folder(tmp_path)
    (tmp_path / "images/train/a_0.png").write_bytes(b"")
    check(tmp_path)
    read.clear()
    assert not check(tmp_path).ok
    assert read == ["a_0"]
    read.clear()
    doctor.check(load_dataset(DataConfig(dataset=str(tmp_path / "data.yaml"), options={"exif": "ignore"})))
    assert len(read) == 4
    read.clear()
    check(tmp_path, cache=False)
    assert len(read) == 4


def test_a_damaged_cache_is_read_again(tmp_path: Path, read: list[str]) -> None:
    trees.folder(tmp_path)
    check(tmp_path)
    for file in (tmp_path / "cache/check").iterdir():
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    read.clear()
    with pytest.warns(UserWarning, match="damaged"):
        assert check(tmp_path).classes[1].images == {"train": 3, "val": 1}
    assert len(read) == 4


def test_a_sample_of_the_samples_says_so(tmp_path: Path, read: list[str]) -> None:
    trees.folder(tmp_path)
    report = check(tmp_path, sample=2)
    assert report.images == {"train": 2, "val": 1}
    assert [f.message for f in report.findings if f.code == "sampled"] == [
        "only 2 of 3 samples were looked at"
    ]


@pytest.mark.parametrize("name", ["a/b c", "tab\tline\n", "#x", '"q"', "é🚦", os.fsdecode(b"\xff")])
def test_names_come_back_from_a_skip_list(tmp_path: Path, name: str) -> None:
    report = Report(
        "d", (finding("error", "layout", "train", name, ""), finding("warning", "alpha", "val", "w", ""))
    )
    file = tmp_path / "skip.txt"
    assert check_files.write_skiplist(file, report) == 1
    assert read_skiplist(file) == {("train", name)}
    assert check_files.write_skiplist(file, Report("d", (finding("error", "layout", "val", "b", ""),))) == 2
    assert read_skiplist(file) == {("train", name), ("val", "b")}
    assert "\n" not in skiplist_line("train", name)


def test_a_file_that_is_no_skip_list_or_lock_is_refused(tmp_path: Path) -> None:
    file = trees.write(tmp_path / "x.txt", "train a\n\nval\tb\n")
    with pytest.raises(ConfigError, match=r"x\.txt, line 1: expected 'split<tab>sample'"):
        read_skiplist(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_skiplist(tmp_path / "none")
    with pytest.raises(ConfigError, match="data check --lock"):
        check_files.read_lock(file)


def test_a_skip_list_in_a_data_yaml_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trees.folder(tmp_path, trees.FOLDER_YAML + "skip: skip.txt\n")
    trees.write(tmp_path / "skip.txt", "# bad ones\ntrain\ta_1\nval\ta_1\n")
    monkeypatch.chdir("/")
    dataset = load_dataset(DataConfig(dataset=str(tmp_path / "data.yaml")))
    train = dataset.splits["train"]
    assert [train.id(i) for i in range(len(train))] == ["a_0", "a_2"]
    np.testing.assert_array_equal(train.read(1)[0], trees.image_of(2))
    assert len(dataset.splits["val"]) == 1


def test_every_reader_honours_a_skip_list(tmp_path: Path) -> None:
    trees.voc(tmp_path / "voc")
    skip = trees.write(
        tmp_path / "skip.txt", "train\t2007_000039\ntrain\tADE_train_00000002\ntrain\t0006R0_f00930\n"
    )
    trees.ade(tmp_path / "ade")
    trees.camvid(tmp_path / "camvid")
    for name, left in (("voc", 1), ("ade", 3), ("camvid", 1)):
        data = DataConfig(dataset=name, root=str(tmp_path / name), options={"skip": str(skip)})
        assert len(load_dataset(data).splits["train"]) == left


def test_the_command_writes_and_honours_lists_and_locks(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trees.folder(tmp_path)
    trees.save(tmp_path / "images/val/a_0.png", trees.image_of(7))
    (tmp_path / "masks/train/a_1.png").unlink()
    code, out, err = call("data", "check", "data.yaml", "--write-skiplist", "bad.txt")
    assert code == 3
    assert "ERROR unpaired (1)" in out
    assert "1 faulty sample" in err
    assert "data.options.skip=bad.txt" in err
    assert (tmp_path / "bad.txt").read_text() == "train\ta_1\n"
    code, out, err = call(
        "data", "check", "data.yaml", "data.options.skip=bad.txt", "--lock", "hashes", "--json"
    )
    assert (code, json.loads(out)["images"]) == (0, {"train": 2, "val": 1})
    trees.save(tmp_path / "images/train/a_2.png", trees.image_of(5))
    code, out, _ = call("data", "check", "data.yaml", "options.skip=bad.txt", "--lock", "hashes")
    assert code == 0
    assert "train/a_2: image changed" in out
    assert "lock file" in out
    code, out, _ = call(
        "data", "check", "data.yaml", "options.on_missing=skip", "--sample", "1", "--no-cache"
    )
    assert code == 0
    must_say(out, "only 1 of 2")
    code, _, err = call("data", "check", "data.yaml", "options.skip=none.txt")
    assert code == 2
    assert "none.txt cannot be read" in err
