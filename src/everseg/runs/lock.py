"""The lock of a run folder: one process writes at a time, and the lock of a dead one does not block for ever.

The file LOCK is a lease. While its holder works, a thread touches the file every `BEAT` seconds. A process that meets
the lock asks in this order:

* Is the holder a process of this machine? Then the machine knows whether it lives, and the answer comes at once.
* Otherwise the file is watched. A sign of life refuses. The lock is taken over if none came for `LEASE` seconds.

The age of the last sign of life is the difference of two times that the file system gave, and the watching is timed by
one clock. So the clocks of two machines are never compared.

A holder that was paused for longer than that, or cut off, may wake when another process writes. It therefore looks
before every write whether the lock is still its own (`commit.GUARDS`), and ends without writing if not. A pause that
falls between this look and the write itself cannot be seen.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from everseg.errors import CheckpointError, ConfigError
from everseg.files import UnreadableError, json_of, real_path
from everseg.runs import commit

BEAT = 5.0
"""Seconds between two signs of life of a holder."""
LEASE = 60.0
"""Seconds without a sign of life after which another machine may take a lock over."""
FILE = "LOCK"
_MOST = 65_536
"""Most bytes of it that are read; one of everseg has a few hundred."""
_MOST_TIMES = 10
"""A lock may state so many times the seconds that everseg has by itself; more would hold up a run for days."""
_HELD: dict[Path, bytes] = {}
"""The locks that this process holds."""


@dataclass(frozen=True)
class _Found:
    """A lock as it was met."""

    data: bytes
    changed: int
    """Time of the last sign of life, in nanoseconds of the file system's clock."""

    @property
    def owner(self) -> dict[str, Any]:
        """What the holder wrote about itself; {} if the file is empty or damaged."""
        try:
            told = json_of(self.data)
        except UnreadableError:
            return {}
        return told if isinstance(told, dict) else {}

    @property
    def name(self) -> str:
        """The holder in words."""
        owner = self.owner
        return f"process {owner.get('pid')} on host {owner.get('host')}" if owner else "an unknown process"

    def seconds(self, key: str, default: float) -> float:
        """A length of time that the holder stated: it may be of another version, with other ones, but not any."""
        value = self.owner.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            return default
        return min(value, _MOST_TIMES * default)


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Hold the lock of a run folder. While it is held, every write below the folder checks that it still is.

    Args:
        say: told if the call has to wait to learn whether the holder lives.

    Raises:
        ConfigError: another live process holds it; or, from a write inside, another process has taken it over.
        CheckpointError: the folder cannot be written, or a link in it leads a write out of it.
    """
    path, root = folder / FILE, real_path(folder)
    mine = json.dumps({**_myself(), "token": uuid.uuid4().hex, "beat": BEAT, "lease": LEASE}).encode()
    with commit.writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        while not _create(path, mine):
            found = _read(path)
            # It may have been released in between. A network file system may also lose its own answer that this process
            # has made the lock.
            if found is None or found.data == mine:
                continue
            if _is_over(path, found, say):
                _remove(path, found.data)

    def guard(target: Path) -> None:
        if not target.is_relative_to(folder):
            return
        _check(path, mine)
        # Whoever made the folder may have put links into it.
        if not real_path(target).is_relative_to(root):
            raise CheckpointError(
                f"{target}: a link leads out of {folder}, where nothing is written; put a folder in its place"
            )

    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, mine, ended), name="everseg-lock", daemon=True)
    beats.start()
    commit.GUARDS.append(guard)
    _HELD[path] = mine
    try:
        yield
    finally:
        del _HELD[path]
        commit.GUARDS.remove(guard)
        ended.set()
        _remove(path, mine)


def release() -> None:
    """Remove all locks of this process, which is about to end without leaving `locked`."""
    for path, mine in list(_HELD.items()):
        with contextlib.suppress(OSError):
            _remove(path, mine)


def _check(path: Path, mine: bytes) -> None:
    """Stop if the lock is not this process's own any more.

    Raises:
        ConfigError: it was taken over, or somebody deleted it.
        OSError: the file system does not answer.
    """
    found = _read(path)
    if found is None:  # another process that has just removed it by mistake gives it back at once: `_remove`
        time.sleep(0.05)
        found = _read(path)
    if found is not None and found.data == mine:
        return
    what = "was deleted" if found is None else f"was taken over by {found.name}"
    raise ConfigError(
        f"{path} {what} while this process was paused or cut off; it stops here and writes nothing more. "
        "Another process may have continued the run; once none writes there, the same command continues it"
    )


def _beat(path: Path, mine: bytes, ended: threading.Event) -> None:
    """Touch the lock again and again, until it is released or lost."""
    while not ended.wait(BEAT):
        # A file system that does not answer now may answer later.
        with contextlib.suppress(OSError, CheckpointError), _opened(path) as file:
            if file.read(_MOST) != mine:
                return
            os.utime(file.fileno())  # of the open file: the name may belong to another lock by now


def _create(path: Path, data: bytes) -> bool:
    """Make the lock, with its content; False if there is one."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(data)
        try:
            os.link(
                temporary, path
            )  # fails where the file exists: of several processes only one gets the lock
        except FileExistsError:
            found = _read(path)
            return found is not None and found.data == data
        except OSError:  # a file system without hard links: for a moment the lock is there, but empty
            try:
                file = path.open("xb")
            except FileExistsError:
                return False
            try:
                with file:
                    file.write(data)
            except OSError:
                path.unlink(missing_ok=True)
                raise
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> _Found | None:
    """Read the lock; None if there is none.

    Raises:
        CheckpointError: it is no regular file, so everseg has not made it.
    """
    try:
        with _opened(path) as file:
            return _Found(file.read(_MOST), os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


def _opened(path: Path) -> BinaryIO:
    """Open the lock, if it is a regular file; a FIFO would be waited for, and a link may lead anywhere.

    It is opened at once, because that makes a network file system ask its server. The answer to a mere `stat` may be a
    minute old.
    """
    flags = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_BINARY"))
    try:
        file = os.fdopen(os.open(path, flags), "rb")
    except OSError as error:
        if not path.is_symlink() and error.errno not in (errno.EISDIR, errno.ENXIO):
            raise
    else:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    raise CheckpointError(f"{path}: is not a regular file, so it is no lock of everseg; move it away")


def _remove(path: Path, data: bytes) -> None:
    """Remove the lock if it has this content. If another process has made it anew meanwhile, it stays."""
    aside = path.with_name(f".{uuid.uuid4().hex}.tmp")
    found = _read(path)
    if found is None or found.data != data:
        return
    # Between that look and an `unlink` the lock could become another one. A renaming takes exactly one file, which can
    # be looked at again.
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        taken = _read(aside)
        if taken is not None and taken.data != data:
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _is_over(path: Path, found: _Found, say: Callable[[str], None]) -> bool:
    """Whether the lock may be removed. False if it has changed hands meanwhile.

    Raises:
        ConfigError: its holder lives.
    """
    owner, me = found.owner, _myself()
    old = bool(owner) and "beat" not in owner  # written by an everseg that gave no signs of life
    if _is_of_this_machine(owner, me):
        if owner.get("boot") != me["boot"] or not _lives(owner.get("pid"), owner.get("started")):
            return True
        paused = " (it is paused: kill -CONT continues it)" if _is_paused(owner["pid"]) else ""
        raise ConfigError(
            f"{path.parent} is in use by process {owner['pid']} on this machine{paused}; wait for it or stop it"
        )
    if old:
        raise ConfigError(
            f"{path.parent} is in use by {found.name}; wait for it, or delete {path} if that process is gone"
        )
    return _watched(path, found, say)


def _watched(path: Path, found: _Found, say: Callable[[str], None]) -> bool:
    """Watch the lock of another machine's process until it may be removed. False if it has changed hands meanwhile.

    Raises:
        ConfigError: the process gives a sign of life.
    """
    beat, lease = found.seconds("beat", BEAT), found.seconds("lease", LEASE)
    say(
        f"{path.parent} was last written by {found.name}; waiting up to {lease:.0f} s to see whether it still runs"
    )
    start = time.monotonic()
    while True:
        watched = time.monotonic() - start
        silent = (_now(path.parent) - found.changed) / 1e9
        # The file system's clock alone would be wrong if somebody set it forward. So the lock is always watched, for at
        # least two beats.
        if watched >= lease or (silent >= lease and watched >= 2 * beat):
            return True
        time.sleep(beat / 4)
        now = _read(path)
        if now is None or now.data != found.data:
            return False
        if now.changed != found.changed:
            raise ConfigError(
                f"{path.parent} is in use by {found.name}, which is still running; wait for it or stop it"
            )


def _now(folder: Path) -> int:
    """The time in nanoseconds by the clock of a folder's file system."""
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        probe.write_bytes(b"")
        return probe.stat().st_mtime_ns
    finally:
        probe.unlink(missing_ok=True)


def _myself() -> dict[str, Any]:
    """Say which process this is."""
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "boot": _boot_id(), "space": _process_space(),
            "started": _start_time(pid)}  # fmt: skip


