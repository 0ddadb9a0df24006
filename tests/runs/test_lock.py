"""One process writes a run: who lives is never taken over, who is dead does not block for ever."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from everseg.errors import CheckpointError, ConfigError
from everseg.runs import commit, lock
from everseg.runs.commit import save_folder, write_document
from everseg.runs.journal import Journal
from everseg.runs.lock import locked
from everseg.runs.run_folder import RunFolder
from saying import must_say

LEASE = 0.8


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "LEASE", LEASE)


@contextmanager
def holder(folder: Path, *, elsewhere: bool = False, then: Callable[[], None] | None = None) -> Iterator[int]:
    """A process that holds the lock; on another machine, as far as everybody else can tell.

    Args:
        then: what it does after SIGUSR1, still with the lock; then it ends with 2 for a ConfigError, else with 0.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    child = os.fork()
    if not child:
        code = 1
        try:
            if elsewhere:
                lock._process_space = lambda: "another machine's"
            with lock.locked(folder):
                signal.sigwait([signal.SIGUSR1])
                if then is not None:
                    then()
            code = 0
        except ConfigError:
            code = 2
        finally:
            os._exit(code)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
    while not (folder / "LOCK").exists():
        time.sleep(0.005)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def kill(child: int) -> None:
    """Kill it without forgetting it: its number stays taken until the `holder` is left."""
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as raised, lock.locked(folder):
        pass
    return str(raised.value)


def test_a_holder_on_this_machine_refuses_at_once_and_is_named(tmp_path):
    with holder(tmp_path) as child:
        start = time.monotonic()
        must_say(refused(tmp_path), str(tmp_path), f"process {child}")
        assert time.monotonic() - start < 0.1


def test_a_dead_holder_on_this_machine_is_taken_over_at_once(tmp_path):
    child = os.fork()
    if not child:
        with lock.locked(tmp_path):
            os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / "LOCK").exists()
    start = time.monotonic()
    with lock.locked(tmp_path):
        assert time.monotonic() - start < 0.1
    assert list(tmp_path.iterdir()) == []


def test_a_paused_holder_on_this_machine_keeps_the_lock_however_long_it_sleeps(tmp_path):
    with holder(tmp_path) as child:
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
        time.sleep(1.2 * LEASE)
        must_say(refused(tmp_path), f"process {child}", "paused", "kill -CONT")


def test_a_holder_elsewhere_that_lives_is_never_taken_over(tmp_path):
    with holder(tmp_path, elsewhere=True) as child:
        for stale in (False, True):  # also not if somebody has set the file system's clock forward
            if stale:
                os.utime(tmp_path / "LOCK", (0, 0))
            must_say(refused(tmp_path), f"process {child}", os.uname().nodename)


def test_a_dead_holder_elsewhere_is_taken_over_when_its_lease_has_expired_and_not_before(tmp_path):
    with holder(tmp_path, elsewhere=True) as child:
        time.sleep(0.2)
        kill(child)
        last = (tmp_path / "LOCK").stat().st_mtime
        said: list[str] = []
        with lock.locked(tmp_path, said.append):
            assert (tmp_path / "LOCK").stat().st_mtime - last > 0.95 * LEASE
        must_say(" ".join(said), str(child), os.uname().nodename)


def test_a_lock_from_the_future_is_taken_over_too(tmp_path):
    """The file system's clock was set back: the lock will not look old for a year."""
    with holder(tmp_path, elsewhere=True) as child:
        kill(child)
        year = time.time() + 365 * 86400
        os.utime(tmp_path / "LOCK", (year, year))
        start = time.monotonic()
        with lock.locked(tmp_path):
            assert LEASE <= time.monotonic() - start < 3 * LEASE


def test_a_holder_that_wakes_after_it_was_taken_over_writes_nothing_and_leaves_the_new_lock(tmp_path):
    written = tmp_path / "metrics.json"

    def write() -> None:
        commit.write_json(written, "the old holder's")

    with holder(tmp_path, elsewhere=True, then=write) as child:
        os.kill(child, signal.SIGSTOP)
        with lock.locked(tmp_path):
            commit.write_json(written, "the new holder's")
            os.kill(child, signal.SIGUSR1)
            os.kill(child, signal.SIGCONT)
            ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
            assert ended.si_status == 2
            assert json.loads(written.read_text()) == "the new holder's"
            commit.write_json(written, "still")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json"]


