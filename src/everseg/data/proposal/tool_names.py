"""Read the names of classes from the files that labelling tools write beside their masks."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from everseg.data.datasets import segments
from everseg.data.mask_values import Value
from everseg.data.proposal.naming import NameList
from everseg.files import UnreadableError, json_of, read_regular, read_text
from everseg.labels import spelling

TABLES = ("_classes.csv", "class_mapping.csv")
"""Roboflow's, one in each split's folder ("Pixel Value, Class"), and V7's (class_name, class_color)."""
COLOURS = ("obj_class_to_machine_color.json",)
"""Supervisely's."""
IDS = ("id2label.json",)
"""What the `transformers` library writes: id -> name."""
RELEASE = "a release of Segments.ai"
DEPTH = 2


def tool_names(root: Path, values: Iterable[Value]) -> NameList | None:
    """Find the names that a tool's file gives to ids or colours; None without such a file.

    Args:
        root: the folder; files up to two folders deeper count.
        values: what the masks hold: ids or colours.
    """
    by_colour = any(isinstance(value, tuple) for value in values)
    tied: dict[Value, str] = {}
    sources: list[str] = []
    for name in (*TABLES, *COLOURS, *IDS, RELEASE):
        files = sorted(f for depth in range(DEPTH + 1) for f in root.glob("*/" * depth + name))
        for file in segments.find_releases(root) if name == RELEASE else files:
            rows = _table(file) if name in TABLES else _json(file)
            shown = file.relative_to(root).as_posix()
            for value, text in rows.items():
                key = _of_kind(value, by_colour)
                if key is None:
                    continue
                if key in tied and spelling(tied[key]) != spelling(text):
                    fault = f"{shown} calls {key} '{text}', but {sources[-1]} calls it '{tied[key]}'; export again"
                    return NameList(shown, fault=fault)
                tied[key] = text
            if rows:
                sources.append(shown)
    return NameList(sources[0], (), tied) if tied else None


def _of_kind(value: Value, by_colour: bool) -> Value | None:
    """A grey colour stands for the id of its brightness where masks hold ids, and the other way round."""
    if isinstance(value, tuple) and not by_colour:
        return value[0] if len(set(value)) == 1 else None
    if isinstance(value, int) and by_colour:
        return (value, value, value) if value <= 255 else None
    return value


def _value(text: str) -> Value | None:
    numbers = [int(n) for n in re.findall(r"\d+", text)] if re.fullmatch(r"[\d\s,;()\[\]]+", text) else []
    if len(numbers) == 1:
        return numbers[0]
    return (numbers[0], numbers[1], numbers[2]) if len(numbers) == 3 and max(numbers) <= 255 else None


def _table(file: Path) -> dict[Value, str]:
    """Two columns, of which one is a number or a colour in every line but the first."""
    try:
        rows = [
            [cell.strip() for cell in row[:2]]
            for row in csv.reader(read_text(file).splitlines(), skipinitialspace=True)
            if len(row) >= 2
        ]
    except (UnreadableError, csv.Error):
        return {}
    rows = [row for number, row in enumerate(rows) if number or any(_value(cell) is not None for cell in row)]
    for at in (0, 1):
        values = [_value(row[at]) for row in rows]
        if rows and None not in values:
            return {value: row[1 - at] for value, row in zip(values, rows, strict=True) if value is not None}
    return {}


def _json(file: Path) -> dict[Value, str]:
    """Name -> [red, green, blue], or id -> name."""
    try:
        if file.name not in (*COLOURS, *IDS):
            return dict(segments.category_names(file))
        content: Any = json_of(read_regular(file))
        if file.name in IDS:
            return {int(key): str(name) for key, name in content.items()}
        return {(int(c[0]), int(c[1]), int(c[2])): str(name) for name, c in content.items()}
    except (UnreadableError, ValueError, AttributeError, TypeError, IndexError):
        return {}
