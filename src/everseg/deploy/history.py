"""The line of bundles that a bundle comes from, and the way back to an earlier one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from everseg.data.writing import unfinished
from everseg.deploy.bundle import Bundle, new_folder, open_bundle
from everseg.deploy.card import changed_text
from everseg.display import UNDEFINED, Piece, Result, percent, table
from everseg.errors import CheckpointError, ConfigError, some
from everseg.files import real_path
from everseg.labels import is_background_name
from everseg.runs.commit import read_committed, verify
from everseg.runs.model_folder import is_bundle


@dataclass(frozen=True)
class Ancestor:
    """A bundle that another one was extended from."""

    steps: int
    """Number of steps that its model was trained in."""
    digest: str
    path: Path | None
    """Where it is; None if it was not found."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": None if self.path is None else str(self.path)}


@dataclass(frozen=True, repr=False)
class History(Result):
    """How a bundle's model came about: a row per step, and the bundles before it."""

    path: Path
    digest: str
    steps: tuple[Mapping[str, Any], ...]
    """The entries of the bundle's `lineage.json`: run, method, classes, image lists with their hashes, scores."""
    ancestors: tuple[Ancestor, ...]
    """The bundles that it was extended from, the latest first."""

    def shown(self) -> Iterator[Piece]:
        places = {name for entry in self.steps for name in entry["scores"]}
        rows = [row for entry in self.steps for row in _rows(entry, several=len(places) > 1)]
        columns = ["step", "method", "taught", "trained on", "tested on", "old", "new", "all", "old left"]
        yield table(columns, rows, title=f"{self.path}: mIoU in percent", right="step|old|new|all|old left")
        if not self.ancestors:
            yield "It was not extended from another bundle."
        for one in self.ancestors:
            where = one.path if one.path is not None else "not at hand (--look FOLDER looks elsewhere)"
            yield f"after {one.steps} step{'' if one.steps == 1 else 's'}: bundle {one.digest[:12]}…  {where}"

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "sha256": self.digest,
            "steps": [dict(entry) for entry in self.steps],
            "ancestors": [one.to_json() for one in self.ancestors],
        }


@dataclass(frozen=True, repr=False)
class Rollback(Result):
    """The earlier bundle that `rollback` found."""

    path: Path
    """The ancestor, or its copy."""
    ancestor: Ancestor
    copied: bool

    def shown(self) -> Iterator[Piece]:
        what = "copied to" if self.copied else "is"
        steps = f"after {self.ancestor.steps} step{'' if self.ancestor.steps == 1 else 's'}"
        yield f"the bundle {steps}, {self.ancestor.digest[:12]}…, {what} {self.path}; every byte of it is as written"

    def to_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "copied": self.copied, "ancestor": self.ancestor.to_json()}


def history(bundle: str | Path, *, look: Sequence[str | Path] = ()) -> History:
    """Tell how a bundle's model came about, from its first training to now.

    Args:
        bundle: folder of the bundle; it is verified.
        look: folders in which ancestors are looked for, beside the folder that the bundle lies in.

    Raises:
        CheckpointError: the folder is no bundle, or it is damaged.
    """
    source = open_bundle(bundle)
    return History(
        source.path,
        source.digest,
        tuple(source.lineage["history"]),
        tuple(_ancestors(source, _at_hand(source.path, look))),
    )


