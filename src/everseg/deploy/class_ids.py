"""Classes of a bundle under ids that never change and are never used again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from everseg.errors import CheckpointError, ConfigError
from everseg.inference.pictures import palette
from everseg.labels import LabelSpace, spelling

MOST = 255
"""Number of ids that fit a mask of bytes; 255 stays for ignored pixels."""


@dataclass(frozen=True)
class BundleClass:
    """One class of a bundle."""

    id: int
    """Its id in masks, in this bundle and in all that are made from it."""
    name: str
    colour: tuple[int, int, int]
    step: int
    """Step in which it was learnt first."""
    paths: tuple[str, ...]
    """Paths of the model that have an output for it."""


@dataclass(frozen=True)
class Registry:
    """Every class that this line of bundles has ever had."""

    classes: tuple[BundleClass, ...]
    next_id: int
    """Smallest id that no class of the line has had."""

    @classmethod
    def read(cls, document: Mapping[str, Any], where: str) -> Registry:
        """Read it from a bundle's `classes.json`.

        Raises:
            CheckpointError: it holds none.
        """
        try:
            entries = [
                BundleClass(
                    int(entry["id"]),
                    entry["name"],
                    tuple(entry["colour"]),
                    int(entry["step"]),
                    tuple(entry["paths"]),
                )
                for entry in document["classes"]
            ]
            return cls(tuple(entries), int(document["next_id"]))
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"{where} is no bundle: its classes.json gives the classes no lasting ids; "
                "make one with: everseg export"
            ) from None

    def to_json(self) -> dict[str, Any]:
        return {"classes": [asdict(entry) for entry in self.classes], "next_id": self.next_id}

    def ids(self, space: LabelSpace) -> list[int]:
        """Ids of a path's outputs in output order."""
        names = _Names(entry.name for entry in self.classes)
        by_name = {entry.name: entry.id for entry in self.classes}
        return [by_name[names.of(name)] for name in space.names]


class _Names:
    """Names of a line of bundles; each spelling stands for the first that has it.

    Bundles of older versions may hold one name in two spellings, as two classes of two paths: there each means itself.
    """

    def __init__(self, known: Iterable[str]) -> None:
        self._known: set[str] = set()
        self._first: dict[str, str] = {}
        for name in known:
            self._add(name)

    def of(self, name: str) -> str:
        """The name that this one is known under; one not known before is known from now on."""
        if name in self._known:
            return name
        if spelling(name) not in self._first:
            self._add(name)
        return self._first[spelling(name)]

    def _add(self, name: str) -> None:
        self._known.add(name)
        self._first.setdefault(spelling(name), name)


def register(
    spaces: Mapping[str, LabelSpace],
    growth: Iterable[Mapping[str, int]],
    steps: Sequence[int],
    before: Registry | None = None,
) -> Registry:
    """Give every class its id, in the order in which they were learnt.

    A class that several paths know under one name (`everseg.labels.spelling`) is one class, spelt as in the first of
    them. Classes that `before` knows keep id, colour and step, also those that the model does not have any more.

    Args:
        spaces: path -> its classes in output order.
        growth: what each growth added to which path, in order.
        steps: step of each growth.
        before: registry of the bundle that this model was extended from.

    Raises:
        ConfigError: more than 255 classes.
    """
    known = {entry.name: replace(entry, paths=()) for entry in before.classes} if before else {}
    next_id = before.next_id if before else 0
    names = _Names(known)
    taken = dict.fromkeys(spaces, 0)
    for step, grown in zip(steps, growth, strict=True):
        for path, number in grown.items():
            for spelt in spaces[path].names[taken[path] : taken[path] + number]:
                name = names.of(spelt)
                if name not in known:
                    if next_id >= MOST:
                        raise ConfigError(
                            f"class '{name}': masks of bytes hold {MOST} classes, and all ids are taken"
                        )
                    red, green, blue = palette(next_id + 1)[next_id].tolist()
                    known[name] = BundleClass(next_id, name, (red, green, blue), step, ())
                    next_id += 1
                entry = known[name]
                known[name] = replace(entry, paths=tuple(dict.fromkeys((*entry.paths, path))))
            taken[path] += number
    return Registry(tuple(known.values()), next_id)


def with_ids(space: LabelSpace, registry: Registry) -> LabelSpace:
    """The label space with the classes' lasting ids as raw ids; outputs without a class keep their negative ones."""
    ids = dict(zip(space.order, registry.ids(space), strict=True))
    groups = tuple(tuple(ids[raw] if raw >= 0 else raw for raw in group) for group in space.groups)
    return replace(space, groups=groups)
