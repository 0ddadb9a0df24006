"""What lies at a path that a user gave, in words, for refusals that name the real fault."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from everseg.errors import CheckpointError, near_miss, some
from everseg.runs.model_folder import is_bundle, is_model_folder

RECORD = "run.json"
"""The file that makes a folder a run folder."""
_MOST = 2000
"""Entries of a folder that are looked at: it may be one of many pictures."""


def what_is(path: Path) -> str:
    """Say what a path is, as the end of a sentence that begins with the path: "does not exist", "is a bundle", ...

    >>> what_is(Path("no/such/run"))
    'does not exist'
    """
    try:
        if path.is_file():
            return "is a file, not a folder"
        if not path.is_dir():
            return f"does not exist{_meant(path)}"
        if (path / RECORD).is_file():
            return "is a run folder"
        if is_model_folder(path):
            return "is a bundle" if is_bundle(path) else "is the model folder of a step"
        entries = sorted(islice(path.iterdir(), _MOST))
        runs = [entry for entry in entries if (entry / RECORD).is_file()]
        bundles = [entry for entry in entries if is_bundle(entry)]
    except OSError as error:
        return f"cannot be looked into ({error.strerror})"
    if runs or bundles:
        kind = "runs" if runs else "bundles"
        return f"is a folder of {kind} ({some([str(one) for one in runs or bundles], 4)})"
    if not entries:
        return "is an empty folder"
    return "holds neither a run nor a model"


def model_folder_at(path: Path) -> Path:
    """Find the model folder that a user means: the given folder itself, or `final` in it if it is a step's folder.

    Raises:
        CheckpointError: there is no model folder.
    """
    folder = path / "final" if (path / "final").is_dir() else path
    if not is_model_folder(folder):
        raise CheckpointError(
            f"{path} {what_is(path)}; give a run folder, a bundle, or a step's `final` folder"
        )
    return folder


def _meant(path: Path) -> str:
    """Name the entry of the same folder that is spelt nearly so; "" if there is none."""
    if not path.parent.is_dir():
        return ""
    try:
        beside = [entry.name for entry in islice(path.parent.iterdir(), _MOST) if entry.is_dir()]
    except OSError:
        return ""
    place = "" if path.parent == Path() else f"{path.parent}/"
    hint = near_miss(path.name, sorted(beside), below=place).removeprefix("; ")
    return f" ({hint})" if hint else ""
