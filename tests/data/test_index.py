from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from everseg.data.batches import index, parallel
from everseg.data.datasets import files
from everseg.data.datasets.decode import open_inside
from everseg.data.datasets.files import FileSplit
from everseg.data.datasets.relabel import Relabelled
from everseg.errors import DataError
from everseg.labels import RawLabels

LABELS = RawLabels({0: "background", 1: "cat", 2: "dog", 3: "bird"})


@dataclass
class MemorySplit:
    masks: list
    name: str = "train"
    reads: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.masks)

    def id(self, index: int) -> str:
        return f"img{index:03d}"

    def read_mask(self, index: int) -> np.ndarray:
        self.reads.append(index)
        mask = self.masks[index]
        if isinstance(mask, Exception):
            raise mask
        return mask

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        mask = self.read_mask(index)
        return np.zeros((*mask.shape, 3), np.uint8), mask

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for mask in self.masks:
            digest.update(repr(mask).encode() if isinstance(mask, Exception) else mask.tobytes())
        return digest.hexdigest()


def random_masks(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    values = np.array([0, 1, 2, 3, 255], np.uint8)
    return [values[rng.integers(0, 5, rng.integers(1, 9, 2))] for _ in range(count)]


def slow_counts(masks: list[np.ndarray]) -> np.ndarray:
    table = np.zeros((len(masks), 256), np.int32)
    for row, mask in zip(table, masks, strict=True):
        for value in mask.ravel():
            row[int(value)] += 1
    return table


def test_counts_equal_a_pixel_loop_and_say_how_far_they_are(tmp_path):
    masks = random_masks(7)
    seen = []
    counts = index.class_counts(
        MemorySplit(masks),
        LABELS,
        cache_dir=tmp_path,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert counts.dtype == np.int32
    np.testing.assert_array_equal(counts, slow_counts(masks))
    assert seen == [(i + 1, 7) for i in range(7)]


def test_processes_give_the_same_counts_in_the_same_order(tmp_path):
    masks = random_masks(parallel.SMALL + 37)
    split = MemorySplit(masks)
    seen = []
    counts = index.class_counts(
        split, LABELS, cache_dir=tmp_path, workers=2, progress=lambda done, total: seen.append((done, total))
    )
    np.testing.assert_array_equal(counts, slow_counts(masks))
    assert split.reads == []  # read elsewhere, not in this process
    assert seen[-1] == (len(masks), len(masks))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_spawned_processes_work_too(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel.mp, "get_all_start_methods", lambda: ["spawn"])
    # numpy's own function: the spawned child need not import this test file
    assert parallel.map_samples(np.take, np.arange(70) ** 2, 70, workers=2) == [i**2 for i in range(70)]


def test_threads_serve_where_a_split_can_be_neither_forked_nor_pickled(monkeypatch):
    monkeypatch.setattr(parallel.mp, "get_all_start_methods", lambda: ["spawn"])
    table = {i: i + 5 for i in range(70)}
    assert parallel.map_samples(lambda subject, i: subject[i], table, 70, workers=2) == list(range(5, 75))


def die(subject: object, i: int) -> int:
    if i == 50:
        os._exit(9)
    return i


def test_a_killed_worker_is_a_data_error():
    with pytest.raises(DataError, match="memory"):
        parallel.map_samples(die, None, 100, workers=2)


def test_workers_end_when_their_parent_is_killed():
    code = (
        "import time, os\nfrom everseg.data.batches import parallel\n"
        "def work(s, i):\n    os.write(1, b'%d\\n' % os.getpid())\n    time.sleep(0.3)\n"
        "parallel.map_samples(work, None, 10000, workers=2)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = {int(process.stdout.readline()) for _ in range(4)}
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()

    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in workers if alive(pid)]


def test_second_call_reads_no_mask(tmp_path):
    masks = random_masks(5)
    first = index.class_counts(MemorySplit(masks), LABELS, cache_dir=tmp_path)
    again = MemorySplit(masks)
    np.testing.assert_array_equal(index.class_counts(again, LABELS, cache_dir=tmp_path), first)
    assert again.reads == []


def test_a_changed_mask_is_counted_anew(tmp_path):
    masks = random_masks(5)
    index.class_counts(MemorySplit(masks), LABELS, cache_dir=tmp_path)
    masks[2] = np.full((3, 3), 2, np.uint8)
    counts = index.class_counts(MemorySplit(masks), LABELS, cache_dir=tmp_path)
    np.testing.assert_array_equal(counts, slow_counts(masks))


def test_two_data_sets_keep_their_own_index(tmp_path):
    first, second = random_masks(5, seed=1), random_masks(5, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for masks, reads in ((first, 5), (second, 5), (first, 0), (second, 0)):
            split = MemorySplit(masks)
            counts = index.class_counts(split, LABELS, cache_dir=tmp_path)
            np.testing.assert_array_equal(counts, slow_counts(masks))
            assert len(split.reads) == reads


@pytest.mark.parametrize("suffix", [".npy", ".json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_cache_is_found_and_rebuilt(tmp_path, suffix, damage):
    masks = random_masks(5)
    expected = index.class_counts(MemorySplit(masks), LABELS, cache_dir=tmp_path)
    (path,) = (tmp_path / "index").glob(f"*{suffix}")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        at = len(data) - 300 if suffix == ".npy" else bytes(data).index(b"sha256") + 12
        data[at] ^= 1
    path.write_bytes({"cut": data[: len(data) // 2], "flip": data, "empty": b""}[damage])
    split = MemorySplit(masks)
    with pytest.warns(UserWarning, match="damaged"):
        np.testing.assert_array_equal(index.class_counts(split, LABELS, cache_dir=tmp_path), expected)
    assert split.reads
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index.class_counts(MemorySplit(masks), LABELS, cache_dir=tmp_path)


def test_unwritable_cache_gives_one_warning_and_the_counts(tmp_path):
    (tmp_path / "file").write_text("in the way")
    masks = random_masks(4)
    with pytest.warns(UserWarning, match="EVERSEG_CACHE") as caught:
        counts = index.class_counts(MemorySplit(masks), LABELS, cache_dir=tmp_path / "file")
    assert len(caught) == 1
    np.testing.assert_array_equal(counts, slow_counts(masks))


def test_the_environment_names_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERSEG_CACHE", str(tmp_path / "here"))
    index.class_counts(MemorySplit(random_masks(2)), LABELS)
    assert len(list((tmp_path / "here" / "index").iterdir())) == 2  # no temporary files are left


def test_an_empty_split_has_an_empty_index(tmp_path):
    assert index.class_counts(MemorySplit([]), LABELS, cache_dir=tmp_path).shape == (0, 256)


def test_undeclared_ids_name_every_file_id_and_pixel_count_also_from_the_cache(tmp_path):
    masks = random_masks(6)
    masks[1] = np.array([[7, 7, 0]], np.uint8)
    masks[4] = np.array([[9, 7, 1]], np.uint8)
    for _ in range(2):
        with pytest.raises(DataError) as error:
            index.class_counts(MemorySplit(masks), LABELS, cache_dir=tmp_path)
        text = str(error.value)
        assert "img001: id 7 (2 pixels)" in text
        assert "img004: id 7 (1 pixel), id 9 (1 pixel)" in text
        assert "declared: 0-3, 255" in text
        assert "2 of 6 masks" in text
        assert "img000" not in text


def test_more_than_twenty_bad_files_end_in_a_count(tmp_path):
    with pytest.raises(DataError) as error:
        index.class_counts(MemorySplit([np.full((1, 1), 77, np.uint8)] * 25), LABELS, cache_dir=tmp_path)
    text = str(error.value)
    assert "img019" in text
    assert "img020" not in text
    assert "... and 5 more files" in text


def test_unreadable_masks_and_undeclared_ids_come_in_one_error_and_nothing_is_cached(tmp_path):
    masks: list = random_masks(5)
    masks[0] = DataError("a.png: truncated")
    masks[2] = PermissionError("b.png: no")
    masks[3] = np.full((2, 2), 50, np.uint8)
    masks[4] = np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(DataError) as error:
        index.class_counts(MemorySplit(masks), LABELS, cache_dir=tmp_path)
    for part in ("4 masks", "a.png: truncated", "img002: b.png: no", "img003: id 50 (4 pixels)", "(2, 2, 3)"):
        assert part in str(error.value)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("declared", "void", "found", "words"),
    [
        (range(19), (255,), {0, 7, 11, 23, 33}, "Cityscapes labelIds (0-33), not trainIds"),
        ((7, 8, 11, 33), (255,), {0, 1, 18}, "trainIds (0-18), not labelIds"),
        (range(26), (255,), {0, 3, 26, 33, 39, 255}, "IDD's label ids"),
        (range(1, 5), (255,), {0, 1, 2}, "Id 0"),
        (range(5), (), {0, 1, 255}, "Id 255"),
        (range(5), (255,), {1, 2, 3, 4, 5}, "start at 1"),
        (range(5), (255,), set(range(100)), "JPEG"),
        (range(5), (255,), {0, 60}, "Declare these ids"),
    ],
)
def test_the_remedy_fits_the_confusion(declared, void, found, words):
    labels = RawLabels({i: str(i) for i in declared}, None, void)
    assert words in index.remedy(labels, found)


def test_a_fingerprint_that_fails_at_the_first_bad_file_still_lists_all(tmp_path):
    masks: list = random_masks(4)
    masks[1] = DataError("a.png: no such file")
    masks[3] = DataError("b.png: no such file")

    class Fails(MemorySplit):
        def fingerprint(self):
            raise DataError("a.png: no such file")

    with pytest.raises(DataError, match=r"(?s)2 masks.*a\.png.*b\.png"):
        index.class_counts(Fails(masks), LABELS, cache_dir=tmp_path)


@pytest.mark.parametrize("kind", ["noise", "areas", "one id", "one pixel", "empty"])
def test_few_runs_and_many_are_counted_alike(kind):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (37, 41), dtype=np.uint8)
    masks = {
        "noise": noise,
        "areas": noise[:4, :4].repeat(20, 0).repeat(40, 1),
        "one id": np.full((9, 7), 255, np.uint8),
        "one pixel": noise[:1, :1],
        "empty": noise[:0],
    }
    counts = index.count_ids(masks[kind])
    assert counts.dtype == np.int32
    np.testing.assert_array_equal(counts, slow_counts([masks[kind]])[0])


def file_split(folder, masks):
    samples = []
    for number, mask in enumerate(masks):
        Image.fromarray(mask).save(folder / f"{number}.png")
        samples.append((f"img{number}", f"{number}.jpg", f"{number}.png"))
    return FileSplit("train", folder, samples)


@pytest.mark.parametrize("renamed", [False, True])
def test_masks_in_files_are_read_once_and_keep_the_fingerprint_of_indices_made_before(
    tmp_path, monkeypatch, renamed
):
    masks = random_masks(5)
    opened = []
    monkeypatch.setattr(files, "open_inside", lambda *a, **k: opened.append(a[1]) or open_inside(*a, **k))

    def split():
        plain = file_split(tmp_path, masks)
        table = np.arange(256, dtype=np.uint8)
        table[1] = 2
        return Relabelled(plain, table) if renamed else plain

    expected = slow_counts([np.where(mask == 1, 2, mask) if renamed else mask for mask in masks])
    first = split()
    counts = index.class_counts(first, LABELS, cache_dir=tmp_path)
    np.testing.assert_array_equal(counts, expected)
    assert sorted(opened) == [f"{i}.png" for i in range(5)], "each file once, for counts and fingerprint"
    assert first.fingerprint() == split().fingerprint(), "as without known digests"
    reads = []
    monkeypatch.setattr(index, "_count", lambda *a: reads.append(a))
    np.testing.assert_array_equal(index.class_counts(split(), LABELS, cache_dir=tmp_path), expected)
    assert reads == []


def test_the_fingerprint_of_masks_in_files_stays_what_it_was(tmp_path):
    """Indices that lie in people's caches are found under it; this value may never change."""
    split = FileSplit("train", tmp_path, [("a", "a.jpg", "a.png")])
    (tmp_path / "a.png").write_bytes(b"bytes of a mask")
    digest = hashlib.sha256(b"bytes of a mask").hexdigest()
    head = b'{"format": 1, "palette": null, "id_table": null}'
    expected = hashlib.sha256(head + f"\na\0{digest}".encode()).hexdigest()
    assert split.fingerprint() == expected
    assert FileSplit("train", tmp_path, [("a", "a.jpg", "a.png")]).fingerprint([digest]) == expected
