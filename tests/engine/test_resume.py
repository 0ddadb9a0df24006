"""Kill it whenever you like: the same command continues, and the result is byte-identical."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
from types import SimpleNamespace

import pytest
from processes import At, complete, killed, results, start, wait, wait_until
from toy import settings

from everseg.engine import runtime
from everseg.runs import lock
from everseg.runs.run_folder import RunFolder
from everyday import some


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A finished run of one epoch a step; tests continue copies of it."""
    out = tmp_path_factory.mktemp("short")
    assert complete(settings(out, train=SHORT)) == 0
    return out / "toy"


SHORT = {"epochs": 1, "epochs_next": 1}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, dict[str, str]]:
    """Results of runs nobody disturbed, by method."""
    found = {}
    for method in ("mib", "rw", "rcil"):
        out = tmp_path_factory.mktemp(method)
        assert complete(settings(out, method={"name": method})) == 0
        found[method] = results(out / "toy")
        assert len(found[method]) == 14
    return found


@pytest.mark.parametrize("method", some(["mib", "rw", "rcil"], "mib"))
def test_20_kills_at_any_moments_change_nothing(tmp_path, undisturbed, method):
    """Each at another distance from the start of its call: at flushes, iterations and renamings, through both steps.

    With a checkpoint after each iteration, so that every call but the shortest gets further.
    """
    config = settings(tmp_path, method={"name": method}, train={"checkpoint_every": 1})
    draw = random.Random(method)
    for _ in range(20):
        killed(config, "any", draw.randrange(34))
    assert list((tmp_path / "toy/steps").glob("01/ckpt/*")), "the last kills were in the second step"
    for path in (tmp_path / "toy").rglob(".*.tmp"):
        age(path)
    assert complete(config) == 0
    assert results(tmp_path / "toy") == undisturbed[method]


def age(path):
    """As if the process that wrote a file had been killed a while ago."""
    os.utime(path, (0, 0))


@pytest.mark.parametrize("flush", some([2, 5, 9, 14, 17, 23, 31], 5, 17))
def test_kills_inside_a_save_change_nothing(tmp_path, undisturbed, flush):
    config = settings(tmp_path)
    killed(config, "flush", flush)
    for path in (tmp_path / "toy").rglob(".*.tmp"):
        age(path)
    assert complete(config) == 0
    assert results(tmp_path / "toy") == undisturbed["mib"]
    assert list((tmp_path / "toy").rglob("*.tmp")) == []


def test_half_written_files_of_a_killed_process_are_gone_at_the_next_start_and_nothing_else(tmp_path):
    config = settings(tmp_path)
    killed(config, "flush", 14)
    left = [tmp_path / "toy" / place / f".{'0af9' * 8}.tmp" for place in (".", "steps/00")]
    kept = [tmp_path / "toy" / "steps/00" / name for name in (".mine.tmp", "notes.tmp")]
    for path in (*left, *kept):
        path.write_text("x")
        age(path)
    kept.append(tmp_path / "toy" / f".{'17c3' * 8}.tmp")  # a report of this run, being written
    kept[-1].write_text("x")
    assert complete(config) == 0
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in kept)


def test_a_file_that_its_writer_moves_away_stops_no_clean_up(tmp_path, monkeypatch):
    gone = tmp_path / f".{'0af9' * 8}.tmp"
    monkeypatch.setattr(type(gone), "glob", lambda self, pattern: [gone] if pattern == ".*.tmp" else [])
    RunFolder(tmp_path).clean()


@pytest.mark.slow
def test_a_kill_changes_nothing_in_bf16(tmp_path):
    train = {"precision": "bf16", "epochs": 2, "epochs_next": 2}
    config = settings(tmp_path, train=train)
    killed(config, "flush", 14)
    assert complete(config) == 0
    assert complete(settings(tmp_path / "whole", train=train)) == 0
    assert results(tmp_path / "toy") == results(tmp_path / "whole" / "toy")


def test_kills_between_steps_change_nothing(tmp_path, undisturbed):
    config = settings(tmp_path)
    for landmark in ("00/final", "00/metrics.json", "01/ckpt/it-*[0-9]", "01/final"):
        killed(config, "name", pattern=landmark)
    assert complete(config) == 0
    assert results(tmp_path / "toy") == undisturbed["mib"]


