"""Steps without gradients: one pass, exactly resumable, the same over processes, shown as what it is."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import At, complete, killed, ranks, results
from safetensors.torch import load_file
from toy import build, settings

import everseg
from everseg.config.fields import DataConfig
from everseg.data.batches.loader import PassOrder, pass_batches, pass_order
from everseg.data.batches.samples import View
from everseg.engine import runtime
from everseg.errors import ConfigError, DivergedError
from everseg.runs.journal import Journal
from everseg.runs.run_folder import RunFolder
from saying import must_say

PLUG_IN = f"{Path(__file__).with_name('summed_method.py')}:Summed"
SHORT = {"epochs": 1, "epochs_next": 1, "checkpoint_every": 2, "log_every": 1}


def config(out: Path, method: dict | None = None, **changes) -> dict:
    changes["train"] = SHORT | changes.get("train", {})
    return settings(out, method={"name": PLUG_IN, **(method or {})}, **changes)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> RunFolder:
    out = tmp_path_factory.mktemp("undisturbed")
    assert complete(config(out)) == 0
    return RunFolder(out / "toy")


def lines(folder: Path, *events: str) -> list[dict]:
    timing = ("images_per_second", "data_wait", "memory")
    found = [e for e in Journal(folder / "journal.jsonl").lines() if e["event"] in events]
    return [{key: value for key, value in entry.items() if key not in timing} for entry in found]


# ---------------------------------------------------------------- the order of images


def views(count: int = 11) -> list[View]:
    dataset = build(train=count)
    return [View(dataset.splits["train"], np.arange(count), np.arange(256, dtype=np.uint8))]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("crops", [True, False])
def test_every_image_is_seen_once_over_all_processes(world, crops):
    order = PassOrder((np.arange(10), np.arange(10, 17)), 4, 3, 1, crops=crops)
    assert len(order) == 3 + 2
    seen = [p for r in range(world) for keys in order.keys(0, len(order), r, world) for _, p in keys]
    assert sorted(seen) == list(range(17))
    for keys in order.keys(0, len(order)):
        assert len({position < 10 for _, position in keys}) == 1, "a batch mixes branches"


def test_whole_batches_only_drop_the_rest_as_training_does():
    order = PassOrder((np.arange(10), np.arange(10, 13)), 4, 3, 1, every_image=False, epochs=2)
    sizes = [len(keys) for keys in order.keys(0, len(order))]
    assert sizes == [4, 4, 3] * 2


def test_epochs_differ_and_a_pass_continues_at_any_batch():
    order = PassOrder((np.arange(10),), 4, 3, 1, epochs=2)
    whole = list(order.keys(0, 6))
    assert whole[:3] != whole[3:]
    assert {epoch for keys in whole[3:] for epoch, _ in keys} == {1}
    for start in range(6):
        assert list(order.keys(start, 6)) == whole[start:]


@pytest.mark.parametrize("crops", [True, False])
def test_shares_of_processes_make_up_the_batches(crops):
    data = DataConfig(crop=16, evaluation="crop", workers=0)
    order = pass_order(views(), data, seed=3, step=0, batch=4, crops=crops)
    whole = list(pass_batches(views(), data, order, start=0))
    parts = [list(pass_batches(views(), data, order, start=0, rank=rank, world=2)) for rank in (0, 1)]
    for one, *shares in zip(whole, *parts, strict=True):
        together = [share for share in shares if share is not None]
        assert sum((share.ids for share in together), ()) == one.ids
        assert torch.equal(torch.cat([share.image for share in together]), one.image)
    assert sum(share is None for part in parts for share in part) == 0


def test_images_of_any_size_come_one_by_one_and_a_process_may_have_none():
    data = DataConfig(crop=16, evaluation="whole", workers=0)
    order = pass_order(views(5), data, seed=3, step=0, batch=4, world=2, crops=False)
    assert (order.batch, len(order)) == (2, 3)
    found = [list(pass_batches(views(5), data, order, start=0, rank=r, world=2)) for r in (0, 1)]
    assert [[one and one.ids[0] for one in part] for part in found] == [
        [None if i is None else f"train-{i:03d}" for i in part] for part in ([0, 2, None], [1, 3, 4])
    ]


# ---------------------------------------------------------------- runs


def test_later_steps_train_nothing_and_the_journal_says_so(undisturbed):
    assert {entry["step"] for entry in lines(undisturbed.path, "train")} == {0}
    passed = lines(undisturbed.path, "pass")
    assert [(e["step"], e["iteration"]) for e in passed if e["step"] == 1] == [
        (1, i + 1) for i in range(sum(e["step"] == 1 for e in passed))
    ]
    assert {entry["step"] for entry in passed} == {0, 1}
    assert all(entry["measured"]["cells"] > 0 for entry in passed)
    first, last = (load_file(undisturbed.final(step) / "model.safetensors") for step in (0, 1))
    for name, value in first.items():
        if "heads" not in name:
            assert torch.equal(last[name], value), name
    state = load_file(undisturbed.final(1) / "method_state.safetensors")
    assert len(state["count"]) == 4
    assert not list(undisturbed.path.glob("steps/*/ckpt"))


def test_the_sums_are_those_of_the_images(undisturbed):
    """Every image once per step, 32 x 32 crops seen on maps of 2 x 2 cells."""
    state = load_file(undisturbed.final(1) / "method_state.safetensors")
    passed = lines(undisturbed.path, "pass")
    assert float(state["count"].sum()) == sum(entry["measured"]["cells"] for entry in passed)


@pytest.mark.parametrize("count", [1, 4, 9, 14, 17, 20])
def test_kills_at_any_moments_change_nothing(tmp_path, undisturbed, count):
    given = config(tmp_path)
    codes = []
    for _ in range(3):
        codes.append(complete(given, at=At("any", count)))
        if codes[-1] == 0:
            break
    assert -signal.SIGKILL in codes
    assert complete(given) == 0
    assert results(tmp_path / "toy") == results(undisturbed.path)
    assert lines(tmp_path / "toy", "train", "pass") == lines(undisturbed.path, "train", "pass")


@pytest.mark.parametrize(
    "landmark", ["00/ckpt/pass/it-00000000", "00/ckpt/pass/it-*[0-9]", "01/ckpt/pass/it-*[0-9]"]
)
def test_kills_right_after_a_checkpoint_change_nothing(tmp_path, undisturbed, landmark):
    given = config(tmp_path)
    killed(given, "name", pattern=landmark)
    assert complete(given) == 0
    assert results(tmp_path / "toy") == results(undisturbed.path)


def test_a_short_budget_cuts_the_pass_into_pieces(tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(runtime, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    given = config(tmp_path, train={"max_time": 3})
    codes = []
    while not codes or codes[-1] == 75:
        codes.append(complete(given))
        assert len(codes) < 20
    assert codes[-1] == 0
    assert codes.count(75) >= 3
    assert results(tmp_path / "toy") == results(undisturbed.path)


def test_a_polite_stop_inside_the_pass_saves_and_says_where(tmp_path, undisturbed, capfd):
    given = config(tmp_path, train={"checkpoint_every": 10_000})
    trained = len(lines(undisturbed.path, "train"))
    assert complete(given, at=At("iteration", trained + 2, signal=signal.SIGTERM)) == 128 + signal.SIGTERM
    must_say(capfd.readouterr().err, "pass", "step 0", "batch 3")
    assert complete(given) == 0
    assert results(tmp_path / "toy") == results(undisturbed.path)


def test_the_average_of_weights_survives_a_kill_in_the_pass(tmp_path):
    digests = []
    for name in ("a", "b"):
        given = config(tmp_path / name, train={"ema": 0.5})
        if name == "b":
            killed(given, "name", pattern="00/ckpt/pass/it-00000002")
        assert complete(given) == 0
        digests.append(results(tmp_path / name / "toy"))
    assert digests[0] == digests[1]
    assert any(name.endswith("00/final/raw.safetensors") for name in digests[0])


@pytest.mark.parametrize("method", [{}, {"crops": False, "batch": None}, {"every_image": False, "batch": 4}])
def test_two_processes_add_up_what_one_does(tmp_path, method):
    found = []
    for world in (1, 2):
        given = config(tmp_path / str(world), method)
        given["model"] = {"name": f"{Path(__file__).with_name('plain_model.py')}:build"}
        assert (ranks(given, world) if world > 1 else [complete(given)]) == [0] * world
        found.append(
            load_file(RunFolder(tmp_path / str(world) / "toy").final(1) / "method_state.safetensors")
        )
    assert torch.equal(found[0]["count"], found[1]["count"])
    torch.testing.assert_close(found[0]["total"], found[1]["total"], rtol=1e-4, atol=1e-4)


def test_two_processes_killed_are_the_same_bytes(tmp_path):
    digests = []
    for name in ("a", "b"):
        given = config(tmp_path / name)
        if name == "b":
            codes = ranks(given, 2, at=At("iteration", 9))
            assert set(codes) == {-signal.SIGKILL}
        assert ranks(given, 2) == [0, 0]
        digests.append(results(tmp_path / name / "toy"))
    assert digests[0] == digests[1]


def test_sums_that_are_not_finite_stop_the_run_before_anything_is_written(tmp_path, monkeypatch):
    import summed_method

    original = summed_method.Summed.accumulate

    def broken(self, batch, ctx):
        self.total[0, 0] = float("nan")
        return original(self, batch, ctx)

    monkeypatch.setattr(summed_method.Summed, "accumulate", broken)
    given = config(tmp_path)
    given["method"] = {"name": "summed_method:Summed"}
    with pytest.raises(DivergedError) as caught:
        everseg.run(given, quiet=True)
    must_say(caught.value, "step 0", "total", "not finite")
    assert not list((tmp_path / "toy").glob("steps/00/final"))


@pytest.mark.parametrize(
    ("switch", "facts"),
    [({"fuse": "all"}, ("method.fuse", "step 1")), ({"pretune": 1}, ("method.pretune", "step 1"))],
)
def test_switches_that_need_gradients_are_refused(tmp_path, switch, facts):
    with pytest.raises(ConfigError) as caught:
        everseg.run(config(tmp_path, switch), quiet=True)
    must_say(caught.value, *facts)


def test_the_report_has_its_speed_and_no_curve(undisturbed):
    from everseg.reports.compare.cost import costs
    from everseg.reports.figures import curves_of, speed_rows
    from everseg.runs.results import Results

    entries = list(Journal(undisturbed.path / "journal.jsonl").lines())
    curves = curves_of(entries)
    assert [step for step, _ in curves.starts] == [0]
    assert list(curves.speed) == [(0, False), (0, True), (1, True)]
    assert [row["iterations"] for row in speed_rows(curves)][-1] > 0
    only = curves_of([entry for entry in entries if entry["event"] == "pass"])
    assert only is not None
    assert not only.series
    assert costs(Results(undisturbed))[0]["time"] > 0
