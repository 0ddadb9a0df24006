"""Count the pixels of every class in every image, once, and cache the counts by content."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from everseg.data.base import Split, mask_fault
from everseg.data.batches.parallel import Progress, map_samples
from everseg.data.writing import write_atomically
from everseg.display import counted
from everseg.errors import DataError, some
from everseg.labels import RawLabels

FORMAT = 1
"""Version of the cached files; part of their key."""

LISTED = 20
"""Most files that a message names one by one; it counts the rest."""


def class_counts(
    split: Split,
    labels: RawLabels,
    *,
    cache_dir: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Count the pixels of every raw id in every mask.

    The counts are cached under a key of the split's content (`split.fingerprint()`), so a changed mask, a
    changed list or another data set never meets a stale index, and a moved data set finds its own again. The
    SHA-256 of a cache file shows damage; the file is then built again. Where the cache cannot be written there is
    one warning and no cache. A split may offer `index_key()`, a name of its content that costs less than the
    fingerprint. It may also offer `read_digested(index)`, a mask with its file's digest: its files are then read
    once for both counts and fingerprint.

    Args:
        split: the masks.
        labels: the ids they may hold; not part of the key, checked on every call.
        cache_dir: None = `$EVERSEG_CACHE`, or `~/.cache/everseg`.
        workers: processes; None = all cores.
        progress: called with (done, total) while masks are read; not called if the cache serves.

    Returns:
        (N, `labels.width`) int32, void and background included.

    Raises:
        DataError: masks that cannot be read, or ids that `labels` does not declare; one error names all files.
    """
    folder = (default_cache_dir() if cache_dir is None else Path(cache_dir)) / "index"
    counts, fingerprint = None, ""
    name_content = getattr(split, "index_key", split.fingerprint)
    # A fingerprint reads every file. It is worth that only if an index may be found with it, or if counting could not
    # give the digests along the way.
    if (
        _may_be_cached(folder, len(split))
        or hasattr(split, "index_key")
        or not hasattr(split, "read_digested")
    ):
        try:
            fingerprint = name_content()
        except DataError:  # it names the first bad file only; counting names all of them
            _build(split, labels, workers, progress)
            raise
        counts = _load(folder, fingerprint, (len(split), labels.width))
    if counts is None:
        counts, digests = _build(split, labels, workers, progress)
        fingerprint = fingerprint or split.fingerprint(digests)  # type: ignore[call-arg]
        _store(folder, fingerprint, counts, split.name)
    require_declared(split, labels, counts)
    return counts


def default_cache_dir() -> Path:
    """`$EVERSEG_CACHE`, or `~/.cache/everseg`."""
    named = os.environ.get("EVERSEG_CACHE")
    return Path(named).expanduser() if named else Path("~/.cache/everseg").expanduser()


def count_ids(mask: np.ndarray, width: int = 256) -> np.ndarray:
    """Pixels per raw id of one mask, (H, W) uint8 or uint16 -> (`width`,) int32, longer where an id is beyond."""
    # Masks consist of long runs of one id. Counting runs instead of pixels is quicker where there are few of them.
    pixels = mask.reshape(-1)
    (ends,) = (pixels[1:] != pixels[:-1]).nonzero()  # last pixel of each run but the last
    if not pixels.size or ends.size > pixels.size // 16:
        return np.bincount(pixels, minlength=width).astype(np.int32)
    ends = np.append(ends, pixels.size - 1)
    lengths = ends.copy()
    lengths[1:] -= ends[:-1]
    lengths[0] += 1
    return np.bincount(pixels[ends], lengths, width).astype(np.int32)


