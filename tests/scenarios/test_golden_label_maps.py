"""Label policies against the original data classes of PLOP's, MiB's and SDR's code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks import golden_labels  # noqa: E402


@pytest.mark.golden
def test_every_case_sees_the_same_images_and_labels(golden):
    rows = golden_labels.check_label_maps(golden / "label_maps.json")
    assert {row.quantity.split(":")[0] for row in rows} >= {"PLOP", "SDR"}
    assert all(row.count == 40 and row.difference == 0 for row in rows), rows


@pytest.mark.golden
@pytest.mark.parametrize("family", ["PLOP", "SDR"])
def test_the_other_familys_policy_is_noticed(golden, monkeypatch, family):
    monkeypatch.setitem(golden_labels.POLICIES, family, "mib" if family == "PLOP" else "plop")
    rows = golden_labels.check_label_maps(golden / "label_maps.json")
    wrong = {row.quantity for row in rows if row.difference > 0}
    assert wrong == {f"{family}: label tables"}
