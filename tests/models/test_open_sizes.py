"""What an encoder computes while a graph with open sizes is exported: the same as always."""

from __future__ import annotations

import pytest
import torch
from encoders import need_transformers, tiny

from everseg.models.adapters.attention import plain_attention
from everseg.models.adapters.windows import windowed_layers
from everseg.models.model import SegmentationModel
from everseg.models.open_sizes import given_sizes, of_tensors, places

need_transformers()


def lively(kind: str) -> SegmentationModel:
    """A model whose maps vary: random weights of usual size, also of norms and of biases of the attention."""
    model = tiny(kind).eval()
    with torch.no_grad():
        for weight in model.encoder.parameters():
            weight.normal_(std=0.3)
    return model


def maps_as_in_a_graph(model: SegmentationModel, image: torch.Tensor) -> dict[str, torch.Tensor]:
    encoder = model.encoder
    strides = [stride for _, stride in encoder.taps.values()]
    sizes = places(*image.shape[2:], encoder.multiple, strides, encoder.windows)
    pairs = [sizes.whole, *sizes.cells.values(), *sizes.windows.values()]
    with given_sizes(of_tensors([one for pair in pairs for one in pair], strides, encoder.windows)):
        return encoder(image)


@pytest.mark.parametrize(
    ("kind", "windows"),
    [
        ("swin", {(4, 4), (8, 4), (16, 4), (32, 4)}),
        ("swinv2", {(4, 4), (8, 4), (16, 4), (32, 4)}),
        ("mobilevit", {(8, 2), (16, 2), (32, 2)}),
        ("convnext", set()),
    ],
)
def test_maps_with_given_sizes_are_those_of_every_other_run(kind, windows):
    """At 77 x 140 the coarsest map has 3 x 5 cells: no multiple of a window's side."""
    model = lively(kind)
    assert set(model.encoder.windows) == windows
    image = torch.randn(2, 3, 77, 140)
    with torch.no_grad():
        expected = model.encoder(image)
        found = maps_as_in_a_graph(model, image)
        again = model.encoder(image)
    for name, map in expected.items():
        assert map.std() > 0.01
        assert torch.equal(found[name], map), name
        assert torch.equal(again[name], map), name  # the library's own code is back


def test_a_layer_whose_method_another_version_lacks_is_left_alone():
    body = tiny("mobilevit").encoder.body
    assert len(windowed_layers(body)) == 3
    for layer in [one.layer for one in windowed_layers(body)]:
        layer.__class__ = type("MobileViTLayer", (torch.nn.Module,), {"__module__": "transformers.x"})
    assert windowed_layers(body) == []


def test_attention_step_by_step_is_close_and_ends_with_its_block():
    model = tiny("dinov2").eval()
    image, config = torch.randn(1, 3, 56, 56), model.encoder.body.config
    usual = config._attn_implementation
    assert usual != "eager"
    with torch.no_grad():
        expected = model.encoder(image)["layer4"]
        with plain_attention(model):
            assert config._attn_implementation == "eager"
            found = model.encoder(image)["layer4"]
    assert config._attn_implementation == usual
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
