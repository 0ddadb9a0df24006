"""Lasting class ids of a bundle. An id never changes and is never given to another class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from everseg.data.class_colours import BACKGROUND_COLOUR, palette
from everseg.errors import ConfigError
from everseg.labels import IGNORED, LabelSpace, known_as
from everseg.runs.model_folder import MOST_IDS, BundleClass, Registry


def register(
    spaces: Mapping[str, LabelSpace],
    growth: Iterable[Mapping[str, int]],
    steps: Sequence[int],
    before: Registry | None = None,
) -> Registry:
    """Give every class an id, in the order in which the classes were learnt.

    If several branches know a class by the same name (`everseg.labels.spelling`), it is one class, spelt as in the
    first of these branches. Classes in `before` keep their id, colour and step, even if the model no longer has them.

    Args:
        spaces: branch -> its classes in output order.
        growth: for each growth in order, branch -> number of outputs added.
        steps: step of each growth.
        before: registry of the bundle that this model was extended from, if any.

    Raises:
        ConfigError: there are more classes than ids.
    """
    known = {entry.name: replace(entry, branches=()) for entry in before.classes} if before else {}
    next_id = before.next_id if before else 0
    empty = {space.names[space.background] for space in spaces.values() if space.background is not None}
    background = next((entry.id for entry in known.values() if entry.colour == BACKGROUND_COLOUR), None)
    taken = dict.fromkeys(spaces, 0)  # branch -> outputs of earlier growths
    for step, grown in zip(steps, growth, strict=True):
        for branch, number in grown.items():
            for spelt in spaces[branch].names[taken[branch] : taken[branch] + number]:
                name = known_as(spelt, known)
                if name != spelt and branch in known[name].branches:
                    name = spelt  # runs of older versions may hold both spellings in one branch: two outputs, two ids
                # A new class gets the next free id, and the palette colour of that id. A background that is met after
                # other classes is near-black, and every class keeps the colour that it has.
                if name not in known:
                    if next_id >= MOST_IDS:
                        raise ConfigError(
                            f"class '{name}': masks of 16 bits hold {MOST_IDS} classes, and all ids are taken"
                        )
                    if background is None and spelt in empty:
                        background = next_id
                    red, green, blue = palette(next_id + 1, background=background)[next_id].tolist()
                    known[name] = BundleClass(next_id, name, (red, green, blue), step, ())
                    next_id += 1
                entry = known[name]
                known[name] = replace(entry, branches=tuple(dict.fromkeys((*entry.branches, branch))))
            taken[branch] += number
    return Registry(tuple(known.values()), next_id)


def mask_type(ids: Iterable[int]) -> type[np.unsignedinteger]:
    """Type of masks that hold these lasting ids: bytes wherever they suffice, else 16 bits."""
    return np.uint8 if max(ids, default=0) < IGNORED else np.uint16


def with_ids(space: LabelSpace, registry: Registry) -> LabelSpace:
    """Replace the raw ids of a label space by the lasting ids. Synthetic outputs keep their negative ids."""
    # By position: in a branch that domains share, two data sets may give two classes one raw id.
    ids = iter(registry.ids(space))
    groups = tuple(
        tuple(i if raw >= 0 else raw for raw, i in zip(group, ids, strict=False)) for group in space.groups
    )
    return replace(space, groups=groups)
