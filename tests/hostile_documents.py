"""Hostile forms of a JSON document: made when a test runs, from the honest document."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WRONG: tuple[Any, ...] = (
    None, True, -1, 2**60, 0.5, float("nan"), float("inf"), "", "x", "../../etc/passwd", [], ["x"], [[]], [None], {},
    {"x": 1}, {"base": "evil.yaml"},
)  # fmt: skip
"""What may stand in the place of a value."""

NO_DOCUMENT: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[1]",
    "a number": b"3",
    "null": b"null",
    "a text": b'"x"',
    "no text": b"\xff\xfe\x00",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "lists in lists": b"[" * 100_000,
    "levels": b'{"a":' * 200 + b"1" + b"}" * 200,
    "a key twice": b'{"steps": [], "steps": []}',
    "a huge number": b'{"threads": ' + b"9" * 5000 + b"}",
    "one megabyte of lists": b"[" + b"[]," * 330_000 + b"[]]",
    "no keys": b"{}",
}
"""Files that are no document at all."""


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place in a document, of lists only the first and the last item."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for number in sorted({0, len(value) - 1} if value else ()):
            yield from places(value[number], (*path, number))


def changed(document: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """The document with another value in a place."""
    whole = copy.deepcopy(document)
    place = whole
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = copy.deepcopy(value)
    return whole


def without(document: Any, path: tuple[str | int, ...]) -> Any:
    """The document without a place."""
    whole = copy.deepcopy(document)
    place = whole
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return whole


def variants(document: Any) -> Iterator[tuple[str, Any]]:
    """Every place of a document taken out, and with each of WRONG in it."""
    for path in places(document):
        shown = ".".join(map(str, path))
        yield f"{shown} missing", without(document, path)
        for value in WRONG:
            yield f"{shown} = {json.dumps(value)[:30]}", changed(document, path, value)


def flips(path: Path) -> Iterator[tuple[int, bytes]]:
    """The file with each one of its bits turned."""
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        yield bit, bytes(data)


def special_files(path: Path, outside: Path) -> dict[str, Callable[[], object]]:
    """Ways to replace a file by something that is none: each puts it into the place of `path`."""
    import os

    def put(make: Callable[[], object]) -> Callable[[], object]:
        def do() -> None:
            path.unlink(missing_ok=True)
            make()

        return do

    return {
        "a FIFO": put(lambda: os.mkfifo(path)),
        "a folder": put(path.mkdir),
        "a link out": put(lambda: path.symlink_to(outside)),
        "a link to a device": put(lambda: path.symlink_to("/dev/zero")),
        "a link to itself": put(lambda: path.symlink_to(path)),
        "a link to nothing": put(lambda: path.symlink_to(path.with_name("gone"))),
    }