def rollback(
    bundle: str | Path,
    *,
    to: int | None = None,
    out: str | Path | None = None,
    look: Sequence[str | Path] = (),
) -> Rollback:
    """Find an earlier bundle of the line that a bundle comes from, and verify it. Bundles are never changed.

    Args:
        bundle: the bundle to go back from.
        to: number of steps that the earlier model was trained in; default the bundle that this one was extended from.
        out: a new folder that gets a copy; by default nothing is written.
        look: as for `history`.

    Raises:
        ConfigError: the line has no such bundle, or the folder exists.
        CheckpointError: the earlier bundle is not at hand, or it is damaged.
    """
    source = open_bundle(bundle)
    known = _ancestors(source, _at_hand(source.path, look))
    if not known:
        raise ConfigError(
            f"{source.path} was not extended from another bundle; there is nothing to go back to"
        )
    found = known[0] if to is None else next((one for one in known if one.steps == to), None)
    if found is None:
        raise ConfigError(
            f"--to {to}: the bundles before {source.path} were trained in "
            f"{some([str(one.steps) for one in known], 12)} steps"
        )
    if found.path is None:
        raise CheckpointError(
            f"bundle {found.digest[:12]}… of {found.steps} steps is not beside {source.path}; say where to look for it "
            "(--look FOLDER)"
        )
    if verify(found.path) != found.digest:
        raise CheckpointError(f"{found.path} has changed since it was found; look for another copy")
    if out is None:
        return Rollback(found.path, found, False)
    target = new_folder(out)
    part = unfinished(target)
    shutil.rmtree(part, ignore_errors=True)
    try:
        shutil.copytree(found.path, part)
        if verify(part) != found.digest:
            raise CheckpointError(f"{found.path} changed while it was copied; try again")
        part.rename(target)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written ({error.strerror}); choose another folder"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Rollback(target, found, True)


def _at_hand(path: Path, look: Sequence[str | Path]) -> dict[str, Path]:
    """Find the bundles in some folders: digest of the manifest -> folder. Damaged ones are left out."""
    found: dict[str, Path] = {}
    for place in (real_path(path).parent, *map(Path, look)):
        if not place.is_dir():
            raise ConfigError(f"--look {place}: no such folder")
        for folder in (place, *sorted(place.iterdir())):
            if folder.is_dir() and is_bundle(folder):
                try:
                    found.setdefault(read_committed(folder).digest, folder)
                except CheckpointError:
                    continue
    return found


def _ancestors(source: Bundle, at_hand: Mapping[str, Path]) -> list[Ancestor]:
    """Follow the line of parents, the latest first.

    The entry of a step names the bundle that it extended. In bundles of older versions it does not; there the parent's
    own document says what came before it, where it is at hand.
    """
    named = {
        entry["extends"]: int(entry["step"]) for entry in source.lineage["history"] if entry.get("extends")
    }
    found, parent, steps = list[Ancestor](), source.lineage["parent"], source.steps - 1
    if parent is not None:
        named.setdefault(parent, steps)
    for digest, number in sorted(named.items(), key=lambda item: -item[1]):
        found.append(Ancestor(number, digest, at_hand.get(digest)))
    while found and (last := found[-1]).path is not None:
        before = open_bundle(last.path).lineage["parent"]
        if before is None:
            break
        found.append(Ancestor(last.steps - 1, before, at_hand.get(before)))
    return found


def taught_text(entry: Mapping[str, Any]) -> str:
    """Name what a step of a bundle's history taught or changed."""
    if changed := entry.get("changed"):
        return changed_text(changed)
    names = [name for name in entry["classes"] if not is_background_name(name)]
    return some(names, 6) if names else "more images"


def _rows(entry: Mapping[str, Any], several: bool) -> Iterator[list[str]]:
    """Make a row for each result of a step.

    Args:
        several: the steps are of several places, so each says which one it is about.
    """
    taught = taught_text(entry)
    if several and len(entry["scores"]) == 1:
        taught += f" ({next(iter(entry['scores']))})"
    trained = "; ".join(f"{s['images']} of {s['data']} ({s['sha256'][:12]}…)" for s in entry["train"])
    tested = "; ".join(f"{s['images']} of {s['data']}" for s in entry["test"])
    left = entry.get("kept") or {}
    kept = percent(left["share"]) + (" est." if left["how"] == "estimated" else "") if left else UNDEFINED
    if not entry["scores"]:
        yield [str(entry["step"]), entry["method"], taught, *[UNDEFINED] * 5, kept]
    for name, scores in entry["scores"].items():
        where = tested if len(entry["scores"]) == 1 else name
        hidden = scores.get("old") is not None and not all(one["pixels"] for one in scores["old"])
        means = [
            UNDEFINED if hidden and group != "new" else percent(scores["miou"].get(group))
            for group in ("old", "new", "all")
        ]
        yield [str(entry["step"]), entry["method"], taught, trained, where, *means, kept]
