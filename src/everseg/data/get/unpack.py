"""Unpack archives from strangers: only regular files and folders, and only inside the target."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import shutil
import stat
import struct
import tarfile
import unicodedata
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from everseg.errors import DataError

BLOCK = 1 << 20


class ArchiveError(DataError):
    """The archive itself is at fault: damaged, hostile, or not the expected one."""


_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    ValueError,
    OverflowError,
    NotImplementedError,
)


@dataclass(frozen=True)
class Limits:
    """The most that an archive may unpack to."""

    entries: int = 500_000
    bytes: int = 64 << 30
    ratio: int = 100
    """Unpacked bytes per archive byte; counts only above `ratio_from`."""
    ratio_from: int = 64 << 20
    depth: int = 32
    """Folders inside each other."""

    def allowed(self, packed: int) -> int:
        """Most bytes that an archive of `packed` bytes may become."""
        return min(self.bytes, max(self.ratio_from, self.ratio * packed))


@dataclass(frozen=True)
class _Entry:
    name: str
    is_folder: bool
    size: int
    problem: str
    """Why it may not be unpacked; "" if it may."""
    source: Any


def extract(archive: Path, target: Path, *, limits: Limits | None = None) -> int:
    """Unpack a .zip or .tar (plain, gz, bz2, xz) into the new folder `target`.

    The files are written to a folder beside `target`, which is renamed at the end. So `target` exists whole or not at
    all. Owners, modes and times of the archive are dropped; `__MACOSX` entries are left out.

    Returns:
        Number of files.

    Raises:
        ArchiveError: names the entry that is a link, device or pipe, leads out of the folder (absolute, `..`,
            backslash, drive), meets another by case or Unicode form, is encrypted, or goes beyond the limits; or
            the archive is damaged. Nothing is left behind.
        DataError: the disk is full, or `target` cannot be written.
    """
    limits = limits or Limits()
    scratch = target.with_name(f".everseg-unpack-{uuid.uuid4().hex}")
    try:
        scratch.mkdir(parents=True)
        count = _unpack(archive, scratch, limits)
        scratch.rename(target)
    except _DAMAGE as error:
        raise ArchiveError(f"{archive}: damaged, or not an archive ({error}); fetch it again") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DataError(f"{target.parent}: the disk is full; make room and try again") from None
        raise DataError(f"{archive}: cannot be unpacked to {target} ({error.strerror or error})") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return count


def _unpack(archive: Path, scratch: Path, limits: Limits) -> int:
    budget = limits.allowed(archive.stat().st_size)
    taken: dict[str, tuple[str, bool]] = {}
    files = written = 0
    with archive.open("rb") as raw:
        if zipfile.is_zipfile(raw):
            entries = _zip_entries(raw, archive, budget)
        else:
            raw.seek(0)
            entries = _tar_entries(raw)
        for number, entry in enumerate(entries, 1):
            if number > limits.entries:
                raise ArchiveError(
                    f"{archive}: more than {limits.entries} entries; it is not unpacked. Is it the right archive?"
                )
            parts = [] if entry.problem else _parts(entry, archive, limits)
            if entry.problem:
                raise _refusal(archive, entry, entry.problem)
            if parts[:1] == ["__MACOSX"]:
                continue
            _claim(parts, entry, taken, archive)
            path = scratch.joinpath(*parts)
            if entry.is_folder:
                path.mkdir(parents=True, exist_ok=True)
                continue
            # By the size declared, before a byte is written; `_copy` holds the entry to it.
            if written + entry.size > budget:
                raise _refusal(archive, entry, f"would unpack to more than {budget} bytes")
            path.parent.mkdir(parents=True, exist_ok=True)
            with entry.source() as packed, path.open("xb") as file:
                written += _copy(packed, file, entry, archive)
            files += 1
    return files


def _copy(packed: IO[bytes], file: IO[bytes], entry: _Entry, archive: Path) -> int:
    size = 0
    while block := packed.read(BLOCK):
        size += len(block)
        if size > entry.size:
            raise _refusal(archive, entry, f"holds more than the {entry.size} bytes it declares")
        file.write(block)
    if size < entry.size:
        raise _refusal(archive, entry, f"holds only {size} of the {entry.size} bytes it declares")
    return size


def _parts(entry: _Entry, archive: Path, limits: Limits) -> list[str]:
    """Split the entry's name into its path below the target, or refuse it."""
    name = entry.name
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or (len(name) > 1 and name[1] == ":"):
        raise _refusal(archive, entry, "has an absolute path")
    if ".." in parts:
        raise _refusal(archive, entry, "leads out of the folder")
    if "\\" in name or not name.isprintable():
        raise _refusal(archive, entry, "has a backslash or control character in its name")
    if len(parts) > limits.depth or any(len(part.encode("utf-8", "surrogateescape")) > 255 for part in parts):
        raise _refusal(archive, entry, "has too long a path")
    if not parts and not entry.is_folder:
        raise _refusal(archive, entry, "has no name")
    return parts


