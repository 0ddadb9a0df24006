"""Fetch one file over HTTP: resumed, retried, verified, and under its final name only when whole."""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everseg.display import counted
from everseg.errors import DataError
from everseg.files import UnreadableError, json_of, read_regular, whole_number

BLOCK = 1 << 20
LARGEST = 64 << 30
"""No file of a data set is larger. The limit keeps a server that never stops sending from filling the disk."""

TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP answers worth another try."""


@dataclass(frozen=True)
class Fetched:
    """What was received."""

    url: str
    size: int
    """Bytes."""
    sha256: str


def fetch(
    url: str,
    target: Path,
    *,
    checksum: str | None = None,
    attempts: int = 6,
    pause: float = 1.0,
    timeout: float = 60.0,
    progress: Callable[[int, int], None] | None = None,
) -> Fetched:
    """Fetch `url` to `target`.

    Bytes collect in `target.part` and stay there when the connection breaks. The next try, or the next call, asks for
    the rest (HTTP Range). It must be the rest of the very same file, so the server's validator (a strong ETag, or
    Last-Modified) goes along as If-Range. Without a validator the download resumes only if there is a checksum to
    verify the result.

    Args:
        checksum: "md5:HEX" or "sha256:HEX".
        attempts: tries in a row without a new byte before it gives up.
        pause: seconds before the second try; doubles with each, up to a minute.
        timeout: seconds without any answer.
        progress: called with (bytes so far, bytes in all; 0 if the server does not say).

    Raises:
        DataError: refused by the server, wrong checksum (nothing is kept then), no connection, or a full disk.
    """
    part = target.with_name(target.name + ".part")
    whole_tries, failures = 0, 0
    while True:
        before = _size(part)
        try:
            _transfer(url, part, checksum is not None, timeout, progress)
        except _BrokenOffError as error:
            failures = 1 if _size(part) > before else failures + 1  # new bytes start the count again
            if failures >= attempts:
                raise DataError(
                    f"{url}: {error}; gave up after {attempts} tries in a row. Run the same command again to go on "
                    f"({_size(part)} bytes are kept in {part})."
                ) from None
            time.sleep(max(error.wait, min(60.0, pause * 2 ** (failures - 1))))
            continue
        size, sha256, fault = _verify(part, checksum)
        if not fault:
            break
        _forget(part)
        whole_tries += 1
        # Bytes from an earlier call may be the ones at fault: one try from the beginning is worth it.
        if before == 0 or whole_tries > 1:
            raise DataError(
                f"{url}: {fault}. Nothing was kept. The file was changed on the server or on the way; "
                "try another network, or fetch it by hand from a source you trust."
            )
    # Only now does the file get its name: whatever has that name is whole and verified.
    part.replace(target)
    _forget(part)
    return Fetched(url, size, sha256)


class _BrokenOffError(Exception):
    """A failure that another try may mend."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects to web addresses only, and never from https down to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.startswith(("http://", "https://")) or (
            req.full_url.startswith("https://") and not newurl.startswith("https://")
        ):
            raise DataError(
                f"{req.full_url}: redirects to {newurl}, which is not followed because it is less safe; fetch it "
                "by hand"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _transfer(
    url: str, part: Path, checked: bool, timeout: float, progress: Callable[[int, int], None] | None
) -> None:
    """One connection: append what is missing to `part`."""
    if not url.startswith(("http://", "https://")):
        raise DataError(f"{url}: only http:// and https:// addresses can be fetched")
    notes = _read_notes(part)
    have = _size(part)
    # Resume only what came from this address and can be recognised, by the server or by the checksum.
    if have and not (notes.get("url") == url and (notes.get("validator") or checked)):
        have = 0
    if have and have == notes.get("total"):
        return
    request = urllib.request.Request(url, headers={"User-Agent": "everseg", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        if notes.get("validator"):
            request.add_header("If-Range", notes["validator"])
    try:
        response = urllib.request.build_opener(_Redirects).open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            # "range not satisfiable": the file is shorter now, so it is another one.
            if error.code == 416 and have:
                _forget(part)
                raise _BrokenOffError("the server's file has changed") from None
            if error.code in TRANSIENT:
                raise _BrokenOffError(f"HTTP {error.code} {error.reason}", _retry_after(error)) from None
            raise DataError(
                f"{url}: HTTP {error.code} {error.reason}. If the file has moved, fetch it by hand."
            ) from None
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenOffError(str(getattr(error, "reason", None) or error) or type(error).__name__) from None
    with response:
        # The notes come before the bytes: a crash must not leave bytes of unknown origin.
        have, total = _start(response, part, have)
        _store_notes(part, url, response, total)
        _append(response, part, have, total, progress)


def _start(response: Any, part: Path, have: int) -> tuple[int, int | None]:
    """Return where the answer begins (0 if the server sends all again) and the size of the whole file."""
    length = response.headers.get("Content-Length", "")
    if response.status == 206:
        span, _, whole = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        if span.partition("-")[0] != str(have):
            _forget(part)
            raise _BrokenOffError("the server sent another range than asked for")
        total = whole_number(whole)
    else:
        have = 0
        total = whole_number(length)
    if total is not None and total > LARGEST:
        raise DataError(
            f"{response.url}: {counted(total, 'byte', 'is', 'are')} more than everseg fetches ({LARGEST})"
        )
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - have > free:
        raise DataError(
            f"{part.parent}: {total - have} bytes are needed but {free} are free; make room or choose another folder"
        )
    return have, total


def _append(
    response: Any, part: Path, have: int, total: int | None, progress: Callable[[int, int], None] | None
) -> None:
    try:
        file = part.open("ab" if have else "wb")
    except OSError as error:
        raise _unwritable(part, error) from None
    with file:
        while True:
            try:
                block = response.read1(BLOCK)
            except (OSError, http.client.HTTPException) as error:
                raise _BrokenOffError(f"the connection broke ({error or type(error).__name__})") from None
            if not block:
                break
            have += len(block)
            if have > (LARGEST if total is None else total):
                raise DataError(f"{response.url}: the server sends more than it announced; try again")
            try:
                file.write(block)
            except OSError as error:
                raise _unwritable(part, error) from None
            if progress:
                progress(have, total or 0)
        try:
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise _unwritable(part, error) from None
    if total is not None and have < total:
        raise _BrokenOffError(f"the connection ended after {have} of {total} bytes")


def _verify(part: Path, checksum: str | None) -> tuple[int, str, str]:
    """Return size and SHA-256 of a complete file, and what is wrong with it ("" if nothing)."""
    kind, _, expected = (checksum or "sha256:").partition(":")
    named = hashlib.new(kind, usedforsecurity=False)
    sha256 = hashlib.sha256()
    size = 0
    with part.open("rb") as file:
        while block := file.read(BLOCK):
            size += len(block)
            named.update(block)
            sha256.update(block)
    wrong = checksum is not None and named.hexdigest() != expected.lower()
    return size, sha256.hexdigest(), f"{kind} is {named.hexdigest()}, not {expected}" if wrong else ""


def _unwritable(part: Path, error: OSError) -> DataError:
    if error.errno == errno.ENOSPC:
        return DataError(f"{part}: the disk is full; make room and run the same command again to go on")
    return DataError(f"{part}: cannot be written ({error.strerror}); choose another folder")


def _retry_after(error: urllib.error.HTTPError) -> float:
    return min(60.0, float(whole_number(error.headers.get("Retry-After", "")) or 0))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _notes_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_notes(part: Path) -> dict[str, Any]:
    try:
        notes = json_of(read_regular(_notes_path(part)))
    except UnreadableError:
        return {}
    return notes if isinstance(notes, dict) else {}


def _store_notes(part: Path, url: str, response: Any, total: int | None) -> None:
    # A weak ETag (W/"...") promises the same meaning, not the same bytes: it cannot validate a range.
    etag = response.headers.get("ETag", "")
    validator = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
    try:
        _notes_path(part).write_text(json.dumps({"url": url, "validator": validator, "total": total}))
    except OSError as error:
        raise _unwritable(part, error) from None


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _notes_path(part).unlink(missing_ok=True)
