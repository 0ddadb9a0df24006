"""What an extension would do, said before it does anything; and the words for how thoroughly."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from everseg.deploy import asked as asked_of
from everseg.deploy import bundle as bundle_module
from everseg.deploy import extend
from everseg.deploy.bundle import open_bundle
from everseg.errors import CheckpointError
from everseg.runs.commit import load_tensors
from saying import must_say

QUICK = ["data.workers=0", "report=false"]


@pytest.fixture
def at(tmp_path, monkeypatch, deployed) -> Path:
    """A working folder with a copy of the deployed bundle, which knows red and green."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(deployed, tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_dry_run_says_what_happens_and_keeps_nothing(at, old_data, call):
    """The data label forklifts and red."""
    line = ("extend", at, "--data", old_data, "--add", "forklift", "--dry-run", *QUICK, "train.epochs=5")
    code, out, err = call(*line)
    assert code == 0, err
    must_say(out, "12 training images", "with forklift", "red")
    must_say(out, "taught", "forklift", "refined", "red")
    must_say(out, "kept", "green", "mib")
    must_say(out, "time", "15 iterations", "6 images")
    assert [path.name for path in Path.cwd().iterdir()] == ["bundle"]
    told = json.loads(call(*line, "--json", "--quiet")[1])
    assert told["iterations"] == 15  # 3 batches of 4 images, 5 times
    assert told["seconds"] > told["iterations"] * told["seconds_per_iteration"] > 0
    code, out, err = call("extend", at, "--data", old_data, "--dry-run", "--json", "--quiet", *QUICK)
    told = json.loads(out)
    assert (told["taught"], told["refined"], told["kept"], told["method"]) == (
        [],
        ["red"],
        ["green"],
        "complete",
    )


def test_a_dry_run_asks_for_the_signature_and_for_shares_that_can_be(at, new_data, call, monkeypatch):
    line = ("extend", at, "--data", new_data, "--dry-run", "--quiet", *QUICK)
    code, _, err = call(*line, "--keep-at-least", "1.5")
    assert code == 2
    must_say(err, "--keep-at-least", "1.5")

    def unsigned(bundle: Path, key: Path) -> None:
        raise CheckpointError(f"{bundle} is not signed with {key}")

    monkeypatch.setattr(bundle_module, "signed", unsigned)
    code, _, err = call(*line, "--require-signature", "me.pub")
    assert code == 4
    must_say(err, "bundle", "me.pub")


def test_quick_trains_the_new_classifier_alone(at, new_data, call):
    """Of the bundle all is the same but the background's bias: it shares its probability with the new class."""
    line = ("extend", at, "--data", new_data, "--add", "forklift", *QUICK, "--no-onnx", "--quiet")
    code, _, err = call(*line, "--how", "quick", "train.max_iterations=3", "train.lr=0.05")
    assert code == 0, err
    before, after = (load_tensors(path / "model.safetensors") for path in (at, at.with_name("bundle-v2")))
    bias = "heads.default.classifiers.0.bias"
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == [bias]
    moved = after[bias] - before[bias]
    assert moved.tolist() == pytest.approx([-math.log(2), 0, 0], abs=1e-6)
    assert {name for name in after if name not in before} == {
        f"heads.default.classifiers.1.{kind}" for kind in ("weight", "bias")
    }
    made = open_bundle("bundle-v2")
    assert made.lineage["method"] == "mib"
    # the word is that of one extension: the next one trains the whole network again, at its usual rates
    following = asked_of.configuration(made, new_data, ("crane",), None, "next", how="balanced")
    usual = asked_of.configuration(open_bundle(at), new_data, ("crane",), None, "next", how="balanced")
    assert following.method == usual.method
    assert following.train.lr_factors == usual.train.lr_factors


def test_a_word_that_cannot_be_kept_is_refused(at, new_data, call):
    line = ("extend", at, "--data", new_data, "--add", "forklift", *QUICK)
    code, _, err = call(*line, "--how", "thorough")
    assert code == 2
    must_say(err, "--how thorough", "holds none", "export RUN --memory")
    code, _, err = call(*line, "--how", "quick", "--method", "mib")
    assert code == 2
    must_say(err, "--how", "--method")
    assert [path.name for path in Path.cwd().iterdir()] == ["bundle"]


def at_speeds(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> list[str]:
    """Let previews take stated times; give the list of the words that were measured."""
    tried = []

    def previewed(asked: Any, *_: object, **__: object) -> asked_of.Preview:
        tried.append(asked.how)
        return asked_of.Preview(
            (), ("forklift",), (), (), "mib", 10, seconds[asked.how] / 10, 6, seconds[asked.how]
        )

    monkeypatch.setattr(asked_of, "previewed", previewed)
    monkeypatch.setattr(extend, "previewed", previewed)
    return tried


def test_a_budget_takes_the_most_thorough_word_that_fits_and_stays_with_it(at, new_data, call, monkeypatch):
    line = (
        "extend",
        at,
        "--data",
        new_data,
        "--add",
        "forklift",
        *QUICK,
        "--no-onnx",
        "train.max_iterations=2",
    )
    tried = at_speeds(monkeypatch, {"balanced": 700, "quick": 80})
    code, _, err = call(*line, "--budget", "10min", "--dry-run")
    assert code == 0
    must_say(err, "balanced", "11:40", "quick", "1:20")
    assert tried == ["balanced", "quick", "quick"]  # the last one is the preview that was asked for
    code, _, err = call(*line, "--budget", "10min")
    assert code == 0, err
    head = "heads.default.classifiers.0.weight"
    before, after = (
        load_tensors(path / "model.safetensors")[head] for path in (at, at.with_name("bundle-v2"))
    )
    assert torch.equal(before, after)  # quick: the old classifier stays
    # Now the machine is fast, and the same command still goes on with the run that it began.
    shutil.rmtree(at.with_name("bundle-v2"))
    tried = at_speeds(monkeypatch, {"balanced": 7, "quick": 1})
    code, _, err = call(*line, "--budget", "10min")
    assert code == 0, err
    assert (tried, at.with_name("bundle-v2").is_dir()) == ([], True)


def test_a_budget_that_nothing_fits_into_says_what_would(at, new_data, call, monkeypatch):
    at_speeds(monkeypatch, {"balanced": 700, "quick": 80})
    line = ("extend", at, "--data", new_data, "--add", "forklift", *QUICK)
    code, _, err = call(*line, "--budget", "40s", "train.epochs=8")
    assert code == 2
    must_say(err, "--budget 40s", "balanced", "quick", "train.epochs=4")
    for wrong, more in (
        ("soon", ()),
        ("0s", ()),
        ("10min", ("--how", "quick")),
        ("10min", ("--method", "mib")),
    ):
        code, _, err = call(*line, "--budget", wrong, *more)
        assert code == 2
        must_say(err, "--budget", *more[:1])
    assert [path.name for path in Path.cwd().iterdir()] == ["bundle"]


@pytest.mark.slow
def test_a_budget_measures(at, new_data, call):
    line = ("extend", at, "--data", new_data, "--add", "forklift", *QUICK, "train.epochs=5", "--dry-run")
    assert call(*line, "--budget", "1h")[0] == 0
    code, _, err = call(*line, "--budget", "0.001s")
    assert code == 2
    must_say(err, "balanced", "quick")
