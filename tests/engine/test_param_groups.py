"""Learning rates by part and by depth, and weight decay for matrices alone."""

from __future__ import annotations

import pytest
import torch
from plain_model import build as plain
from torch import nn

from everseg.config.fields import LrFactors, ModelConfig, TrainConfig
from everseg.engine.optim import check_param_groups, make_optimizer
from everseg.engine.param_groups import encoder_layers, split_by_rate
from everseg.errors import ConfigError
from everseg.labels import LabelSpace
from everseg.methods.base import Method
from everseg.methods.ft import FineTuning
from everseg.methods.mdil import MDIL
from everseg.models.build import build_model
from everseg.models.erfnet import erfnet
from everseg.models.model import SegmentationModel
from everseg.scenarios.steps import Source, Step

SPACE = LabelSpace(((0, 1), (2,)), ("x", "y", "z"))
FIRST = Step(
    0,
    (Source("default", "d", "t", (), b""),),
    (),
    {"default": LabelSpace(((0, 1),), ("x", "y"))},
    {"default": 2},
)
SECOND = Step(1, FIRST.train, (), {"default": SPACE}, {"default": 1})


def tiny() -> SegmentationModel:
    options = {"widths": [4, 4, 4, 4], "hidden": 4, "out_channels": 4}
    return build_model(ModelConfig(name="deeplabv3-tiny", norm="bn", options=options))


def rates(model: SegmentationModel, train: TrainConfig, step: Step = SECOND, method: Method | None = None):
    """Name of each weight -> its learning rate at a base of 1, and its weight decay."""
    groups = (method or FineTuning()).param_groups(model, step)
    split = split_by_rate(groups, model, step, train)
    check_param_groups(model, split)
    names = {id(weight): name for name, weight in model.named_parameters()}
    return {
        names[id(weight)]: (group["lr"], group["weight_decay"])
        for group in make_optimizer(split, train, lr=1.0).param_groups
        for weight in group["params"]
    }


@pytest.fixture
def model() -> SegmentationModel:
    made = tiny()
    for step in (FIRST, SECOND):
        made.grow(step.grows)
    return made


def test_nothing_asked_for_leaves_the_groups_of_the_method_alone(model):
    groups = FineTuning().param_groups(model, SECOND)
    assert split_by_rate(groups, model, SECOND, TrainConfig(layer_decay=1.0)) is groups


def test_every_part_has_its_factor(model):
    factors = LrFactors(encoder=0.1, decoder=2.0, heads=10.0, old_heads=3.0)
    found = rates(model, TrainConfig(lr_factors=factors))
    for name, (rate, decay) in found.items():
        part = name.partition(".")[0]
        wanted = {"encoder": 0.1, "decoder": 2.0, "heads": 10.0}[part]
        assert rate == (3.0 if name.startswith("heads.default.classifiers.0") else wanted), name
        assert decay == 1e-4
    assert {rate for rate, _ in found.values()} == {0.1, 2.0, 10.0, 3.0}


def test_every_classifier_of_the_first_step_is_new():
    model = tiny()
    model.grow(FIRST.grows)
    found = rates(model, TrainConfig(lr_factors=LrFactors(new_heads=7.0, old_heads=2.0)), FIRST)
    assert {rate for name, (rate, _) in found.items() if name.startswith("heads")} == {7.0}
    assert {rate for name, (rate, _) in found.items() if not name.startswith("heads")} == {1.0}


def test_factors_multiply_those_of_the_method():
    """MDIL: shared weights at 0.01, a branch's own at 1; here the encoder at a tenth of either."""
    model = erfnet(widths=(4, 8, 12), blocks=(1, 1))
    space = {"a": FIRST.spaces["default"], "b": FIRST.spaces["default"]}
    for branch in space:
        model.grow({branch: 2})
    step = Step(1, (Source("b", "d", "t", (), b""),), (), space, {"b": 2})
    model.freeze(branches=("a",))
    found = rates(model, TrainConfig(lr_factors=LrFactors(encoder=0.1)), step, MDIL())
    assert {rate for name, (rate, _) in found.items() if ".b." in name and "encoder" in name} == {0.1}
    assert found["encoder.down1.conv.weight"][0] == pytest.approx(0.001)
    assert {rate for name, (rate, _) in found.items() if "heads.b" in name} == {1.0}


def test_layers_of_the_resnet_are_stem_and_stages(model):
    found = rates(model, TrainConfig(layer_decay=0.5, lr_factors=LrFactors(encoder=2.0)))
    wanted = {
        "conv1": 1 / 32,
        "bn1": 1 / 32,
        "layer1": 1 / 16,
        "layer2": 1 / 8,
        "layer3": 1 / 4,
        "layer4": 1 / 2,
    }
    for name, (rate, _) in found.items():
        part, _, rest = name.partition(".")
        assert rate == (2 * wanted[rest.partition(".")[0]] if part == "encoder" else 1.0), name


def test_layers_of_erfnet_hold_what_branches_own():
    model = erfnet(widths=(4, 8, 12), blocks=(1, 1))
    model.grow({"default": 2})
    model.grow({"default": 1})
    found = rates(model, TrainConfig(layer_decay=0.5))
    wanted = {"1": 0.125, "2": 0.25, "3": 0.5}
    for name, (rate, _) in found.items():
        part, stage, *_ = name.split(".")
        assert rate == (wanted[stage[-1]] if part == "encoder" else 1.0), name


def test_weights_of_one_dimension_can_be_left_undecayed(model):
    found = rates(model, TrainConfig(decay_norms=False, weight_decay=0.3))
    for name, weight in model.named_parameters():
        assert found[name] == (1.0, 0.0 if weight.ndim == 1 else 0.3), name
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(found[f"{name}.weight"][1] == 0 for name in norms)


def test_an_update_moves_every_weight_by_its_own_rate(model):
    """By hand: SGD without momentum moves a weight by -rate * (1 + decay * weight) for a gradient of 1."""
    train = TrainConfig(
        momentum=0.0, nesterov=False, weight_decay=0.1, decay_norms=False, layer_decay=0.5,
        lr_factors=LrFactors(heads=4.0),
    )  # fmt: skip
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    split = split_by_rate(FineTuning().param_groups(model, SECOND), model, SECOND, train)
    optimizer = make_optimizer(split, train, lr=0.5)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    now = dict(model.named_parameters())
    for name, rate, decay in (
        ("encoder.conv1.weight", 0.5 / 32, 0.1),
        ("encoder.bn1.weight", 0.5 / 32, 0.0),
        ("heads.default.classifiers.1.weight", 2.0, 0.1),
        ("heads.default.classifiers.0.bias", 2.0, 0.0),
    ):
        wanted = before[name] - rate * (1 + decay * before[name])
        torch.testing.assert_close(now[name].detach(), wanted, msg=name)


def test_an_encoder_that_says_nothing_of_its_layers_is_refused():
    model = plain()
    model.grow({"default": 2})
    with pytest.raises(ConfigError, match=r"train\.layer_decay: the encoder Encoder.*parameter_layers"):
        encoder_layers(model.encoder)
    model.encoder.parameter_layers = lambda: [[model.encoder.layers[0].weight]]
    with pytest.raises(ConfigError, match=r"leaves out layers\.0\.bias and 2 more"):
        encoder_layers(model.encoder)
