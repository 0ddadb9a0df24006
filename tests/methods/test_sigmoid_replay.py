"""DKD's and STAR's training runs and losses, of the authors' code, in float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks import golden_dkd, golden_star  # noqa: E402
from benchmarks.golden_checks import EXACT  # noqa: E402
from benchmarks.verification import ORIGINALS  # noqa: E402

from everseg.methods.dkd import DKD  # noqa: E402
from everseg.methods.star import STAR  # noqa: E402

pytestmark = pytest.mark.golden
FOLDER = ROOT.parent / "shared" / "golden"
REPLAYS = {"dkd": golden_dkd.replay_dkd, "star": golden_star.replay_star}
LIMITS = {"dkd": lambda *given: EXACT, "star": golden_star.limit_star}
RUNS = [(name, path.stem) for name in REPLAYS for path in sorted(FOLDER.glob(f"train_{name}*.npz"))]


@pytest.mark.parametrize(("name", "stem"), RUNS)
def test_replay_agrees_with_the_original(golden, name, stem):
    found = REPLAYS[name](golden, stem)
    assert not {k: v for k, v in found.items() if not v.largest <= LIMITS[name](golden, stem, k)}
    expected = {"labels", "learning rate", "loss", "loss_mbce", "gradient norms", "weights at the start"}
    own = {
        "dkd": {"loss_kd", "loss_ac", "loss_dkd_pos", "loss_dkd_neg"},
        "star": {"loss_pkd", "loss_cont", "prototypes", "norms of features", "noise", "features drawn"},
    }
    assert expected | own[name] | {"final weights", "confusion counts"} <= found.keys()


@pytest.mark.parametrize("check", [golden_dkd.check_dkd, golden_star.check_star])
def test_losses_agree_with_the_original(golden, check):
    rows = check(golden)
    assert len(rows) >= 16
    assert not [row for row in rows if not row.difference <= row.limit]


def test_there_are_runs_to_replay_and_the_table_holds_them(golden):
    stems = {stem for _, stem in RUNS}
    assert {"train_dkd_A", "train_dkdm_A", "train_star_A"} <= stems
    files = tuple(name for original in ORIGINALS for name in original.files)
    assert all(stem.startswith(files) for stem in (*stems, "dkd_losses_A", "star_losses_A"))


@pytest.mark.parametrize(
    ("module", "changed", "stem", "quantity"),
    [
        (golden_dkd, {"unlabelled": "left out"}, "train_dkd_A", "loss_mbce"),
        (golden_dkd, {"decay": "all"}, "train_dkd_A", "final weights"),
        (golden_dkd, {"init_auxiliary": False}, "train_dkd_A", "weights at the start"),
        (golden_dkd, {"freeze_norm": False}, "train_dkd_A", "loss_kd"),
        (golden_dkd, {"positive_weight": 4.0}, "train_dkdm_A", "final weights"),
        (golden_star, {"noise": "fixed"}, "train_star_A", "noise"),
        (golden_star, {"old_logit": 0.0}, "train_star_A", "loss_mbce"),
        (golden_star, {"new_lr_scale": 1.0}, "train_star_A", "learning rate"),
        (golden_star, {"unlabelled": "left out"}, "train_star_A", "loss_mbce"),
    ],
)
def test_replay_notices_a_mistake(golden, monkeypatch, module, changed, stem, quantity):
    name, cls = ("DKD", DKD) if module is golden_dkd else ("STAR", STAR)
    monkeypatch.setattr(module, name, lambda **options: cls(**options | changed))
    assert not REPLAYS[name.lower()](golden, stem)[quantity].largest < 1e-5