def _claim(parts: list[str], entry: _Entry, taken: dict[str, tuple[str, bool]], archive: Path) -> None:
    """Refuse a path that equals an earlier one, also on file systems that ignore case or Unicode form."""
    for depth in range(1, len(parts) + 1):
        path = "/".join(parts[:depth])
        is_folder = depth < len(parts) or entry.is_folder
        # Twice: folding the case of a composed letter may give letters that compose again.
        key = unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
        earlier = taken.get(key)
        if earlier is None:
            taken[key] = (path, is_folder)
        elif not is_folder or earlier != (path, True):
            raise _refusal(archive, entry, f"collides with {earlier[0]!r}")


def _zip_entries(raw: IO[bytes], archive: Path, budget: int) -> Iterator[_Entry]:
    with zipfile.ZipFile(raw) as bundle:
        infos = bundle.infolist()
        if sum(info.file_size for info in infos) > budget:
            largest = max(infos, key=lambda info: info.file_size)
            raise ArchiveError(
                f"{archive}: entry {largest.filename!r} and the others would unpack to more than {budget} bytes; "
                "it is not unpacked. Is it the right archive?"
            )
        for info in infos:
            kind = stat.S_IFMT(info.external_attr >> 16)
            problem = ""
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                problem = "is a link" if kind == stat.S_IFLNK else "is a device or pipe"
            elif info.flag_bits & 1:
                problem = "is encrypted"
            is_folder = info.filename.endswith("/")  # `is_dir` fails on a name of nothing
            yield _Entry(info.filename, is_folder, info.file_size, problem, partial(bundle.open, info))


def _tar_entries(raw: IO[bytes]) -> Iterator[_Entry]:
    head = raw.read(6)
    raw.seek(0)
    stream: Any = raw
    if head[:2] == b"\x1f\x8b":
        stream = gzip.GzipFile(fileobj=raw)
    elif head[:3] == b"BZh":
        stream = bz2.BZ2File(raw)
    elif head == b"\xfd7zXZ\x00":
        stream = lzma.LZMAFile(raw)  # noqa: SIM115 - closed with raw
    with tarfile.open(fileobj=_Bounded(stream), mode="r:") as bundle:
        while (info := bundle.next()) is not None:
            problem = ""
            if info.issym() or info.islnk():
                problem = f"is a link to {info.linkname!r}"
            elif info.sparse is not None or info.type == tarfile.GNUTYPE_SPARSE:
                problem = "is a sparse file"
            elif not (info.isfile() or info.isdir()):
                problem = "is a device or pipe"
            yield _Entry(info.name, info.isdir(), info.size, problem, partial(bundle.extractfile, info))
            bundle.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every entry in memory otherwise
        # Tarfile takes a damaged header for the end of the archive. The real end is a block of zeros.
        stream.seek(bundle.offset)
        end = stream.read(tarfile.BLOCKSIZE)
        if not end or end.strip(b"\0"):
            raise tarfile.ReadError("cut off, or a damaged header")


class _Bounded(io.RawIOBase):
    """A stream that refuses to read much at once, so that a header with a name of gigabytes does no harm."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > 8 * BLOCK:
            raise tarfile.ReadError("a header of unreasonable size")
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()


def _refusal(archive: Path, entry: _Entry, reason: str) -> ArchiveError:
    return ArchiveError(f"{archive}: entry {entry.name!r} {reason}; nothing of the archive is unpacked")
