"""Inputs that are large: seconds and memory, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from campaigns import Trial, campaign

import bounds


@campaign("large inputs", everyday=0, long=len(bounds.BOUNDS))
def large_inputs(place: Path, number: int) -> Iterator[Trial]:
    """One input of millions of lines, keys, names or objects takes the seconds and the memory that are promised."""
    for name, bound in list(bounds.BOUNDS.items())[:number]:
        done = subprocess.run(
            [sys.executable, str(bounds.__file__), "1", name], capture_output=True, text=True, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(place)},
        )  # fmt: skip
        problem = done.stderr[-500:] if done.returncode else ""
        taken = ""
        if not problem:
            one = bounds.Cost(**json.loads(done.stdout))
            taken, problem = f": {one.seconds:.0f} s, {one.megabytes:.0f} MB", bound.broken(one, 1.0)
        yield Trial(f"{bound.make.__doc__ or name}{taken}", problem)
