"""Classes of a deployed model removed, merged and renamed, without training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from everseg.data.class_colours import BACKGROUND_COLOUR, palette
from everseg.deploy.bundle import Bundle, Contents, new_folder, open_bundle, write_bundle
from everseg.deploy.feature_sketch import remapped
from everseg.deploy.onnx import require_onnx
from everseg.deploy.trial_images import generated, images_of
from everseg.display import Piece, Result
from everseg.errors import ConfigError, near_miss, some
from everseg.labels import LabelSpace, find_name, is_background_name, spelling
from everseg.models.build import from_description
from everseg.models.heads import GrowingHead, Growth, Trunk, last_layer
from everseg.models.model import SegmentationModel
from everseg.runs.memory import read_memory
from everseg.runs.model_folder import (
    MOST_IDS,
    BundleClass,
    ModelFile,
    Registry,
    is_bundle,
    load_strictly,
)
from everseg.runs.sketch import read_sketch

METHOD = "classes"
"""What stands in the history of a bundle as the method of such a step."""


@dataclass(frozen=True)
class ClassEdits:
    """What becomes of classes that a model knows. Names in any spelling (`everseg.labels.spelling`)."""

    drop: tuple[str, ...] = ()
    """Classes whose outputs are removed."""
    merge: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """New class -> the classes that become one under its name."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """Class -> its new name."""

    @classmethod
    def of(
        cls,
        drop: Sequence[str] = (),
        merge: Mapping[str, Sequence[str]] | None = None,
        rename: Mapping[str, str] | None = None,
    ) -> ClassEdits:
        """Make them of what a caller gives."""
        return cls(
            tuple(drop), {new: tuple(names) for new, names in (merge or {}).items()}, dict(rename or {})
        )

    def __bool__(self) -> bool:
        return bool(self.drop or self.merge or self.rename)

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON value."""
        return {
            "drop": list(self.drop),
            "merge": {new: list(names) for new, names in self.merge.items()},
            "rename": dict(self.rename),
        }

    def known_in(self, registry: Registry, spaces: Mapping[str, LabelSpace]) -> ClassEdits:
        """Spell every class as the model does.

        Args:
            spaces: branch -> its classes. They say which one is the background; a name alone does not.

        Raises:
            ConfigError: an unknown class, one that is named twice, a background that would be lost, or a new name that
                another class has; all of them in one message.
        """
        known = [one.name for one in registry.classes if one.branches]
        problems, used = list[str](), list[str]()
        grounds = {space.names[space.background] for space in spaces.values() if space.background is not None}

        def found(option: str, name: str) -> str:
            match = find_name(name, known)
            if match is None:
                hint = near_miss(name, known, f"; it has {some(known, 12)}")
                problems.append(f"{option}: the bundle knows no class '{name}'{hint}")
                return name
            if match in used:
                problems.append(f"{option}: '{match}' is named twice")
            used.append(match)
            return match

        drop = tuple(found("--drop", name) for name in self.drop)
        merge = {new: tuple(found("--merge", name) for name in names) for new, names in self.merge.items()}
        rename = {found("--rename", old): new for old, new in self.rename.items()}
        for option, named in (("--drop", drop), ("--rename", tuple(rename))):
            ground = [name for name in named if find_name(name, grounds) is not None]
            problems += [f"{option}: '{name}' is the background, which a model keeps" for name in ground]
        for new, names in merge.items():
            if len(names) < 2:
                problems.append(f"--merge {','.join(names)}={new}: two classes or more become one")
            ground = [name for name in names if find_name(name, grounds) is not None]
            if bool(ground) != (find_name(new, grounds) is not None or is_background_name(new)):
                problems.append(
                    f"--merge {','.join(names)}={new}: what the background takes up is the background"
                )
        rest = [name for name in known if name not in used]
        for option, new in [
            *(("--merge", new) for new in merge),
            *(("--rename", new) for new in rename.values()),
        ]:
            if not new.strip():
                problems.append(f"{option}: a class needs a name")
            elif (other := find_name(new, rest)) is not None:
                problems.append(
                    f"{option}: the bundle has a class '{other}' already; merge it too, or choose another name"
                )
            rest.append(new)
        if not [name for name in rest if find_name(name, grounds) is None]:
            problems.append("--drop: no class would be left")
        if problems:
            raise ConfigError(problems)
        return ClassEdits(drop, merge, rename)


_Row = tuple[int, int]
"""An output of a head: number of its growth, and its place among the outputs of that growth's classes."""


