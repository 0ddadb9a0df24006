"""Commit folders to disk, such as checkpoints and finished steps: a folder is whole and verified, or does not exist.

A folder is first written as `X.tmp/` (`.X.everseg.tmp/` among the user's own folders): its files, then the manifest
with sizes and SHA-256. It is flushed to disk and then renamed to `X`. It is never overwritten. Only safetensors and
JSON are read back, so loading never runs code from a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from everseg.data.writing import flush_folder, unfinished, write_atomically, write_flushed
from everseg.errors import CheckpointError, EversegError, some
from everseg.files import MOST, UnreadableError, check_regular, json_of, read_regular, system_text
from everseg.runs.shapes import COUNT, TEXT, Shape, entries, named, one, or_none, problems_of

FORMAT = 1
MANIFEST = "MANIFEST.json"
SEALED, SHA256 = "sealed", "sha256"
"""Entries by which a document holds its own checksum."""
RESTORE = "restore it or start again under another name"
GUARDS: list[Callable[[Path], None]] = []
"""Asked before every write of this process, with the file or folder to be written; they raise to prevent it. The lock
of a run puts its own here (`everseg.runs.lock`)."""


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically and flushed."""
    write_bytes(path, _json(value))


def write_bytes(path: Path, data: bytes) -> None:
    """Write any file atomically and flushed.

    Raises:
        CheckpointError: the folder or disk does not allow it. An earlier file of that name stays whole.
    """
    with writing(path):
        write_atomically(path, data)


def read_json(
    path: Path,
    data: bytes | None = None,
    *,
    root: Path | None = None,
    most: int = MOST,
    advice: str = RESTORE,
) -> Any:
    """Read a JSON file: a regular one, bounded in size and depth, in which every key stands once.

    Args:
        path: the file. If `data` is given, the path serves only for messages.
        data: the bytes of the file, if the caller has read them before.
        root: folder that the file must lie in, links followed; default the file's own.
        most: bytes.
        advice: what to do about a damaged one.

    Raises:
        CheckpointError: the file is unreadable or damaged.
    """
    try:
        return json_of(read_regular(path, most, root=root or path.parent) if data is None else data)
    except UnreadableError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {advice}") from None


def read_document(
    path: Path,
    *needed: str,
    data: bytes | None = None,
    shape: Shape | None = None,
    root: Path | None = None,
    most: int = MOST,
    advice: str = RESTORE,
) -> dict[str, Any]:
    """Read a JSON file of named entries, and compare it with its own checksum if it has one (`write_document`).

    Args:
        path: the file. If `data` is given, the path serves only for messages.
        needed: entries that must be there.
        data: the bytes of the file, if the caller has read them before.
        shape: what must stand in it (`everseg.runs.documents`).
        root: as for `read_json`; so are `most` and `advice`.

    Returns:
        The entries without the checksum.

    Raises:
        CheckpointError: the file is unreadable, damaged or changed, lacks one of the entries `needed`, or has another
            shape. The message names the keys.
    """
    value = read_json(path, data, root=root, most=most, advice=advice)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: expected keys and values; {advice}")
    _check_seal(path, value, advice)
    problems = [f"it has no {name}" for name in needed if name not in value]
    if not problems and shape is not None:
        problems = problems_of(value, shape)
    if problems:
        raise CheckpointError(f"{path} is damaged: {some(problems, 8, between='; ')}; {advice}")
    return value


