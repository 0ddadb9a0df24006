"""What the benchmarks share: figures, and times taken in turn so that a busy machine slows all ways alike."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class Figure:
    """One measured number."""

    part: str
    """Benchmark it comes from."""
    what: str
    """What was measured, with sizes and threads."""
    value: float
    unit: str
    """"x" for a ratio, else "ms", "s", "MB", "%" ..."""
    target: float | None = None
    """What was asked for, in the same unit."""
    better: Literal["higher", "lower"] = "higher"
    """Which side of the target is good."""
    note: str = ""
    """The numbers behind a ratio."""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without target."""
        if self.target is None:
            return None
        return self.value >= self.target if self.better == "higher" else self.value <= self.target

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def in_turn(
    ways: Mapping[str, Callable[[], object]], repeat: int, *, warm: int = 1
) -> dict[str, list[float]]:
    """Seconds of every way, `repeat` times, one after the other in each round; `warm` rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(warm + repeat):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number >= warm:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """How many times faster `fast` is: the median over rounds of the two times' ratio."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def medians(seconds: Mapping[str, list[float]], scale: float = 1e3, digits: int = 1, unit: str = "ms") -> str:
    """The ways' median times as text, for a figure's note."""
    return ", ".join(
        f"{name} {statistics.median(values) * scale:.{digits}f} {unit}" for name, values in seconds.items()
    )


def table(figures: list[Figure]) -> str:
    """Figures as aligned text."""
    rows = [("part", "what", "value", "target", "met", "")]
    for figure in figures:
        sign = ">=" if figure.better == "higher" else "<="
        target = "" if figure.target is None else f"{sign} {figure.target:g} {figure.unit}"
        met = {None: "", True: "yes", False: "NO"}[figure.met]
        rows.append((figure.part, figure.what, f"{figure.value:.3g} {figure.unit}", target, met, figure.note))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip()
        for row in rows
    )


def main(figures: Callable[..., list[Figure]], parser: argparse.ArgumentParser) -> None:
    """Run a benchmark's `figures` from the command line; the parser's own arguments become its options."""
    parser.add_argument(
        "--quick", action="store_true", help="few rounds of small sizes, to try the benchmark itself"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = vars(parser.parse_args())
    target = options.pop("json")
    found = figures(**options)
    sys.stdout.write(table(found) + "\n")
    if target:
        write_json(found, target)


def write_json(found: list[Figure], target: Path) -> None:
    """Write figures with what they were measured on."""
    document = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "figures": [figure.to_json() for figure in found],
    }
    target.write_text(json.dumps(document, indent=1) + "\n")