def undeclared(split: Split, labels: RawLabels, counts: Sequence[np.ndarray | str] | np.ndarray) -> list[str]:
    """List the undeclared ids of every file that holds some, as "ID: id 7 (12 pixels), ..."."""
    readable = [index for index, row in enumerate(counts) if not isinstance(row, str)]
    if not readable:
        return []
    rows = np.stack([counts[index] for index in readable])
    rows[:, [raw for raw in labels.declared if raw < rows.shape[1]]] = 0
    lines = []
    for place in np.flatnonzero(rows.any(axis=1)):
        row = rows[place]
        foreign = np.flatnonzero(row)
        found = ", ".join(f"id {raw} ({counted(int(row[raw]), 'pixel')})" for raw in foreign[:8])
        more = f" and {foreign.size - 8} more ids" if foreign.size > 8 else ""
        lines.append(f"{split.id(readable[place])}: {found}{more}")
    return lines


def require_declared(split: Split, labels: RawLabels, counts: np.ndarray) -> None:
    """Refuse masks with ids that are neither a class nor void.

    Args:
        counts: (N, ids) pixels per raw id.

    Raises:
        DataError: names the files with id and pixel count, the likely cause, and the remedy.
    """
    lines = undeclared(split, labels, counts)
    if lines:
        found = {int(raw) for raw in np.flatnonzero(counts.any(axis=0))}
        head = (
            f"{len(lines)} of {len(split)} masks of split '{split.name}' hold ids that are not declared "
            f"(declared: {ranges(labels.declared)}; found: {ranges(found)}):"
        )
        raise DataError(_listing(head, lines) + "\n" + remedy(labels, found))


def remedy(labels: RawLabels, found: set[int]) -> str:
    """Advise what to do about undeclared ids, by the usual causes.

    Args:
        found: all raw ids of the masks.
    """
    foreign = found - labels.declared
    classes = set(labels.names)
    if len(foreign) > 40:
        return (
            "So many ids suggest masks that were saved as JPEG or resized with interpolation, or colour pictures: "
            "use lossless single-channel masks and nearest-neighbour resizing."
        )
    if classes and max(classes) <= 18 and foreign <= set(range(34)) and max(foreign) >= 19:
        return (
            "These look like Cityscapes labelIds (0-33), not trainIds (0-18), which are declared: use masks of "
            "trainIds (everseg data prepare cityscapes DIR makes them), or map the ids in a data.yaml."
        )
    if classes == set(range(26)) and foreign <= set(range(26, 40)):
        return (
            "These look like IDD's label ids (0-39) or level-4 ids (0-29), not level-3 ids (0-25), which are "
            "declared: use masks of level-3 ids (everseg data prepare idd DIR makes them)."
        )
    if classes and 19 <= max(classes) <= 33 and min(classes) >= 7 and max(foreign) <= 18:
        return (
            "These look like Cityscapes trainIds (0-18), not labelIds (7-33), which are declared: "
            "use the *_labelIds.png masks, or declare the trainIds."
        )
    if foreign == {0}:
        return "Id 0 is often 'unlabelled' or background: declare it as a class or list it under the ignored ids."
    if foreign == {255}:
        return "Id 255 usually marks pixels without annotation: list it under the ignored ids."
    if classes and foreign == {max(classes) + 1} and 0 in classes and 0 not in found:
        return "The ids seem to start at 1 while the classes were declared from 0: shift one of the two."
    return "Declare these ids as classes, list them under the ignored ids, or correct the masks."


def ranges(ids: set[int] | frozenset[int]) -> str:
    """Write ids as ranges: {0, 1, 2, 255} -> "0-2, 255"."""
    parts: list[list[int]] = []
    for raw in sorted(ids):
        if parts and raw == parts[-1][1] + 1:
            parts[-1][1] = raw
        else:
            parts.append([raw, raw])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def _build(
    split: Split, labels: RawLabels, workers: int | None, progress: Progress | None
) -> tuple[np.ndarray, list[str]]:
    """Return the counts, and the digests of the masks' files ([] where the split offers none)."""
    results = map_samples(partial(_count, labels), split, len(split), workers=workers, progress=progress)
    unreadable = [result for result in results if isinstance(result, str)]
    if unreadable:
        rows = [result if isinstance(result, str) else result[0] for result in results]
        faults = unreadable + undeclared(split, labels, rows)
        raise DataError(
            _listing(f"faults in {counted(len(faults), 'mask')} of split '{split.name}':", faults)
        )
    whole = [result for result in results if not isinstance(result, str)]
    counts = np.stack([row for row, _ in whole]) if whole else np.zeros((0, labels.width), np.int32)
    return counts, [digest for _, digest in whole if digest]


