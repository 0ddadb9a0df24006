"""Folders that are either whole and verified, or not there: checkpoints and finished steps.

A folder is written as `X.tmp/` (files, then the manifest with sizes and SHA-256), flushed to disk, renamed to `X`,
and never overwritten. Only safetensors and JSON are read back, so loading never runs code from a file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from everseg.data.writing import flush_folder, write_atomically, write_flushed
from everseg.errors import CheckpointError

FORMAT = 1
MANIFEST = "MANIFEST.json"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically and flushed."""
    write_bytes(path, _json(value))


def write_bytes(path: Path, data: bytes) -> None:
    """Write any file atomically and flushed.

    Raises:
        CheckpointError: the folder or disk does not allow it; an earlier file of that name is then still whole.
    """
    with writing(path):
        write_atomically(path, data)


def read_json(path: Path, data: bytes | None = None) -> Any:
    """Read a JSON file.

    Args:
        path: the file; where `data` is given, only its name for the message.
        data: its bytes, if they were read before.

    Raises:
        CheckpointError: unreadable or damaged.
    """
    try:
        return json.loads(path.read_bytes() if data is None else data)
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: nested thousands of levels deep
        raise CheckpointError(
            f"{path}: cannot be read ({error}); restore it or start again under another name"
        ) from None


def read_document(path: Path, *needed: str, data: bytes | None = None) -> dict[str, Any]:
    """Read a JSON file of named entries.

    Args:
        path: the file; where `data` is given, only its name for the message.
        needed: entries that must be there.
        data: its bytes, if they were read before.

    Raises:
        CheckpointError: unreadable, damaged, or without one of the entries `needed`.
    """
    value = read_json(path, data)
    missing = [name for name in needed if not isinstance(value, dict) or name not in value]
    if missing:
        raise CheckpointError(
            f"{path} is damaged: it has no {', '.join(missing)}; restore it or start again under another name"
        )
    return value


