"""A strict reader of small YAML files: YAML 1.2 scalars, every fault with file:line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml import events

from everseg.errors import ConfigError
from everseg.files import UnreadableError, read_regular

MAX_BYTES = 1_000_000
MAX_DEPTH = 20

FullKey = tuple[str | int, ...]
"""A key with the keys of all sections around it, outermost first: ("data", "root"), ("scenario", "steps", 0)."""

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
    ".nan": float("nan"), ".inf": float("inf"), "+.inf": float("inf"), "-.inf": float("-inf"),
}  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """Where a value was written, and how."""

    where: str
    """"file:line", or "" for the command line."""
    text: str | None = None
    """The text of a plain scalar: what a field of type str gets (`task: 50`)."""


@dataclass
class Parsed:
    """A YAML document with the place of each of its values."""

    value: Any
    origins: dict[FullKey, Origin] = field(default_factory=dict)


def scalar(text: str) -> Any:
    """Read an unquoted scalar as YAML 1.2 does: null, true, false, numbers (1e-3 too), else text.

    `on`, `off`, `yes`, `no`, dates and `1_000` stay text. Numbers of more than 4000 digits stay text as well.
    """
    if text in _WORDS:
        return _WORDS[text]
    if len(text) <= 4000:  # Python refuses to convert whole numbers of more than 4300 digits
        if _INT.fullmatch(text):
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        if _FLOAT.fullmatch(text):
            return float(text)
    return text


def read(path: Path) -> Parsed:
    """Read a YAML file.

    Raises:
        ConfigError: missing, not a regular file, too large, not UTF-8, or not strict YAML.
    """
    try:
        if not path.is_file():
            looked = "" if path.is_absolute() else f" (looked in {Path.cwd()})"
            kind = "a folder, not a file" if path.is_dir() else "not a file"
            raise ConfigError(f"{path}: {kind if path.exists() else f'no such file{looked}'}")
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(
                f"{path}: larger than {MAX_BYTES // 1000} kB, which no configuration is; name the right file"
            )
        data = read_regular(path, MAX_BYTES)
    except (OSError, ValueError, UnreadableError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
    return parse(text, str(path))


def parse(text: str, where: str, *, quick: bool = False) -> Parsed:
    """Read one YAML document.

    Refused: duplicate keys, anchors and aliases, tags, a second document, nesting deeper than 20, keys other than
    text and whole numbers.

    Args:
        where: name of the file for messages.
        quick: let the C library read, if there is one: ten times as fast, with other words for faults of syntax.

    Raises:
        ConfigError: with "where:line".
    """
    # Events, not values: PyYAML's own constructors follow YAML 1.1 and forget where a value stood.
    builder = _Builder(where)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader) if quick else yaml.SafeLoader
    try:
        for event in yaml.parse(text.removeprefix("\ufeff"), Loader=loader):
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = error.problem or "not YAML"
        if "'\\t'" in problem or (mark is not None and _tab_at(text, mark.line)):
            problem = "a tab in the indentation; YAML allows spaces only"
        raise ConfigError(f"{where}:{line}: {problem}") from None
    except yaml.YAMLError as error:
        position = getattr(error, "position", 0)
        line = text[:position].count("\n") + 1 if isinstance(position, int) else 1
        raise ConfigError(f"{where}:{line}: a character that is not allowed in YAML") from None
    except (ValueError, OverflowError) as error:  # "\UFFFFFFFF" and the like
        raise ConfigError(f"{where}: not YAML: {error}") from None
    return Parsed(builder.result, builder.origins)


def _tab_at(text: str, line: int) -> bool:
    lines = text.splitlines()
    near = lines[max(0, line - 1) : line + 1]
    return any("\t" in row[: len(row) - len(row.lstrip())] for row in near)


@dataclass
class _Open:
    """A mapping or sequence whose end has not been read yet."""

    value: dict[str | int, Any] | list[Any]
    key: str | int | None = None
    key_line: int = 0


class _Builder:
    """Turns parser events into plain values without recursion."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.result: Any = None
        self.origins: dict[FullKey, Origin] = {}
        self._stack: list[_Open] = []
        self._documents = 0

    def take(self, event: events.Event) -> None:
        line = event.start_mark.line + 1 if event.start_mark is not None else 1
        if isinstance(event, events.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                self._refuse(line, "a second document ('---'); write one configuration per file")
        if isinstance(event, events.AliasEvent) or getattr(event, "anchor", None):
            self._refuse(line, "anchors and aliases (& and *) are not allowed; write the value out")
        if getattr(event, "tag", None):
            self._refuse(line, f"tag '{event.tag}' is not allowed; write plain values")  # type: ignore[attr-defined]
        if isinstance(event, events.ScalarEvent):
            self._scalar(event, line)
        elif isinstance(event, (events.MappingStartEvent, events.SequenceStartEvent)):
            if len(self._stack) >= MAX_DEPTH:
                self._refuse(line, f"nested deeper than {MAX_DEPTH} levels")
            new: dict | list = {} if isinstance(event, events.MappingStartEvent) else []
            self._add(new, line, None)
            self._stack.append(_Open(new))
        elif isinstance(event, (events.MappingEndEvent, events.SequenceEndEvent)):
            self._stack.pop()

    def _scalar(self, event: events.ScalarEvent, line: int) -> None:
        plain = event.implicit[0]
        value = scalar(event.value) if plain else event.value
        try:
            event.value.encode()
        except UnicodeEncodeError:
            self._refuse(line, "half of a surrogate pair in a text")
        self._add(value, line, event.value if plain else None)

    def _add(self, value: Any, line: int, text: str | None) -> None:
        if not self._stack:
            self.result = value
            self.origins[()] = Origin(f"{self.where}:{line}", text)
            return
        top = self._stack[-1]
        if isinstance(top.value, list):
            top.value.append(value)
            self._record(line, text, len(top.value) - 1)
        elif top.key is None:
            self._key(top, value, line)
        else:
            top.value[top.key] = value
            self._record(top.key_line, text, top.key)
            top.key = None

    def _key(self, top: _Open, value: Any, line: int) -> None:
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            self._refuse(line, "a key must be a text or a whole number")
        if value in top.value:
            self._refuse(line, f"key '{value}' is written twice")
        top.key, top.key_line = value, line

    def _record(self, line: int, text: str | None, last: str | int) -> None:
        parents: list[str | int] = []
        for level in self._stack[:-1]:
            parents.append(len(level.value) - 1 if isinstance(level.value, list) else _last_key(level.value))
        self.origins[(*parents, last)] = Origin(f"{self.where}:{line}", text)

    def _refuse(self, line: int, problem: str) -> NoReturn:
        raise ConfigError(f"{self.where}:{line}: {problem}")


def _last_key(mapping: dict[str | int, Any]) -> str | int:
    return next(reversed(mapping))
