"""Large inputs take no more than what is promised; at full size by `python tests/bounds.py 1`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bounds
import peak
from bounds import BOUNDS, Bound, Cost

pytestmark = pytest.mark.skipif(not peak.CLEAR.exists(), reason="memory is measured as Linux tells it")


def costs(*arguments: str) -> dict[str, Cost]:
    done = subprocess.run(
        [sys.executable, str(Path(bounds.__file__)), *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    return {one["name"]: Cost(**one) for one in map(json.loads, done.stdout.splitlines())}


def test_large_inputs_take_what_is_promised() -> None:
    """In a process of their own: what the tests before have left free would hide what an input takes."""
    found = costs("parts")
    assert found.keys() == BOUNDS.keys()
    assert {
        name: why for name, one in found.items() if (why := BOUNDS[name].broken(one, BOUNDS[name].part))
    } == {}


@pytest.mark.slow
def test_costs_grow_as_the_inputs_do() -> None:
    found = costs("parts", "4")
    for name, bound in BOUNDS.items():
        assert bound.broken(found[name], min(1.0, 4 * bound.part)) == "", name


@pytest.mark.parametrize("name", BOUNDS)
def test_the_part_that_is_tried_every_day_would_show_four_times_the_bound(name: str) -> None:
    bound = BOUNDS[name]
    seconds, megabytes = bound.allowed(bound.part)
    assert seconds <= 4 * bound.part * bound.seconds
    assert megabytes <= 4 * bound.part * bound.megabytes


def test_what_takes_too_long_or_too_much_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(folder: Path, scale: float):
        return lambda: np.ones(int(80e6 * scale), np.uint8).sum()

    def slow(folder: Path, scale: float):
        return lambda: [sum(range(10_000)) for _ in range(int(30_000 * scale))]

    for name, make, kind in (("hungry", hungry, " MB"), ("slow", slow, " s")):
        monkeypatch.setitem(BOUNDS, name, Bound(make, 0.2 if name == "slow" else 9, 20, 1 / 5))
        assert kind in BOUNDS[name].broken(bounds.cost(name, tmp_path, 0.2), 0.2)