def with_classes(
    model: SegmentationModel, about: ModelFile, edits: ClassEdits, step: int, builder: Any = None
) -> tuple[SegmentationModel, dict[str, LabelSpace], Registry]:
    """Remove, merge and rename classes of a model, in every branch that has them, without training.

    * A dropped class loses its outputs; its pixels go to the class that comes next. Its id is not given to another one.
    * A merged class keeps the outputs of its parts, and its logit is the logarithm of the sum of their exponentials. So
      its softmax probability is the sum of theirs, at the resolution of the logits. It stands where the first of them
      stood. It has the id of the part whose name it takes over, else a new one.
    * A renamed class keeps its id.

    All other logits stay bit-equal. Data that use an earlier name mean the class of today (`LabelSpace.formerly`).

    Args:
        edits: with names as the model spells them (`ClassEdits.known_in`).
        step: number of the step that a new class counts as learnt in.
        builder: of the user's own architecture, if the model is not a built-in one.

    Returns:
        A new model in eval mode; its classes; and all classes that the bundle has ever had.

    Raises:
        ConfigError: the outputs are read in another way, or stand in parts of the head that cannot be joined.
    """
    registry = about.lasting_ids("the model")
    state = dict(model.state_dict())
    description = model.describe()
    entries: dict[str, list[Any]] = {}
    spaces = dict(about.spaces)
    for branch, space in about.spaces.items():
        outputs = _outputs_after(space, edits)
        if outputs == [(name, [c]) for c, name in enumerate(space.names)]:
            continue
        spaces[branch] = _space_after(space, outputs, edits)
        if [members for _, members in outputs] != [[c] for c in range(space.num_classes)]:
            entries[branch] = _rows_after(model, branch, [members for _, members in outputs], state)
    growth = []
    counters = dict.fromkeys(entries, 0)
    for grown in description["growth"]:
        kept = dict(grown)
        for branch in [name for name in grown if name in entries]:
            entry = entries[branch][counters[branch]]
            counters[branch] += 1
            if entry is None:
                del kept[branch]
            else:
                kept[branch] = entry
        if kept:
            growth.append(kept)
    changed = from_description({**description, "growth": growth}, builder)
    load_strictly(changed, state, "the model")
    changed.readout = about.readout
    changed.domain_statistics = dict(
        model.domain_statistics
    )  # of the encoder's features, which stay as they are
    return changed.eval(), spaces, _registry_after(registry, spaces, edits, step)


def _outputs_after(space: LabelSpace, edits: ClassEdits) -> list[tuple[str, list[int]]]:
    """Name of each output after the edits, and the outputs of today that it is made of."""
    merged = {name: new for new, names in edits.merge.items() for name in names}
    found: dict[str, list[int]] = {}
    for c, name in enumerate(space.names):
        if name not in edits.drop:
            found.setdefault(merged.get(name) or edits.rename.get(name, name), []).append(c)
    return list(found.items())


def _space_after(space: LabelSpace, outputs: list[tuple[str, list[int]]], edits: ClassEdits) -> LabelSpace:
    """The label space after the edits; its raw ids are those of the first part of each output."""
    order = space.order
    group_of = [number for number, group in enumerate(space.groups) for _ in group]
    groups = [
        tuple(order[members[0]] for _, members in outputs if group_of[members[0]] == number)
        for number in range(len(space.groups))
    ]
    names = tuple(name for name, _ in outputs)
    today = {name: new for new, parts in edits.merge.items() for name in parts} | dict(edits.rename)
    # A name that is given away again means its new owner, and no longer the class that had it.
    kept = {spelling(name) for name in names}
    told = [(old, today.get(now, now)) for old, now in space.formerly] + list(today.items())
    formerly = {old: now for old, now in told if spelling(old) not in kept and now in names}
    background = None
    if space.background is not None:
        background = next(c for c, (_, members) in enumerate(outputs) if space.background in members)
    return LabelSpace(tuple(group for group in groups if group), names, background, tuple(formerly.items()))


