"""Give the values of masks their names: by value, by colour, by position, or as another description has them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from everseg.data.mask_values import BLACK, Value, shown
from everseg.display import counted
from everseg.errors import ConfigError, some
from everseg.files import UnreadableError, read_text
from everseg.labels import BACKGROUND, IGNORE_NAME, is_background_name, is_void_name, spelling

NAME_FILES = (
    "classes.txt", "class_names.txt", "labels.txt", "class_dict.csv", "label_colors.txt", "colormap.txt",
)  # fmt: skip
_FIRSTS = frozenset({"null", "none", "nothing", "other", "others", "nolabel", "empty"})
"""Further names that a list of names begins with where its first name is that of id 0."""
_TIED = re.compile(r"(.*?)\s*=\s*(\d+\s*,\s*\d+\s*,\s*\d+|\d+\s*-\s*\d+|\d+)\s*")
_ID_FIRST = re.compile(r"(\d+)\s*[\s:;,=]\s*(\S.*)")
_ID_LAST = re.compile(r"(\S.*?)\s*[:;,=\t]\s*(\d+)")
_COLOUR_LAST = re.compile(r"(\S.*?)[\s:;,=]+(\d+)[\s,;]+(\d+)[\s,;]+(\d+)\W*")
_COLOUR_FIRST = re.compile(r"(\d+)[\s,;]+(\d+)[\s,;]+(\d+)[\s:;,=]+(\S.*)")


@dataclass(frozen=True)
class NameList:
    """Names that were given, or found in a file beside the data."""

    source: str
    """--classes, or the file's name."""
    names: tuple[str, ...] = ()
    """In the order of the values; () if they are tied."""
    tied: Mapping[Value, str] = field(default_factory=dict)
    """Value -> name; several values may have one name. `IGNORE_NAME` means pixels without annotation."""
    fault: str = ""
    """Why the file cannot be used, and what to do."""


@dataclass(frozen=True)
class Reading:
    """One way to understand a list of names."""

    of: Mapping[Value, str]
    """Id -> name, ids that no mask shows included."""
    option: str
    """What chooses this reading."""
    first: int | None = None
    """Id of the first name, if the names count on from it."""

    def text(self, ids: Sequence[int]) -> str:
        """Say which id is which, and which names are not drawn."""
        pairs = [
            f"{i} = {self.of.get(i, BACKGROUND if i == 0 else 'without a name')}"
            for i in [*self.of, *(i for i in ids if i not in self.of)]
        ]
        absent = [name for i, name in self.of.items() if i not in ids]
        return some(pairs, 8) + (f" ({some(absent, 4)} in no mask)" if absent else "")


MAX_BYTES = 10_000_000
"""Larger files are no lists of names; one of 65,534 names is smaller."""


class TwoReadingsError(ConfigError):
    """A list of names that fits the ids in more than one way."""

    def __init__(
        self, source: str, names: Sequence[str], ids: Sequence[int], readings: Sequence[Reading]
    ) -> None:
        self.readings = tuple(readings)
        self.lines = [f"{reading.text(ids)}: {reading.option}" for reading in readings]
        super().__init__(
            f"{source}: {counted(len(names), 'name')} ({some(list(names), 4)}) for the ids "
            f"{some([str(i) for i in ids], 12)} can "
            "be read in several ways; say which is right:\n    " + "\n    ".join(self.lines)
        )


def split_classes(text: str) -> list[str]:
    """Cut the text of --classes at its commas, but not inside the colour of "road=128,64,128"."""
    parts: list[str] = []
    for part in text.split(","):
        open_colour = parts and re.fullmatch(r".*=\s*\d+(\s*,\s*\d+)?\s*", parts[-1], re.DOTALL)
        if open_colour and re.fullmatch(r"\s*\d+\s*", part):
            parts[-1] += "," + part
        else:
            parts.append(part)
    return [part.strip() for part in parts]


