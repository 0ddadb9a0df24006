"""The adapter to timm, against a stand-in with timm's feature interface, and timm itself where it can be imported."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
from fake_timm import Net, Timm
from safetensors.torch import save_file

from everseg.config.fields import ModelConfig
from everseg.errors import CheckpointError, ConfigError
from everseg.models.adapters.timm import _from_efficientnet_pytorch
from everseg.models.build import build_model, from_description


@pytest.fixture
def timm(monkeypatch) -> Timm:
    module = Timm()
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


def build(encoder: str = "timm:toynet", name: str = "mlp", **changes):
    torch.manual_seed(2)
    options = {
        "hidden": 8,
        **({"out_channels": 8} if name == "deeplabv3" else {}),
        **changes.pop("options", {}),
    }
    model = build_model(ModelConfig(name=name, encoder=encoder, options=options, **changes))
    model.grow({"default": 3})
    return model


@pytest.mark.parametrize("name", ["mlp", "deeplabv3"])
@pytest.mark.parametrize("encoder", ["timm:toynet", "timm:swinny"])
def test_maps_become_taps_and_odd_sizes_work(encoder, name, timm):
    model = build(encoder, name).train()
    assert model.encoder.taps == {f"layer{k}": (4 * (k + 1), 2 << k) for k in (1, 2, 3, 4)}  # the last four
    features = model(torch.randn(2, 3, 75, 40))["default"].features
    assert [tuple(features[f"layer{k}"].shape[1:]) for k in (1, 2, 3, 4)] == [
        (8, 19, 10), (12, 10, 5), (16, 5, 3), (20, 3, 2)
    ]  # fmt: skip
    model(torch.randn(2, 3, 64, 64))["default"].logits.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_a_description_rebuilds_the_model_without_weights_of_others(timm):
    model = build(options={"config": {"width": 2}, "taps": [1, 3]}).eval()
    again = from_description(model.describe())
    assert timm.calls[-1] == {"name": "toynet", "pretrained": False, "width": 2, "out_indices": (1, 3)}
    again.load_state_dict(model.state_dict(), strict=True)
    image = torch.randn(1, 3, 50, 50)
    assert torch.equal(again.eval()(image)["default"].logits, model(image)["default"].logits)
    assert list(again.encoder.taps.values()) == [(4, 4), (8, 16)]


def test_images_of_other_channels(timm):
    config = ModelConfig(name="mlp", encoder="timm:toynet", options={"hidden": 8})
    model = build_model(config, in_channels=4)
    assert timm.calls[-1]["in_chans"] == 4
    model.grow({"default": 2})
    again = from_description(model.describe())
    again.load_state_dict(model.state_dict(), strict=True)
    image = torch.randn(1, 4, 50, 50)
    assert torch.equal(again.eval()(image)["default"].logits, model.eval()(image)["default"].logits)
    own = config.model_copy(update={"options": {"config": {"in_chans": 4}}})
    with pytest.raises(ConfigError, match=r"in_chans"):
        build_model(own, in_channels=4)


def weights(path: Path, **changes) -> dict[str, torch.Tensor]:
    torch.manual_seed(9)
    state = {f"{name}": value.clone() for name, value in Net().state_dict().items()}
    save_file({**state, "fc.weight": torch.zeros(2, 20), **changes}, path)
    return state


def test_a_tag_names_weights_in_the_cache_and_a_file_replaces_them(timm, tmp_path, monkeypatch):
    state = weights(tmp_path / "model.safetensors")
    asked = []

    def fake(repo, filename, *, revision, local_files_only):
        asked.append((repo, filename, local_files_only))
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake)
    tagged = build("timm:toynet.in1k")
    assert asked == [("timm/toynet.in1k", "model.safetensors", True)]
    given = build("timm:toynet", weights=str(tmp_path / "model.safetensors"))
    with (
        torch.device("meta"),
        warnings.catch_warnings(),
    ):  # a method is tried on such a network before training
        warnings.simplefilter("error")
        assert {value.device.type for value in build("timm:toynet.in1k").state_dict().values()} == {"meta"}
    for model in (tagged, given):
        assert all(torch.equal(value, state[n]) for n, value in model.encoder.body.state_dict().items())
        assert model.describe()["options"]["encoder"]["type"] == "toynet"
    assert tagged.describe()["options"]["encoder"]["inputs"]["scale"] == pytest.approx([0.916, 0.896, 0.9])
    assert given.describe()["options"]["encoder"]["inputs"] is None  # a file does not say


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages.0.weight": torch.zeros(1)}, "do not fit 'toynet'.*stages.0.weight"),
        ({"more": torch.zeros(1)}, "do not fit 'toynet'.*more"),
        ({"stages.0.bias": torch.full((4,), float("nan"))}, "not finite: stages.0.bias"),
    ],
)
def test_weights_that_do_not_fit_are_told(changes, words, timm, tmp_path):
    weights(tmp_path / "x.safetensors", **changes)
    with pytest.raises(CheckpointError, match=words):
        build(weights=str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"encoder": "timm:toynett"}, "no model 'toynett'"),
        ({"encoder": "timm:hf-hub:someone/x"}, "no model 'hf-hub:someone/x'"),
        ({"encoder": "timm:toynet.mine"}, "names no file.*model.weights=FILE"),
        ({"options": {"config": {"pretrained": True}}}, "pretrained cannot be set"),
        ({"options": {"config": {"checkpoint_path": "x"}}}, "checkpoint_path cannot be set"),
        ({"options": {"config": {"colour": 1}}}, "no argument colour"),
        ({"options": {"taps": ["stage1"]}}, "timm's feature maps"),
        ({"options": {"taps": [4, 1]}}, "fine to coarse"),
    ],
)
def test_what_cannot_be_is_told(config, words, timm):
    with pytest.raises(ConfigError, match=words):
        build(**config)


def test_a_checkpoints_description_cannot_fetch_anything(timm):
    described = build().describe()
    for changes in (
        {"type": "hf-hub:someone/x"},
        {"type": "local-dir:x"},
        {"config": {"pretrained": True}},
        {"config": {"pretrained_cfg": {"url": "http://x"}}},
        {"config": {"cache_dir": "x"}},
        {"config": {"colour": "hf-hub:someone/x"}},
        {"config": {"width": {"url": "http://x"}}},
        {"config": {"width": [[], {}]}},
        {"config": {"width": "x" * 100}},
    ):
        bad = {**described, "options": {**described["options"]}}
        bad["options"]["encoder"] = {**described["options"]["encoder"], **changes}
        with pytest.raises(CheckpointError, match=r"no model|cannot be set|no argument|expected numbers"):
            from_description(bad)


def test_weights_in_efficientnet_pytorchs_names_become_timms():
    """A first block that does not expand, and one that does and squeezes; real ones: `everseg.interop.weights`."""
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    expanding = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
                 "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand", "_project_conv": "conv_pwl",
                 "_bn2": "bn3"}  # fmt: skip
    theirs = ["_conv_stem", "_bn0", *(f"_blocks.0.{part}" for part in plain)]
    theirs += [*(f"_blocks.1.{part}" for part in expanding), "_conv_head", "_bn1"]
    wanted = ["conv_stem", "bn1", *(f"blocks.0.0.{part}" for part in plain.values())]
    wanted += [*(f"blocks.1.0.{part}" for part in expanding.values()), "conv_head", "bn2"]
    state = {f"{name}.weight": torch.tensor(float(i)) for i, name in enumerate(theirs)} | {
        "_fc.bias": torch.zeros(1)
    }
    found = _from_efficientnet_pytorch(
        state, dict.fromkeys([f"{name}.weight" for name in wanted], torch.zeros(1))
    )
    assert {name: int(value) for name, value in found.items()} == {
        f"{name}.weight": i for i, name in enumerate(wanted)
    }


def test_timm_itself():
    try:
        import timm

        assert timm.create_model
    except Exception as error:
        pytest.skip(f"timm cannot be imported (it needs a torchvision that fits torch): {error}")
    for encoder, config in (
        ("timm:resnet18", {}),
        ("timm:convnext_atto", {}),
        ("timm:swin_tiny_patch4_window7_224", {"strict_img_size": False}),
        ("timm:vit_tiny_patch16_224", {"dynamic_img_size": True, "depth": 4}),
    ):
        model = build(encoder, options={"config": config}).train()
        output = model(torch.randn(2, 3, 75, 64))["default"]
        output.logits.square().mean().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
        again = from_description(model.describe())
        again.load_state_dict(model.state_dict(), strict=True)