def write_document(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file of named entries with its own checksum, atomically and flushed.

    The file says twice that it has one: by the checksum, and by the entry "sealed". So no single damaged key makes it
    look like a file of an earlier version, which had none.
    """
    body = {**value, SEALED: 1}
    write_json(path, {**body, SHA256: canonical_hash(body)})


def _check_seal(path: Path, value: dict[str, Any], advice: str) -> None:
    """Compare a document with its checksum, and take it out."""
    given = value.pop(SHA256, None)
    if (given is None and SEALED in value) or (given is not None and given != canonical_hash(value)):
        raise CheckpointError(
            f"{path} is damaged: it does not match its own checksum; {advice} (whoever edited it on purpose takes out "
            f"its entries '{SEALED}' and '{SHA256}')"
        )
    value.pop(SEALED, None)


def canonical_hash(value: Any) -> str:
    """SHA-256 of what a JSON document says, however its text is laid out."""
    # The round trip through JSON gives values before writing the form that they have when they are read back.
    return hashlib.sha256(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode()).hexdigest()


def save_folder(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Any],
    parent: str | None = None,
    files: Mapping[str, bytes | Callable[[], bytes]] | None = None,
    *,
    among_others: bool = False,
) -> str:
    """Commit a folder of safetensors and JSON files.

    Args:
        folder: the folder to make. An existing whole folder of that name is kept, and its digest is returned.
        tensors: file stem -> named tensors, saved as `<stem>.safetensors`.
        documents: file stem -> JSON value, saved as `<stem>.json`.
        parent: digest of the folder this one continues.
        files: file name -> bytes of any other files, or what makes them when they are written.
        among_others: the folder lies among the user's own, which may be called `X.tmp` too.

    Returns:
        The digest (SHA-256 of the manifest). A folder that continues this one records it as `parent`.

    Raises:
        CheckpointError: the disk is full or read-only, or permission is missing. Nothing half-written is left behind.
    """
    temporary = unfinished(folder) if among_others else folder.with_name(folder.name + ".tmp")
    with writing(folder):
        if (folder / MANIFEST).exists():
            return verify(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            contents: dict[str, bytes | Callable[[], bytes]]
            contents = {f"{stem}.safetensors": _pack(values) for stem, values in tensors.items()}
            contents |= {f"{stem}.json": _json(value) for stem, value in documents.items()}
            contents |= files or {}
            # The manifest comes after all files and the rename after the flush, so that a folder `X` is complete.
            listed = {}
            for name, content in contents.items():
                data = content() if callable(content) else content
                write_flushed(temporary / name, data)
                listed[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            body = {"format": FORMAT, "files": listed, "parent": parent}
            manifest = _json({**body, "self": _self_hash(body)})
            write_flushed(temporary / MANIFEST, manifest)
            flush_folder(temporary)
            _ask(folder)  # writing all that may have taken long
            temporary.rename(folder)
            flush_folder(folder.parent)
        except BaseException:
            with contextlib.suppress(EversegError, OSError):
                _ask(
                    folder
                )  # who lost the lock deletes nothing either: the files may be another process's by now
                shutil.rmtree(temporary, ignore_errors=True)
            raise
    return hashlib.sha256(manifest).hexdigest()


def is_file_name(value: Any) -> bool:
    """Tell whether a value is the name of a file beside another one: without a folder, on any system."""
    return (
        isinstance(value, str)
        and 0 < len(value) < 256
        and not set(value) & set("/\\:\0")
        and value not in (".", "..")
    )


def _files(value: Any, key: str, problems: list[str]) -> None:
    named(entries({"size": COUNT, "sha256": TEXT}))(value, key, problems)
    # A name with a separator in it could lead anywhere on this machine.
    if not problems and not all(map(is_file_name, value)):
        problems.append(f"{key}: expected names of files beside this one")


_MANIFEST = entries(
    {
        "format": one("a whole number", lambda value: type(value) is int),
        "files": _files,
        "parent": or_none(TEXT),
        "self": TEXT,
    }
)


@dataclass(frozen=True)
class Committed:
    """A committed folder as its manifest describes it. Each file is checked when it is read."""

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
            CheckpointError: the file is missing or changed, or the manifest does not list it.
        """
        self._check_hash(name, _file_hash(self._sized(name)))

    def read(self, name: str) -> bytes:
        """Read a whole file and compare the bytes with the manifest.

        The file is opened only once, so the bytes returned are the bytes that were checked.

        Raises:
            CheckpointError: the file is missing or changed, or the manifest does not list it.
        """
        path = self._sized(name)
        try:
            data = read_regular(path, self.files[name]["size"], root=self.folder)
        except UnreadableError as error:
            raise CheckpointError(f"{self.folder} is damaged: {name} cannot be read ({error})") from None
        self._check_hash(name, hashlib.sha256(data).hexdigest())
        return data

    def _sized(self, name: str) -> Path:
        """Return the path of a file after checking that it exists and has the size in the manifest."""
        if name not in self.files:
            raise CheckpointError(f"{self.folder} is damaged: {MANIFEST} does not list {name}")
        path, size = self.folder / name, self.files[name]["size"]
        if not path.is_file():
            raise CheckpointError(f"{self.folder} is damaged: {name} is missing")
        try:
            check_regular(path, root=self.folder)
        except UnreadableError as error:
            raise CheckpointError(f"{self.folder} is damaged: {name} cannot be read ({error})") from None
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
    """Read and check the manifest of a committed folder, but none of its other files.

    Raises:
        CheckpointError: the manifest is missing, damaged, or of another format.
    """
    try:
        raw = read_regular(folder / MANIFEST, root=folder)
        manifest = json_of(raw)
    except UnreadableError as error:
        raise CheckpointError(f"{folder} is damaged: no readable {MANIFEST} ({error})") from None
    if problems := problems_of(manifest, _MANIFEST):
        raise CheckpointError(f"{folder} is damaged: {MANIFEST}: {some(problems, 8, between='; ')}")
    given = manifest.pop("self")
    if given != _self_hash(manifest):
        raise CheckpointError(f"{folder} is damaged: {MANIFEST} does not match its own checksum")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{folder} has format {manifest['format']}; this everseg reads format {FORMAT}")
    return Committed(folder, manifest["files"], manifest["parent"], hashlib.sha256(raw).hexdigest())


def verify(folder: Path, only: Collection[str] | None = None) -> str:
    """Check the files of a committed folder against its manifest.

    Args:
        only: names of the files to check; None = all.

    Returns:
        The folder's digest, which is the SHA-256 of the manifest. It identifies all files as they were written. Only
        the files checked here are known to be unchanged since.

    Raises:
        CheckpointError: a file is missing or differs, or the manifest does not list a name in `only`.
    """
    found = read_committed(folder)
    for name in found.files if only is None else only:
        found.check(name)
    return found.digest


def parent_of(folder: Path) -> str | None:
    """Read the digest of the folder that this one continues."""
    return read_committed(folder).parent


def load_tensors(path: Path, data: bytes | None = None) -> dict[str, Tensor]:
    """Read one safetensors file.

    Args:
        path: the file. If `data` is given, the path serves only for messages.
        data: the bytes of the file, if the caller has read them before.

    Raises:
        CheckpointError: the file is unreadable or not a safetensors file.
    """
    try:
        return safetensors.torch.load_file(path) if data is None else safetensors.torch.load(data)
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def newest_valid(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Find the newest checkpoint `it-<iteration>` of a folder that is not damaged.

    Newer damaged checkpoints are renamed to `it-<iteration>.damaged`, with one warning. Then the iterations that are
    done again can be saved under their usual names. Leftovers of an interrupted save are ignored.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
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
    """Delete all but the newest checkpoints, and leftovers of interrupted saves. The newest one must verify first."""
    checkpoints = sorted(folder.glob("it-" + "[0-9]" * 8), reverse=True)
    if checkpoints:
        verify(checkpoints[0])
    for path in checkpoints[keep:]:
        # A half-deleted checkpoint must not look like a damaged one, so it is renamed before it is deleted.
        doomed = path.with_name(path.name + ".old")
        with writing(doomed):
            path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    for pattern in ("*.tmp", "*.old"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Do a write: first ask the `GUARDS`, and turn the operating system's errors into one clear CheckpointError."""
    try:
        _ask(target)
        yield
    except OSError as error:
        # Whoever lost the lock in the middle of a write may find its files gone. Then the lock is what to tell.
        with contextlib.suppress(OSError):
            _ask(target)
        raise CheckpointError(system_text(error, target)) from error


def _ask(target: Path) -> None:
    for guard in GUARDS:
        guard(target)


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