def given_names(given: Sequence[str], source: str = "--classes") -> NameList:
    """Understand the names of --classes: plain names in the order of the values, or name=value for each.

    Raises:
        ConfigError: both kinds, colours beside ids, impossible values, or one value twice; lists all.
    """
    matches = [_TIED.fullmatch(name) for name in given]
    if not any(matches):
        return NameList(source, tuple(name.strip() for name in given))
    problems = [
        f"{source}: '{name}' names no value, but others do; write every class as NAME=VALUE"
        for name, match in zip(given, matches, strict=True)
        if match is None
    ]
    tied: dict[Value, str] = {}
    for match in matches:
        if match is None:
            continue
        name, value = match[1].strip(), match[2]
        if not name:
            problems.append(f"{source}: '{match[0]}' has no name before the =")
        for one in _values_of(value):
            if isinstance(one, tuple) and max(one) > 255:
                problems.append(
                    f"{source}: '{match[0]}' is not a colour; red, green and blue go from 0 to 255"
                )
            elif tied.setdefault(one, name) != name:
                problems.append(f"{source}: the value {shown(one)} is '{tied[one]}' and '{name}'")
    if len({isinstance(value, tuple) for value in tied}) > 1:
        problems.append(f"{source}: some classes are tied to colours and others to ids; use one of them")
    if problems:
        raise ConfigError(problems)
    return NameList(source, (), tied)


def _values_of(text: str) -> Iterable[Value]:
    numbers = [int(n) for n in re.split("[,-]", text)]
    if "," in text:
        return [(numbers[0], numbers[1], numbers[2])]
    return range(min(numbers), min(max(numbers), 65535) + 1)


def names_beside(root: Path, values: Iterable[Value]) -> NameList | None:
    """Read the names from a file beside the data.

    Lines are names in the order of the ids; or an id and a name, or a name and a colour, in every line.

    Args:
        values: what the masks hold.
    """
    values = list(values)
    for file in NAME_FILES:
        try:
            text = read_text(root / file, MAX_BYTES, root=root)
        except UnreadableError:
            continue  # no list of names
        lines = [line.strip() for line in text.splitlines() if line.strip() and line.strip()[:2] != "//"]
        lines = [line for line in lines if not line.startswith("#")] or lines
        if not lines:
            continue
        coloured = _coloured(lines)
        if coloured and any(isinstance(v, tuple) for v in values):
            return NameList(file, (), coloured)
        numbered = {} if coloured else _numbered(lines)
        lines = list(coloured.values()) or lines
        if not numbered:
            return NameList(file, tuple(lines))
        missing = [v for v in values if isinstance(v, int) and v not in numbered and v not in (0, 255)]
        if missing:
            return NameList(
                file,
                fault=f"{file}: its lines are ids and names, but there is none for "
                f"{some([str(v) for v in missing], 8)}, which the masks hold; add these lines, or tie names to "
                "ids with --classes NAME=ID,...",
            )
        return NameList(file, (), numbered)
    return None


def _coloured(lines: Sequence[str]) -> dict[Value, str]:
    """Name and colour of every line; {} if the lines are something else. A heading may stand first."""
    found: dict[Value, str] = {}
    for number, line in enumerate(lines):
        last, first = _COLOUR_LAST.fullmatch(line), _COLOUR_FIRST.fullmatch(line)
        if last is None and first is None:
            if number == 0:
                continue
            return {}
        name, numbers = (
            (last[1], last.groups()[1:]) if last else (first[4], first.groups()[:3]) if first else ("", ())
        )
        colour = tuple(int(n) for n in numbers)
        if max(colour) > 255 or colour in found:
            return {}
        found[(colour[0], colour[1], colour[2])] = name.strip(" \"'")
    return found


def _numbered(lines: Sequence[str]) -> dict[Value, str]:
    """Id and name of every line; {} if the lines are something else."""
    for pattern, at, of in ((_ID_FIRST, 1, 2), (_ID_LAST, 2, 1)):
        matches = [pattern.fullmatch(line) for line in lines]
        found: dict[Value, str] = {int(m[at]): m[of].strip() for m in matches if m is not None}
        if len(found) == len(lines):
            return found
    return {}


