"""A disk that fails: everything that Python does to files below a folder is counted, and one of these things goes
wrong.

It stands in the way of `open`, of what an open file does, and of the functions of `os` that change names: everseg
writes through nothing else.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NAMES = ("rename", "replace", "mkdir", "unlink", "link", "rmdir", "symlink", "remove")


class Disk:
    """Counts what is done to files below `root`, and fails.

    Args:
        root: the folder that lies on this disk.
        code: error number, or None: the process ends at once, as if it were killed right then.
        at: the operation that fails, from 0; None = none.
        lasting: all later ones fail as well. A disk that is full or read-only stays so, except that deleting works on a
            full one.
    """

    def __init__(self, root: Path, code: int | None, at: int | None, *, lasting: bool = False) -> None:
        self.root, self.code, self.at, self.lasting = str(root), code, at, lasting
        self.done: list[str] = []
        """The operations so far, each as its name and file."""

    def met(self, what: str, path: Any) -> None:
        """An operation begins."""
        number = len(self.done)
        self.done.append(f"{what} {Path(os.fsdecode(path)).name}")
        if self.at is None or number < self.at or (number > self.at and not self.lasting):
            return
        if (
            self.lasting
            and number > self.at
            and what in ("unlink", "remove", "rmdir")
            and not self._is_frozen()
        ):
            return
        if self.code is None:
            os._exit(9)
        raise OSError(self.code, os.strerror(self.code), os.fsdecode(path))

    def _is_frozen(self) -> bool:
        import errno

        return self.code in (errno.EROFS, errno.EIO)

    def holds(self, path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return os.path.abspath(os.fsdecode(path)).startswith(self.root)  # noqa: PTH100

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Disk]:
        """Be this disk."""
        kept = {name: getattr(os, name) for name in (*NAMES, "open", "fsync")}
        opened = io.open
        descriptors: dict[int, Any] = {}

        def names(name: str) -> Callable[..., Any]:
            def do(path: Any, *more: Any, **named: Any) -> Any:
                if self.holds(path) and named.get("dir_fd") is None:
                    self.met(name, path)
                return kept[name](path, *more, **named)

            return do

        def open_descriptor(path: Any, flags: int, *more: Any, **named: Any) -> int:
            if self.holds(path) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.met("open", path)
            found = kept["open"](path, flags, *more, **named)
            if self.holds(path):
                descriptors[found] = path
            return found

        def flush(descriptor: int) -> None:
            if descriptor in descriptors:
                self.met("fsync", descriptors[descriptor])
            kept["fsync"](descriptor)

        def open_file(path: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
            writes = self.holds(path) and set(mode) & set("wax+")
            if writes:
                self.met("open", path)
            file = opened(path, mode, *more, **named)
            if writes:
                descriptors[file.fileno()] = path
                return _File(file, path, self)
            return file

        for name in NAMES:
            setattr(os, name, names(name))
        os.open, os.fsync = open_descriptor, flush  # type: ignore[assignment]
        io.open = builtins.open = open_file  # type: ignore[assignment]
        try:
            yield self
        finally:
            for name, function in kept.items():
                setattr(os, name, function)
            io.open = builtins.open = opened  # type: ignore[assignment]


class _File:
    """An open file on a failing disk. Of a write that fails, the first half arrives."""

    def __init__(self, file: Any, path: Any, disk: Disk) -> None:
        self._file, self._path, self._disk = file, path, disk

    def write(self, data: Any) -> int:
        try:
            self._disk.met("write", self._path)
        except OSError:
            self._file.write(data[: len(data) // 2])
            with contextlib.suppress(OSError):
                self._file.flush()
            raise
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)
