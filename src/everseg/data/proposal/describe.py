"""Write the data.yaml for a folder. Classes come from the values in its masks, names from the user or from files."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from everseg.config.yaml import scalar
from everseg.data.batches.parallel import Progress
from everseg.data.class_colours import colour_word
from everseg.data.datasets import hf
from everseg.data.datasets.decode import UNLIMITED, open_inside, open_picture
from everseg.data.datasets.descriptor import NO_DATA_CLASS, palette_of, read_labelmap
from everseg.data.mask_values import (
    BLACK,
    VOID_SHARE,
    WHITE,
    MaskFile,
    Value,
    Values,
    blocks_of,
    decide,
    mask_values,
    shown,
    value_counts,
    void_doubts,
)
from everseg.data.proposal.guess import Guess, guess
from everseg.data.proposal.like import Like
from everseg.data.proposal.naming import (
    NameList,
    by_order,
    by_position,
    default_name,
    given_names,
    names_beside,
    void_or,
)
from everseg.data.proposal.tool_names import tool_names
from everseg.display import counted, share
from everseg.errors import ConfigError, DataError, some
from everseg.files import real_path
from everseg.labels import (
    BACKGROUND,
    IGNORE_NAME,
    IGNORED_WIDE,
    doubled,
    find_name,
    is_background_name,
    spelling,
)

MOST = 254
"""Classes that a mask of bytes can hold beside background and void."""
LARGE = 8_000_000
"""Pictures of more pixels are read in windows."""
SHOWN = 256
"""Most classes that the table lists."""
NO_BACKGROUND = "none"
"""What stands for the name of the background where there is none."""


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
    """Values of the classes to name, ascending; colours in the order of their red, green and blue."""
    found: NameList | None = None
    """Names found beside the data."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names found beside the data, in the order of their file."""
        if self.found is None:
            return ()
        return self.found.names or tuple(dict.fromkeys(self.found.tied.values()))

    def text(self) -> str:
        """Describe the findings for people, in several lines."""
        lines = [
            f"Layout: {self.layout.layout}" + (f", {self.layout.images} images" if self.layout.images else "")
        ]
        keys = self.layout.keys
        if "images" in keys and "masks" in keys:
            lines.append(
                f"Images in {keys['images']}, {counted(len(self.layout.masks), 'mask')} in {keys['masks']}"
            )
        if "split" in keys:
            lines.append(
                "No splits found: about a fifth of the images, drawn by name, becomes val (split: {val: 0.2, seed: 0})"
            )
        if self.values.ids:
            own = self.values.own
            ids = [f"{i} ({_coloured(own[i])})" if i in own else str(i) for i in self.values.ids]
            lines.append(f"Ids in the masks: {some(ids, 30)}")
        if self.values.colours:
            lines.append(
                f"Colours in the masks: {some([_coloured(c) for c in self.values.colours], 12, '; ')}"
            )
        lines += [f"Note: {note}" for note in self.values.notes]
        guesses = []
        if self.background is not None:
            guesses.append(f"{shown(self.background)} is background")
        if self.ignore is not None and self.ignore in self.values.ids:
            ignored = share(self.values.ids[self.ignore] / self.values.pixels)
            guesses.append(f"{self.ignore} marks pixels without annotation ({ignored} of the pixels)")
        if guesses:
            lines.append("Guess: " + ", ".join(guesses))
        if self.values.faults:
            lines.append(
                f"{counted(len(self.values.faults), 'mask')} cannot be used: {some(list(self.values.faults), 3, '; ')}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Described:
    """A finished description."""

    keys: Mapping[str, Any]
    comments: Mapping[str, str] = field(default_factory=dict)
    """Key -> remark behind it."""
    notes: tuple[str, ...] = ()
    """What was decided and can be decided otherwise, and what is new or missing beside `like`."""
    open_background: bool = False
    """Whether nothing says which class, if any, is the background."""
    table: tuple[str, ...] = ()
    """A line for each class: what masks store = id = name, and its share of the pixels."""

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
        DataError: no layout fits, no mask can be read, there are more values than a mask can have classes, or the
            masks contradict each other.
    """
    root = real_path(root)
    found = guess(root, follow_links=follow_links)
    if follow_links:
        found = replace(found, keys={**found.keys, "follow_links": True})
    if found.keys.get("layout") == "hf":
        return _proposed(root, found, _of_columns(root, progress))
    if not found.masks or "labels" in found.keys:
        return Proposal(root, found, Values())
    values = mask_values(root, found.masks, follow_links=follow_links, progress=progress)
    if not values.ids and not values.colours:
        raise DataError(
            f"{root}: no mask can be read, so there is nothing to propose: {some(list(values.faults), 5, '; ')}"
        )
    return _proposed(root, found, values)


def _of_columns(root: Path, progress: Progress | None) -> Values:
    """Count the values of the masks in a stored set's column."""
    data = hf.build(root, classes={i: f"id {i}" for i in range(256)}, ignore=None)
    total, files = sum(len(split) for split in data.splits.values()), []
    for name, split in data.splits.items():
        if isinstance(split, hf.ColumnSplit):
            split.most = IGNORED_WIDE  # whatever the masks hold is counted
        for index in range(len(split)):
            mask = split.read_mask(index)
            counts = value_counts(mask.reshape(-1))
            files.append(MaskFile(f"{name}[{split.id(index)}]", "ids", counts, blocks_of(mask)))
            if progress is not None:
                progress(len(files), total)
    return decide(root, files)


def _proposed(root: Path, layout: Guess, values: Values) -> Proposal:
    kinds = _of_colours(values) if values.colours else _of_ids(values)
    beside = names_beside(root, values.colours or values.ids) or tool_names(
        root, values.colours or values.ids
    )
    return Proposal(root, layout, values, *kinds, found=beside)


def describe(
    proposal: Proposal,
    names: Sequence[str] | None,
    *,
    here: Path,
    background: str | None = None,
    first: int | None = None,
    like: Like | None = None,
) -> Described:
    """Turn a proposal into a finished description.

    Args:
        names: names for the values in their order, or "name=id", "name=red,green,blue" for each; None = those found
            beside the data, or made up.
        here: folder of the data.yaml.
        background: name of the background class, or `NO_BACKGROUND`; None = the class with a usual background name,
            else the value 0 or black if nothing else names it.
        first: id of the first name of a plain list.
        like: an earlier description whose classes are taken over.

    Raises:
        ConfigError: names that do not fit, that fit in several ways, or that occur twice; or the background is none of
            the names.
        DataError: values that can be read in several ways and that no name is tied to.
    """
    root, keys = proposal.root, dict(proposal.layout.keys)
    near = root.is_relative_to(real_path(here))
    head = {"root": os.path.relpath(root, real_path(here)) if near else str(root)}
    if not proposal.unnamed and proposal.background is None:
        given = {"--classes": names, "--background": background, "--like": like, "--names-from": first}
        if wrong := [option for option, value in given.items() if value is not None]:
            raise ConfigError(
                f"{wrong[0]}: {proposal.layout.layout} brings its own class names; leave the option out"
            )
        if "labels" in keys:
            classes, palette = palette_of(read_labelmap(root / keys["labels"]["palette"]))
            keys |= {"classes": classes, "labels": {"palette": palette}}
        layout = {"layout": keys.pop("layout")} if "layout" in keys else {}
        name = {} if layout else {"name": root.name or "data"}
        return Described({**name, **layout, **head, **keys})
    comments = {}
    if "split" in keys:
        comments["split"] = "about a fifth of the images, drawn by their names"
    if _large(root, proposal.layout.masks[:20], bool(keys.get("follow_links"))):
        keys["tiles"] = {"size": 1024, "overlap": 64}
        comments["tiles"] = "large pictures: every window is a sample"
    meaning = _taken_over(proposal, names, like) if like is not None else _named(proposal, names, first)
    meaning = _with_background(meaning, background)
    labels = _keys(meaning)
    if "layout" in keys:
        if "labels" in labels:
            raise DataError(
                f"{root}: the values of the masks must be mapped to ids, and a stored data set has no place for a map; "
                "store it with ids from 0 to 254, and 255 for pixels without annotation"
            )
        own = {
            key: value
            for key, value in labels.items()
            if key != "void_share" and (key, value) != ("background", None)
        }
        keys = {"layout": keys.pop("layout"), **head, **keys, **own}
        return Described(keys, comments, meaning.notes, meaning.open_background, tuple(_table(meaning)))
    return Described(
        {"name": root.name or "data", **head, **keys, **labels},
        comments,
        meaning.notes,
        meaning.open_background,
        tuple(_table(meaning)),
    )


@dataclass(frozen=True)
class _Meaning:
    """What every value of the masks means."""

    values: Values
    named: Mapping[Value, str]
    """Value -> class or `IGNORE_NAME`; with classes that no mask shows."""
    classes: Mapping[int, str]
    """Raw id -> name."""
    ignore: tuple[int, ...]
    background: str | None = None
    extra: str | None = None
    """The name of a background that nobody named."""
    open_background: bool = False
    notes: tuple[str, ...] = ()


def _named(proposal: Proposal, given: Sequence[str] | None, first: int | None) -> _Meaning:
    """Give every value a name: as it is tied to it, by its place in a list, or a made-up one."""
    values, found = proposal.values, proposal.found
    names = given_names(given) if given is not None else found
    notes: list[str] = []
    if names is not None and given is None and names.names and values.colours:
        notes.append(
            f"{names.source} is not used: it names no colours, and the masks hold colours; see --classes"
        )
        names = None
    if first is not None and (names is None or not names.names or values.colours):
        raise ConfigError(
            f"--names-from {first}: found no plain list of names (one a line) that it could number"
        )
    if names is None and values.ids and len(proposal.unnamed) > MOST:
        raise DataError(
            f"{proposal.root}: {len(proposal.unnamed)} different ids in the masks: instance ids, or resized masks; "
            "export class ids. If all are classes, put a list of their names beside the data (classes.txt), or write a "
            "data.yaml that lists them as `classes: {ID: NAME, ...}` (ids up to 65534; docs: data)"
        )
    if names is not None and names.fault:
        raise DataError(f"{proposal.root}: {names.fault}")
    stored: list[Value] = [*values.colours, *values.ids]
    tied: dict[Value, str] = {}
    if names is not None and names.tied:
        tied = _by_own_colour(values, names)
        values = _right_kind(values, tied, names.source)
        stored = [*values.colours, *values.ids]
    doubts = [d.text for d in values.doubts if not d.values <= _plain_values(tied)]
    if doubts:
        raise DataError(f"{proposal.root}: " + "\n  ".join(doubts))
    named: dict[Value, str]
    if names is None:
        named = {v: default_name(v) for v in proposal.unnamed}
    elif names.tied:
        named = {value: void_or(name) for value, name in tied.items()}
    elif values.colours:
        named = by_order(names, stored)
    else:
        ids = [i for i in values.ids if i != proposal.ignore]
        named = by_position(names, ids, first=first)
        if given is None:  # a file lists void too
            named = {value: void_or(name) for value, name in named.items()}
    extra = None
    zero: Value = BLACK if values.colours else 0
    if zero in stored and zero not in named and not any(is_background_name(n) for n in named.values()):
        named, extra = {zero: BACKGROUND, **named}, BACKGROUND
    if proposal.ignore in values.ids and proposal.ignore not in named:
        named[proposal.ignore] = IGNORE_NAME
    _require_named(values, named, names)
    problems = _wrong_names(named, names)
    if problems:
        raise ConfigError(problems)
    return _numbered(values, named, extra, tuple(notes))


def _plain_values(tied: Mapping[Value, str]) -> set[int]:
    """The tied values as doubts have them: ids, or packed colours."""
    return {v if isinstance(v, int) else v[0] << 16 | v[1] << 8 | v[2] for v in tied}


def _by_own_colour(values: Values, names: NameList) -> dict[Value, str]:
    """Turn names of colours into names of ids, where indexed masks show these colours."""
    if values.colours or not values.own or not all(isinstance(v, tuple) for v in names.tied):
        return dict(names.tied)
    # Several ids may have one colour; then the colour names all of them.
    tied: dict[Value, str] = {i: names.tied[c] for i, c in values.own.items() if c in names.tied}
    absent = [n for c, n in names.tied.items() if c not in values.own.values() and n not in tied.values()]
    return dict(names.tied) if absent else tied


def _right_kind(values: Values, tied: Mapping[Value, str], source: str) -> Values:
    """Read indexed masks by colour if the names are tied to colours; refuse names for the other kind of values."""
    colours = any(isinstance(v, tuple) for v in tied)
    if colours and values.ids:
        if not values.own:
            raise ConfigError(
                f"{source}: names are tied to colours, but the masks hold ids "
                f"({some([str(i) for i in values.ids], 12)}); tie the names to ids: NAME=ID"
            )
        return decide(Path(), values.files, values.faults, by_colour=True)
    if not colours and values.colours:
        raise ConfigError(
            f"{source}: names are tied to ids, but the masks hold colours; tie them to colours: "
            f"NAME={shown(next(iter(values.colours)))}"
        )
    return values


def _require_named(values: Values, named: Mapping[Value, str], names: NameList | None) -> None:
    counts = values.counts
    missing = [v for v in counts if v not in named]
    if missing:
        lines = [f"{_coloured(v)} on {share(counts[v] / values.pixels)} of the pixels" for v in missing]
        source = names.source if names is not None else "--classes"
        raise ConfigError(
            f"{source}: no name for {some(lines, 12, '; ')}; add NAME={shown(missing[0])}, or "
            f"{IGNORE_NAME}={shown(missing[0])} for pixels without annotation"
        )


def _wrong_names(named: Mapping[Value, str], names: NameList | None) -> list[str]:
    """Refuse blank names, two names that are one, and void as a class of a plain list that somebody typed."""
    source = "--classes" if names is None else names.source
    plain = list(names.names) if names is not None else []
    distinct = plain or list(dict.fromkeys(named.values()))
    void = source == "--classes" and any(spelling(n) == IGNORE_NAME for n in plain)
    if void or doubled(dict(enumerate(distinct))) or any(spelling(n) == "" for n in distinct):
        return [f"{source}: every class needs a name of its own other than '{IGNORE_NAME}', got {distinct}"]
    return []


def _numbered(
    values: Values, named: Mapping[Value, str], extra: str | None, notes: tuple[str, ...]
) -> _Meaning:
    """Give every class its raw id: what the masks store where that can be, else 0, 1, 2, ..., background first."""
    classes = [n for n in dict.fromkeys(named.values()) if n != IGNORE_NAME]
    void = [v for v, n in named.items() if n == IGNORE_NAME]
    single = all(sum(n == name for n in named.values()) == 1 for name in classes)
    if single and not values.colours and all(isinstance(v, int) and 0 <= v <= 255 for v in named):
        own = {v: n for v, n in named.items() if isinstance(v, int) and n != IGNORE_NAME}
        ignore = tuple(sorted(v for v in void if isinstance(v, int)))
        return _Meaning(values, named, dict(sorted(own.items())), ignore, extra=extra, notes=notes)
    classes.sort(key=lambda name: not is_background_name(name))
    if len(classes) > MOST + 1 and not values.colours:
        return _wide(values, named, extra, notes)
    if len(classes) > MOST + 1:
        raise DataError(
            f"{counted(len(classes), 'class')}; a mask of bytes holds {MOST + 1} beside the ignored value"
        )
    return _Meaning(values, named, dict(enumerate(classes)), (255,) if void else (), extra=extra, notes=notes)


def _wide(values: Values, named: Mapping[Value, str], extra: str | None, notes: tuple[str, ...]) -> _Meaning:
    """Keep the ids of masks of 16 bits as they are stored, where there are more classes than a byte holds."""
    own = {v: n for v, n in named.items() if isinstance(v, int) and n != IGNORE_NAME}
    ignore = tuple(sorted(v for v, n in named.items() if isinstance(v, int) and n == IGNORE_NAME))
    several = {n for n in own.values() if sum(n == other for other in own.values()) > 1}
    if several or max(own) >= IGNORED_WIDE:
        what = f"several ids are {some(sorted(several), 4)}" if several else f"id {IGNORED_WIDE} is a class"
        raise DataError(
            f"{counted(len(own), 'class')}, and {what}; with more than {MOST + 1} classes every id up to "
            f"{IGNORED_WIDE - 1} has "
            "a name of its own: export the masks so"
        )
    return _Meaning(values, named, dict(sorted(own.items())), ignore, extra=extra, notes=notes)


def _taken_over(proposal: Proposal, given: Sequence[str] | None, like: Like) -> _Meaning:
    """Take classes and values from an earlier description; new values need names of their own."""
    more = given_names(given) if given is not None else NameList("--classes")
    if more.names:
        raise ConfigError("--classes: beside --like, write every new class as NAME=VALUE")
    values, known = _comparable(proposal, like)
    if like.lasting and values.ids:
        known = _proven(proposal.root, values, known, more.tied, like)
    problems = [
        f"--classes: {shown(v)} is '{known[v]}' in {like.source} and '{name}' here"
        for v, name in more.tied.items()
        if v in known and spelling(known[v]) != spelling(name)
    ]
    named = dict(known)
    for value, name in more.tied.items():
        named.setdefault(value, find_name(name, like.classes.values()) or name)
    counts = values.counts
    if new := [v for v in counts if v not in named]:
        lines = [f"{_coloured(v)} on {share(counts[v] / values.pixels)} of the pixels" for v in new]
        problems.append(
            f"--like: {like.source} does not know {some(lines, 8, '; ')}; name what is new beside --like: --classes "
            f"NAME={shown(new[0])} ({IGNORE_NAME}={shown(new[0])}: without annotation)"
        )
    if problems:
        raise ConfigError(problems)
    # An ignore value is taken over only if nothing speaks against it here.
    sure = {v: n for v, n in named.items() if n != IGNORE_NAME or v in more.tied}
    doubts = [d.text for d in values.doubts if not d.values <= _plain_values(sure)]
    if doubts:
        raise DataError(f"{proposal.root}: " + "\n  ".join(doubts))
    classes, ignore, notes = _with_new(values, named, like)
    seen = {named[v] for v in counts}
    if absent := [name for name in like.classes.values() if name not in seen]:
        notes.append(f"{like.source} has {some(absent, 12)}, which no mask here shows")
    lost = sum(n for v, n in counts.items() if named[v] == IGNORE_NAME)
    if lost > VOID_SHARE * values.pixels:
        notes.append(f"{share(lost / values.pixels)} of the pixels are without annotation")
    return _Meaning(values, named, classes, ignore, like.background, notes=tuple(notes))


def _proven(
    root: Path, values: Values, known: Mapping[Value, str], tied: Mapping[Value, str], like: Like
) -> dict[Value, str]:
    """Keep of a bundle's ids those that are certain: what the user tied, what colours show, background and void.

    Raises:
        ConfigError: ids are left. A bundle gives its classes ids of its own, so the same id may be another class here.
    """
    names = {name: colour for colour, name in like.colours.items()}
    sure: dict[Value, str] = {
        i: n for i, n in known.items() if isinstance(i, int) and names.get(n, BLACK) == values.own.get(i)
    }
    sure |= {i: n for i, n in known.items() if n == IGNORE_NAME or (i == 0 and n == like.background)}
    sure = {i: n for i, n in sure.items() if i not in tied}
    if open_ids := [i for i in values.ids if i not in sure and i not in tied]:
        numbered = ",".join(f"{known.get(i, 'NAME')}={i}" for i in open_ids)
        swapped = ",".join(f"NAME={i}" for i in open_ids)
        raise ConfigError(
            f"--like: {like.source} has ids of its own, and the masks of {root} may store others; say which is right:\n"
            f"    the masks store the bundle's ids: add --classes {numbered}\n"
            f"    they store the ids of their own list: add --classes {swapped} with the names in that list, or "
            "--like the data.yaml of the earlier data"
        )
    return sure


def _comparable(proposal: Proposal, like: Like) -> tuple[Values, dict[Value, str]]:
    """Bring the masks and an earlier description to one kind of values, ids or colours.

    Raises:
        ConfigError: one tells classes by id and the other by colour, or ids carry other colours here.
    """
    values = proposal.values
    if like.by_colour and values.ids:
        if not values.own:
            raise ConfigError(
                f"--like: {like.source} tells classes by colour, but the masks of {proposal.root} hold ids"
            )
        return decide(proposal.root, values.files, values.faults, by_colour=True), dict(like.values)
    if values.colours and not like.by_colour:
        if not like.colours:
            raise ConfigError(
                f"--like: {like.source} tells classes by id, but the masks of {proposal.root} hold colours"
            )
        return values, dict(like.colours)
    ours = {name: colour for colour, name in like.colours.items()}
    wrong = []
    for i, colour in values.own.items():
        name = like.values.get(i, "")
        if name in ours and ours[name] != colour:
            wrong.append(f"id {i} is {name} {_coloured(ours[name])} there, but {_coloured(colour)} here")
    if wrong:
        raise ConfigError(
            f"--like: the colours of the masks differ from {like.source}: {some(wrong, 6, '; ')}"
        )
    return values, dict(like.values)


def _with_new(
    values: Values, named: Mapping[Value, str], like: Like
) -> tuple[dict[int, str], tuple[int, ...], list[str]]:
    """Give raw ids to the classes that an earlier description does not have.

    Returns:
        All classes, the ignored ids, and a note for each new class.
    """
    classes, notes = dict(like.classes), []
    raw = {name: i for i, name in classes.items()}
    coded = bool(values.colours) or any(raw.get(n, v) != v for v, n in named.items() if n != IGNORE_NAME)
    void = [v for v, n in named.items() if n == IGNORE_NAME]
    ignore = set(like.ignore) | {v for v in void if isinstance(v, int) and not coded and v <= 255}
    if void and not ignore:
        ignore = {255}
    for value, name in named.items():
        if name != IGNORE_NAME and name not in classes.values():
            free = next(i for i in range(256) if i not in classes and i not in ignore)
            place = value if not coded and isinstance(value, int) and value <= 255 else free
            classes[place] = name
            notes.append(f"new beside {like.source}: {name} ({_coloured(value)}), id {place}")
    return classes, tuple(sorted(ignore)), notes


def _with_background(meaning: _Meaning, given: str | None) -> _Meaning:
    """Decide which class is the background, and note a choice made without the user."""
    names = list(meaning.classes.values())
    if given is not None:
        found = find_name(given, names)
        if found is None and spelling(given) != NO_BACKGROUND:
            raise ConfigError(
                f"--background: '{given}' is not one of {some(names, 12)} (or '{NO_BACKGROUND}', if there is none)"
            )
        return replace(meaning, background=found)
    if meaning.background is not None:
        return meaning
    usual = next((name for name in names if is_background_name(name)), None)
    if usual is not None:
        return replace(meaning, background=usual)
    zero: Value = BLACK if meaning.values.colours else 0
    first = meaning.named.get(zero)
    if first is None or first == IGNORE_NAME:
        return meaning
    note = (
        f"every value has a name and none is called as the background usually is, so '{first}', the value "
        f"{shown(zero)}, is a class like the others and there is no background; --background NAME decides otherwise"
    )
    return replace(meaning, notes=(*meaning.notes, note), open_background=True)


def _keys(meaning: _Meaning) -> dict[str, Any]:
    """The keys classes, background, ignore and labels."""
    ids = list(meaning.classes)
    classes: Any = list(meaning.classes.values()) if ids == list(range(len(ids))) else dict(meaning.classes)
    void: Any = meaning.ignore[0] if len(meaning.ignore) == 1 else list(meaning.ignore) or None
    keys: dict[str, Any] = {"classes": classes, "background": meaning.background, "ignore": void}
    raw = {name: i for i, name in meaning.classes.items()}
    if meaning.values.colours:
        palette: dict[str, Any] = {}
        for value, name in meaning.named.items():
            if isinstance(value, tuple):
                palette.setdefault(name, []).append(list(value))
        order = [n for n in (*meaning.classes.values(), IGNORE_NAME) if n in palette]
        colours = {n: palette[n][0] if len(palette[n]) == 1 else palette[n] for n in order}
        return keys | {"labels": {"palette": colours}}
    table = {v: n for v, n in meaning.named.items() if isinstance(v, int)}
    own = [value for doubt in meaning.values.doubts if doubt.no_data for value in doubt.values]
    if any(meaning.named[value] != IGNORE_NAME for value in own):
        keys["no_data"] = NO_DATA_CLASS  # somebody named these ids
    keys |= _void_share(meaning, {v: 255 if n == IGNORE_NAME else raw[n] for v, n in table.items()})
    if all((v in meaning.ignore) if n == IGNORE_NAME else raw[n] == v for v, n in table.items()):
        return keys
    return keys | {"labels": {"map": dict(sorted(table.items()))}}


def _void_share(meaning: _Meaning, raw: Mapping[int, int]) -> dict[str, float]:
    """State the share without annotation if the check would doubt it: somebody said that it is so."""
    files: list[tuple[str, Mapping[int, int]]] = []
    for file in meaning.values.files:
        counts: dict[int, int] = {}
        for value, pixels in file.counts.items():
            counts[raw[value]] = counts.get(raw[value], 0) + pixels
        files.append((file.name, counts))
    if 255 not in meaning.ignore or not void_doubts(files):
        return {}
    void = sum(n for v, n in meaning.values.counts.items() if meaning.named[v] == IGNORE_NAME)
    return {"void_share": min(1.0, math.ceil(100 * void / meaning.values.pixels + 1) / 100)}


def _table(meaning: _Meaning) -> list[str]:
    """Write a line for each value: colour = id = name, and its share of the pixels."""
    counts = meaning.values.counts
    raw = {name: i for i, name in meaning.classes.items()}
    lines = []
    for value, name in sorted(meaning.named.items(), key=lambda item: (raw.get(item[1], 999), str(item[0]))):
        seen = (
            f"{share(counts[value] / meaning.values.pixels, digits=2)} of the pixels"
            if value in counts
            else ""
        )
        if not seen and len(meaning.named) > 64:
            continue
        own = meaning.values.own.get(value) if isinstance(value, int) else None
        place = f" ({_coloured(own)})" if own is not None else ""
        number = "without annotation" if name == IGNORE_NAME else f"id {raw[name]} = {name}"
        if name == meaning.background and not is_background_name(name):
            number += " (background)"
        lines.append(f"{_coloured(value)}{place} = {number}: {seen or 'in no mask'}")
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [*lines[:SHOWN], *more]


def _coloured(value: Value) -> str:
    return f"{colour_word(value)} {shown(value)}" if isinstance(value, tuple) else str(value)


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


_NOTHING = (
    "the masks hold nothing but {}: there is nothing to learn; did the export lose the objects (an alpha channel, "
    "another layer, another folder)?"
)


def _of_ids(values: Values) -> tuple[Value | None, int | None, tuple[Value, ...]]:
    ids = list(values.ids)
    if IGNORED_WIDE in ids:  # the largest value of 16 bits, as 255 is that of a byte
        ignore = IGNORED_WIDE
    elif max(ids) > WHITE and {WHITE - 1, WHITE + 1} & {*ids}:  # a class between others
        ignore = None
    else:
        ignore = 255 if 255 not in ids or set(ids) - {0, 255} else None
    classes = [i for i in ids if i != ignore and i != 0]
    if len(classes) + (0 in ids) < 2:
        raise DataError(_NOTHING.format(", ".join(map(str, ids))))
    return (0 if 0 in ids else None), ignore, tuple(classes)


def _of_colours(values: Values) -> tuple[Value | None, int | None, tuple[Value, ...]]:
    colours = list(values.colours)
    if len(colours) > MOST:
        raise DataError(
            f"{counted(len(colours), 'different colour')} in the masks: JPEG or resized masks? Export them as PNG"
        )
    if len(colours) < 2:
        raise DataError(_NOTHING.format(_coloured(colours[0])))
    background = BLACK if BLACK in colours else None
    return background, 255, tuple(c for c in colours if c != background)


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