def _is_of_this_machine(owner: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether this process sees the holder's process ids.

    Two containers on one machine may have the same host name, and so may two machines. They differ in the boot's id, or
    in the space of process ids.
    """
    if not owner:
        return False
    if "space" not in owner or not me["boot"]:  # an older everseg; or a system without /proc
        return bool(owner.get("host") == me["host"])
    return (owner.get("boot"), owner["space"]) == (me["boot"], me["space"])


def _lives(pid: Any, started: Any) -> bool:
    """Whether a process of this machine lives. Process ids are used again, so its start must be the same, too."""
    return isinstance(pid, int) and started is not None and _start_time(pid) == started


def _is_paused(pid: int) -> bool:
    return _status(pid)[:1] in (["T"], ["t"])


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _process_space() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _status(pid: int) -> list[str]:
    """Fields of a process from the third one, its state, on; [] where /proc does not tell."""
    try:
        # The second field, the program's name, may hold blanks and stands in brackets.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None if there is no such process."""
    fields = _status(pid)
    if len(fields) > 19:
        return fields[19]
    try:  # without /proc: signal 0 reaches nobody and fails where there is no such process
        os.kill(pid, 0)
    except PermissionError:  # there is one, of another user
        return "unknown"
    except (OSError, OverflowError):
        return None
    return "unknown"
