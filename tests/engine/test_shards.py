"""A network cut into shards over two processes learns what it learns whole, and leaves the same files."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from encoders import need_transformers
from processes import At, ranks, results
from safetensors.torch import load_file
from toy import SEGFORMER, settings

import everseg
from everseg.config.loading import load
from everseg.engine import (
    shards,  # noqa: F401  takes a second: here, so that no fork need do it
    step,
)
from everseg.engine.peers import unfit_for_shards
from everseg.errors import ConfigError
from saying import must_say


def configured(out: Path, shard: bool, **train: Any) -> dict[str, Any]:
    """Two steps of a few iterations with a teacher, dropout and a moving average on a network with attention."""
    few = {"epochs": 1, "epochs_next": 1, "checkpoint_every": 1, "max_iterations": 2}
    config = settings(out, data={"options": {"train": 12, "val": 2}}, train={**few, "shard": shard, **train})
    encoder = {**SEGFORMER["options"]["config"], "drop_path_rate": 0.3, "hidden_dropout_prob": 0.2}
    config["method"] = {"name": f"{Path(__file__).with_name('telling_method.py')}:Telling"}
    config["model"] = {**SEGFORMER, "options": {**SEGFORMER["options"], "config": encoder}}
    return config


def told(capfd: pytest.CaptureFixture[str]) -> set[str]:
    """What the weights of student and teacher were in the iterations since this was asked last."""
    return {line for line in capfd.readouterr().err.splitlines() if line in ("Tensor", "DTensor")}


def agree(one: Path, two: Path) -> None:
    """The same files; tensors of the same names and shapes, equal to rounding; all else equal to the byte."""
    first, second = results(one), results(two)
    assert first.keys() == second.keys()
    for name in first:
        if not name.endswith(".safetensors"):
            if Path(name).name not in ("MANIFEST.json",):  # digests of the weights
                assert first[name] == second[name], name
            continue
        mine, other = load_file(one / name), load_file(two / name)
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-6, msg=f"{name}: {key}")


@pytest.mark.slow
def test_shards_give_the_checkpoints_and_results_of_whole_models_and_either_continues_the_other(
    tmp_path, capfd
):
    need_transformers()
    more = {"ema": 0.9, "clip_norm": 1.0, "accumulate": 2}
    at = At("iteration", 1)
    for name, shard in (("whole", False), ("cut", True)):
        codes = ranks(configured(tmp_path / name, shard, **more), 2, at=at)
        assert codes == [-signal.SIGKILL] * 2
        assert told(capfd) == {"DTensor" if shard else "Tensor"}
    agree(tmp_path / "whole" / "toy", tmp_path / "cut" / "toy")
    (found,) = (tmp_path / "cut" / "toy").glob("steps/00/ckpt/it-*")
    assert {path.stem for path in found.glob("*.safetensors")} == {"model", "method", "optim", "average"}
    for name, shard in (("whole", True), ("cut", False)):
        assert ranks(configured(tmp_path / name, shard, **more), 2) == [0, 0]
        assert told(capfd) == {"DTensor" if shard else "Tensor"}
    agree(tmp_path / "whole" / "toy", tmp_path / "cut" / "toy")
    assert len(results(tmp_path / "cut" / "toy")) == 16


def test_all_processes_gather_the_files_of_a_checkpoint_in_one_order(tmp_path, monkeypatch):
    """Each has another order of sets. Weights and the optimiser's values have the same shapes: nobody would notice."""
    gathered = list[str]()
    monkeypatch.setattr(step, "optimizer_state", lambda *_: ("optim", {}))
    phase = SimpleNamespace(
        cut=SimpleNamespace(whole=gathered.append), optimizer=None, model=None,
        stored=lambda: {"average": "average", "method": "method", "model": "model"},
    )  # fmt: skip
    other = SimpleNamespace(is_main_process=False, wait_for_everyone=lambda: None)
    step.StepJob._save(SimpleNamespace(accelerator=other), phase, 1)
    assert gathered == ["model", "average", "optim"]


def test_what_reads_whole_weights_is_refused_with_everything_else_before_anything_is_trained(tmp_path, capfd):
    method = {"name": "ewc", "fuse": "all"}
    config = settings(tmp_path, method=method, scenario={"task": "offline"}, train={"shard": True})
    with pytest.raises(ConfigError) as raised:
        everseg.run(config)
    assert len(raised.value.problems) == 2
    must_say(str(raised.value), "train.shard", "'ewc'")
    assert not (tmp_path / "toy").exists()
    must_say("".join(capfd.readouterr()), "note: train.shard", "process")  # one has nothing to share


@pytest.mark.parametrize(
    ("train", "fact", "domains"),
    [({"precision": "fp16"}, "fp16", False), ({"sync_norm": True}, "train.sync_norm=false", False),
     ({}, "domains", True)],
)  # fmt: skip
def test_what_knows_no_shards_is_refused(train, fact, domains):
    config = load(train={"shard": True, **train})
    (problem,) = unfit_for_shards(config.train, "ft", reads_gradients=False, domains=domains)
    must_say(problem, "train.shard", fact)
    whole = config.train.model_copy(update={"shard": False})
    assert unfit_for_shards(whole, "ft", reads_gradients=True, domains=True) == []