def save_folder(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Any],
    parent: str | None = None,
    files: Mapping[str, bytes] | None = None,
) -> str:
    """Commit a folder of safetensors and JSON files.

    Args:
        folder: where; must not exist yet (an existing whole folder of that name is kept and its digest returned).
        tensors: file stem -> named tensors, saved as `<stem>.safetensors`.
        documents: file stem -> JSON value, saved as `<stem>.json`.
        parent: digest of the folder this one continues.
        files: file name -> bytes of any other files.

    Returns:
        The digest (SHA-256 of the manifest), which children record as `parent`.

    Raises:
        CheckpointError: disk full, read-only, or no permission; nothing is left half-written.
    """
    if (folder / MANIFEST).exists():
        return verify(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    with writing(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            contents = {f"{stem}.safetensors": _pack(values) for stem, values in tensors.items()}
            contents |= {f"{stem}.json": _json(value) for stem, value in documents.items()}
            contents |= files or {}
            listed = {}
            for name, data in contents.items():
                write_flushed(temporary / name, data)
                listed[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            body = {"format": FORMAT, "files": listed, "parent": parent}
            manifest = _json({**body, "self": _self_hash(body)})
            write_flushed(temporary / MANIFEST, manifest)
            flush_folder(temporary)
            temporary.rename(folder)
            flush_folder(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return hashlib.sha256(manifest).hexdigest()


@dataclass(frozen=True)
class Committed:
    """A committed folder as its manifest describes it; its files are checked when they are read."""

    folder: Path
    files: Mapping[str, Mapping[str, Any]]
    """Name -> size in bytes and SHA-256."""
    parent: str | None
    """Digest of the folder that this one continues."""
    digest: str
    """SHA-256 of the manifest."""

    def check(self, name: str) -> None:
        """Compare a file with the manifest without holding it in memory.

        Raises:
            CheckpointError: missing, changed, or not listed.
        """
        self._check_hash(name, _file_hash(self._sized(name)))

    def read(self, name: str) -> bytes:
        """Read a file whole, opening it once, and compare what was read with the manifest.

        Raises:
            CheckpointError: missing, changed, or not listed.
        """
        path = self._sized(name)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{self.folder} is damaged: {name} cannot be read ({error})") from None
        self._check_hash(name, hashlib.sha256(data).hexdigest())
        return data

    def _sized(self, name: str) -> Path:
        """Path of a file that is there and has its size."""
        if name not in self.files:
            raise CheckpointError(f"{self.folder} is damaged: {MANIFEST} does not list {name}")
        path, size = self.folder / name, self.files[name]["size"]
        if not path.is_file():
            raise CheckpointError(f"{self.folder} is damaged: {name} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{self.folder} is damaged: {name} has {path.stat().st_size} bytes instead of {size}"
            )
        return path

    def _check_hash(self, name: str, found: str) -> None:
        expected = self.files[name]["sha256"]
        if found != expected:
            raise CheckpointError(
                f"{self.folder} is damaged: {name} sha256 mismatch "
                f"(expected {expected[:12]}…, got {found[:12]}…)"
            )


def read_committed(folder: Path) -> Committed:
    """Read and check the manifest of a committed folder; none of its other files.

    Raises:
        CheckpointError: missing, damaged, or of another format.
    """
    try:
        raw = (folder / MANIFEST).read_bytes()
        manifest = json.loads(raw)
        files, given = manifest["files"], manifest.pop("self")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} is damaged: no readable {MANIFEST} ({type(error).__name__})"
        ) from None
    if given != _self_hash(manifest):
        raise CheckpointError(f"{folder} is damaged: {MANIFEST} does not match its own checksum")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{folder} has format {manifest['format']}; this everseg reads format {FORMAT}")
    return Committed(folder, files, manifest["parent"], hashlib.sha256(raw).hexdigest())


def verify(folder: Path, only: Collection[str] | None = None) -> str:
    """Check the files of a committed folder against its manifest.

    Args:
        only: the names to check; None = all.

    Returns:
        The folder's digest, SHA-256 of the manifest alone: it stands for every file as it was written, but only those
        checked here are known to be as they were.

    Raises:
        CheckpointError: what is missing or differs, or a name in `only` that the manifest does not list.
    """
    found = read_committed(folder)
    for name in found.files if only is None else only:
        found.check(name)
    return found.digest


def parent_of(folder: Path) -> str | None:
    """Digest of the folder that this one continues."""
    return read_json(folder / MANIFEST)["parent"]


def load_tensors(path: Path, data: bytes | None = None) -> dict[str, Tensor]:
    """Read one safetensors file.

    Args:
        path: the file; where `data` is given, only its name for the message.
        data: its bytes, if they were read before.

    Raises:
        CheckpointError: not a safetensors file.
    """
    try:
        return safetensors.torch.load_file(path) if data is None else safetensors.torch.load(data)
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def newest_valid(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Find the newest checkpoint `it-<iteration>` of a folder that verifies.

    A damaged newest one is set aside as `it-<iteration>.damaged`, with one warning, so that the iterations done
    again can be saved under their name. Leftovers of an interrupted save are ignored.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    problems: list[str] = []
    damaged: list[Path] = []
    for path in sorted(folder.glob("it-" + "[0-9]" * 8), reverse=True):
        try:
            verify(path)
        except CheckpointError as error:
            problems.append(str(error))
            damaged.append(path)
            continue
        for bad in damaged:
            aside = bad.with_name(bad.name + ".damaged")
            with writing(aside):
                shutil.rmtree(aside, ignore_errors=True)
                bad.rename(aside)
        if problems:
            warn(f"{'; '.join(problems)}. Using {path.name} instead; the iterations after it are done again.")
        return path
    if problems:
        listing = "\n  ".join(problems)
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged:\n  {listing}\n"
            f"Restore one of them, or delete {folder} to train this step again from its beginning."
        )
    return None


def purge(folder: Path, keep: int = 2) -> None:
    """Delete all but the newest checkpoints, once the newest verifies; and leftovers of interrupted saves."""
    checkpoints = sorted(folder.glob("it-" + "[0-9]" * 8), reverse=True)
    if checkpoints:
        verify(checkpoints[0])
    for path in checkpoints[keep:]:
        doomed = path.with_name(path.name + ".old")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    for pattern in ("*.tmp", "*.old"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn the operating system's write errors into one message."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(_existing(target)).free / 1e6
            text = f"disk full: {target} could not be written ({free:.0f} MB free); free some space and run again"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            text = f"{target}: no permission to write here; choose another folder to write to"
        else:
            text = (
                f"{target}: cannot be written ({error.strerror or error}); choose another folder to write to"
            )
        raise CheckpointError(text) from error


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _self_hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_json(body)).hexdigest()


def _pack(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save(
        {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    )


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