def _rows_after(
    model: SegmentationModel, branch: str, outputs: list[list[int]], state: dict[str, Tensor]
) -> list[Any]:
    """Change the weights of a branch's classifiers in `state`.

    Args:
        outputs: for each output after the edits those of today that it is made of.

    Returns:
        The entries of the branch's growths in the description; None = this growth is gone.

    Raises:
        ConfigError: the outputs cannot be changed so.
    """
    head = model.head(branch)
    if type(head) is not GrowingHead or head.expansion is not None or model.readout.to_json():
        raise ConfigError(
            f"branch '{branch}': the outputs of this network are not classifiers of one class each under a softmax, so "
            "classes cannot be dropped or merged in it; --rename works"
        )
    today: list[list[_Row]] = []
    for number, (classes, one) in enumerate(head.growths):
        if one.background != "joint":
            today.append([])  # the background has a classifier of its own, which stays
        at = 0
        for size in one.sums or (1,) * (classes - (one.background != "joint")):
            today.append([(number, at + i) for i in range(size)])
            at += size
    wanted = [[row for c in members for row in today[c]] for members in outputs]
    own = [c for c, rows in enumerate(today) if not rows]
    if any(set(own) & set(members) and len(members) > 1 for members in outputs):
        raise ConfigError(
            f"branch '{branch}': its background has a classifier of its own, so nothing can be merged into it"
        )
    prefix = f"heads.{branch}.classifiers."
    before = {key: state.pop(key) for key in [key for key in state if key.startswith(prefix)]}
    parts = list(head.classifiers)
    entries: list[Any] = []
    kept = 0
    for number, (_, one) in enumerate(head.growths):
        mine = [rows for rows in wanted if rows and rows[0][0] == number]
        constant = one.background != "joint"
        if not mine:
            if constant or one.auxiliary or one.reserve or one.beside:
                raise ConfigError(
                    f"branch '{branch}': the classifier of its step {number} holds more than classes; leave one of them"
                )
            entries.append(None)
            continue
        rows = [row for each in mine for row in each]
        if strange := {other for other, _ in rows if other != number}:
            plain = [
                type(parts[n]) is type(parts[number]) and not isinstance(parts[n], Trunk) for n in strange
            ]
            if not all(plain):
                raise ConfigError(
                    f"branch '{branch}': classes that were learnt in different steps have layers of their own in "
                    "front of their classifiers here, so they cannot be merged"
                )
        ahead = sum(one.beside.values())
        sums = tuple(len(each) for each in mine)
        changed = replace(one, sums=sums if max(sums) > 1 else ())
        entries.append(Growth(len(mine) + constant, changed).to_json())
        for key, value in before.items():
            name = key.removeprefix(f"{prefix}{number}.")
            if name == key:
                continue
            layer = last_layer(parts[number])
            if name in _last_names(parts[number]):
                axis = 1 if isinstance(layer, nn.ConvTranspose2d) and name.endswith("weight") else 0
                sources = {n: before[f"{prefix}{n}.{name}"] for n, _ in rows} | {number: value}
                lead = [value.narrow(axis, 0, ahead)] if ahead else []
                skip = {n: sum(head.growths[n].head.beside.values()) for n in sources}
                value = torch.cat(
                    [*lead, *(sources[n].narrow(axis, skip[n] + row, 1) for n, row in rows)], axis
                )
            state[f"{prefix}{kept}.{name}"] = value.clone()
        kept += 1
    return entries


def _last_names(part: nn.Module) -> tuple[str, str]:
    """Names of the weights of a part's last layer."""
    before = "classifier." if isinstance(part, Trunk) else ""
    return f"{before}weight", f"{before}bias"


def _registry_after(
    registry: Registry, spaces: Mapping[str, LabelSpace], edits: ClassEdits, step: int
) -> Registry:
    """The classes after the edits. Names that are gone stay in the list, in no branch."""
    renamed = {one.name: replace(one, name=edits.rename.get(one.name, one.name)) for one in registry.classes}
    # A class of long ago may have had the name that is given now; it makes room.
    classes = [
        one
        for old, one in renamed.items()
        if one.branches or old in edits.rename or find_name(one.name, edits.rename.values()) is None
    ]
    next_id = registry.next_id
    background = next((one.id for one in registry.classes if one.colour == BACKGROUND_COLOUR), None)
    for new in edits.merge:
        if find_name(new, [one.name for one in classes]) is None:
            if next_id >= MOST_IDS:
                raise ConfigError(f"class '{new}': all ids are taken")
            red, green, blue = palette(next_id + 1, background=background)[next_id].tolist()
            classes.append(BundleClass(next_id, new, (red, green, blue), step, ()))
            next_id += 1

    def branches(name: str) -> tuple[str, ...]:
        return tuple(b for b, space in spaces.items() if find_name(name, space.names) is not None)

    return Registry(tuple(replace(one, branches=branches(one.name)) for one in classes), next_id)


# ---------------------------------------------------------------- the verb


@dataclass(frozen=True, repr=False)
class ClassChanges(Result):
    """A bundle whose classes were changed without training, or what would be changed."""

    bundle: Bundle | None
    """The new bundle; None in a preview."""
    edits: ClassEdits
    lines: tuple[str, ...]
    """What becomes of each class, and what the new bundle does not have any more."""

    def shown(self) -> Iterator[Piece]:
        yield from self.lines
        if self.bundle is None:
            yield "dry run: nothing was kept"
            return
        yield from self.bundle.parity_text()
        yield f"wrote {self.bundle.path} (the old bundle is not changed; nothing was trained)"

    def to_json(self) -> dict[str, Any]:
        place = {} if self.bundle is None else {"path": str(self.bundle.path), "sha256": self.bundle.digest}
        return {**place, **self.edits.to_json(), "lines": list(self.lines)}


