"""Change a document of a run folder as somebody would who knows how its checksum is made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from everseg.runs.commit import SEALED, SHA256, write_document


def content(path: Path) -> dict[str, Any]:
    """What a document says, without its checksum."""
    return {key: value for key, value in json.loads(path.read_bytes()).items() if key not in (SEALED, SHA256)}


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the content in place, and write it with a checksum that fits."""
    document = content(path)
    change(document)
    write_document(path, document)


def put_arrays(path: Path, **arrays: Any) -> None:
    """Replace an archive of counts, and its checksum in metrics.json beside it."""
    np.savez_compressed(path, **arrays)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite(path.with_name("metrics.json"), lambda stored: stored["files"].update({path.name: digest}))
