"""Taps before the last activation, frozen decoders and classifiers, and structural changes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from everseg.errors import ConfigError
from everseg.models.build import deeplabv3_tiny, from_description
from everseg.models.erfnet import erfnet
from everseg.models.model import Restructured, SegmentationModel
from saying import must_say


def deeplab(norm: str = "abn", **options) -> SegmentationModel:
    torch.manual_seed(0)
    model = deeplabv3_tiny(norm=norm, **options)
    model.grow({"default": 3})
    return model.eval()


def street() -> SegmentationModel:
    torch.manual_seed(0)
    model = erfnet(widths=(4, 8, 12), blocks=(1, 2))
    model.grow({"day": 3})
    return model.eval()


@pytest.mark.parametrize("norm", ["bn", "abn", "iabn"])
def test_a_stage_is_its_map_before_the_activation_activated(norm):
    model, image = deeplab(norm), torch.randn(2, 3, 32, 40)
    plain = model(image)["default"]
    both = model(image, taps=("before_activation",))["default"]
    assert torch.equal(plain.logits, both.logits)
    assert not any(name.endswith(".pre") for name in plain.features)
    for name in ("layer1", "layer2", "layer3", "layer4"):
        before, after = both.features[f"{name}.pre"], both.features[name]
        assert (before < 0).any()
        expected = before.clamp(min=0) if norm == "bn" else torch.where(before > 0, before, before * 0.01)
        assert torch.equal(after, expected)
        assert torch.equal(after, plain.features[name])
    assert both.features["encoder"] is both.features["layer4"]


def test_erfnet_has_the_same_taps_by_branch():
    model, image = street(), torch.randn(1, 3, 24, 32)
    plain, both = model(image)["day"], model(image, taps=("before_activation",))["day"]
    assert torch.equal(plain.logits, both.logits)
    for name in ("down1", "down2", "down3"):
        assert torch.equal(both.features[name], both.features[f"{name}.pre"].relu())
    assert list(plain.features) == ["down1", "down2", "down3", "encoder", "decoder"]


def test_gradient_flows_through_the_map_before_the_activation():
    model = deeplab().train()
    output = model(torch.randn(2, 3, 32, 32), taps=("before_activation",))["default"]
    output.features["layer4.pre"].square().sum().backward()
    assert model.encoder.layer4[-1].conv2.weight.grad.abs().sum() > 0
    assert model.head("default").classifiers[0].weight.grad is None


def test_an_encoder_without_such_maps_is_not_asked_for_them():
    class Plain(nn.Module):
        out_channels = 4

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, image: Tensor) -> dict[str, Tensor]:
            return {"only": self.conv(image)}

    class Head(nn.Module):
        out_channels = 4

        def forward(self, features):
            return features["encoder"]

    model = SegmentationModel(Plain(), Head())
    model.grow({"a": 2})
    output = model(torch.randn(1, 3, 8, 8), taps=("before_activation",))["a"]
    assert set(output.features) == {"only", "encoder", "decoder"}


def test_a_single_tap_is_asked_for_by_its_name():
    model, image = deeplab(), torch.randn(1, 3, 32, 32)
    every = model(image, taps=("before_activation",))["default"].features
    found = model(image, taps=("layer3.pre",))["default"].features
    assert [name for name in found if name.endswith(".pre")] == ["layer3.pre"]
    assert torch.equal(found["layer3.pre"], every["layer3.pre"])
    assert set(model.encode(image, taps=("layer3.pre",))) == {*model.encode(image), "layer3.pre"}
    assert {*found, *every} == {*model.tap_names()}


@pytest.mark.parametrize("tap", ["layer9", "layer5.pre", "attention1"])
def test_a_tap_that_is_not_there_is_refused_with_those_that_are(tap):
    model = deeplab().train()
    for call in (model, model.encode):
        with pytest.raises(ConfigError) as error:
            call(torch.randn(2, 3, 32, 32), taps=(tap,))
        must_say(error.value, tap, "layer1.pre", "layer4", "decoder")
    assert all(module.training for module in model.modules())


def test_the_taps_of_a_network_by_branch_are_those_of_its_first_branch():
    model = street()
    names = {f"down{k}{end}" for k in (1, 2, 3) for end in ("", ".pre")}
    assert {*model.tap_names()} == {*names, "encoder", "decoder"}
    with pytest.raises(ConfigError, match="grow"):
        erfnet(widths=(4, 8, 12), blocks=(1, 2), per_branch="norm").tap_names()


def trained_once(model: SegmentationModel) -> set[str]:
    """Names of the tensors that one update of everything trainable moves."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    model.train()
    model(torch.randn(2, 3, 32, 32))["default"].logits.square().sum().backward()
    optimizer.step()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_a_frozen_decoder_stands_still_with_its_statistics():
    model = deeplab()
    model.freeze(decoder=True)
    moved = trained_once(model)
    assert moved == {name for name in model.state_dict() if not name.startswith("decoder.")}


def test_a_frozen_decoder_may_move_its_statistics():
    model = deeplab()
    model.freeze(decoder=True, statistics=False)
    moved = trained_once(model)
    own = {name for name, _ in model.named_parameters() if name.startswith("decoder.")}
    assert not moved & own
    assert "decoder.norm.running_mean" in moved


def test_old_classifiers_freeze_by_number():
    model = deeplab()
    model.grow({"default": 2})
    model.freeze(heads={"default": 1})
    moved = trained_once(model)
    head = {name for name in model.state_dict() if name.startswith("heads.")}
    assert moved & head == {f"heads.default.classifiers.1.{leaf}" for leaf in ("weight", "bias")}
    model.freeze()
    assert trained_once(model) >= head


@pytest.mark.parametrize("number", [3, -1])
def test_more_classifiers_than_there_are_cannot_freeze(number):
    model = deeplab()
    with pytest.raises(ConfigError, match=r"default.*1"):
        model.freeze(heads={"default": number})


class Biased(Restructured):
    """A convolution that gets a bias, and is settled from then on."""

    changes_known = ("add-bias",)
    out_channels = 4

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.settled = False

    def forward(self, features):
        return self.norm(self.conv(features["encoder"]))

    def restructure(self, name: str) -> None:
        if self.conv.bias is None:
            self.conv.bias = nn.Parameter(torch.ones(4))
        self.settled = True

    def freeze_changed(self) -> None:
        if self.settled:
            self.conv.requires_grad_(False)

    def rest_changed(self) -> None:
        if self.settled:
            self.norm.eval()


def biased() -> SegmentationModel:
    encoder = nn.Module()
    encoder.conv = nn.Conv2d(3, 4, 3)
    encoder.forward = lambda image: {"only": encoder.conv(image)}
    return SegmentationModel(encoder, Biased(), {"name": "file.py:biased", "options": {}})


def test_a_structural_change_is_replayed_from_the_description():
    model = biased()
    model.grow({"a": 2})
    assert "changes" not in model.describe()
    model.restructure("add-bias")
    described = json.loads(json.dumps(model.describe()))
    assert described["changes"] == ["add-bias"]
    rebuilt = from_description(described, builder=biased)
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    assert rebuilt.describe() == described
    with pytest.raises(ConfigError, match="merge"):
        model.restructure("merge")


def test_what_a_change_has_settled_stays_so_after_freeze_and_train():
    model = biased()
    model.grow({"a": 2})
    model.restructure("add-bias")
    model.freeze()
    model.train()
    assert not model.decoder.conv.weight.requires_grad
    assert model.heads["a"].classifiers[0].weight.requires_grad
    assert not model.decoder.norm.training
    assert model.encoder.training
