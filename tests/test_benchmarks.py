"""The benchmarks' own arithmetic; no test looks at a time."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.__main__ import PARTS  # noqa: E402
from benchmarks.common import Figure, in_turn, ratio, table, write_json  # noqa: E402


def test_a_figure_knows_whether_its_target_is_met():
    assert Figure("a", "b", 3.0, "x", 3).met is True
    assert Figure("a", "b", 2.9, "x", 3).met is False
    assert Figure("a", "b", 2.9, "ms", 3, "lower").met is True
    assert Figure("a", "b", 2.9, "ms").met is None


def test_ways_take_turns_and_the_ratio_is_by_rounds():
    calls: list[str] = []
    seconds = in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, warm=1)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]
    assert ratio({"slow": [2.0, 9.0, 40.0], "fast": [1.0, 3.0, 4.0]}, "slow", "fast") == 3.0


def test_the_table_and_the_file_hold_every_figure(tmp_path):
    found = [
        Figure("losses", "time", 5.1, "x", 3, note="a, b"),
        Figure("data", "sample", 7.0, "ms", 6, "lower"),
    ]
    lines = table(found).splitlines()
    assert [line.split()[0] for line in lines] == ["part", "losses", "data"]
    assert ">= 3 x" in lines[1]
    assert "yes" in lines[1]
    assert "<= 6 ms  NO" in lines[2]
    write_json(found, tmp_path / "out.json")
    stored = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert [one["met"] for one in stored] == [True, False]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_can_be_asked_for_its_figures(part):
    figures = importlib.import_module(f"benchmarks.{part}").figures
    assert next(iter(inspect.signature(figures).parameters)) == "quick"
