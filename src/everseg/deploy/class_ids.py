"""Classes of a bundle under ids that never change and are never used again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from everseg.data.class_colours import palette
from everseg.errors import ConfigError
from everseg.labels import LabelSpace, known_as
from everseg.runs.model_folder import MOST_IDS, BundleClass, Registry


def register(
    spaces: Mapping[str, LabelSpace],
    growth: Iterable[Mapping[str, int]],
    steps: Sequence[int],
    before: Registry | None = None,
) -> Registry:
    """Give every class its id, in the order in which they were learnt.

    A class that several branches know under one name (`everseg.labels.spelling`) is one class, spelt as in the first of
    them. Classes that `before` knows keep id, colour and step, also those that the model does not have any more.

    Args:
        spaces: path -> its classes in output order.
        growth: what each growth added to which branch, in order.
        steps: step of each growth.
        before: registry of the bundle that this model was extended from.

    Raises:
        ConfigError: more than 255 classes.
    """
    known = {entry.name: replace(entry, branches=()) for entry in before.classes} if before else {}
    next_id = before.next_id if before else 0
    taken = dict.fromkeys(spaces, 0)
    for step, grown in zip(steps, growth, strict=True):
        for branch, number in grown.items():
            for spelt in spaces[branch].names[taken[branch] : taken[branch] + number]:
                name = known_as(spelt, known)
                if name != spelt and branch in known[name].branches:
                    name = spelt  # runs of older versions may hold both spellings in one branch: two outputs, two ids
                if name not in known:
                    if next_id >= MOST_IDS:
                        raise ConfigError(
                            f"class '{name}': masks of bytes hold {MOST_IDS} classes, and all ids are taken"
                        )
                    red, green, blue = palette(next_id + 1)[next_id].tolist()
                    known[name] = BundleClass(next_id, name, (red, green, blue), step, ())
                    next_id += 1
                entry = known[name]
                known[name] = replace(entry, branches=tuple(dict.fromkeys((*entry.branches, branch))))
            taken[branch] += number
    return Registry(tuple(known.values()), next_id)


def with_ids(space: LabelSpace, registry: Registry) -> LabelSpace:
    """The label space with the classes' lasting ids as raw ids; outputs without a class keep their negative ones."""
    # By position: in a branch that domains share, two data sets may give two classes one raw id.
    ids = iter(registry.ids(space))
    groups = tuple(
        tuple(i if raw >= 0 else raw for raw, i in zip(group, ids, strict=False)) for group in space.groups
    )
    return replace(space, groups=groups)
