"""RCIL's losses and runs as its authors' code made them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks import golden_rcil  # noqa: E402
from benchmarks.golden_checks import EXACT  # noqa: E402
from benchmarks.golden_rcil import FACTORS, check_rcil, replay_rcil  # noqa: E402

from everseg.methods.rcil import RCIL  # noqa: E402

FOLDER = ROOT.parent / "shared" / "golden"
pytestmark = pytest.mark.golden
RUNS = sorted(path.stem for path in FOLDER.glob("train_rcil_*.npz")) or ["train_rcil_A"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("rcil_losses_*.npz")), ids=lambda path: path.stem)
def test_terms_gradients_and_merges_agree(path):
    rows = check_rcil(path)
    assert {row.quantity for row in rows} >= {"spatial", "channel", "lkd", "gradients", "merged convolution"}
    assert [row for row in rows if not row.difference <= EXACT] == []


@pytest.mark.parametrize("run", RUNS)
def test_a_replayed_run_agrees(golden, run):
    found = replay_rcil(golden, run)
    assert {"loss", "lkd", "pod_loss", "merged units", "frozen weights", "final weights"} <= found.keys()
    assert {k: v for k, v in found.items() if not v.largest <= EXACT} == {}


@pytest.mark.parametrize(
    ("change", "quantity"),
    [
        ({"init_background": "all"}, "classifiers at the start"),
        ({"growth_factor": False}, "pod_loss"),
        ({"channel_decoder_weight": 0.01}, "pod_loss"),
    ],
)
def test_the_replay_notices_a_mistake(golden, monkeypatch, change, quantity):
    monkeypatch.setattr(golden_rcil, "RCIL", lambda **given: RCIL(**{**given, **change}))
    assert replay_rcil(golden, "train_rcil_A")[quantity].largest > 1e-4


def test_presets_have_the_factors_of_the_files():
    from everseg.config.loading import load

    for name, data in (("voc-15-1-overlapped-rcil", "voc"), ("ade-100-10-rcil", "ade")):
        options = load(name).method.options
        spatial, channel = FACTORS[data]
        assert (options["spatial_weight"], options["spatial_logits_weight"]) == spatial
        assert (options["channel_weight"], options["channel_decoder_weight"]) == channel
