"""How long commands take to answer: `python -m benchmarks.startup [--quick] [--json FILE]`.

Whole processes, warm (files in memory, bytecode compiled, class index cached), one after the other in each round. The
time is the least of all rounds: what the command costs where nothing disturbs it; the median stands beside it.
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

COMMANDS = (
    "--help",
    "list presets",
    "list methods",
    "show voc-15-5-mib",
    "show cs-bdd-idd-mdil",
    "show demo-mib",
)
FLOOR = """
import typer
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
@app.command()
def show(name: str):
    import yaml
    from pydantic import BaseModel
    from rich.console import Console
    from rich.table import Table
    class Settings(BaseModel):
        name: str
    table = Table("name")
    table.add_row(Settings(name=name).name)
    Console().print(table)
app(["preset"])
"""
"""The smallest program of the same libraries: a typer command, a pydantic model and a rich table of one row."""


def figures(quick: bool = False) -> list[Figure]:
    """Wall time of each command and of `import everseg`, and of what is below them."""
    call = "from everseg.cli.main import main; main({!r})"
    codes = {f"everseg {line}": call.format(line.split()) for line in COMMANDS}
    codes |= {"import everseg": "import everseg", "python": "pass", "floor: the same libraries": FLOOR}
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "EVERSEG_CACHE": cache,
            "PYTHONPATH": str(Path(everseg.__file__).resolve().parents[1]),
        }
        ways = {name: _process(code, environment) for name, code in codes.items()}
        seconds = in_turn(ways, 2 if quick else 9)
    return [
        Figure(
            "start-up",
            name,
            min(times),
            "s",
            {"import everseg": 0.2}.get(name, 0.3 if name.startswith("everseg") else None),
            "lower",
            f"median {statistics.median(times):.3f} s of {len(times)}",
        )
        for name, times in seconds.items()
    ]


def _process(code: str, environment: dict[str, str]) -> Callable[[], object]:
    return lambda: subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=environment
    )


if __name__ == "__main__":
    main(figures, argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]))
