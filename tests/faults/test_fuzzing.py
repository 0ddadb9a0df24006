"""Fuzzing in small: what was once found stays mended, and each reader takes some spoilt inputs every day."""

from __future__ import annotations

import mmap
import os
import random
import signal
import warnings
from pathlib import Path

import fuzzing
import pytest
from fuzzing import KEPT, READERS, Reader, said_by, spoilt

EVERYDAY = {"command line": 4, "bundle documents": 3, "run documents": 5}
"""Inputs of a reader in every run of the tests, where it is not 25."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    warnings.simplefilter("ignore")


@pytest.mark.parametrize("path", sorted(KEPT.glob("*.bin")), ids=lambda path: path.stem)
def test_what_was_once_found_stays_mended(path: Path, tmp_path: Path) -> None:
    name = path.stem.rpartition("-")[0].replace("_", " ")
    assert said_by(name, tmp_path, path.read_bytes())[1] == ""


@pytest.mark.parametrize("name", READERS)
def test_a_reader_reads_or_refuses_what_it_gets(name: str, tmp_path: Path) -> None:
    draw, seeds = random.Random(7), READERS[name].seeds(tmp_path)
    for _ in range(EVERYDAY.get(name, 25)):
        data = spoilt(draw.choice(seeds), seeds, READERS[name].words, draw)
        _, fault = said_by(name, tmp_path, data)
        assert fault == "", data


def test_honest_inputs_are_read(tmp_path: Path) -> None:
    """Else the fuzzer would only see how its readers refuse everything."""
    for name in ("image", "list", "label map", "journal", "npz", "safetensors", "pth", "archive"):
        refused = []
        for number, seed in enumerate(READERS[name].seeds(tmp_path)):
            folder = tmp_path / name.replace(" ", "_") / str(number)
            folder.mkdir(parents=True)
            said = said_by(name, folder, seed)
            assert said[1] == ""
            refused += [(number, said[0])] if said[0] != "read" else []
        # GIF and JPEG 2000 are not on the list of formats; 16 bits and more do not say how bright they are.
        assert len(refused) <= (5 if name == "image" else 0), (name, refused)


def test_a_fault_a_crash_and_a_slow_reader_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_: Path, data: bytes) -> None:
        if data.startswith(b"b"):
            raise KeyError("found")
        if data.startswith(b"c"):
            os.kill(os.getpid(), signal.SIGKILL)
        if data.startswith(b"m"):
            # Not from the heap: a process that has trained keeps what was freed there, and would grow by nothing.
            mmap.mmap(-1, 64 << 20).write(bytes(64 << 20))
        while data.startswith(b"d"):
            pass

    monkeypatch.setitem(READERS, "weak", Reader(lambda _: [b"a"], read, (b"b",)))
    monkeypatch.setattr(fuzzing, "MOST_SECONDS", 0.05)
    assert "KeyError" in said_by("weak", tmp_path, b"b")[1]
    assert "0.05 s" in said_by("weak", tmp_path, b"d")[1]
    monkeypatch.setattr(fuzzing, "MOST_SECONDS", 5)
    monkeypatch.setattr(fuzzing, "MOST_MEMORY", 32 << 20)
    for _ in range(2):  # the first one does not hide the second
        assert " MB" in said_by("weak", tmp_path, b"m")[1]
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setattr(fuzzing, "spoilt", lambda *_: b"b")
    done, found = fuzzing._stretch("weak", place, 1, 0.4)
    assert done >= 1
    assert [data for data, _ in found] == [b"b"], "one place in the code is told once"
    monkeypatch.setattr(fuzzing, "spoilt", lambda *_: b"c")
    assert [data for data, _ in fuzzing._stretch("weak", place, 1, 0.4)[1]] == [b"c"]
