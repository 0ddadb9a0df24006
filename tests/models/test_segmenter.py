"""Segmenter on encoders of transformers: grids, odd sizes, checkpoints, gradients of every weight."""

from __future__ import annotations

import json

import pytest
import torch
from encoders import TYPES, need_transformers, tiny
from torch.testing import assert_close

from everseg.config.fields import ModelConfig
from everseg.errors import ConfigError
from everseg.models.build import build_model, configured_name, from_description
from everseg.models.patches import PatchDecoder
from everseg.models.token_head import TokenHead
from saying import must_say

need_transformers()
EVERYDAY = ("segformer", "dinov2", "resnet")


def grown(kind: str, **options):
    model = tiny(kind, "segmenter", options={"layers": 1, **options})
    model.grow({"default": 3})
    return model


def grid_of(kind: str) -> int:
    return {"dinov2": 14, "dinov2_with_registers": 14}.get(kind, 16)


@pytest.mark.parametrize(
    "kind", [k if k in EVERYDAY else pytest.param(k, marks=pytest.mark.slow) for k in TYPES]
)
def test_every_family_trains_whole_and_takes_odd_sizes(kind):
    model = grown(kind).train()
    output = model(torch.randn(2, 3, 64, 96))["default"]
    (output.logits.square().mean() + output.features["class_features"].mean()).backward()
    # DDP refuses weights without gradient
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    model.eval()
    stride = grid_of(kind)
    for height, width in ((75, 53), (33, 97), (9, 20)):
        found = model(torch.randn(1, 3, height, width))["default"]
        size = (-(-height // stride), -(-width // stride))
        assert found.logits.shape == (1, 3, *size)
        assert found.features["patches"].shape[2:] == size
        assert found.logits.isfinite().all()


@pytest.mark.parametrize("kind", ["segformer", "dinov2"])
def test_a_description_rebuilds_the_model(kind):
    model = grown(kind).eval()
    model.grow({"default": 2})
    described = json.loads(json.dumps(model.describe()))
    again = from_description(described)
    again.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(1, 3, 40, 56)
    assert torch.equal(again.eval()(x)["default"].logits, model(x)["default"].logits)
    assert configured_name(described["name"]) == "segmenter"


def test_maps_of_all_strides_meet_on_one_grid():
    taps = {"layer1": (3, 4), "layer2": (5, 8), "layer3": (4, 32)}
    torch.manual_seed(0)
    decoder = PatchDecoder(taps, hidden=6, stride=8).double()
    assert decoder.grid == 8
    size = (21, 35)
    features = {
        name: torch.randn(1, channels, *(-(-side // stride) for side in size), dtype=torch.float64)
        for name, (channels, stride) in taps.items()
    }
    found = decoder(features)
    assert found.shape == (1, 6, 3, 5)

    def projected(name, vectors):  # (n, C)
        return decoder.project[name](decoder.norms[name](vectors))

    row, column = 2, 4  # the last cell, which reaches beyond the image
    fine = features["layer1"][0, :, 4:6, 8:9]  # what there is of its four cells
    expected = projected("layer1", fine.flatten(1).T).mean(dim=0)
    expected = expected + projected("layer2", features["layer2"][0, :, row, column][None])[0]
    # Stride 32 on a grid of 8: cell (2, 4) lies 1/8 of a coarse cell behind the centre of (0, 1), at the border's row.
    coarse = projected("layer3", features["layer3"][0, :, 0].T)  # (2, 6): one row of two cells
    expected = expected + coarse[1] * 0.625 + coarse[0] * 0.375
    assert_close(found[0, :, row, column], expected)


def test_a_plain_transformer_gives_its_last_map_alone():
    decoder = PatchDecoder({"layer1": (3, 14), "layer2": (5, 14)})
    assert list(decoder.project) == ["layer2"]
    assert decoder.out_channels == 5
    assert decoder.grid == 14


def test_the_grid_may_be_finer():
    coarse, fine = grown("segformer"), grown("segformer", stride=8)
    image = torch.randn(1, 3, 64, 64)
    assert coarse(image)["default"].logits.shape[2:] == (4, 4)
    assert fine(image)["default"].logits.shape[2:] == (8, 8)


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"hidden": 9, "heads": 2}, ("hidden", "9", "2")),
        ({"stride": 0}, ("stride",)),
        ({"per_branch": "norms"}, ("per_branch", "norms")),
    ],
)
def test_options_that_cannot_be_are_refused(options, facts):
    with pytest.raises(ConfigError) as caught:
        grown("segformer", **options)
    must_say(caught.value, *facts)


def test_it_needs_an_encoder_of_another_library():
    with pytest.raises(ConfigError) as caught:
        build_model(ModelConfig(name="segmenter"))
    must_say(caught.value, "segmenter", "model.encoder=hf:NAME or timm:NAME")


def test_each_branch_has_a_transformer_of_its_own():
    model = grown("segformer")
    model.grow({"night": 2})
    day, night = (model.head(branch) for branch in ("default", "night"))
    assert isinstance(night, TokenHead)
    assert not {id(w) for w in day.parameters()} & {id(w) for w in night.parameters()}