def by_position(names: NameList, ids: Sequence[int], *, first: int | None = None) -> dict[Value, str]:
    """Find out which id each name of a list belongs to.

    Args:
        names: plain names.
        ids: what the masks hold, without void; ascending.
        first: id of the first name, if it is known.

    Raises:
        TwoReadingsError: several readings fit.
        ConfigError: none does.
    """
    given, count = names.names, len(names.names)
    by: dict[int, dict[Value, str]] = {
        start: {i + start: name for i, name in enumerate(given)} for start in (0, 1)
    }
    if first is not None:
        if first not in by or not {*ids} <= {0, *by[first]}:
            raise ConfigError(
                f"--names-from {first}: {names.source} holds {counted(count, 'name')}, but the masks hold the ids "
                f"{some([str(i) for i in ids], 12)}"
            )
        return by[first]
    named = names.source == "--classes"
    objects = [i for i in ids if i != 0]
    called = [i for i, name in enumerate(given) if is_background_name(name)]
    starts = bool(given) and (0 in called or is_void_name(given[0]) or spelling(given[0]) in _FIRSTS)
    fits0, fits1 = {*ids} <= {*by[0]}, {*objects} <= {*by[1]} and not (0 in ids and (called or starts))
    apart = not any(i < count for i in objects)
    readings: list[Reading] = []
    if fits0:
        readings.append(Reading(by[0], "--names-from 0", 0))
    if fits1 and not (named and 0 in ids and list(ids) == list(range(count))):
        readings.append(Reading(by[1], "--names-from 1", 1))
    if count == len(ids):
        # --classes that names every id means every id. A file's list is about ids, so its order counts only if nothing
        # else fits.
        order: dict[Value, str] = dict(zip(ids, given, strict=True))
        # In a file that does not name the background, one of the objects may not be drawn yet; and ids that are
        # lines of the file as well are no mere order.
        if named or (apart and not readings and (0 not in ids or called or starts)):
            readings.append(Reading(order, "--classes " + ",".join(f"{n}={i}" for i, n in order.items())))
    elif 0 in ids and count == len(objects) and not called and (named or (apart and not readings)):
        order = dict(zip(objects, given, strict=True))
        readings.append(Reading(order, "--classes " + ",".join(f"{n}={i}" for i, n in order.items())))
    different: list[Reading] = []
    for reading in readings:
        seen = [{i: r.of.get(i) for i in ids} for r in different]
        if {i: reading.of.get(i) for i in ids} not in seen:
            different.append(reading)
    if len(different) > 1:
        raise TwoReadingsError(names.source, given, ids, different)
    if not different:
        if called and 0 in ids and count == len(objects):
            raise ConfigError(
                f"{names.source}: {counted(count, 'name')} for {count + 1} values leave 0 to the background, but "
                f"'{given[called[0]]}' is among them; name all {count + 1} values in their order"
            )
        what = some([str(i) for i in objects], 12)
        file = "" if named else "; tie names to ids with --classes NAME=ID,..."
        raise ConfigError(
            f"{names.source}: {counted(count, 'name')} for {counted(len(objects), 'class')} ({what}){file}"
        )
    return dict(different[0].of)


def by_order(names: NameList, colours: Sequence[Value]) -> dict[Value, str]:
    """Name colours in the order of their red, green and blue; without a name for black, it is the background.

    Raises:
        ConfigError: another number of names.
    """
    objects = [c for c in colours if c != BLACK]
    given = names.names
    called = [name for name in given if is_background_name(name)]
    if len(given) == len(colours):
        return dict(zip(colours, given, strict=True))
    if len(given) == len(objects):
        if called:
            raise ConfigError(
                f"{names.source}: {counted(len(given), 'name')} for {counted(len(colours), 'value')} leave "
                f"{shown(BLACK)} to the background, "
                f"but '{called[0]}' is among them; name all {len(colours)} values in their order"
            )
        return dict(zip(objects, given, strict=True))
    what = some([shown(c) for c in objects], 12, "; ")
    raise ConfigError(
        f"{names.source}: {counted(len(given), 'name')} for {counted(len(objects), 'class')} ({what}); "
        f"--classes NAME={shown(objects[0])},... ties names to colours"
    )


def default_name(value: Value) -> str:
    """Name for a class that has none: its id or colour is part of it."""
    return (
        "colour_" + "_".join(map(str, value))
        if isinstance(value, tuple)
        else (BACKGROUND if value == 0 else f"class_{value}")
    )


def void_or(name: str) -> str:
    """The name, or `IGNORE_NAME` if it means pixels without annotation."""
    return IGNORE_NAME if is_void_name(name) else name
