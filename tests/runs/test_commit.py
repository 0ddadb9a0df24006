"""Committed folders: whole or not there, damage found, the one before used."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import pytest
import torch

from everseg.data.writing import unfinished
from everseg.errors import CheckpointError
from everseg.labels import LabelSpace
from everseg.runs import commit as checkpoint
from everseg.runs.commit import load_tensors, newest_valid, parent_of, purge, save_folder, verify
from everseg.runs.model_folder import ModelFile, save_model
from everseg.runs.run_folder import RunFolder


def _save(folder: Path, value: float = 1.0, parent: str | None = None) -> str:
    tensors = {"model": {"w": torch.full((50,), value), "n": torch.tensor(3)}, "empty": {}}
    return save_folder(folder, tensors, {"state": {"iteration": 7}}, parent)


def test_a_folder_round_trips_with_its_parent(tmp_path):
    digest = _save(tmp_path / "a")
    _save(tmp_path / "b", parent=digest)
    assert verify(tmp_path / "a") == digest
    assert parent_of(tmp_path / "b") == digest
    assert torch.equal(load_tensors(tmp_path / "a" / "model.safetensors")["w"], torch.ones(50))
    assert load_tensors(tmp_path / "a" / "empty.safetensors") == {}


def test_the_same_content_gives_the_same_bytes(tmp_path):
    assert _save(tmp_path / "a") == _save(tmp_path / "b")


def test_an_existing_folder_is_never_overwritten(tmp_path):
    first = _save(tmp_path / "a", 1.0)
    assert _save(tmp_path / "a", 2.0) == first


def test_among_the_user_s_folders_none_is_taken_for_a_leftover(tmp_path):
    (tmp_path / "a.tmp").mkdir()
    (tmp_path / "a.tmp/mine").write_text("")
    unfinished(tmp_path / "a").mkdir()
    (unfinished(tmp_path / "a") / "of a killed process").write_text("")
    save_folder(tmp_path / "a", {"model": {"w": torch.ones(1)}}, {}, among_others=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.tmp"]
    assert (tmp_path / "a.tmp/mine").exists()
    assert verify(tmp_path / "a")


@pytest.mark.parametrize("seed", range(40))
def test_every_flipped_bit_is_found(tmp_path, seed):
    _save(tmp_path / "a")
    rng = random.Random(seed)
    file = rng.choice(sorted((tmp_path / "a").iterdir()))
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"damaged|format"):
        verify(tmp_path / "a")


@pytest.mark.parametrize("length", [0, 1, 40])
def test_truncation_and_loss_of_any_file_are_found(tmp_path, length):
    for name in ("model.safetensors", "state.json", "MANIFEST.json", "empty.safetensors"):
        folder = tmp_path / f"{name}-{length}"
        _save(folder)
        file = folder / name
        file.write_bytes(file.read_bytes()[: min(length, file.stat().st_size - 1)])
        with pytest.raises(CheckpointError, match="damaged"):
            verify(folder)
        file.unlink()
        with pytest.raises(CheckpointError, match="damaged"):
            verify(folder)


def test_files_swapped_between_checkpoints_are_found(tmp_path):
    _save(tmp_path / "a", 1.0)
    _save(tmp_path / "b", 2.0)
    a, b = (tmp_path / name / "model.safetensors" for name in "ab")
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    for name in "ab":
        with pytest.raises(CheckpointError, match="sha256"):
            verify(tmp_path / name)


def test_a_damaged_newest_falls_back_with_one_warning(tmp_path):
    for iteration in (10, 20, 30):
        _save(tmp_path / f"it-{iteration:08d}", iteration)
    (tmp_path / "it-00000040.tmp").mkdir()  # an interrupted save is no checkpoint
    (tmp_path / "it-00000030" / "model.safetensors").write_bytes(b"")
    warnings: list[str] = []
    assert newest_valid(tmp_path, warnings.append) == tmp_path / "it-00000020"
    assert len(warnings) == 1
    assert "it-00000030" in warnings[0]
    assert "it-00000020" in warnings[0]
    assert (tmp_path / "it-00000030.damaged").is_dir()
    _save(tmp_path / "it-00000030", 30)  # done again, under its own name
    assert newest_valid(tmp_path, warnings.append) == tmp_path / "it-00000030"
    assert len(warnings) == 1


def test_all_damaged_stops_and_lists_them(tmp_path):
    for iteration in (10, 20):
        _save(tmp_path / f"it-{iteration:08d}")
        (tmp_path / f"it-{iteration:08d}" / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match="every checkpoint") as caught:
        newest_valid(tmp_path, lambda text: None)
    assert "it-00000010" in str(caught.value)
    assert "it-00000020" in str(caught.value)


def test_purge_keeps_two_and_clears_leftovers(tmp_path):
    for iteration in (10, 20, 30):
        _save(tmp_path / f"it-{iteration:08d}")
    (tmp_path / "it-00000040.tmp").mkdir()
    purge(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["it-00000020", "it-00000030"]


def test_purge_deletes_nothing_when_the_newest_is_damaged(tmp_path):
    for iteration in (10, 20, 30):
        _save(tmp_path / f"it-{iteration:08d}")
    (tmp_path / "it-00000030" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError):
        purge(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("fail_at", range(5))
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_failing_disk_leaves_the_old_one_and_no_leftover(tmp_path, monkeypatch, fail_at, code):
    _save(tmp_path / "it-00000010")
    calls = iter(range(100))
    real = os.fsync

    def failing(descriptor: int) -> None:
        if next(calls) == fail_at:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(CheckpointError) as caught:
        _save(tmp_path / "it-00000020")
    assert {errno.ENOSPC: "disk full", errno.EROFS: "no permission", errno.EIO: "cannot be written"}[
        code
    ] in str(caught.value)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["it-00000010"]
    assert newest_valid(tmp_path, lambda text: None) == tmp_path / "it-00000010"


@pytest.mark.parametrize(("fail_at", "kept"), [(0, b"old"), (1, b"new")], ids=["file", "folder"])
def test_a_file_is_the_old_or_the_new_one_when_the_disk_fails(tmp_path, monkeypatch, fail_at, kept):
    checkpoint.write_bytes(tmp_path / "x.json", b"old")
    calls = iter(range(100))

    def failing(_descriptor: int) -> None:
        if next(calls) == fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(CheckpointError, match="disk full"):
        checkpoint.write_bytes(tmp_path / "x.json", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert (tmp_path / "x.json").read_bytes() == kept


def test_a_newer_format_is_refused_by_name(tmp_path):
    _save(tmp_path / "a")
    manifest = tmp_path / "a" / "MANIFEST.json"
    body = json.loads(manifest.read_text())
    del body["self"]
    body["format"] = 99
    body["self"] = checkpoint._self_hash(body)
    manifest.write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match="format 99"):
        verify(tmp_path / "a")


def test_a_name_that_the_manifest_does_not_list_is_told(tmp_path):
    _save(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"a is damaged.*MANIFEST\.json.*classes\.json"):
        verify(tmp_path / "a", only=("classes.json",))


def test_whether_a_step_is_fresh_is_read_from_a_verified_file(tmp_path):
    folder = RunFolder(tmp_path)
    space = LabelSpace(((0,),), ("background",))
    about = ModelFile(
        {"name": None, "options": {}, "growth": [{"default": 1}]}, {"default": space}, fresh=True
    )
    save_model(folder.final(0), about, {})
    assert folder.is_fresh(0)
    path = folder.final(0) / "classes.json"
    path.write_text(path.read_text().replace("true", "null"))
    with pytest.raises(CheckpointError, match=r"classes\.json sha256 mismatch"):
        folder.is_fresh(0)
