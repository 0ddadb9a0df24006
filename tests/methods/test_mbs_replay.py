"""MBS's and MiB-AugM's training runs and losses, of the authors' code, in float64."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks import golden_mbs, golden_mibaugm  # noqa: E402

from everseg.methods.mbs import MBS  # noqa: E402
from everseg.methods.mib import MiB  # noqa: E402

pytestmark = pytest.mark.golden
FOLDER = ROOT.parent / "shared" / "golden"
REPLAYS = {"mbs": golden_mbs.replay_mbs, "mibaugm": golden_mibaugm.replay_mibaugm}
RUNS = [(name, path.stem) for name in REPLAYS for path in sorted(FOLDER.glob(f"train_{name}*.npz"))]


@pytest.mark.parametrize(("name", "stem"), RUNS)
def test_replay_agrees_with_the_original(golden, name, stem):
    found = REPLAYS[name](golden, stem)
    assert not {k: v for k, v in found.items() if not v.largest <= 1e-8}
    assert {
        "labels",
        "confusion counts",
        "weights at the start",
        "final weights",
        "learning rate",
    } <= found.keys()
    own = {"targets", "kd", "feature", "class", "token", "total"}
    assert (
        own if name == "mbs" else {"loss_unce", "loss_uncemem", "loss_unkd", "gradient norms"}
    ) <= found.keys()


@pytest.mark.parametrize("check", [golden_mbs.check_mbs, golden_mibaugm.check_mibaugm])
def test_losses_agree_with_the_original(golden, check):
    rows = check(golden)
    assert rows
    assert not [row for row in rows if not row.difference <= row.limit]


def test_there_are_runs_to_replay(golden):
    assert {"train_mbs_A", "train_mibaugm_A"} <= {stem for _, stem in RUNS}


@pytest.mark.parametrize(
    ("name", "wrong", "quantity"),
    [
        ("mbs", {"ignore_doubted": False}, "targets"),
        ("mbs", {"moved": False}, "kd"),
        ("mbs", {"adaptive": False}, "feature"),
        ("mbs", {"kd_weight": 10.0}, "total"),
        ("mibaugm", {"memory_void": "ignored"}, "loss_uncemem"),
        ("mibaugm", {"later_rate": 1.0}, "final weights"),
        ("mibaugm", {"decay_encoder": True}, "final weights"),
        ("mibaugm", {"freeze_norm": False}, "final weights"),
    ],
)
def test_replay_notices_a_mistake(golden, monkeypatch, name, wrong, quantity):
    module, cls = {"mbs": (golden_mbs, MBS), "mibaugm": (golden_mibaugm, MiB)}[name]
    make = partial(lambda cls, wrong, **given: cls(**given | wrong), cls, wrong)
    monkeypatch.setattr(module, cls.__name__, make)
    found = REPLAYS[name](golden, f"train_{name}_A")
    assert not found[quantity].largest < 1e-6
