"""Read a file that somebody else may have made: a regular one, inside its folder, and no larger than expected.

Nothing here trusts a name or a size. A link may lead out of the folder, a FIFO would be waited for without end, a
device may have side effects, and a header may claim more than its file holds.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shutil
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

MB = 1_000_000
MOST = 16 * MB
"""Most bytes of a document, unless its reader says otherwise. Parsed, it takes about twenty times as much memory."""
MOST_LIST = 256 * MB
"""Most bytes of a list with a line for each image."""
MOST_LEVELS = 64
"""Most levels of lists and mappings inside each other in a JSON document."""


class UnreadableError(Exception):
    """A file is not what it should be. The message is the reason alone: the caller names the file and what to do."""


def read_regular(path: Path, most: int = MOST, *, root: Path | None = None) -> bytes:
    """Read a whole regular file.

    Args:
        path: the file.
        most: a larger file is refused.
        root: folder that no link may lead out of; None allows links to anywhere, for files that the user names.

    Raises:
        UnreadableError: missing, not allowed, no regular file, too large, or outside `root`.
    """
    try:
        with open_regular(path, root=root) as file:
            if os.fstat(file.fileno()).st_size > most:
                raise UnreadableError(f"it is larger than {size_text(most)}")
            data = file.read(most + 1)  # a file may grow while it is read
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from None
    if len(data) > most:
        raise UnreadableError(f"it is larger than {size_text(most)}")
    return data


def open_regular(path: Path, *, root: Path | None = None) -> BinaryIO:
    """Open a regular file for reading; arguments as for `read_regular`.

    Raises:
        UnreadableError: missing, not allowed, no regular file, or outside `root`.
    """
    check_regular(path, root=root)  # before it is opened, because opening a device can do something
    try:
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(path, flags), "rb")
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # replaced in between
        file.close()
        raise UnreadableError("it is not a regular file")
    return file


def check_regular(path: Path, *, root: Path | None = None) -> None:
    """Check a file without opening it; arguments as for `read_regular`.

    Raises:
        UnreadableError: missing, not allowed, no regular file, or outside `root`.
    """
    try:
        if root is not None and not path.resolve(strict=True).is_relative_to(real_path(root)):
            raise UnreadableError(f"it is a link that leads out of {root}")
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnreadableError("it is not a regular file")
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from None
    except (ValueError, RuntimeError) as error:  # a NUL in the name; a loop of links
        raise UnreadableError(str(error)) from None


def real_path(path: Path | str) -> Path:
    r"""Where a file or folder really is, links followed, as `Path.resolve` says it, but without its errors.

    For a loop of links and a NUL in a name that raises what is no error of the operating system (RuntimeError,
    ValueError). Here the path comes back as it is: to open it says what is wrong.

    >>> real_path("a\0b").name
    'a\\x00b'
    """
    try:
        return Path(path).resolve()
    except (RuntimeError, ValueError):
        return Path(path).absolute()


def size_text(number: int) -> str:
    """Say a limit in bytes: in MB where it has that many.

    >>> size_text(16_000_000), size_text(900)
    ('16 MB', '900 bytes')
    """
    return f"{number // MB} MB" if number >= MB else f"{number} bytes"


# ---------------------------------------------------------------- what the operating system says

_SENTENCES = {
    errno.EACCES: "no permission to {do} here; {instead}",
    errno.EPERM: "no permission to {do} here; {instead}",
    errno.EROFS: "no permission to {do} here, the disk is read-only; {instead}",
    errno.ENAMETOOLONG: "the name is too long for this disk; give a shorter one",
    errno.EXDEV: "lies on another disk than the folder that it is moved from; put both on one disk",
    errno.EDQUOT: "your quota on this disk is used up; delete something of yours there, or ask for more, and run again",
    errno.EFBIG: "larger than a file may be here; raise the limit (ulimit -f), or free some space and run again",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n 4096), or set data.workers=0",
    errno.ENFILE: "too many files are open on this machine; end other programs and run again",
    errno.ENOMEM: "there is no memory left; end other programs, or use smaller batches (train.batch, data.crop)",
    errno.EIO: "cannot be {done}: the disk reports an error; look after the disk, then run again",
    errno.ELOOP: "is a link that leads back to itself; put a file there",
    errno.ENOTDIR: "cannot be {done}, as a part of the path is a file and no folder; {instead}",
    errno.ESTALE: "the network disk has lost this file; mount it again, then run again",
}


def system_text(error: OSError, path: Path | str | None, *, writing: bool = True) -> str:
    """Say an error of the operating system in a sentence that says what is full or wrong, and what to do.

    Args:
        path: the file or folder that it is about; None = the output of the command, wherever that goes.
        writing: it was to be written; else read.
    """
    if error.errno == errno.ENOSPC:
        room = "no space left there" if path is None else _room(Path(path))
        path = "the output" if path is None else path
        return f"disk full: {path} could not be written ({room}); free some space and run again"
    path = "the output" if path is None else path
    words = {
        "do": "write" if writing else "read",
        "done": "written" if writing else "read",
        "instead": "choose another folder to write to" if writing else "give another file",
    }
    known = _SENTENCES.get(error.errno or 0)
    if known is None:
        return f"{path}: cannot be {words['done']} ({error.strerror or error}); {words['instead']}"
    full = "disk full: " if error.errno in (errno.EDQUOT, errno.EFBIG) else ""
    begun = "" if known.startswith(("no permission", "cannot")) else f"cannot be {words['done']}: "
    return f"{full}{path}: {begun}{known.format(**words)}"


FEW_FILES = 1000
"""Free inodes below which they may be what a disk lacks."""


def _room(path: Path) -> str:
    """What is left on a disk: its room, or its number of files where that is the scarcer of the two, and few.

    Half-written files may be deleted by now, so neither needs to be 0.
    """
    try:
        while not path.exists() and path != path.parent:
            path = path.parent
        found = os.statvfs(path) if hasattr(os, "statvfs") else None
        few = found is not None and bool(found.f_files) and found.f_favail < FEW_FILES
        if found is not None and few and found.f_favail * found.f_blocks <= found.f_bavail * found.f_files:
            return f"its number of files is used up: {found.f_favail} inodes free"
        return f"{shutil.disk_usage(path).free / 1e6:.0f} MB free"
    except OSError:
        return "its room is not known"


# ---------------------------------------------------------------- text


def text_of(data: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark.

    Raises:
        UnreadableError: it is another encoding.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UnreadableError(f"line {line} is not UTF-8 text; save the file as UTF-8") from None


MOST_DIGITS = 18
"""Digits of a whole number that a text may state: more fit no file, no picture and no list."""


def whole_number(text: str) -> int | None:
    """Read a whole number that somebody else wrote: digits 0 to 9, blanks around them; None for anything else.

    `str.isdigit` is true for "\u00b2" and `str.strip` takes away what `int` does not, and `int` refuses 4,301 digits.

    >>> whole_number(" 12 "), whole_number("-1"), whole_number("\u00b2"), whole_number("9" * 5000)
    (12, None, None, None)
    """
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS else None


def read_text(path: Path, most: int = MOST, *, root: Path | None = None) -> str:
    """Read a text file as `read_regular` and `text_of` do.

    Raises:
        UnreadableError: as theirs.
    """
    return text_of(read_regular(path, most, root=root))


def json_of(data: bytes) -> Any:
    """Read strict JSON: UTF-8, every key once, and no more than MOST_LEVELS levels.

    Raises:
        UnreadableError: it is anything else.
    """
    try:
        value = json.loads(text_of(data), object_pairs_hook=_mapping)
    except RecursionError:
        raise UnreadableError(f"it nests deeper than {MOST_LEVELS} levels") from None
    except ValueError as error:
        raise UnreadableError(f"it is no JSON: {error}") from None
    _check_levels(value)
    return value


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        # json keeps the last of them; another reader may keep the first, and see another document.
        raise UnreadableError(f"the key {twice[:40]!r} appears twice in one mapping")
    return found


def _check_levels(value: Any) -> None:
    level = [value]
    for _ in range(MOST_LEVELS):
        level = list(_inside(level))
        if not level:
            return
    raise UnreadableError(f"it nests deeper than {MOST_LEVELS} levels")


def _inside(level: list[Any]) -> Iterator[Any]:
    for item in level:
        if isinstance(item, dict | list):
            for inner in item.values() if isinstance(item, dict) else item:
                if isinstance(inner, dict | list):
                    yield inner


# ---------------------------------------------------------------- numpy arrays


def array_of(file: BinaryIO, size: int, most: int) -> np.ndarray:
    """Read an array in numpy's format, after checking that the file holds as much as its header says.

    numpy takes the memory that a header asks for before it reads: a header of 128 bytes can ask for any amount.

    Args:
        file: at the beginning of the array.
        size: bytes of the array with its header.
        most: bytes that the array may take.

    Raises:
        UnreadableError: it is not that format, holds objects, or does not fit `size` or `most`.
    """
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise UnreadableError(f"an array of format {version}")
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(file)
        if (
            dtype.hasobject
            or dtype.fields is not None
            or dtype.subdtype is not None
            or dtype.kind not in "biufc"
        ):
            raise UnreadableError(f"an array of {str(dtype)[:40]}, not of numbers")
        wanted = math.prod(shape) * dtype.itemsize
        if wanted > most:
            raise UnreadableError(f"an array that is larger than {size_text(most)}")
        if len(shape) > 8 or min(shape, default=0) < 0 or file.tell() + wanted != size:
            raise UnreadableError("an array of another size than its header says")
        data = file.read(wanted)
    except UnreadableError:
        raise
    except Exception as error:  # numpy parses the header as Python and raises nearly anything
        raise UnreadableError(f"no array: {type(error).__name__}") from None
    if len(data) != wanted:
        raise UnreadableError("an array that is cut off")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return array.copy()


MOST_ARRAYS = 4096
MOST_ARRAY_BYTES = 2048 * MB


def arrays_of(data: bytes, most: int = MOST_ARRAY_BYTES) -> dict[str, np.ndarray]:
    """Read the arrays of an npz archive.

    Args:
        most: bytes that all arrays may take together.

    Raises:
        UnreadableError: it is no such archive, or an array does not fit its header or `most`.
    """
    found: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if len(entries) > MOST_ARRAYS:
                raise UnreadableError(f"it holds more than {MOST_ARRAYS} arrays")
            for entry in entries:
                name = entry.filename.removesuffix(".npy")
                if name == entry.filename or name in found:
                    raise UnreadableError(
                        f"an entry {entry.filename[:40]!r} that is not an array, or appears twice"
                    )
                with archive.open(entry) as file:
                    found[name] = array_of(file, entry.file_size, most)  # type: ignore[arg-type]
                    if file.read(1):  # to the end: only then the checksum is compared
                        raise UnreadableError(f"bytes behind the array {name[:40]!r}")
                most -= found[name].nbytes
    except UnreadableError:
        raise
    except Exception as error:  # a damaged archive makes its readers raise nearly anything
        raise UnreadableError(f"it is not a readable npz: {type(error).__name__}") from None
    return found
