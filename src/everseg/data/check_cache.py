"""What an earlier check found about healthy samples, so that the next one reads changed files only (floor 2)."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from everseg.data.base import Split
from everseg.data.examine import SIGNATURE, Examined
from everseg.data.index import default_cache_dir
from everseg.data.writing import write_atomically

FORMAT = 1
"""Version of the cached files; part of their name."""


def cache_file(split: Split) -> Path | None:
    """Where the findings about a split are kept; None for splits that do not lie in files."""
    decoding, root = getattr(split, "decoding", None), getattr(split, "root", None)
    if decoding is None or root is None:
        return None
    key = json.dumps([FORMAT, split.name, str(root), decoding()])
    return default_cache_dir() / "check" / f"{hashlib.sha256(key.encode()).hexdigest()}.npz"


def load(file: Path) -> dict[str, Examined]:
    """Read what is known, by sample id; nothing if there is no such file or it is damaged."""
    try:
        data = file.read_bytes()
    except OSError:
        return {}
    checksum, body = data[:32], data[32:]
    if hashlib.sha256(body).digest() != checksum:
        warnings.warn(f"Results of the last check in {file} are damaged; all files are read.", stacklevel=2)
        return {}
    with np.load(io.BytesIO(body), allow_pickle=False) as stored:
        texts = json.loads(stored["texts"].tobytes())
        counts, sizes, signatures, stamps = (stored[k] for k in ("counts", "sizes", "signatures", "stamps"))
    return {
        name: Examined(
            name,
            (),
            tuple((level, code, message) for level, code, message in notes),
            counts[i],
            (int(sizes[i, 0]), int(sizes[i, 1])),
            (image, mask),
            signatures[i].tobytes(),
            tuple(stamps[i].tolist()) if stamps[i, 1] else (),
        )
        for i, (name, notes, image, mask) in enumerate(texts)
    }


def store(file: Path, samples: Sequence[Examined]) -> None:
    """Keep what was found about the samples without fault; where that cannot be written, nothing is kept."""
    healthy = [s for s in samples if not s.faults and s.counts is not None and s.digests[1]]
    if not healthy:
        return
    texts = json.dumps([[s.id, s.notes, *s.digests] for s in healthy]).encode()
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        texts=np.frombuffer(texts, np.uint8),
        counts=np.stack([s.counts for s in healthy if s.counts is not None]),
        sizes=np.array([s.size for s in healthy], np.int64),
        signatures=np.stack([np.frombuffer(s.signature, np.uint8) for s in healthy]).reshape(
            -1, SIGNATURE**2
        ),
        stamps=np.array([s.stamp or (0,) * 8 for s in healthy], np.int64),
    )
    body = buffer.getvalue()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, hashlib.sha256(body).digest() + body)
    except OSError:  # the check itself is done; the class index warns where the cache cannot be written
        return
