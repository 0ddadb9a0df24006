"""The original authors' training runs, replayed in float64."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.golden_checks import EXACT, Row  # noqa: E402
from benchmarks.golden_mib import CASES, Case, replay, tags  # noqa: E402
from benchmarks.golden_replay import GROWTH, RATES, difference  # noqa: E402
from benchmarks.verification import ROUNDING, markdown, measure  # noqa: E402

from everseg.methods.ewc import EWC  # noqa: E402
from everseg.methods.ft import FineTuning  # noqa: E402
from everseg.methods.mib import MiB  # noqa: E402
from everseg.methods.pi import PI  # noqa: E402

FOLDER = ROOT.parent / "shared" / "golden"
TAGS = tags(FOLDER) if FOLDER.is_dir() else []


@pytest.mark.golden
@pytest.mark.parametrize("tag", TAGS)
def test_replay_agrees_with_the_original(golden, tag):
    differences = replay(golden, tag)
    wrong = {k: v for k, v in differences.items() if not v.largest <= ROUNDING.get(tag, {}).get(k, EXACT)}
    assert not wrong
    assert {
        "ce",
        "weight norms",
        "gradient norms",
        "final weights",
        "classifiers at the start",
    } <= differences.keys()


@pytest.mark.golden
@pytest.mark.parametrize("tag", TAGS)
def test_case_says_what_the_file_was_made_with(golden, tag):
    """The table of cases against the original's own options, stored in each file."""
    with np.load(golden / f"train_mib_{tag}.npz") as file:
        options = json.loads(str(file["step1/meta"]))["opts"]
    case = CASES[tag]
    values = dataclasses.asdict(case.method())
    assert options["task"] == case.task
    assert options["norm_act"] == case.norm
    assert options["lr_policy"] == case.train.schedule
    stored = {
        "loss_kd": "kd_weight", "loss_de": "feature_weight", "alpha": "alpha", "unce": "unbiased_ce",
        "unkd": "unbiased_kd", "init_balanced": "init_background", "bce": "bce", "reg_importance": "weight",
        "reg_iterations": "period", "icarl_importance": "importance", "icarl_bkg": "background_from_labels",
        "freeze": "freeze_encoder", "fix_bn": "freeze_norm",
    }  # fmt: skip
    for theirs, ours in stored.items():
        if ours in values:
            key = "reg_alpha" if theirs == "alpha" and "normalise" in values else theirs
            assert values[ours] == options[key], key
    if "normalise" in values:
        assert values["normalise"] is not options["reg_no_normalize"]
    if "form" in values:
        assert (values["form"] == "disjoint") is options["icarl_disjoint"]
    assert len(GROWTH[case.task]) >= 2


@pytest.mark.golden
def test_there_are_runs_to_replay(golden):
    assert len(tags(golden)) >= 13


@pytest.mark.golden
@pytest.mark.parametrize(
    ("tag", "wrong", "quantity"),
    [
        ("EWC", Case(lambda: EWC(alpha=0.1)), "statistic fisher"),
        ("MiB", Case(lambda: MiB(init_background=False)), "classifiers at the start"),
        ("MiB", Case(lambda: MiB(unbiased_kd=False)), "lkd"),
        ("FT", Case(FineTuning, train=RATES.model_copy(update={"nesterov": False})), "final weights"),
        ("PI", Case(lambda: PI(normalise=False)), "reg"),
    ],
)
def test_replay_notices_a_mistake(golden, monkeypatch, tag, wrong, quantity):
    monkeypatch.setitem(CASES, tag, wrong)
    assert not replay(golden, tag)[quantity].largest < 1e-5


def test_difference_is_relative_and_never_hides_a_nan():
    assert difference([1.0, 0.0], [1.0, 0.0]) == 0
    assert difference([2.0, 1.0], [4.0, 1.0]) == 0.5
    assert difference([1.0], [0.0]) == np.inf
    assert difference([np.nan], [1.0]) == np.inf
    assert difference([3.0, 0.1], [2.0, 0.0], 10.0) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="shapes differ"):
        difference([1.0], [1.0, 1.0])


def test_table_marks_what_is_above_its_limit():
    rows = [Row("a.npz", "ce", 3, 2e-9, 1e-8), Row("b.npz", "kd", 1, 2e-8, 1e-8), Row("c", "x", 1, 0.0, 0.0)]
    text = markdown(rows)
    assert "| a.npz | ce | 3 | 2.0e-09 | 1.0e-08 |" in text
    assert "| b.npz | kd | 1 | 2.0e-08 **above** | 1.0e-08 |" in text
    assert "3 quantities, 1 above their limit." in text


def test_folder_without_golden_files_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no golden file"):
        measure(tmp_path)
