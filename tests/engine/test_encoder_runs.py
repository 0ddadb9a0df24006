"""Whole runs on library encoders: two steps with a teacher, dropout and stochastic depth, killed and continued."""

from __future__ import annotations

import json
import math

import pytest
import torch
from encoders import TYPES, need_transformers
from processes import complete, killed, ranks, results
from toy import settings

import everseg
from everseg.errors import ConfigError
from everseg.runs.model_folder import load_model
from saying import must_say

need_transformers()


def configured(out, kind: str = "segformer", decoder: str = "mlp", **changes) -> dict:
    dropping = {"drop_path_rate": 0.3, "hidden_dropout_prob": 0.2} if kind in ("segformer", "swin") else {}
    options = {"config": {**TYPES[kind], **dropping}, "hidden": 8}
    if decoder == "deeplabv3":
        options |= {"out_channels": 8}
    config = settings(out, **changes)
    config["data"] |= {"options": {"train": 16, "val": 4}}
    return {**config, "model": {"name": decoder, "encoder": f"hf:{kind}", "options": options}}


def test_a_killed_run_continues_to_the_same_bytes_through_dropout(tmp_path):
    undisturbed, disturbed = configured(tmp_path / "a"), configured(tmp_path / "b")
    assert complete(undisturbed) == 0
    expected = results(tmp_path / "a" / "toy")
    assert len(expected) == 14
    for flush in (2, 9):
        killed(disturbed, "flush", flush)
    assert complete(disturbed) == 0
    assert results(tmp_path / "b" / "toy") == expected


@pytest.mark.parametrize(
    ("kind", "name", "method"),
    [
        ("segformer", "mlp", "mib"),
        ("convnext", "deeplabv3", "mib"),
        ("resnet", "deeplabv3", "ilt"),
        ("swin", "mlp", "plop"),
        ("dinov2", "mlp", "ilt"),
    ],
)
def test_two_steps_with_a_teacher(kind, name, method, tmp_path, capsys):
    config = configured(
        tmp_path, kind, name, method={"name": method}, train={"epochs": 1, "epochs_next": 1, "log_every": 1}
    )
    run = everseg.run(config)
    # Swin's stages have no last activation, which PLOP's distances are taken before.
    assert ("layer1, layer2, layer3, layer4" in capsys.readouterr().err) == (method == "plop")
    lines = map(json.loads, (run.path / "journal.jsonl").read_text().splitlines())
    terms = [line["terms"] for line in lines if "terms" in line]
    assert all(math.isfinite(value) for term in terms for value in term.values())
    held = {"mib": {"kd"}, "ilt": {"kd", "feature"}, "plop": {"pod"}}[method]
    assert held | {"ce"} == set(terms[-1])
    assert all(max(term.get(name, 0) for term in terms) > 0 for name in held)
    model, about = load_model(tmp_path / "toy" / "steps" / "01" / "final")
    before, _ = load_model(tmp_path / "toy" / "steps" / "00" / "final")
    assert model.growth == [{"default": 3}, {"default": 1}]
    assert about.spaces["default"].num_classes == 4
    image = torch.randn(1, 3, 41, 37)
    taps, old = model(image)["default"].features, before(image)["default"].features
    assert {n: t.shape for n, t in taps.items()} == {n: t.shape for n, t in old.items()}
    assert not torch.equal(taps["encoder"], old["encoder"])  # it was trained in step 1


def test_bf16_frozen_and_two_processes_run(tmp_path):
    frozen = configured(
        tmp_path, "dinov2", "deeplabv3", name="frozen", method={"freeze_encoder": True, "freeze_from": 0},
        train={"precision": "bf16", "epochs": 1, "epochs_next": 1},
    )  # fmt: skip
    everseg.run(frozen, quiet=True)
    first, second = (load_model(tmp_path / "frozen" / "steps" / s / "final")[0] for s in ("00", "01"))
    for name, value in first.encoder.state_dict().items():
        assert torch.equal(value, second.encoder.state_dict()[name])
    both = configured(tmp_path, "swin", "deeplabv3", name="both", train={"epochs": 1, "epochs_next": 1})
    assert ranks(both, 2) == [0, 0]
    assert (tmp_path / "both" / "steps" / "01" / "metrics.json").exists()


TINY = {
    "swin-b": "swin", "mit-b2": "segformer", "vit-b": "beit", "convnext-t": "convnext", "dinov2-s": "dinov2",
    "dinov2-b": "dinov2", "dinov3-s": "dinov3_vit", "dinov3-b": "dinov3_vit",
}  # fmt: skip
"""Network of the presets -> the type of a tiny one of its family."""


@pytest.mark.parametrize(
    "network", [name if name == "vit-b" else pytest.param(name, marks=pytest.mark.slow) for name in TINY]
)
def test_networks_of_presets_train_at_reduced_size(network, tmp_path):
    """Two steps of an iteration each; only the encoder's size and weights are others."""
    kind = TINY[network]
    changes = [
        f"model.encoder=hf:{kind}", f"model.options={json.dumps({'config': TYPES[kind], 'hidden': 8})}",
        "train.max_iterations=1", "train.batch=2", "data.options={num_train: 8, num_val: 2}", "report=false",
        f"out={tmp_path}",
    ]  # fmt: skip
    run = everseg.run(f"demo-mib@{network}", overrides=changes, quiet=True)
    final, before = (load_model(run.path / "steps" / step / "final")[0] for step in ("01", "00"))
    moved = [not torch.equal(a, b) for a, b in zip(final.parameters(), before.parameters(), strict=False)]
    assert any(moved)
    encoders = [{**model.encoder.state_dict()} for model in (before, final)]
    same = all(torch.equal(value, encoders[1][name]) for name, value in encoders[0].items())
    assert same == network.startswith("dino")  # frozen


def test_a_user_without_the_weights_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ConfigError) as error:
        everseg.run("demo-mib@swin-b", overrides=[f"out={tmp_path}"], quiet=True)
    must_say(error.value, "hf:microsoft/swin-base-patch4-window7-224-in22k", "model.download=true")
    assert not list(tmp_path.glob("demo*"))
