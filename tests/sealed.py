"""Change a document of a run folder as somebody would who knows how its checksum is made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from everseg.runs.commit import MANIFEST, SEALED, SHA256, _json, _self_hash, write_document


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


def reseal(folder: Path) -> None:
    """Write the manifest of a committed folder anew, so that it fits the files as they are now."""
    stored = json.loads((folder / MANIFEST).read_text())
    files = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name in stored["files"]
        if (folder / name).is_file()
        for data in [(folder / name).read_bytes()]
    }
    body = {"format": stored["format"], "files": files, "parent": stored["parent"]}
    (folder / MANIFEST).write_bytes(_json({**body, "self": _self_hash(body)}))
