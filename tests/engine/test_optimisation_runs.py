"""Runs with everything that `train` offers: killed at any moment, over two processes, and older ones continued."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from processes import At, complete, killed, ranks, results
from safetensors.torch import load_file
from toy import settings

import everseg
from everseg.config.fields import TrainConfig
from everseg.config.loading import load
from everseg.errors import ConfigError
from everseg.runs.run_folder import RunFolder
from saying import must_say
from sealed import content

EVERYTHING = {
    "optimizer": "adamw", "lr": 0.01, "lr_next": 0.01, "accumulate": 2, "warmup": 7, "warmup_power": 2.0,
    "clip_norm": 0.5, "ema": 0.8, "lr_factors": {"encoder": 0.5, "new_heads": 2.0}, "layer_decay": 0.8,
    "decay_norms": False,
}  # fmt: skip
PLAIN = {"name": f"{Path(__file__).with_name('plain_model.py')}:build"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("everything")
    assert complete(settings(out, train=EVERYTHING)) == 0
    found = results(out / "toy")
    assert "steps/01/final/raw.safetensors" in found
    return found


@pytest.mark.parametrize(
    ("event", "counts"),
    [("backward", (5, 17, 10)), ("iteration", (5, 2, 13)), ("flush", (8, 9, 17))],
    ids=["inside-a-batch", "between-batches", "inside-a-save"],
)
def test_kills_change_nothing(tmp_path, undisturbed, event, counts):
    """Odd counts of `backward` lie between the two parts of a batch. The warm-up lasts 7 iterations of 18."""
    config = settings(tmp_path, train=EVERYTHING)
    for count in counts:
        killed(config, event, count)
    assert complete(config) == 0
    assert results(tmp_path / "toy") == undisturbed


def test_a_stop_in_the_warm_up_saves_the_average_and_continues(tmp_path, undisturbed):
    config = settings(tmp_path, train=EVERYTHING)
    assert complete(config, at=At("backward", 10, signal=signal.SIGTERM)) == 128 + signal.SIGTERM
    (kept,) = (tmp_path / "toy" / "steps" / "00" / "ckpt").glob("it-00000006")
    assert (kept / "average.safetensors").is_file()
    assert complete(config) == 0
    assert results(tmp_path / "toy") == undisturbed


@pytest.mark.slow
def test_every_setting_acts(tmp_path, undisturbed):
    """One setting left out at a time gives another first step."""
    wanted = undisturbed["steps/00/final/model.safetensors"]
    scenario = {"task": "offline"}
    assert complete(settings(tmp_path / "all", train=EVERYTHING, scenario=scenario)) == 0
    seen = {results(tmp_path / "all" / "toy")["steps/00/final/model.safetensors"]}
    assert wanted
    for key in EVERYTHING.keys() - {"lr", "lr_next"}:
        train = {name: value for name, value in EVERYTHING.items() if name != key}
        assert complete(settings(tmp_path / key, train=train, scenario=scenario)) == 0
        seen.add(results(tmp_path / key / "toy")["steps/00/final/model.safetensors"])
    assert len(seen) == len(EVERYTHING) - 1


@pytest.mark.parametrize("changes", [{"clip_norm": 0.05}, {"accumulate": 2, "clip_norm": 0.05, "ema": 0.7}])
def test_two_processes_learn_the_weights_of_one(tmp_path, changes):
    """Norms without batch statistics, so that they can agree; gradients long enough to be clipped."""
    folders = []
    for world in (1, 2):
        out = tmp_path / str(world)
        train = {**changes, "epochs": 2, "epochs_next": 1}
        config = settings(out, method={"name": "ewc", "weight": 5.0}, train=train)
        config["model"] = PLAIN
        assert (ranks(config, world) if world > 1 else [complete(config)]) == [0] * world
        folders.append(RunFolder(out / "toy"))
    lines = [json.loads(line) for line in (folders[0].path / "journal.jsonl").read_text().splitlines()]
    assert min(line["grad_norm"] for line in lines if line["event"] == "train") > 0.05
    for index in (0, 1):
        one, two = (load_file(folder.final(index) / "model.safetensors") for folder in folders)
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=name)
        one, two = (load_file(folder.final(index) / "method_state.safetensors") for folder in folders)
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=2e-2, atol=1e-4, msg=name)


def test_both_processes_end_a_step_with_the_same_average(tmp_path):
    """With batch norms, whose statistics differ between processes; the plug-in method compares the ranks."""
    method = {"name": f"{Path(__file__).with_name('checked_method.py')}:CheckedBuffers"}
    train = {**EVERYTHING, "epochs": 1, "epochs_next": 1, "batch": 8}
    config = settings(tmp_path, train=train, method=method)
    assert ranks(config, 2) == [0, 0]


def test_a_run_begun_before_these_settings_existed_continues(tmp_path):
    whole, begun = settings(tmp_path / "whole"), settings(tmp_path / "begun")
    assert complete(whole) == 0
    killed(begun, "iteration", 6)
    record = tmp_path / "begun" / "toy" / "run.json"
    document = content(record)
    old = {"epochs", "epochs_next", "batch", "lr", "lr_next", "schedule", "schedule_by", "power", "step_size"}
    old |= {
        "step_factor",
        "optimizer",
        "betas",
        "momentum",
        "nesterov",
        "weight_decay",
        "precision",
        "sync_norm",
    }
    old |= {"threads", "checkpoint_every", "log_every", "max_time", "max_iterations", "eval_batch"}
    assert old < document["config"]["train"].keys() == TrainConfig.model_fields.keys()
    document["config"]["train"] = {key: document["config"]["train"][key] for key in old}
    record.write_text(json.dumps(document))
    assert complete(begun) == 0
    assert results(tmp_path / "begun" / "toy") == results(tmp_path / "whole" / "toy")


def test_a_bundle_holds_the_average_and_passes_the_settings_on(tmp_path):
    train = {**EVERYTHING, "epochs": 1, "epochs_next": 1}
    config = settings(tmp_path, train=train, data={"evaluation": "whole"})
    folder = everseg.run(config, quiet=True).folder
    everseg.export(folder.path, tmp_path / "bundle", onnx=False)
    kept, raw = (load_file(folder.final(1) / f"{name}.safetensors") for name in ("model", "raw"))
    bundled = load_file(tmp_path / "bundle" / "model.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in bundled.items())
    assert not all(torch.equal(value, kept[name]) for name, value in raw.items())
    recipe = json.loads((tmp_path / "bundle" / "lineage.json").read_text())["recipe"]["train"]
    told = load(None, train={**EVERYTHING, "batch": 4}).model_dump(mode="json")["train"]
    assert {key: recipe[key] for key in EVERYTHING} == {key: told[key] for key in EVERYTHING}


@pytest.mark.parametrize(("key", "value"), [("ema", 0.9), ("accumulate", 2), ("clip_norm", 1.0)])
def test_another_value_is_another_run(tmp_path, key, value):
    config = settings(tmp_path, train={"epochs": 1, "epochs_next": 1})
    assert complete(config) == 0
    with pytest.raises(ConfigError, match=rf"train\.{key}: "):
        everseg.run(settings(tmp_path, train={"epochs": 1, "epochs_next": 1, key: value}), quiet=True)


def test_impossible_settings_are_named_together():
    with pytest.raises(ConfigError) as caught:
        load(
            None,
            [
                "train.batch=6",
                "train.accumulate=4",
                "train.momentum=0",
                "train.warmup=5",
                "train.warmup_share=0.1",
            ],
        )
    text = str(caught.value)
    must_say(text, "train.warmup_share", "train.warmup both", "one of them")
    assert "train.accumulate: 6 images per batch cannot be cut into 4 equal parts" in text
    assert "train.nesterov: needs train.momentum > 0" in text
    with pytest.raises(ConfigError) as caught:
        load(
            None,
            ["train.lr_factors.encodr=2", "train.lr_factors.heads=0", "train.ema=1", "train.clip_norm=0"],
        )
    text = str(caught.value)
    for part in (
        "train.lr_factors.encodr: unknown key; did you mean 'train.lr_factors.encoder'?",
        "train.lr_factors.heads: expected number > 0, got 0",
        "train.ema: expected number > 0 and < 1 or null, got 1",
        "train.clip_norm: expected number > 0 or null, got 0",
    ):
        assert part in text
    factors = load(
        None, ["train.lr_factors={encoder: 0.1}", "train.lr_factors.new_heads=10"]
    ).train.lr_factors
    assert (factors.encoder, factors.heads, factors.new_heads) == (0.1, 1.0, 10.0)


def test_parts_that_processes_cannot_share_are_refused(tmp_path):
    assert ranks(settings(tmp_path, train={"batch": 4, "accumulate": 4}), 2) == [2, 2]


def test_a_part_of_one_image_is_too_small_for_a_norm_over_one_pixel(tmp_path):
    """As a batch of one image is: the pooled map of the whole image has one pixel."""
    options = {"widths": [8, 8, 8, 8], "hidden": 8, "pool_size": 0}
    config = settings(tmp_path, train={"accumulate": 4}, model={"options": options})
    with pytest.raises(ConfigError, match=r"(?s)2 problems\n  step 0: batch norm.*two images"):
        everseg.run(config, quiet=True)
    assert list(tmp_path.iterdir()) == []  # before anything is trained


def test_a_network_without_layers_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.layer_decay"):
        everseg.run({**settings(tmp_path, train={"layer_decay": 0.5}), "model": PLAIN}, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_warm_up_longer_than_the_step_is_told(tmp_path, capfd):
    config = settings(tmp_path, train={"epochs": 1, "epochs_next": 1, "warmup": 6})
    everseg.run(config)
    told = capfd.readouterr()
    assert "step 0: train.warmup lasts 6 iterations and the step 6" in told.out + told.err
