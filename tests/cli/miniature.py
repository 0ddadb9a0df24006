"""A miniature of a data set and a run, for calls of the command line that must be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import trees


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Everseg = Callable[..., Outcome]


def refused(outcome: Outcome, code: int, *parts: str) -> None:
    """One error message on stderr that holds all the parts, nothing on stdout, no traceback."""
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert sum(line.startswith("error:") for line in outcome.err.splitlines()) == 1
    for text in ("Traceback", "a fault of everseg", "Warning"):
        assert text not in outcome.err
    for part in parts:
        assert part in outcome.err, outcome.err


def everything(folder: Path) -> dict[str, bytes | None]:
    """All files and folders with their content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


SETTINGS: dict[str, Any] = {
    "name": "x",
    "tracker": [],
    "report": False,
    "data": {"dataset": "data/data.yaml", "crop": 32, "workers": 0},
    "scenario": {"task": "1-1"},
    "model": {"name": "deeplabv3-tiny", "norm": "bn", "options": {"widths": [8, 8, 8, 8], "hidden": 8}},
    "train": {"epochs": 1, "batch": 2, "checkpoint_every": 1, "threads": 1},
}


def small(base: Path, text: str = trees.FOLDER_YAML) -> Path:
    """A healthy data set of 3 + 1 images in `data/`, and `run.yaml` that trains on it for two iterations."""
    trees.folder(base / "data", text)
    trees.save(base / "data/images/val/a_0.png", trees.image_of(7))
    (base / "run.yaml").write_text(json.dumps(SETTINGS))
    return base


def cut(path: Path, keep: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