def test_who_lost_the_lock_learns_by_whom_and_may_write_elsewhere(tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    with lock.locked(folder):
        commit.write_json(folder / "a.json", 1)
        (folder / "LOCK").write_text(json.dumps({"pid": 77, "host": "node3"}))
        commit.write_json(other / "a.json", 1)
        with pytest.raises(ConfigError) as raised:
            commit.save_folder(folder / "step", {}, {"a": 1})
    must_say(str(raised.value), "LOCK", "77", "node3")
    assert sorted(path.name for path in folder.iterdir()) == ["LOCK", "a.json"]
    assert (other / "a.json").exists()
    commit.write_json(folder / "b.json", 1)  # without a lock nothing is asked


def test_who_loses_the_lock_in_the_middle_of_a_save_deletes_nothing_and_tells_of_the_lock(tmp_path):
    """The new holder has cleared the half-written folder away, and is writing one of the same name."""
    other = tmp_path / "step.tmp" / "theirs"

    def taken_over() -> bytes:
        (tmp_path / "LOCK").write_text(json.dumps({"pid": 77, "host": "node3"}))
        shutil.rmtree(other.parent)
        other.parent.mkdir()
        other.touch()
        raise FileNotFoundError(2, "gone")

    with lock.locked(tmp_path), pytest.raises(ConfigError) as raised:
        commit.save_folder(tmp_path / "step", {}, {}, files={"a": taken_over})
    must_say(str(raised.value), "LOCK", "77", "node3")
    assert other.exists()


def test_a_deleted_lock_counts_as_lost(tmp_path):
    with lock.locked(tmp_path):
        (tmp_path / "LOCK").unlink()
        with pytest.raises(ConfigError) as raised:
            commit.write_json(tmp_path / "a.json", 1)
    must_say(str(raised.value), "LOCK", "deleted")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("host", "is_refused"), [("elsewhere", True), (os.uname().nodename, False)], ids=["foreign", "own"]
)
def test_a_lock_of_an_older_everseg_has_no_lease(tmp_path, host, is_refused):
    """Its holder gives no signs of life, so their absence says nothing."""
    path = tmp_path / "LOCK"
    path.write_text(json.dumps({"pid": 4_000_000, "host": host, "boot": "x", "started": "1"}))
    os.utime(path, (0, 0))
    if is_refused:
        must_say(refused(tmp_path), "elsewhere", "delete", str(path))
    else:
        with lock.locked(tmp_path):
            pass


def test_of_many_that_find_an_expired_lock_one_at_a_time_gets_it(tmp_path):
    for kept in (os.link, None):
        (tmp_path / "LOCK").write_text(json.dumps({"pid": 1, "host": "gone", "boot": "x", "space": "y",
                                                   "started": "1", "beat": 0.05, "lease": 0.1}))  # fmt: skip
        os.utime(tmp_path / "LOCK", (0, 0))
        children = [os.fork() or _contend(tmp_path, without_links=kept is None) for _ in range(4)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert codes.count(0) == 1
        assert set(codes) <= {0, 2}
        assert list(tmp_path.iterdir()) == []


def _contend(folder: Path, *, without_links: bool) -> int:
    code = 1
    try:
        if without_links:
            os.link = _no_links
        with lock.locked(folder):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            time.sleep(2)
            (folder / "inside").unlink()
        code = 0
    except ConfigError:
        code = 2
    finally:
        os._exit(code)


def _no_links(*_: object) -> None:
    raise PermissionError(1, "no hard links here")


def test_a_lock_made_anew_between_a_look_and_the_removal_stays(tmp_path, monkeypatch):
    path, read = tmp_path / "LOCK", lock._read
    path.write_bytes(b"the winner's")
    looks = iter([lock._Found(b"the dead one's", 0)])
    monkeypatch.setattr(lock, "_read", lambda path: next(looks, None) or read(path))
    lock._remove(path, b"the dead one's")
    assert path.read_bytes() == b"the winner's"
    assert list(tmp_path.iterdir()) == [path]


NO_LOCKS = {
    "a FIFO": os.mkfifo,
    "a folder": Path.mkdir,
    "a link": lambda path: path.symlink_to("mine"),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", NO_LOCKS)
def test_what_is_no_file_is_neither_waited_for_nor_followed(tmp_path, kind):
    (tmp_path / "mine").write_text("mine")
    NO_LOCKS[kind](tmp_path / "LOCK")
    with pytest.raises(CheckpointError) as caught, locked(tmp_path):
        pass
    must_say(caught.value, str(tmp_path / "LOCK"), "not a regular file")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_a_lock_of_hostile_content_is_taken_over_in_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    monkeypatch.setattr(lock, "LEASE", 0.02)
    for content in (
        "[" * 200_000,
        '{"beat": 1e300, "lease": 1e999, "pid": {}}',
        '{"beat": null, "lease": true}',
        "x" * 10**6,
    ):
        path = tmp_path / "LOCK"
        path.write_text(content)
        os.utime(path, (0, 0))
        begun = time.monotonic()
        with locked(tmp_path):
            pass
        assert time.monotonic() - begun < 5


def test_no_link_leads_a_write_out_of_a_run_folder(tmp_path):
    """The folder may come from somebody else, and be continued here."""
    run, other = tmp_path / "run", tmp_path / "other"
    (run / "steps/00").mkdir(parents=True)
    other.mkdir()
    (run / "steps/01").symlink_to(other)
    (run / "journal.jsonl").symlink_to(other / "journal.jsonl")
    with locked(run):
        for write in (
            lambda: write_document(run / "steps/01/metrics.json", {}),
            lambda: write_document(run / "steps/01/deeper/metrics.json", {}),
            lambda: save_folder(run / "steps/01/final", {}, {}),
            lambda: Journal(run / "journal.jsonl").add("note", step=0),
            lambda: RunFolder(run).clean(),
        ):
            with pytest.raises(CheckpointError) as caught:
                write()
            must_say(caught.value, "link", str(run))
        write_document(run / "steps/00/metrics.json", {})
    assert list(other.iterdir()) == []


def test_a_run_folder_may_itself_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    with locked(tmp_path / "run"):
        write_document(tmp_path / "run/scenario.json", {})
    assert (tmp_path / "disk/scenario.json").is_file()
