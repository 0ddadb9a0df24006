"""A first step that several runs have in common, trained once.

Two runs have the same first step if everything that acts in it is the same: all settings but those of later steps and
but the method's, of which each method says itself what acts (`Method.first_step`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from everseg import registry
from everseg.config.fields import RunConfig
from everseg.config.loading import identity
from everseg.data.writing import flush_folder, write_flushed
from everseg.engine.runtime import locked
from everseg.errors import CheckpointError, DataError
from everseg.methods.base import first_step_of
from everseg.methods.build import build_method
from everseg.runs.commit import verify, write_bytes, writing
from everseg.runs.folder import RunFolder
from everseg.runs.journal import Journal, replaced_samples

LATER_STEPS = ("train.epochs_next", "train.lr_next")
"""Settings that act after the first step only."""
_COPIED = ("images.npz", "confusion.npz", "metrics.json")
_PACKAGES = ("everseg", "torch", "numpy", "pillow", "accelerate")
"""Another version of these may give other bits."""


def first_step_hash(config: RunConfig) -> str | None:
    """SHA-256 of everything that decides a run's first step; None where it is never shared.

    Joint runs have a single step, and scenarios of the user's own may train several branches in the first one.
    """
    if config.scenario.joint or config.scenario.kind not in registry.BUILTIN["scenario"]:
        return None
    settings = {key: value for key, value in _settings(config).items() if not key.startswith("method.")}
    told = [settings, first_step_of(build_method(config.method))]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=repr).encode()).hexdigest()


def has_first_step(folder: RunFolder) -> bool:
    """Whether a run's first step is trained and scored."""
    return (folder.step(0) / "metrics.json").is_file()


def obstacle(source: RunFolder, threads: int) -> str:
    """Why a first step would not be the bits that this machine makes, though the settings agree; "" = nothing."""
    record = source.record()
    if record.threads != threads:
        return f"{source.path.name} was trained with {record.threads} CPU threads, not {threads}"
    others = [name for name in _PACKAGES if record.versions.get(name) != version(name)]
    return f"{source.path.name} was trained with another version of {', '.join(others)}" if others else ""


def share_first_step(source: RunFolder, target: RunFolder, skip_bad: int = 0) -> bool:
    """Give a run that has not begun the finished first step of another one, as if it had trained it itself.

    Weights, method state, counts and scores are copied, and the lines of the journal that belong to them.

    Args:
        source: a run whose first step is trained and scored.
        target: a run with the same `first_step_hash`.
        skip_bad: the target's `data.skip_bad`; the first step may hold no more replaced samples.

    Returns:
        Whether it was copied; False where the target has begun already, or was begun with other settings.

    Raises:
        CheckpointError: the source is damaged, or the copy cannot be written.
        DataError: the source replaced more training samples than the target may.
        ConfigError: the target is in use by another process.
    """
    if target.step(0).exists():
        return False
    replaced = len(replaced_samples(Journal(source.path / "journal.jsonl"), step=0))
    if replaced > skip_bad:
        raise DataError(
            f"{source.path.name} replaced {replaced} unreadable training samples in its first step, "
            f"and data.skip_bad allows {skip_bad}"
        )
    digest = verify(source.final(0))
    source.metrics(0), source.counts(0), source.images(0)
    with locked(target.path):
        if target.step(0).exists() or _is_of_another(target, source):
            return False
        temporary = target.step(0).with_name("00.tmp")
        with writing(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
            _copy_flushed(source, temporary)
            if verify(temporary / "final") != digest:
                raise CheckpointError(
                    f"{temporary} is not what {source.step(0)} holds; run the same command again"
                )
            journal = Journal(source.path / "journal.jsonl")
            write_bytes(target.path / "journal.jsonl", journal.of_step(0))
            temporary.rename(target.step(0))
            flush_folder(target.step(0).parent)
    return True


def _is_of_another(target: RunFolder, source: RunFolder) -> bool:
    if not target.is_begun:
        return False
    theirs, ours = target.config(), source.config()
    if all(registry.is_builtin("method", config.method.name) for config in (theirs, ours)):
        return first_step_hash(theirs) != first_step_hash(ours)
    # What acts in the first step is asked of the method, and a run folder is no reason to import one: with a method of
    # the user's own only equal settings count as the same.
    return _settings(theirs) != _settings(ours)


def _settings(config: RunConfig) -> dict[str, Any]:
    return {key: value for key, value in identity(config).items() if key not in LATER_STEPS}


def _copy_flushed(source: RunFolder, target: Path) -> None:
    """Copy a finished first step without its checkpoints, every file flushed to disk."""
    root = source.step(0)
    files = [*source.final(0).iterdir(), *(root / name for name in _COPIED if (root / name).is_file())]
    for path in files:
        place = target / path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_flushed(place, path.read_bytes())
    flush_folder(target / "final")
    flush_folder(target)
