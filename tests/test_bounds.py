"""Large inputs take no more than what is promised; at full size by `python tests/bounds.py 1`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bounds import BOUNDS

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux tells it"
)


def costs(scale: float) -> dict[str, dict[str, float]]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("bounds.py")), str(scale)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    return {one["name"]: one for one in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("scale", [0.002, pytest.param(0.02, marks=pytest.mark.slow)])
def test_large_inputs_take_what_is_promised(scale: float) -> None:
    """All costs grow as the input does, so that a part of it may take that part of the bound, and a little."""
    found = costs(scale)
    assert found.keys() == BOUNDS.keys()
    for name, one in found.items():
        bound = BOUNDS[name]
        assert one["seconds"] < 1 + 2 * scale * bound.seconds, one
        assert one["megabytes"] < 30 + scale * bound.megabytes, one
