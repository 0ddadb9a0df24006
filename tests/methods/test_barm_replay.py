"""The original authors' numbers of BARM: its head, and training runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks import golden_barm  # noqa: E402
from benchmarks.golden_barm import check_barm, replay_barm  # noqa: E402
from benchmarks.golden_checks import EXACT  # noqa: E402
from benchmarks.verification import ORIGINALS  # noqa: E402

from everseg import losses  # noqa: E402
from everseg.methods import barm  # noqa: E402

FOLDER = ROOT.parent / "shared" / "golden"
STEMS = sorted(path.stem for path in FOLDER.glob("train_barm*.npz"))
pytestmark = pytest.mark.golden


@pytest.mark.parametrize("stem", STEMS)
def test_replay_agrees_with_the_original(golden, stem):
    found = replay_barm(golden, stem)
    assert not {name: entry for name, entry in found.items() if not entry.largest <= EXACT}
    terms = {"std", "tri", "tunnel", "gkd", "bga_ce", "total", "tunnel at the start (absolute)"}
    other = {"labels", "targets", "learning rate", "gradient norms", "weights at the start", "final weights"}
    assert terms | other | {"confusion counts"} <= found.keys()


def test_the_head_agrees_with_the_original(golden):
    rows = check_barm(golden)
    assert not [row for row in rows if not row.difference <= row.limit]
    assert {"logits, train", "logits, eval", "gradients, train", "gradients, eval"} <= {
        row.quantity for row in rows
    }


def test_the_table_of_the_verification_holds_both(golden):
    files = tuple(name for original in ORIGINALS for name in original.files)
    assert "barm_losses_A".startswith(files)
    assert all(stem.startswith(files) for stem in STEMS)


def _uncut(logits, residual, num_old):
    return losses.readout.with_residual(logits, residual)


def _attached(logits, residual, num_old):
    return losses.adapted_logits(logits, residual, 1)


def _outside(label, size, num_old, num_classes):
    _, new = losses.label_cells(label, size, num_old, num_classes)
    return ~new, new


def test_copied_statistics_show(golden, monkeypatch):
    """The files start an ear from statistics drawn for them; leaving ours in their place is another network."""
    right = golden_barm.BARM
    monkeypatch.setattr(golden_barm, "BARM", lambda **given: right(**(given | {"ear_statistics": "copied"})))
    monkeypatch.setattr(
        golden_barm, "is_drawn", lambda key, index: key.startswith(f"classifier.head.{index}.")
    )
    found = replay_barm(golden, "train_barm_A")
    assert found["final weights"].largest > 1
    assert found["weights at the start"].largest > 1


@pytest.mark.parametrize(
    ("wrong", "quantity"),
    [
        ({"threshold": 0.99}, "targets"),
        ({"residual_weight": 4.0}, "final weights"),
        ({"freeze_norm": False}, "std"),
        ({"decoder_rate": 1.0}, "learning rate"),
        (("adapted_logits", _uncut), "std"),
        (("adapted_logits", _attached), "final weights"),
        (("label_cells", _outside), "tri"),
        (("with_residual", lambda logits, residual: logits), "targets"),
    ],
)
def test_a_wrong_rule_shows(golden, monkeypatch, wrong, quantity):
    """Negative controls of the specification, among others."""
    if isinstance(wrong, tuple):
        monkeypatch.setattr(barm, *wrong)
    else:
        right = golden_barm.BARM
        monkeypatch.setattr(golden_barm, "BARM", lambda **options: right(**(options | wrong)))
    assert replay_barm(golden, "train_barm_A")[quantity].largest > 1e-3
