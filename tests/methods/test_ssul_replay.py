"""The original authors' numbers of SSUL, with and without memory: functions and training runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks import golden_ssul  # noqa: E402
from benchmarks.golden_checks import EXACT  # noqa: E402
from benchmarks.golden_ssul import check_ssul, replay_ssul  # noqa: E402

FOLDER = ROOT.parent / "shared" / "golden"
STEMS = sorted(path.stem for path in FOLDER.glob("train_ssul*.npz"))
pytestmark = pytest.mark.golden


@pytest.mark.parametrize("stem", STEMS)
def test_replay_agrees_with_the_original(golden, stem):
    found = replay_ssul(golden, stem)
    assert not {name: entry for name, entry in found.items() if not entry.largest <= EXACT}
    quantities = {"labels", "targets", "loss", "learning rate", "gradient norms", "final weights", "logits"}
    quantities |= {"weights at the start", "confusion counts"}
    if "ssulm" in stem:
        quantities |= {"labels of the memory", "memory"}
    assert quantities <= found.keys()


def test_functions_agree_with_the_original(golden):
    rows = check_ssul(golden)
    assert not [row for row in rows if not row.difference <= row.limit]
    assert {"BCE, gradient", "BCE in bands", "lr_warm_poly", "readout"} <= {row.quantity for row in rows}


@pytest.mark.parametrize(
    ("stem", "wrong", "quantity"),
    [
        ("train_ssul_A", {"background_rate": 1.0}, "final weights"),
        ("train_ssul_A", {"threshold": 0.99}, "targets"),
        ("train_ssul_A", {"unknown": "none"}, "loss"),
        ("train_ssulm_A", {"memory_offset": "fixed"}, "loss"),
    ],
)
def test_a_wrong_rule_shows(golden, monkeypatch, stem, wrong, quantity):
    """Negative controls of the specification."""
    right = golden_ssul.SSUL

    def other(**options):
        return right(**(options | wrong))

    monkeypatch.setattr(golden_ssul, "SSUL", other)
    assert replay_ssul(golden, stem)[quantity].largest > 1e-3
