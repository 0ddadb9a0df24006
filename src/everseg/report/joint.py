"""Joint training of the same task beside a run, the upper bound in its step matrix (floor 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from everseg.config.fields import RunConfig
from everseg.config.loading import identity
from everseg.errors import CheckpointError, EversegError
from everseg.runs.commit import read_document
from everseg.runs.folder import RunFolder
from everseg.runs.results import Track, planned_steps, tracks_of

_FREE = ("scenario.joint", "scenario.lists", "train.epochs_next", "train.lr_next", "method.")
"""What may differ: the method, and what acts on steps or their images, of which joint training has one and all."""


def joint_beside(
    folder: RunFolder, config: RunConfig, tracks: Sequence[Track]
) -> tuple[str, dict[str, Track]] | None:
    """The first finished joint run, by name, that lies beside a run and has exactly its setting.

    That is: every setting which can change a result but those of `_FREE` (the seed, too, is the same), no image lists
    of its own, and the last test with the same classes in the same order on the same images with the same labels.

    Returns:
        Its folder's name, and its results by the names of the run's; None where there is no such run.
    """
    if config.scenario.joint or config.scenario.single:
        return None
    own, tested = _setting(config), _tested(folder)
    for path in sorted(folder.path.resolve().parent.glob("*/run.json")):
        other = RunFolder(path.parent)
        try:
            if not _is_joint(path):
                continue
            theirs = other.config()
            if theirs.scenario.lists or _setting(theirs) != own:
                continue
            if _tested(other) != tested or not other.is_finished(theirs):
                continue
            found = {track.name: track for track in tracks_of(other)}
        except EversegError:  # a damaged or foreign neighbour is no upper bound
            continue
        if all(_classes(found.get(track.name)) == _classes(track) for track in tracks):
            return path.parent.name, found
    return None


def _setting(config: RunConfig) -> dict[str, Any]:
    return {key: value for key, value in identity(config).items() if not key.startswith(_FREE)}


def _is_joint(document: Path) -> bool:
    """Whether a run.json is of joint training, told before its configuration is checked, which takes longer.

    Raises:
        CheckpointError: it cannot be read.
    """
    stored = read_document(document, "config")["config"]
    scenario = stored.get("scenario") if isinstance(stored, dict) else None
    return isinstance(scenario, dict) and scenario.get("joint") is True


def _tested(folder: RunFolder) -> list[Mapping[str, Any]]:
    """What the last step is tested on: images and tables.

    Raises:
        CheckpointError: scenario.json does not say.
    """
    try:
        sources = planned_steps(folder)[-1]["test"]
        return [{k: v for k, v in source.items() if k != "images"} for source in sources]
    except (IndexError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{folder.path / 'scenario.json'} is damaged: its last step does not say what it is tested on; "
            "restore it or start again under another name"
        ) from None


def _classes(track: Track | None) -> Any:
    return None if track is None else (track.space.names, [len(group) for group in track.space.groups])
