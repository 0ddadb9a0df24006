"""Training curves out of a journal."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from everseg.reports.figures import MOST_POINTS, curves_of, training_charts
from everseg.runs.journal import Journal


def written(path: Path, *entries: dict, tail: str = "") -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + tail)
    return path


def train(step: int, iteration: int, lr: float = 0.1, memory: float = 2.0**30, **terms: float) -> dict:
    return {"event": "train", "step": step, "iteration": iteration, "lr": lr, "grad_norm": 1.0, "memory": memory,
            "images_per_second": 10.0 * iteration, "terms": terms}  # fmt: skip


def test_steps_follow_one_another_with_a_gap_and_terms_have_their_sum(tmp_path: Path) -> None:
    path = written(
        tmp_path / "journal.jsonl",
        train(0, 10, ce=1.0), train(0, 20, lr=0.05, ce=0.5), {"event": "test", "step": 0, "iteration": 20},
        train(1, 10, memory=2.0**31, ce=0.25, kd=0.5), train(1, 30, ce=0.25, kd=0.25),
        tail='{"event": "train", "step": 1, "iter',
    )  # fmt: skip
    curves = curves_of(Journal(path).lines())
    assert curves is not None
    assert curves.starts == [(0, 0), (1, 20)]
    assert curves.terms == ["ce", "sum", "kd"]
    at, values = curves.series["loss/ce"]
    assert (at[:2], at[3:]) == ([10, 20], [30, 50])
    assert (values[:2], values[3:]) == ([1.0, 0.5], [0.25, 0.25])
    assert math.isnan(at[2])
    assert math.isnan(values[2])
    assert curves.series["loss/sum"] == ([30, 50], [0.75, 0.5])
    assert curves.speed[1, False] == {"iterations": 30, "images_per_second": 200.0, "memory": 2.0**31}
    assert not curves.averaged


def test_long_curves_are_averaged_without_losing_a_value(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random(3 * MOST_POINTS)
    entries = [train(0, i + 1, ce=float(v)) for i, v in enumerate(values)]
    curves = curves_of(Journal(written(tmp_path / "journal.jsonl", *entries)).lines())
    assert curves is not None
    assert curves.averaged
    assert len(curves.series["loss/ce"][1]) == MOST_POINTS
    assert np.mean(curves.series["loss/ce"][1]) == pytest.approx(values.mean())
    assert curves.series["loss/ce"][1][0] == pytest.approx(values[:3].mean())


def test_no_journal_no_curves(tmp_path: Path) -> None:
    assert curves_of(Journal(tmp_path / "journal.jsonl").lines()) is None
    path = written(tmp_path / "other.jsonl", {"event": "test", "step": 0}, tail="[]\nnull\n")
    assert curves_of(Journal(path).lines()) is None


def test_a_loss_term_has_the_same_colour_in_every_run_and_the_sum_is_grey(tmp_path: Path) -> None:
    def legend(*entries: dict) -> tuple[dict[str, str], str]:
        curves = curves_of(Journal(written(tmp_path / "journal.jsonl", *entries)).lines())
        assert curves is not None
        loss = training_charts(curves, "t")[0]
        return {name: colour for colour, name in loss.legend}, loss.caption

    first, caption = legend(train(0, 10, ce=1.0), train(1, 10, ce=0.5, kd=0.5))
    other, below = legend(train(0, 10, kd=-0.5, ce=0.5, extra=0.25))
    assert first["sum"] == other["sum"] == "var(--muted)"
    assert (first["ce"], first["kd"]) == (other["ce"], other["kd"])
    assert len(set(other.values())) == 4
    assert "below 0" in below
    assert "below 0" not in caption
