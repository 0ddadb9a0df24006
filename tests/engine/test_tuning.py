"""Pre-tuning inside `begin_step`: exactly resumable, with gradients of all processes, and nothing else moves."""

from __future__ import annotations

import itertools
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import At, complete, killed, ranks, results
from safetensors.torch import load_file
from toy import settings

import everseg
from everseg.engine import runtime
from everseg.errors import ConfigError
from everseg.runs.journal import Journal
from everseg.runs.run_folder import RunFolder
from everyday import some
from saying import must_say

PLUG_IN = f"{Path(__file__).with_name('tuned_method.py')}:Tuned"
SHORT = {"epochs": 1, "epochs_next": 1, "checkpoint_every": 2, "log_every": 1}


def config(out: Path, method: dict | None = None, **changes) -> dict:
    changes["train"] = SHORT | changes.get("train", {})
    return settings(out, method=method or {"name": PLUG_IN}, **changes)


METHODS = {
    "plug-in": {"name": PLUG_IN},
    "nest": {"name": "nest", "pretune": 2, "pretune_lr_scale": 20.0},
    "plop": {"name": "plop", "pretune": 2, "pretune_kd_weight": 10.0, "fuse": "all", "freeze_heads": "old"},
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, RunFolder]:
    """Runs that nobody disturbed, by method."""
    found = {}
    for name, method in METHODS.items():
        out = tmp_path_factory.mktemp("undisturbed")
        assert complete(config(out, method)) == 0
        found[name] = RunFolder(out / "toy")
    return found


def lines(folder: Path, *events: str) -> list[dict]:
    timing = ("images_per_second", "data_wait", "memory")
    found = [e for e in Journal(folder / "journal.jsonl").lines() if e["event"] in events]
    return [{key: value for key, value in entry.items() if key not in timing} for entry in found]


def test_the_journal_counts_each_tuning_apart(undisturbed):
    tuned = lines(undisturbed["plug-in"].path, "tune")
    assert {entry["step"] for entry in tuned} == {1}
    numbers = [(entry["tuning"], entry["iteration"]) for entry in tuned]
    per_epoch = max(iteration for number, iteration in numbers if number == 1)
    assert numbers == [(0, i + 1) for i in range(2 * per_epoch)] + [(1, i + 1) for i in range(per_epoch)]
    rates = [entry["lr"] for entry in tuned]
    assert rates[0] == pytest.approx(0.02 * 5)
    assert rates[1] == pytest.approx(0.02 * 5 * (1 - 1 / (2 * per_epoch)) ** 0.9)
    assert rates[2 * per_epoch] == pytest.approx(0.02)
    trained = [(e["step"], e["iteration"]) for e in lines(undisturbed["plug-in"].path, "train")]
    assert (1, 1) in trained
    assert not list(undisturbed["plug-in"].path.glob("steps/*/ckpt"))


@pytest.mark.parametrize("name", some(METHODS, "plug-in"))
def test_kills_at_any_moments_change_nothing(tmp_path, undisturbed, name):
    given, codes = config(tmp_path, METHODS[name]), []
    for count in random.Random(name).sample(range(4, 24), 10):
        codes.append(complete(given, at=At("any", count)))
        if codes[-1] == 0:
            break
    assert codes.count(-signal.SIGKILL) >= 4
    assert complete(given) == 0
    assert results(tmp_path / "toy") == results(undisturbed[name].path)
    assert lines(tmp_path / "toy", "tune", "train") == lines(undisturbed[name].path, "tune", "train")


@pytest.mark.parametrize(
    "landmark",
    [
        "01/ckpt/tune-0/it-*[0-9]",
        "01/ckpt/tune-0/it-00000008",
        "01/ckpt/tune-1/it-*[0-9]",
        "01/ckpt/it-*[0-9]",
    ],
)
def test_kills_right_after_a_checkpoint_change_nothing(tmp_path, undisturbed, landmark):
    given = config(tmp_path)
    killed(given, "name", pattern=landmark)
    assert complete(given) == 0
    assert results(tmp_path / "toy") == results(undisturbed["plug-in"].path)


