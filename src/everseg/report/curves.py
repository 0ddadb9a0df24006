"""Training curves out of a run's journal (floor 6)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

MOST_POINTS = 300
"""Curves with more are averaged, each step into its share of so many pieces of equal length."""
_GAP = (float("nan"), float("nan"))


@dataclass(frozen=True)
class Curves:
    """Values over the iterations of all steps, one after the other."""

    series: dict[str, tuple[list[float], list[float]]]
    """Name -> (iteration, value), NaN between two steps; "loss/NAME" (weights applied), "lr", "grad_norm"."""
    starts: list[tuple[int, int]]
    """(step, first iteration)."""
    speed: dict[int, dict[str, float]] = field(default_factory=dict)
    """Step -> iterations, images_per_second (median) and memory (largest, bytes)."""
    averaged: bool = False

    @property
    def terms(self) -> list[str]:
        return [name.removeprefix("loss/") for name in self.series if name.startswith("loss/")]


def read_curves(path: Path) -> Curves | None:
    """Read `journal.jsonl`; None where nothing was logged. Half-written lines are passed over."""
    lines: dict[int, list[dict[str, Any]]] = {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            if entry["event"] == "train" and isinstance(entry["iteration"], int):
                lines.setdefault(int(entry["step"]), []).append(entry)
        except (ValueError, KeyError, TypeError):
            continue
    if not lines:
        return None
    points: dict[str, list[list[tuple[float, float]]]] = {}
    starts, speed, offset = [], {}, 0
    for step in sorted(lines):
        starts.append((step, offset))
        mine: dict[str, list[tuple[float, float]]] = {}
        for entry in lines[step]:
            for name, value in _values(entry):
                mine.setdefault(name, []).append((offset + entry["iteration"], value))
        for name, found in mine.items():
            points.setdefault(name, []).append(found)
        speed[step] = _speed(lines[step])
        offset += max(entry["iteration"] for entry in lines[step])
    series = {name: _thinned(found) for name, found in points.items()}
    averaged = any(sum(map(len, found)) > MOST_POINTS for found in points.values())
    return Curves(series, starts, speed, averaged)


def _values(entry: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    terms = {k: v for k, v in (entry.get("terms") or {}).items() if isinstance(v, int | float)}
    if len(terms) > 1:
        yield "loss/sum", float(sum(terms.values()))
    yield from ((f"loss/{name}", float(value)) for name, value in terms.items())
    for name in ("lr", "grad_norm"):
        if isinstance(entry.get(name), int | float):
            yield name, float(entry[name])


def _speed(entries: list[dict[str, Any]]) -> dict[str, float]:
    images = [e["images_per_second"] for e in entries if isinstance(e.get("images_per_second"), int | float)]
    memory = [e["memory"] for e in entries if isinstance(e.get("memory"), int | float)]
    return {
        "iterations": max(e["iteration"] for e in entries),
        "images_per_second": float(np.median(images)) if images else 0.0,
        "memory": float(max(memory, default=0)),
    }


def _thinned(steps: list[list[tuple[float, float]]]) -> tuple[list[float], list[float]]:
    """About MOST_POINTS means of neighbours, none across two steps; no value is left out."""
    share = min(1.0, MOST_POINTS / sum(map(len, steps)))
    kept: list[tuple[float, float]] = []
    for points in steps:
        pieces = np.array_split(np.array(points, dtype=np.float64), max(1, round(share * len(points))))
        kept += [
            *([_GAP] if kept else []),
            *((float(x), float(y)) for x, y in (p.mean(axis=0) for p in pieces)),
        ]
    return [x for x, _ in kept], [y for _, y in kept]