def test_workers_and_checkpoint_intervals_do_not_change_the_result(tmp_path, undisturbed):
    config = settings(tmp_path, data={"workers": 2}, train={"checkpoint_every": 3, "log_every": 1})
    killed(config, "flush", 12)
    assert complete(settings(tmp_path, data={"workers": 1}, train={"checkpoint_every": 5})) == 0
    assert results(tmp_path / "toy") == undisturbed["mib"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_polite_stop_saves_and_continues(tmp_path, undisturbed, number):
    config = settings(tmp_path, train={"checkpoint_every": 10_000})
    folder = RunFolder(tmp_path / "toy")
    assert complete(config, at=At("iteration", 3, signal=number)) == 128 + number
    assert [path.name for path in folder.path.glob("steps/*/ckpt/*")] == ["it-00000004"]
    assert complete(config) == 0
    assert results(tmp_path / "toy") == undisturbed["mib"]


def test_a_time_budget_cuts_the_run_into_pieces(tmp_path, undisturbed, monkeypatch):
    """On a clock of its own: each question for the time takes a second of it, and every iteration asks once."""
    monkeypatch.setattr(runtime, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    config = settings(tmp_path, train={"max_time": 5})
    codes = []
    while not codes or codes[-1] == 75:
        codes.append(complete(config))
        assert len(codes) < 10
    assert codes[-1] == 0
    assert codes.count(75) >= 3
    assert results(tmp_path / "toy") == undisturbed["mib"]


def test_every_call_gets_further_however_short_its_budget_is(tmp_path):
    """A budget that is over at once: a call trains one iteration, or ends with the training, or tests a whole step."""
    config = settings(tmp_path, train={"max_time": 1e-6, "max_iterations": 2})
    folder, codes, seen = RunFolder(tmp_path / "toy"), [], []
    while not codes or codes[-1] == 75:
        codes.append(complete(config))
        names = sorted(path.relative_to(folder.path).as_posix() for path in folder.path.glob("steps/**/*"))
        assert names != seen, "this call changed nothing"
        seen = names
        assert len(codes) < 20
    assert codes[-1] == 0


def test_a_damaged_newest_checkpoint_costs_iterations_not_the_result(tmp_path, undisturbed):
    config = settings(tmp_path)
    folder = RunFolder(tmp_path / "toy")
    killed(config, "name", 1, "00/ckpt/it-*[0-9]")
    newest = sorted(folder.checkpoints(0).glob("it-*[0-9]"))[-1]
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-3] ^= 4
    (newest / "model.safetensors").write_bytes(data)
    assert complete(config) == 0
    assert results(tmp_path / "toy") == undisturbed["mib"]


def test_all_checkpoints_damaged_stops_with_4_and_starts_nothing_anew(tmp_path):
    config = settings(tmp_path)
    folder = RunFolder(tmp_path / "toy")
    killed(config, "name", 1, "00/ckpt/it-*[0-9]")
    for path in folder.checkpoints(0).glob("it-*[0-9]"):
        (path / "optim.safetensors").write_bytes(b"")
    before = sorted(p.name for p in folder.checkpoints(0).iterdir())
    assert complete(config) == 4
    assert sorted(p.name for p in folder.checkpoints(0).iterdir()) == before


def test_a_damaged_or_foreign_parent_stops_with_4(tmp_path, short):
    config = settings(tmp_path, train=SHORT)
    shutil.copytree(short, tmp_path / "toy")
    folder = RunFolder(tmp_path / "toy")
    for name in ("final", "metrics.json"):
        target = folder.step(1) / name
        target.rename(target.with_name(f"away-{name}"))
    weights = folder.final(0) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert complete(config) == 4
    weights.write_bytes(whole)
    other = settings(tmp_path / "other", seed=4, train=SHORT)
    assert complete(other) == 0
    (folder.step(1) / "away-final").rename(folder.final(1))
    for name in ("model.safetensors", "MANIFEST.json", "classes.json", "method_state.safetensors"):
        (folder.final(0) / name).write_bytes((tmp_path / "other/toy/steps/00/final" / name).read_bytes())
    assert complete(config) == 4


def test_a_finished_run_is_read_not_redone(tmp_path, short):
    config = settings(tmp_path, train=SHORT)
    shutil.copytree(short, tmp_path / "toy")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "toy" / "steps").rglob("*") if p.is_file()}
    assert complete(config) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "toy" / "steps").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"train": {"lr": 0.07}}, 2),
        ({"seed": 4}, 2),
        ({"method": {"name": "mib", "kd_weight": 5.0}}, 2),
        ({"scenario": {"task": "1-1"}}, 2),
        ({"model": {"output_stride": 8}}, 2),
        ({"data": {"crop": 24}}, 2),
        ({"data": {"workers": 1}}, 0),
        ({"train": {"log_every": 1, "checkpoint_every": 4}}, 0),
        ({"data": {"options": {"train": 20}}}, 2),
    ],
)
def test_a_changed_configuration_is_refused_where_it_matters(tmp_path, short, change, code):
    config = settings(tmp_path, train=SHORT)
    shutil.copytree(short, tmp_path / "toy")
    merged = json.loads(json.dumps(config))
    for key, value in change.items():
        merged[key] = {**merged[key], **value} if isinstance(value, dict) else value
    assert complete(merged) == code


def test_two_processes_cannot_write_one_run(tmp_path):
    config = settings(tmp_path)
    child = start(config)
    wait_until((tmp_path / "toy" / "LOCK").exists)
    assert complete(config) == 2
    assert wait(child) == 0


def test_a_run_that_wakes_after_another_machine_took_it_over_ends_with_2_and_writes_nothing(
    tmp_path, undisturbed, monkeypatch
):
    config = settings(tmp_path)
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "LEASE", 0.6)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(lock, "_process_space", lambda: "another machine's")
        paused = start(config, at=At("iteration", 6, signal=signal.SIGSTOP))
    assert os.WIFSTOPPED(os.waitpid(paused, os.WUNTRACED)[1])
    assert complete(config) == 0
    assert results(tmp_path / "toy") == undisturbed["mib"]
    before = files(tmp_path / "toy")
    os.kill(paused, signal.SIGCONT)
    assert wait(paused) == 2
    assert files(tmp_path / "toy") == before


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_damaged_lock_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    path = tmp_path / "toy" / "LOCK"
    path.parent.mkdir()
    path.write_text("")
    age(path)
    assert complete(settings(tmp_path, train=SHORT)) == 0
    assert not path.exists()
