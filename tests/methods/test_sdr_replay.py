"""SDR's and UCD's training runs and losses, of the authors' code, in float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks import golden_sdr, golden_ucd  # noqa: E402
from benchmarks.golden_runs import limit  # noqa: E402

from everseg.methods.sdr import SDR  # noqa: E402
from everseg.methods.ucd import UCD  # noqa: E402

pytestmark = pytest.mark.golden
FOLDER = ROOT.parent / "shared" / "golden"
REPLAYS = {"sdr": golden_sdr.replay_sdr, "ucd": golden_ucd.replay_ucd}
RUNS = [(name, path.stem) for name in REPLAYS for path in sorted(FOLDER.glob(f"train_{name}*.npz"))]


@pytest.mark.parametrize(("name", "stem"), RUNS)
def test_replay_agrees_with_the_original(golden, name, stem):
    found = REPLAYS[name](golden, stem)
    assert not {k: v for k, v in found.items() if not v.largest <= limit(golden, stem, k)}
    expected = {"loss", "lkd", "loss_tot", "weight norms", "gradient norms", "final norms"}
    own = {"lfc", "lsep_clusters", "ldeprototype", "lfs", "prototypes", "counts"}
    assert expected | (own if name == "sdr" else {"contrastive", "final weights"}) <= found.keys()


@pytest.mark.parametrize("check", [golden_sdr.check_sdr, golden_ucd.check_ucd])
def test_losses_agree_with_the_original(golden, check):
    rows = check(golden)
    assert rows
    assert not [row for row in rows if not row.difference <= row.limit]


def test_there_are_runs_to_replay(golden):
    assert {"train_sdr_A", "train_sdr_disjoint_A", "train_ucd_A"} <= {stem for _, stem in RUNS}


@pytest.mark.parametrize(
    ("module", "method", "stem", "quantity"),
    [
        (golden_sdr, lambda **o: SDR(), "train_sdr_A", "prototypes"),
        (
            golden_sdr,
            lambda **o: SDR(**o | {"init_background": True}),
            "train_sdr_A",
            "classifiers at the start",
        ),
        (golden_ucd, lambda **o: UCD(), "train_ucd_A", "contrastive"),
        (golden_ucd, lambda **o: UCD(**o, freeze_first_head=False), "train_ucd_A", "gradient norms"),
    ],
)
def test_replay_notices_a_mistake(golden, monkeypatch, module, method, stem, quantity):
    monkeypatch.setattr(module, "SDR" if module is golden_sdr else "UCD", method)
    replay = REPLAYS["sdr" if module is golden_sdr else "ucd"]
    assert not replay(golden, stem)[quantity].largest < 1e-5