def _count(labels: RawLabels, split: Split, index: int) -> tuple[np.ndarray, str] | str:
    """Count one mask; return the counts with the digest of its file ("" without one), or what is wrong with it."""
    read = getattr(split, "read_digested", None)
    try:
        mask, digest = read(index) if read else (split.read_mask(index), "")
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"{split.id(index)}: {error}"
    if fault := mask_fault(mask):
        return f"{split.id(index)}: {fault}"
    counts = count_ids(mask, labels.width)
    if len(counts) > labels.width:  # ids that the table has no column for
        far = [raw for raw in np.flatnonzero(counts).tolist() if raw not in labels.declared]
        shown = some([f"id {raw} ({counted(int(counts[raw]), 'pixel')})" for raw in far], 8)
        return f"{split.id(index)}: {shown}, not declared (declared: {ranges(labels.declared)})"
    return counts, digest


def _listing(head: str, lines: list[str]) -> str:
    more = [f"... and {len(lines) - LISTED} more files"] if len(lines) > LISTED else []
    return "\n  ".join([head, *lines[:LISTED], *more])


def _paths(folder: Path, fingerprint: str) -> tuple[Path, Path]:
    key = hashlib.sha256(f"{fingerprint}:{FORMAT}".encode()).hexdigest()
    return folder / f"{key}.npy", folder / f"{key}.json"


def _may_be_cached(folder: Path, length: int) -> bool:
    """Whether an index of so many images is in the cache. If not, no fingerprint is needed to look for it."""
    try:
        manifests = [*folder.glob("*.json")]
    except OSError:  # a folder that cannot be read holds no usable index
        return False
    for path in manifests:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(path.read_bytes())["images"] != length:
                continue
        return True  # a damaged manifest counts as well: `_load` reports it
    return False


def _load(folder: Path, fingerprint: str, shape: tuple[int, int]) -> np.ndarray | None:
    """Read the cached counts; None if they are missing or damaged."""
    data_path, manifest_path = _paths(folder, fingerprint)
    try:
        manifest_text = manifest_path.read_bytes()
        data = data_path.read_bytes()
    except OSError:
        return None
    try:
        manifest = json.loads(manifest_text)
        if manifest["sha256"] != hashlib.sha256(data).hexdigest():
            raise ValueError("checksum differs")
        counts = np.load(io.BytesIO(data), allow_pickle=False)
        if manifest["fingerprint"] != fingerprint or counts.shape != shape or counts.dtype != np.int32:
            raise ValueError("it belongs to other data")
    except (ValueError, KeyError, TypeError, EOFError) as error:
        warnings.warn(f"Class index {data_path} is damaged ({error}); it is built again.", stacklevel=3)
        return None
    return counts


def _store(folder: Path, fingerprint: str, counts: np.ndarray, name: str) -> None:
    data_path, manifest_path = _paths(folder, fingerprint)
    buffer = io.BytesIO()
    np.save(buffer, counts, allow_pickle=False)
    data = buffer.getvalue()
    manifest = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "split": name,
        "images": len(counts),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The manifest comes last: an index without one is not read.
        write_atomically(data_path, data)
        write_atomically(manifest_path, json.dumps(manifest, indent=1).encode())
    except OSError as error:
        warnings.warn(
            f"The class index cannot be cached in {folder} ({error}); it is built again in every run. "
            "Set EVERSEG_CACHE to a folder that can be written.",
            stacklevel=3,
        )
