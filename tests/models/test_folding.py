"""A folded copy computes what its model computes in eval mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing import assert_close

from everseg.models.blocks import synchronise_norms
from everseg.models.build import deeplabv3
from everseg.models.erfnet import erfnet
from everseg.models.folding import folded_copy
from everseg.models.model import SegmentationModel

SMALL = {"stem": 4, "widths": (4, 4, 6, 8), "hidden": 4, "out_channels": 6, "rates": (1, 2, 3)}


def build(kind: str) -> SegmentationModel:
    name, _, option = kind.partition(" ")
    if name == "erfnet":
        return erfnet(per_branch=option, widths=(4, 8, 16), blocks=(1, 2))
    if name == "basic":
        return deeplabv3(blocks=(1, 1, 1, 1), bottleneck=False, per_branch=option, **SMALL)
    return deeplabv3(blocks=(1, 2, 1, 1), norm=option, **SMALL)


def lived(model: SegmentationModel) -> SegmentationModel:
    """Weights, signs included, and running statistics that differ from their start; two branches."""
    model.grow({"a": 3})
    model.grow({"b": 2})
    model.grow({"a": 2})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.weight.normal_()
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.double().train()


KINDS = {
    "bottleneck bn": 0, "bottleneck abn": 0, "bottleneck iabn": 0, "basic head": 0, "basic decoder": 0,
    "basic adapter": 24, "erfnet head": 3, "erfnet decoder": 3, "erfnet adapter": 18,
}  # fmt: skip
"""Model -> norms that stay: one after a convolution and a pooling, and a branch's own after a shared convolution."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_copy_is_the_same_function(kind):
    torch.manual_seed(0)
    model, image = lived(build(kind)), torch.randn(2, 3, 33, 40, dtype=torch.float64)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    folded = folded_copy(model)
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    expected = model.eval()(image)
    for branch, output in folded(image).items():
        assert_close(output.logits, expected[branch].logits, rtol=1e-9, atol=1e-9)
        assert_close(output.features["encoder"], expected[branch].features["encoder"], rtol=1e-9, atol=1e-9)
    assert not any(p.requires_grad for p in folded.parameters())
    assert not folded.training
    assert sum(isinstance(m, _BatchNorm) for m in folded.modules()) == KINDS[kind]


def test_synchronised_norms_fold_too():
    model = lived(build("bottleneck iabn"))
    image = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    expected = folded_copy(model)(image)["a"].logits
    assert_close(folded_copy(synchronise_norms(model))(image)["a"].logits, expected)


def test_a_norm_without_statistics_stays():
    model = lived(build("bottleneck bn"))
    model.encoder.bn1 = nn.BatchNorm2d(4, track_running_stats=False).double()
    assert isinstance(folded_copy(model).encoder.bn1, nn.BatchNorm2d)


def test_which_encoders_are_constant():
    model = build("bottleneck bn")
    model.grow({"a": 2})
    assert not model.encoder_is_constant
    model.freeze(encoder=True)
    assert model.encoder_is_constant
    model.freeze(encoder=True, statistics=False)
    assert not model.encoder_is_constant
    model.freeze(encoder=True)
    next(model.encoder.parameters()).requires_grad_(True)  # thawed by a method
    assert not model.encoder_is_constant
    for kind, constant in (("basic adapter", False), ("erfnet head", True)):  # a branch's own norms; dropout
        other = build(kind)
        other.grow({"a": 2})
        other.freeze(encoder=True)
        assert other.encoder_is_constant is constant
        assert other.train().encoder.training is not constant
