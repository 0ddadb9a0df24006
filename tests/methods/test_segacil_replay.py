"""The original authors' numbers of SegACIL, DFT and DFT*: functions and training runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks import golden_dft, golden_segacil  # noqa: E402
from benchmarks.golden_checks import EXACT  # noqa: E402

from everseg.methods.acil import ACIL  # noqa: E402
from everseg.methods.dft import DFTStar  # noqa: E402

FOLDER = ROOT.parent / "shared" / "golden"
ACIL_STEMS, DFT_STEMS = (sorted(p.stem for p in FOLDER.glob(f"train_{n}*.npz")) for n in ("segacil", "dft"))
pytestmark = pytest.mark.golden


def above(stem: str, found: dict, limit=lambda folder, stem, quantity: EXACT) -> dict:
    return {name: entry for name, entry in found.items() if not entry.largest <= limit(FOLDER, stem, name)}


@pytest.mark.parametrize("stem", ACIL_STEMS)
def test_replay_of_segacil_agrees_with_the_original(golden, stem):
    found = golden_segacil.replay_segacil(golden, stem)
    assert not above(stem, found, golden_segacil.limit_segacil)
    assert {"labels", "labels that are fitted", "loss", "weights of the first step", "random features",
            "classifier after each batch", "inverse after each batch", "confusion counts"} <= found.keys()  # fmt: skip


def test_the_recursion_agrees_with_the_original(golden):
    rows = golden_segacil.check_segacil(golden)
    assert not [row for row in rows if not row.difference <= row.limit]
    assert {"rls, inverse", "rls, weights", "rls_bias, weights", "arm, weights"} <= {
        row.quantity for row in rows
    }


@pytest.mark.parametrize("stem", DFT_STEMS)
def test_replay_of_dft_agrees_with_the_original(golden, stem):
    found = golden_dft.replay_dft(golden, stem)
    assert not above(stem, found)
    assert {"weights at the start", "what is trained", "learning rate", "ce", "gradient norms", "final weights",
            "logits of the test images"} <= found.keys()  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "quantity"),
    [
        ({"teacher": "frozen"}, "labels that are fitted"),
        ({"gamma": 0.02}, "classifier after each batch"),
        ({"bce": False}, "loss"),
        ({"encoder_rate": 1.0}, "weights of the first step"),
    ],
)
def test_other_settings_of_acil_differ(golden, monkeypatch, wrong, quantity):
    monkeypatch.setattr(golden_segacil, "ACIL", lambda **options: ACIL(**options | wrong))
    found = golden_segacil.replay_segacil(golden, "train_segacil_A")
    assert found[quantity].largest > 1e-4


@pytest.mark.parametrize(
    ("wrong", "quantity"),
    [
        ({"future": "fixed"}, "what is trained"),
        ({"old_classifiers": "trained"}, "final weights"),
        ({"network": "trained"}, "final weights"),
    ],
)
def test_other_settings_of_dft_star_differ(golden, monkeypatch, wrong, quantity):
    monkeypatch.setattr(golden_dft, "DFTStar", lambda **options: DFTStar(**options | wrong))
    found = golden_dft.replay_dft(golden, "train_dftstar_A")
    assert found[quantity].largest > 1e-4
