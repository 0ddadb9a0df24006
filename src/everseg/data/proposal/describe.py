"""Write the data.yaml for a folder. Classes come from the values in its masks, names from the user or from files."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from everseg.config.yaml import scalar
from everseg.data.batches.parallel import Progress, map_samples
from everseg.data.datasets.decode import LOSSY, UNLIMITED, Colour, Reading, open_inside, open_picture
from everseg.data.datasets.descriptor import palette_of, read_labelmap
from everseg.data.proposal.guess import Guess, guess
from everseg.errors import ConfigError, DataError, some
from everseg.labels import BACKGROUND, IGNORE_NAME, doubled, find_name, is_background_name, spelling

Value = int | tuple[int, int, int]
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
MOST = 254
"""Classes that a mask of bytes can hold beside background and void."""
LARGE = 8_000_000
"""Pictures of more pixels are read in windows."""
NO_BACKGROUND = "none"
"""What stands for the name of the background where there is none."""
NAME_FILES = ("classes.txt", "class_names.txt", "labels.txt")


@dataclass(frozen=True)
class Proposal:
    """The findings about a folder, before its classes have names."""

    root: Path
    layout: Guess
    values: Values
    background: Value | None = None
    """The value taken for background; None: there is none."""
    ignore: int | None = None
    """The id taken for pixels without annotation."""
    unnamed: tuple[Value, ...] = ()
    """Values of the classes to name, ascending; colours by their share of the pixels."""
    names: tuple[str, ...] = ()
    """Names found beside the data, for `unnamed`."""

    def text(self) -> str:
        """Describe the findings for people, in several lines."""
        lines = [
            f"Layout: {self.layout.layout}" + (f", {self.layout.images} images" if self.layout.images else "")
        ]
        keys = self.layout.keys
        if "images" in keys and "masks" in keys:
            lines.append(f"Images in {keys['images']}, {len(self.layout.masks)} masks in {keys['masks']}")
        if "split" in keys:
            lines.append(
                "No splits found: about a fifth of the images, drawn by name, becomes val (split: {val: 0.2, seed: 0})"
            )
        if self.values.ids:
            lines.append(f"Ids in the masks: {some([str(i) for i in self.values.ids], 30)}")
        if self.values.colours:
            lines.append(f"Colours in the masks: {some([str(list(c)) for c in self.values.colours], 12)}")
        guesses = []
        if self.background is not None:
            guesses.append(f"{_shown(self.background)} is background")
        if self.ignore is not None and self.ignore in self.values.ids:
            guesses.append(f"{self.ignore} marks pixels without annotation")
        if guesses:
            lines.append("Guess: " + ", ".join(guesses))
        if self.values.faults:
            lines.append(
                f"{len(self.values.faults)} masks tell nothing: {some(list(self.values.faults), 3, '; ')}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Described:
    """A finished description."""

    keys: Mapping[str, Any]
    comments: Mapping[str, str] = field(default_factory=dict)
    """Key -> remark behind it."""
    notes: tuple[str, ...] = ()
    """What was decided about the background and can be decided otherwise."""

    def yaml(self) -> str:
        """The text of the data.yaml."""
        lines = []
        for key, value in self.keys.items():
            remark = f"    # {self.comments[key]}" if key in self.comments else ""
            lines.append(f"{key}: {_flow(value)}{remark}")
        return "\n".join(lines) + "\n"


def propose(root: Path, *, follow_links: bool = False, progress: Progress | None = None) -> Proposal:
    """Examine a folder and read all of its masks.

    Args:
        root: an existing folder.
        follow_links: use files and folders that links lead to; the description then says so.
        progress: called with (done, total) masks.

    Raises:
        DataError: no layout fits, no mask can be read, or there are more values than a mask can have classes.
    """
    root = root.resolve()
    found = guess(root, follow_links=follow_links)
    if follow_links:
        found = replace(found, keys={**found.keys, "follow_links": True})
    if not found.masks or "labels" in found.keys:
        return Proposal(root, found, Values())
    values = mask_values(root, found.masks, follow_links=follow_links, progress=progress)
    if not values.ids and not values.colours:
        raise DataError(f"{root}: no mask can be used: {some(list(values.faults), 5, '; ')}")
    if values.ids and values.colours:
        raise DataError(
            f"{root}: masks of ids and masks of colours in {found.keys['masks']}; keep one kind, or write a data.yaml"
        )
    if values.colours:
        return _with_names(Proposal(root, found, values, *_of_colours(values)))
    return _with_names(Proposal(root, found, values, *_of_ids(values)))


def describe(
    proposal: Proposal, names: Sequence[str] | None, *, here: Path, background: str | None = None
) -> Described:
    """Turn a proposal into a finished description.

    Args:
        names: names for `proposal.unnamed`, in its order, or with the background's name first; None = found or made up.
        here: folder of the data.yaml.
        background: name of the background class, or `NO_BACKGROUND`; None = the class with a usual background name,
            else the class of the value that is assumed to be background.

    Raises:
        ConfigError: the number of names differs from that of the classes, a class already has a name, a name occurs
            twice, or the background is none of the names.
    """
    root, keys = proposal.root, dict(proposal.layout.keys)
    near = root.is_relative_to(here.resolve())
    head = {"root": os.path.relpath(root, here.resolve()) if near else str(root)}
    if not proposal.unnamed and proposal.background is None:
        if names is not None or background is not None:
            option = "--classes" if names is not None else "--background"
            raise ConfigError(
                f"{option}: {proposal.layout.layout} brings its own class names; leave the option out"
            )
        if "labels" in keys:
            classes, palette = palette_of(read_labelmap(root / keys["labels"]["palette"]))
            keys |= {"classes": classes, "labels": {"palette": palette}}
        layout = {"layout": keys.pop("layout")} if "layout" in keys else {}
        name = {} if layout else {"name": root.name or "data"}
        return Described({**name, **layout, **head, **keys})
    named = _names(proposal, names)
    empty, notes = _background(proposal, named, background)
    comments = {}
    if "split" in keys:
        comments["split"] = "about a fifth of the images, drawn by their names"
    if _large(root, proposal.layout.masks[:20], bool(keys.get("follow_links"))):
        keys["tiles"] = {"size": 1024, "overlap": 64}
        comments["tiles"] = "large pictures: every window is a sample"
    values = [v for v in (proposal.background, *proposal.unnamed) if v is not None]
    labels, classes = _labels(values, named, proposal.ignore)
    keys |= {"classes": classes, "background": empty}
    keys |= {"ignore": proposal.ignore} | labels
    return Described({"name": root.name or "data", **head, **keys}, comments, notes)


def _large(root: Path, masks: Sequence[str], follow_links: bool) -> bool:
    """Whether most masks have more pixels than a training crop can use; reads only their headers."""
    large = 0
    for name in masks:
        try:
            with open_inside(root, name, follow_links=follow_links) as file:
                width, height = open_picture(file, root / name, UNLIMITED).size
        except DataError:
            continue
        large += width * height > LARGE
    return 2 * large > len(masks)


def _names(proposal: Proposal, given: Sequence[str] | None) -> list[str]:
    """Name all values; the value that is assumed to be background, if any, comes first."""
    count, extra = len(proposal.unnamed), proposal.background is not None
    values = [v for v in (proposal.background, *proposal.unnamed) if v is not None]
    names = [n.strip() for n in given or proposal.names or (f"class_{i + 1}" for i in range(count))]
    if extra and len(names) == count:
        if called := [n for n in names if is_background_name(n)]:
            raise ConfigError(
                f"--classes: {count} names for {count + 1} values leave {_shown(values[0])} to the "
                f"background, but '{called[0]}' is among them; name all {count + 1} values in their order"
            )
        names = [BACKGROUND, *names]
    if len(names) != count + extra:
        what = some([_shown(v) for v in proposal.unnamed], 12)
        raise ConfigError(f"--classes: {len(names)} names for {count} classes ({what})")
    if doubled(dict(enumerate(names))) or any(spelling(n) in ("", IGNORE_NAME) for n in names):
        raise ConfigError(
            f"--classes: every class needs a name of its own other than '{IGNORE_NAME}', got {names}"
        )
    return names


def _background(
    proposal: Proposal, names: Sequence[str], given: str | None
) -> tuple[str | None, tuple[str, ...]]:
    """Name of the background, None if there is none, and a note on any choice made without the user."""
    if given is not None:
        found = find_name(given, names)
        if found is None and spelling(given) != NO_BACKGROUND:
            raise ConfigError(
                f"--background: '{given}' is none of {some(list(names), 12)}; {NO_BACKGROUND}: there is none"
            )
        return found, ()
    usual = next((name for name in names if is_background_name(name)), None)
    if usual is not None or proposal.background is None:
        return usual, ()
    return names[0], (
        f"no class is called as the background usually is, so '{names[0]}', the value {_shown(proposal.background)}, "
        f"is taken for it; --background NAME, or --background {NO_BACKGROUND}, decides",
    )


def _labels(values: list[Value], names: list[str], ignore: int | None) -> tuple[dict[str, Any], Any]:
    """Make the keys that map values to classes, and `classes`."""
    if isinstance(values[0], tuple):
        colours = [list(v) for v in values if isinstance(v, tuple)]
        return {"labels": {"palette": dict(zip(names, colours, strict=True))}}, names
    ids = [v for v in values if isinstance(v, int)]
    if ids == list(range(len(ids))):
        return {}, names
    if all(0 <= i <= 255 for i in ids):
        return {}, dict(zip(ids, names, strict=True))
    table: dict[int, str] = dict(zip(ids, names, strict=True))
    return {"labels": {"map": table | ({ignore: "ignore"} if ignore is not None else {})}}, names


def _of_ids(values: Values) -> tuple[Value | None, int | None, tuple[Value, ...]]:
    ids = list(values.ids)
    ignore = 255 if 255 not in ids or set(ids) - {0, 255} else None
    classes = [i for i in ids if i != ignore and i != 0]
    if len(classes) > MOST:
        raise DataError(
            f"{len(classes)} different ids in the masks: instance ids, or resized masks; export class ids"
        )
    if not classes:
        raise DataError("the masks hold nothing but background and pixels without annotation")
    return (0 if 0 in ids else None), ignore, tuple(classes)


def _of_colours(values: Values) -> tuple[Value | None, int | None, tuple[Value, ...]]:
    colours = list(values.colours)
    if len(colours) > MOST:
        raise DataError(
            f"{len(colours)} different colours in the masks: JPEG or resized masks? Export them as PNG"
        )
    background = BLACK if BLACK in colours else None
    return background, 255, tuple(c for c in colours if c != background)


def _with_names(proposal: Proposal) -> Proposal:
    """Take the names from a file beside the data if its number of lines fits."""
    count = len(proposal.unnamed)
    for file in NAME_FILES:
        try:
            lines = (proposal.root / file).read_text(encoding="utf-8-sig")[:100_000].splitlines()
        except (OSError, UnicodeDecodeError):
            continue
        names = tuple(line.strip() for line in lines if line.strip())
        if len(names) in (count, count + (proposal.background is not None)) and isinstance(
            proposal.unnamed[0], int
        ):
            return Proposal(**{**vars(proposal), "names": names})
    return proposal


def _shown(value: Value) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _flow(value: Any) -> str:
    """Write a value as YAML on one line, so that it reads back as the same value."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_flow(k)}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_.][\w ./-]*", value, re.ASCII) and not value.endswith(" ")
        return value if plain and scalar(value) == value else json.dumps(value, ensure_ascii=False)
    return json.dumps(value)


