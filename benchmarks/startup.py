"""How long commands take to answer: `python -m benchmarks.startup [--quick] [--json FILE]`.

Whole processes, warm (files in memory, bytecode compiled, class index cached), one after the other in each round. A
figure is the least time of all rounds: what the command costs where nothing disturbs it; the median stands beside it.
Of commands it is the time over that of a bare interpreter (`python -c pass`), which is no doing of everseg.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import everseg
from benchmarks.common import Figure, in_turn, main

BARE = "python -c pass"
COMMANDS = {
    "--help": 0.3, "list methods": 0.5, "list presets": 0.5, "list tasks": 0.5, "list policies": 0.5, "docs": 0.5,
    "show voc-15-5-mib": None,
}  # fmt: skip
"""Command -> seconds over a bare interpreter that it may take; None for those that import torch."""
FLOOR = """
import typer
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
@app.command()
def show(name: str):
    print(name)
app(["preset"])
"""
"""The smallest program of the same library: a typer command that prints one line."""


def figures(quick: bool = False) -> list[Figure]:
    """Wall time of each command and of `import everseg` over a bare interpreter's, and of the smallest command line."""
    call = "from everseg.cli.main import main; main({!r})"
    codes = {f"everseg {line}": call.format(line.split()) for line in COMMANDS}
    codes |= {"import everseg": "import everseg", "the smallest command line": FLOOR, BARE: "pass"}
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "EVERSEG_CACHE": cache,
            "PYTHONPATH": str(Path(everseg.__file__).resolve().parents[1]),
        }
        ways = {name: _process(code, environment) for name, code in codes.items()}
        seconds = in_turn(ways, 2 if quick else 9)
    bare = min(seconds[BARE])
    bounds = {"import everseg": 0.2, **{f"everseg {line}": bound for line, bound in COMMANDS.items()}}
    return [
        Figure(
            "start-up",
            name if name == BARE else f"{name}, over {BARE}",
            min(times) - (0 if name == BARE else bare),
            "s",
            bounds.get(name),
            "lower",
            f"median of the whole process {statistics.median(times):.3f} s of {len(times)}",
        )
        for name, times in seconds.items()
    ]


def _process(code: str, environment: dict[str, str]) -> Callable[[], object]:
    return lambda: subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=environment
    )


if __name__ == "__main__":
    main(figures, argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]))