def change_classes(
    source: Bundle,
    target: Path,
    edits: ClassEdits,
    *,
    images: str | Path | None = None,
    onnx: bool | None = None,
    builder: Any = None,
    dry_run: bool = False,
) -> ClassChanges:
    """Write a bundle with classes removed, merged or renamed; see `with_classes`.

    A bundle that the same call wrote before is taken as it is.

    Args:
        source: the bundle to start from; it is not changed.
        target: a new folder.
        edits: names in any spelling.
        images: as for `everseg.deploy.export.export`.
        onnx: write the ONNX file; by default if the old bundle has one.
        builder: of the user's own architecture, if the bundle has one.
        dry_run: write nothing.

    Raises:
        ConfigError: classes that the bundle does not know, edits that contradict each other, or the folder exists.
    """
    edits = edits.known_in(source.registry, source.spaces)
    if is_bundle(target) and not dry_run:
        written = open_bundle(target)
        last = ({}, *written.lineage["history"])[-1]
        if written.lineage["parent"] == source.digest and last.get("changed") == edits.to_json():
            return ClassChanges(written, edits, tuple(_told(source, edits, written.registry)))
    if not dry_run:
        new_folder(target)
    with_onnx = bool(source.about.onnx) if onnx is None else onnx
    if with_onnx and not dry_run:
        require_onnx()
    before = source.model(builder)
    model, spaces, registry = with_classes(before, source.about, edits, source.steps, builder)
    lines = [*_told(source, edits, registry)]
    lines.append(f"weights: {before.parameter_count} before, {model.parameter_count} after")
    if read_memory(source.path) is not None:
        lines.append(
            "note: the images of earlier steps are not passed on: their masks hold the classes of before"
        )
    if dry_run:
        return ClassChanges(None, edits, tuple(lines))
    history = list(source.lineage["history"])
    history.append(
        {
            "step": source.steps, "method": METHOD, "classes": list(edits.merge), "train": [], "test": [], "scores": {},
            "extends": source.digest, "changed": edits.to_json(),
        }
    )  # fmt: skip
    kept = {key: source.lineage[key] for key in ("run", "recipe", "source") if key in source.lineage}
    contents = Contents(
        model,
        spaces,
        form=source.about.form,
        domains=source.about.domains,
        steps=[0] * len(model.describe()["growth"]),
        before=registry,
        parent=source.digest,
        # What the method of the last step gathered is of the classes of before, so the next step has no such state.
        lineage={**kept, "steps": source.steps + 1, "history": history, "method": None},
        unknown=source.about.unknown,
        sketch=lambda found: remapped(read_sketch(source.path), _ids_now(edits, source.registry, found)),
    )
    pictures, where = list[np.ndarray](), ""
    if with_onnx:
        channels = source.about.form.channels
        pictures, where = images_of(images, contents.form) if images is not None else generated(channels)
    return ClassChanges(
        write_bundle(target, contents, images=pictures, source=where, onnx=with_onnx), edits, tuple(lines)
    )


def _ids_now(edits: ClassEdits, before: Registry, after: Registry) -> dict[int, int]:
    """Lasting id before the edits -> that of the class that it is part of now; dropped classes are not in it."""
    ids = {spelling(one.name): one.id for one in after.classes}
    today = {name: new for new, names in edits.merge.items() for name in names} | dict(edits.rename)
    return {
        one.id: ids[spelling(today.get(one.name, one.name))]
        for one in before.classes
        if one.name not in edits.drop
    }


def _told(source: Bundle, edits: ClassEdits, registry: Registry) -> Iterator[str]:
    """Say what becomes of each class that the edits name."""
    before = {one.name: one for one in source.registry.classes}
    after = {spelling(one.name): one for one in registry.classes}
    for name in edits.drop:
        where = some(before[name].branches, 6)
        yield f"drop:   {name} (id {before[name].id}) in {where}; its pixels go to the class that comes next"
    for new, names in edits.merge.items():
        ids = ", ".join(f"{name} ({before[name].id})" for name in names)
        yield (
            f"merge:  {ids} become {new} (id {after[spelling(new)].id}); its probability is the sum of theirs, and "
            "data that label one of them label it"
        )
    for name, new in edits.rename.items():
        yield f"rename: {name} (id {before[name].id}) is called {new}; data may use both names"