@pytest.mark.parametrize("name", some(["plug-in", "nest"], "nest"))
def test_budgets_shorter_than_the_tuning_cut_it_into_pieces(tmp_path, undisturbed, name, monkeypatch):
    """On a clock of its own: each question for the time takes a second of it, and every iteration asks once."""
    monkeypatch.setattr(runtime, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    given = config(tmp_path, METHODS[name], train={"max_time": 3})
    codes = []
    while not codes or codes[-1] == 75:
        codes.append(complete(given))
        assert len(codes) < 20
    assert codes[-1] == 0
    assert codes.count(75) >= 5
    assert results(tmp_path / "toy") == results(undisturbed[name].path)


def test_every_call_gets_further_however_short_its_budget_is(tmp_path):
    given = config(tmp_path, train={"max_time": 1e-6, "max_iterations": 2})
    folder, codes, seen = RunFolder(tmp_path / "toy"), [], []
    while not codes or codes[-1] == 75:
        codes.append(complete(given))
        names = sorted(path.relative_to(folder.path).as_posix() for path in folder.path.glob("steps/**/*"))
        assert names != seen, "this call changed nothing"
        seen = names
        assert len(codes) < 20
    assert codes[-1] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_polite_stop_inside_the_tuning_saves_and_continues(tmp_path, undisturbed, number, capfd):
    given = config(tmp_path, train={"checkpoint_every": 10_000})
    first = len(lines(undisturbed["plug-in"].path, "train")) - len(
        [e for e in lines(undisturbed["plug-in"].path, "train") if e["step"] == 1]
    )
    assert complete(given, at=At("iteration", first + 2, signal=number)) == 128 + number
    must_say(capfd.readouterr().err, "pre-tuning", "step 1", "iteration 3")
    found = [path.name for path in (tmp_path / "toy").glob("steps/*/ckpt/*/*")]
    assert found == ["it-00000003"]
    assert complete(given) == 0
    assert results(tmp_path / "toy") == results(undisturbed["plug-in"].path)


def test_a_damaged_checkpoint_of_the_tuning_costs_iterations_not_the_result(tmp_path, undisturbed):
    given = config(tmp_path)
    killed(given, "name", 1, pattern="01/ckpt/tune-0/it-*[0-9]")
    newest = sorted((tmp_path / "toy").glob("steps/01/ckpt/tune-0/it-*[0-9]"))[-1]
    data = bytearray((newest / "tuned.safetensors").read_bytes())
    data[-3] ^= 4
    (newest / "tuned.safetensors").write_bytes(data)
    assert complete(given) == 0
    assert results(tmp_path / "toy") == results(undisturbed["plug-in"].path)


@pytest.mark.parametrize("name", some(["plug-in", "nest"], "plug-in"))
def test_two_processes_learn_what_one_learns(tmp_path, name):
    """Norms without batch statistics, so that they can agree; the plug-in's own noise differs by process."""
    found = []
    for world in (1, 2):
        given = config(tmp_path / str(world), METHODS[name])
        given["model"] = {"name": f"{Path(__file__).with_name('plain_model.py')}:build"}
        assert (ranks(given, world) if world > 1 else [complete(given)]) == [0] * world
        found.append(load_file(RunFolder(tmp_path / str(world) / "toy").final(1) / "model.safetensors"))
    atol = 1e-5 if name == "nest" else 5e-3
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-3, atol=atol, msg=key)


@pytest.mark.slow
def test_the_same_with_two_processes_twice_is_the_same_bytes_also_after_a_kill_of_both(tmp_path):
    digests = []
    for name in ("a", "b"):
        given = config(tmp_path / name)
        if name == "b":
            codes = ranks(given, 2, at=At("iteration", 7))
            assert set(codes) == {-signal.SIGKILL}
        assert ranks(given, 2) == [0, 0]
        digests.append(results(tmp_path / name / "toy"))
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"scenario": {"task": "offline"}}, ("method.pretune", "classes", "single step")),
        ({"train": {"precision": "fp16"}}, ("train.precision", "fp16")),
        ({"model": {"name": "erfnet"}}, ("method.pretune", "1x1")),
    ],
)
def test_what_cannot_be_pretuned_is_told_before_anything_is_trained(tmp_path, changes, facts):
    given = config(tmp_path, METHODS["nest"], **changes)
    given |= {key: value for key, value in changes.items() if key == "model"}
    with pytest.raises(ConfigError) as caught:
        everseg.run(given, quiet=True)
    must_say(caught.value, *facts)
    assert not list((tmp_path / "toy").glob("steps/*"))
