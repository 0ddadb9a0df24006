"""Write files so that they appear under their name only when they are whole."""

from __future__ import annotations

import contextlib
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

MOMENT = 60
"""Seconds for which an unfinished file may be one that is being written."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file next to its place, flush it, move it there, and flush the folder.

    Raises:
        OSError: the folder or disk does not allow it; an earlier file of that name is then still whole.
    """
    # In the same folder, as a rename is atomic within one file system only. Flushed before and after, so that a crash
    # leaves the old file or the new one, never an empty one under the right name.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        write_flushed(temporary, data)
        temporary.replace(path)
        flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the unfinished files that killed processes have left in a folder (see `write_atomically`).

    Files that changed in the last minute stay: another process (a report of the run) may be writing them.

    Raises:
        OSError: the folder does not allow it.
    """
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\.[0-9a-f]{32}\.tmp", path.name):
            # Its writer has moved it to its place in the meantime.
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > MOMENT:
                    path.unlink()


def write_flushed(path: Path, data: bytes, *, rights: int = 0o666) -> None:
    """Write a new file and wait until the disk has it.

    Args:
        rights: who may use it, less what the user's mask takes away. They hold before anything is in it.

    Raises:
        OSError: it exists already, or the folder or disk does not allow it.
    """
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, rights)) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def unfinished(folder: Path) -> Path:
    """Where a folder that lies among the user's own is written until it is whole.

    The user has nothing of this name, so a leftover of a killed process can be deleted: the name is always the same.

    >>> unfinished(Path("models/v2")).name
    '.v2.everseg.tmp'
    """
    return folder.with_name(f".{folder.name}.everseg.tmp")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is in a block of this kind for the same folder. No file is left by it.

    Where the system has no such locks (Windows, some network disks) it does not wait.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # until the descriptor is closed
        yield


def flush_folder(path: Path) -> None:
    """Wait until the disk has the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