MANY = 256
"""A mask with more values than this was not drawn class by class."""


@dataclass(frozen=True)
class Values:
    """The values in the masks of a data set."""

    ids: dict[int, int] = field(default_factory=dict)
    """Id -> pixels, of the masks with one channel."""
    colours: dict[Colour, int] = field(default_factory=dict)
    """Colour -> pixels, of the colour masks."""
    faults: tuple[str, ...] = ()
    """One line per mask that tells nothing: unreadable, lossy, or of too many values."""


def mask_values(
    root: Path, masks: Sequence[str], *, follow_links: bool = False, progress: Progress | None = None
) -> Values:
    """Read masks on all cores and count their values.

    Args:
        root: data folder, resolved.
        masks: paths below it.
        follow_links: links may lead out of the folder.
    """
    found = map_samples(_values, (root, list(masks), follow_links), len(masks), progress=progress)
    ids: Counter[int] = Counter()
    colours: Counter[Colour] = Counter()
    for one in found:
        ids.update(one.ids)
        colours.update(one.colours)
    return Values(
        dict(sorted(ids.items())), dict(colours.most_common()), tuple(f for v in found for f in v.faults)
    )


def _values(job: tuple[Path, list[str], bool], index: int) -> Values:
    root, name = job[0], job[1][index]
    try:
        with open_inside(root, name, follow_links=job[2]) as file:
            picture = open_picture(file, root / name, Reading())
            if picture.format in LOSSY:
                return Values(faults=(f"{name}: stored as {picture.format}, which changes values",))
            picture.load()
            bits = picture.mode in ("RGB", "RGBA", "RGBX")
            pixels = np.asarray(picture.convert("RGB") if bits else picture)
    except DataError as error:
        return Values(faults=(str(error),))
    except Exception as error:  # decoders raise almost any exception on damaged files
        return Values(faults=(f"{name}: {error}",))
    if bits:
        wide = pixels.astype(np.uint32)
        pixels = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
    if pixels.ndim != 2 or pixels.dtype.kind not in "uib":
        return Values(faults=(f"{name}: a mask of mode {picture.mode}",))
    values, counts = np.unique(pixels, return_counts=True)
    if len(values) > MANY:
        return Values(faults=(f"{name}: {len(values)} different values; no mask of classes",))
    pairs = [(int(v), int(n)) for v, n in zip(values, counts, strict=True)]
    if bits:
        return Values(colours={(v >> 16, v >> 8 & 255, v & 255): n for v, n in pairs})
    return Values(ids=dict(pairs))
