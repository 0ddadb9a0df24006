"""Fusion, pre-tuning, the average of weights and uncertainty weighting, with every method: finite and resumable."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import need_transformers
from processes import results
from safetensors.torch import load_file
from toy import MAPS, NETWORKS, maps, settings

import everseg
from everseg import registry
from everseg.config.hyperparameters import method_options
from everseg.engine import one_pass
from everseg.engine import step as engine_step
from everseg.errors import ConfigError
from everseg.methods.base import Method
from everyday import some

METHODS = list(registry.BUILTIN["method"])
UNCERTAINTY = ("adaptive_factor", "certainty")
"""Hyper-parameters that weigh images or pixels by how certain the teacher is."""
SWITCHES: dict[str, dict[str, dict[str, Any]]] = {
    "fusion": {"method": {"fuse": "all"}},
    "pre-tuning": {"method": {"pretune": 1}},
    "average": {"train": {"ema": 0.5}},
}
REFUSED = {
    ("rcil", "fusion"): "correspond",
    ("dkd", "pre-tuning"): "heads",
    ("star", "pre-tuning"): "heads",
    ("barm", "pre-tuning"): "heads",
    ("acil", "fusion"): "gradients",
    ("acil", "pre-tuning"): "gradients",
    ("dft*", "fusion"): "frozen",
    ("dft*", "pre-tuning"): "heads",
    ("mbs", "pre-tuning"): "classifiers",
    ("ssul", "pre-tuning"): "mixtures",
    ("microseg", "pre-tuning"): "mixtures",
}
"""Method and switch that do not fit -> a word of the sentence that says so."""


def weighing(name: str) -> dict[str, dict[str, Any]]:
    """The method's uncertainty weighting, switched on; {} where it has none."""
    known = method_options(name)
    return {"method": {key: True for key in UNCERTAINTY if key in known}} if {*UNCERTAINTY} & {*known} else {}


def configured(out: Path, name: str, switches: tuple[str, ...]) -> dict[str, Any]:
    """A run of two steps of two iterations, checkpoints after each."""
    method: dict[str, Any] = {"name": name}
    train: dict[str, Any] = {"max_iterations": 2, "checkpoint_every": 1, "log_every": 1}
    for switch in switches:
        change = weighing(name) if switch == "uncertainty" else SWITCHES[switch]
        method |= change.get("method", {})
        train |= change.get("train", {})
    config = settings(out, method=method, train=train)
    config["data"] |= {"options": {"train": 12, "val": 2}}
    if name in MAPS:
        config["data"] |= {"extra": {MAPS[name]: maps(out / "maps", MAPS[name])}}
    return config


class StoppedError(Exception):
    """What a test raises inside a run, as if the machine had gone down."""


def stopped(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Run until some iterations, those of all steps counted, are done."""
    real, done = engine_step.train_batch, []

    def counted(method: Any, *args: Any, **options: Any) -> Any:
        if isinstance(method, Method):
            if len(done) == after:
                raise StoppedError
            done.append(1)
        return real(method, *args, **options)

    take_in = one_pass.take_in

    def counted_pass(*args: Any) -> Any:
        if len(done) == after:
            raise StoppedError
        done.append(1)
        return take_in(*args)

    with monkeypatch.context() as patched:
        patched.setattr(engine_step, "train_batch", counted)
        patched.setattr(one_pass, "take_in", counted_pass)
        with pytest.raises(StoppedError):
            everseg.run(config, quiet=True)


def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, switches: tuple[str, ...]) -> None:
    whole = configured(tmp_path / "whole", name, switches)
    refusals = [word for (method, switch), word in REFUSED.items() if method == name and switch in switches]
    if refusals:
        with pytest.raises(ConfigError, match=refusals[0]) as told:
            everseg.run(whole, quiet=True)
        assert not list(tmp_path.rglob("*.safetensors")), "before anything is trained"
        assert len(str(told.value).splitlines()) == 1
        return
    done = everseg.run(whole, quiet=True)
    lines = [json.loads(line) for line in (done.path / "journal.jsonl").read_text().splitlines()]
    terms = [line.get("terms") or line["measured"] for line in lines if line["event"] in ("train", "pass")]
    # Two iterations in each step; acil has a pass of two batches after those of the first, and nothing else later.
    assert len(terms) == (6 if name == "acil" else 4)
    assert all(math.isfinite(value) for line in terms for value in line.values())
    for path in done.path.rglob("*.safetensors"):
        assert all(
            bool(value.isfinite().all()) for value in load_file(path).values() if value.is_floating_point()
        )
    parts = configured(tmp_path / "parts", name, switches)
    stopped(parts, monkeypatch, after=3)  # after the first iteration of the second step
    everseg.run(parts, quiet=True)
    assert results(tmp_path / "parts" / "toy") == results(tmp_path / "whole" / "toy")


def pairs(name: str) -> list[tuple[str, str]]:
    every = [*SWITCHES, *(["uncertainty"] if weighing(name) else [])]
    return list(itertools.combinations(every, 2))


def fitting(name: str) -> tuple[str, ...]:
    every = [*SWITCHES, *(["uncertainty"] if weighing(name) else [])]
    return tuple(switch for switch in every if (name, switch) not in REFUSED)


@pytest.mark.parametrize("name", some(METHODS, "mib", "plop", "rcil"))
def test_all_switches_that_fit_at_once(tmp_path, monkeypatch, name):
    if name in NETWORKS:
        need_transformers()
    check(tmp_path, monkeypatch, name, fitting(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    # One pair for each method, another one for the next: all switches at once are tried with each method above, and all
    # pairs of all methods took five minutes.
    ("name", "pair"),
    [(name, pairs(name)[place % len(pairs(name))]) for place, name in enumerate(METHODS)],
    ids=str,
)
def test_a_pair(tmp_path, monkeypatch, name, pair):
    if name in NETWORKS:
        need_transformers()
    check(tmp_path, monkeypatch, name, pair)


@pytest.mark.parametrize(("name", "switch"), list(REFUSED))
def test_what_does_not_fit_is_refused_before_training(tmp_path, monkeypatch, name, switch):
    check(tmp_path, monkeypatch, name, (switch,))


@pytest.mark.parametrize("switch", list(SWITCHES))
def test_each_switch_changes_the_weights(tmp_path, switch):
    """Else the others would prove nothing."""
    plain, switched = (
        everseg.run(configured(tmp_path / kind, "mib", chosen), quiet=True)
        for kind, chosen in (("plain", ()), ("switched", (switch,)))
    )
    one, other = (load_file(run.folder.final(1) / "model.safetensors") for run in (plain, switched))
    assert any(not torch.equal(one[name], other[name]) for name in one)
