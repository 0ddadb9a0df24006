"""Shapes of stored documents: what must stand under each key, so that a reader need not ask again.

A shape is a function that looks at a value and adds what is wrong with it to a list. Keys that a shape does not name
may stand there too: a later everseg may have written them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Shape = Callable[[Any, str, list[str]], None]
"""Called with a value, its key ("steps[0].train") and the list of problems."""


def problems_of(value: Any, shape: Shape) -> list[str]:
    """List what is wrong with a value, each problem beginning with its key."""
    found: list[str] = []
    shape(value, "", found)
    return found


def one(expected: str, is_good: Callable[[Any], bool]) -> Shape:
    """A value without parts."""

    def check(value: Any, key: str, problems: list[str]) -> None:
        if not is_good(value):
            problems.append(f"{key or 'the file'}: expected {expected}")

    return check


def is_count(value: Any) -> bool:
    """Tell whether a value is a whole number from 0 that other programs can read too."""
    return type(value) is int and 0 <= value < 2**53


TEXT = one("a text", lambda value: isinstance(value, str))
FLAG = one("true or false", lambda value: isinstance(value, bool))
COUNT = one("a whole number from 0", is_count)
WHOLE = one("a whole number", lambda value: type(value) is int and abs(value) < 2**53)
NUMBER = one(
    "a number",
    lambda value: (
        (type(value) is float and not math.isinf(value)) or (type(value) is int and abs(value) < 2**53)
    ),
)
SHA256 = one("a SHA-256", lambda value: isinstance(value, str) and len(value) == 64)


def or_none(shape: Shape) -> Shape:
    """The value, or null."""

    def check(value: Any, key: str, problems: list[str]) -> None:
        if value is not None:
            shape(value, key, problems)

    return check


def many(shape: Shape) -> Shape:
    """A list of such values."""

    def check(value: Any, key: str, problems: list[str]) -> None:
        if not isinstance(value, list):
            problems.append(f"{key or 'the file'}: expected a list")
            return
        for place, item in enumerate(value):
            shape(item, f"{key}[{place}]", problems)

    return check


def named(shape: Shape) -> Shape:
    """Such values by name."""

    def check(value: Any, key: str, problems: list[str]) -> None:
        if not isinstance(value, dict):
            problems.append(f"{key or 'the file'}: expected values by name")
            return
        for name, item in value.items():
            shape(item, _below(key, name), problems)

    return check


def entries(needed: Mapping[str, Shape], optional: Mapping[str, Shape] | None = None) -> Shape:
    """A mapping with these keys."""

    def check(value: Any, key: str, problems: list[str]) -> None:
        if not isinstance(value, dict):
            problems.append(f"{key or 'the file'}: expected keys and values")
            return
        for name, shape in needed.items():
            if name in value:
                shape(value[name], _below(key, name), problems)
            else:
                problems.append(f"{_below(key, name)}: missing")
        for name, shape in (optional or {}).items():
            if name in value:
                shape(value[name], _below(key, name), problems)

    return check


def _below(key: str, name: str) -> str:
    return f"{key}.{name[:60]}" if key else name[:60]
