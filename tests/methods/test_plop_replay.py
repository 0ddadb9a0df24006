"""The original authors' numbers of PLOP and REMINDER: functions, thresholds and training runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.golden_checks import EXACT  # noqa: E402
from benchmarks.golden_plop import check_plop, replay_plop  # noqa: E402
from benchmarks.golden_reminder import check_reminder, replay_reminder  # noqa: E402

FOLDER = ROOT.parent / "shared" / "golden"
STEMS = sorted(path.stem for kind in ("plop", "reminder") for path in FOLDER.glob(f"train_{kind}*.npz"))
pytestmark = pytest.mark.golden


@pytest.mark.parametrize("stem", STEMS)
def test_replay_agrees_with_the_original(golden, stem):
    replay = replay_plop if "plop" in stem else replay_reminder
    found = replay(golden, stem)
    assert not {name: entry for name, entry in found.items() if not entry.largest <= EXACT}
    quantities = {
        "loss",
        "pod_loss",
        "loss_tot",
        "weight norms",
        "gradient norms",
        "classifiers at the start",
    }
    if "domain" not in stem:
        quantities |= {"thresholds", "pseudo-labels", "adaptive factor"}
    if "reminder" in stem:
        quantities |= {"csw", "prototypes"}
    assert quantities <= found.keys()
    assert {"final sums", "final norms"} <= found.keys()


@pytest.mark.parametrize("check", [check_plop, check_reminder])
def test_functions_agree_with_the_original(golden, check):
    rows = check(golden)
    assert not [row for row in rows if not row.difference <= row.limit]
    assert {"class loss, value", "POD, gradient", "thresholds", "pseudo-labels", "similarity term"} & {
        row.quantity for row in rows
    }


def test_a_wrong_rule_shows(golden, monkeypatch):
    """The negative control of the specification: POD on maps after their activation."""
    from everseg.methods import plop_terms

    real = plop_terms.stage_maps
    monkeypatch.setattr(
        plop_terms, "stage_maps", lambda output, before_activation: real(output, before_activation=False)
    )
    assert replay_plop(golden, "train_plop_A")["pod_loss"].largest > 1e-3
