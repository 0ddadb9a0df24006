"""SegFormer's all-MLP head against a slow loop, and against the head of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from encoders import need_transformers, tiny
from torch.testing import assert_close

from everseg.errors import ConfigError
from everseg.models.mlp import MLPDecoder

TAPS = {"layer1": (3, 4), "layer2": (5, 8), "layer3": (2, 16)}


def bilinear(map: np.ndarray, ratio: int) -> np.ndarray:
    """Enlarge (C, h, w): output cell i lies at (i + 0.5) / ratio - 0.5 of the input, clamped at the border."""
    out = np.zeros((map.shape[0], map.shape[1] * ratio, map.shape[2] * ratio))
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            y = min(max((i + 0.5) / ratio - 0.5, 0), map.shape[1] - 1)
            x = min(max((j + 0.5) / ratio - 0.5, 0), map.shape[2] - 1)
            for a, p in ((int(y), 1 - y % 1), (min(int(y) + 1, map.shape[1] - 1), y % 1)):
                for b, q in ((int(x), 1 - x % 1), (min(int(x) + 1, map.shape[2] - 1), x % 1)):
                    out[:, i, j] += p * q * map[:, a, b]
    return out


def test_the_head_is_the_published_formula_over_the_maps_joined():
    decoder = MLPDecoder(TAPS, hidden=4, norm="abn").double().eval()
    torch.nn.init.uniform_(decoder.norm.running_mean)
    torch.nn.init.uniform_(decoder.norm.running_var, 0.5, 2.0)
    sizes = {"layer1": (5, 7), "layer2": (3, 4), "layer3": (2, 2)}  # of an image of 20 x 28 pixels
    features = {n: torch.randn(1, TAPS[n][0], *s, dtype=torch.float64) for n, s in sizes.items()}
    joined = []
    for index, (name, (_, stride)) in enumerate(TAPS.items()):
        projected = np.einsum(
            "dc,chw->dhw", decoder.project[index].weight[:, :, 0, 0].detach(), features[name][0]
        )
        joined.append(bilinear(projected, stride // 4)[:, :5, :7])
    fuse = np.concatenate([conv.weight[:, :, 0, 0].detach().numpy() for conv in decoder.fuse], axis=1)
    total = np.einsum("de,ehw->dhw", fuse, np.concatenate(joined))
    mean, variance = decoder.norm.running_mean.numpy(), decoder.norm.running_var.numpy()
    total = (total - mean[:, None, None]) / np.sqrt(variance + 1e-5)[:, None, None]
    expected = np.where(total > 0, total, 0.01 * total)
    assert_close(decoder(features)[0].detach().numpy(), expected)


def test_a_point_of_the_image_stays_where_it_is_whatever_the_images_size():
    """Only the coarsest tap speaks, and only in its second cell: pixels 16 to 31 of 40."""
    decoder = MLPDecoder(TAPS, hidden=1).eval()
    for module in (*decoder.project, *decoder.fuse):
        torch.nn.init.ones_(module.weight)
    features = {n: torch.zeros(1, c, -(-40 // s), -(-40 // s)) for n, (c, s) in TAPS.items()}
    features["layer3"][:, :, 1, 1] = 1.0
    out = decoder(features)[0, 0]
    assert out.shape == (10, 10)
    assert divmod(int(out.argmax()), 10)[0] in (5, 6)  # cells of 4 pixels: 20 to 27, the middle of 16 to 31
    assert out[5:7, 5:7].min() == out.max()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"hidden": 0}, "positive"),
        ({"dropout": 1.0}, "below 1"),
        ({"taps": {"layer1": (3, 8), "layer2": (3, 12)}}, r"\[8, 12\] are not multiples"),
    ],
)
def test_dimensions_that_cannot_be_are_told(arguments, words):
    with pytest.raises(ConfigError, match=words):
        MLPDecoder(**{"taps": TAPS, **arguments})


def test_segformer_with_its_own_weights_gives_the_logits_of_transformers():
    """The whole network, encoder and head, against SegformerForSemanticSegmentation: same weights, same logits."""
    need_transformers()
    import transformers

    ours = tiny("segformer").eval()
    config = {**ours.describe()["options"]["encoder"]["config"], "decoder_hidden_size": 8, "num_labels": 3}
    theirs = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**config)).eval()
    head = theirs.decode_head
    for weight in head.parameters():  # larger than transformers draws them, and biases that are not 0
        torch.nn.init.normal_(weight)
    torch.nn.init.normal_(head.batch_norm.running_mean)
    ours.grow({"default": 3})
    ours.encoder.body.load_state_dict(theirs.segformer.state_dict(), strict=True)
    width = 8
    constant = torch.zeros(width)
    with torch.no_grad():
        for index, projection in enumerate(head.linear_projections):
            place = 3 - index  # transformers joins the maps coarsest first
            fused = head.linear_fuse.weight[:, place * width : (place + 1) * width]
            ours.decoder.project[index].weight.copy_(projection.proj.weight[:, :, None, None])
            ours.decoder.fuse[index].weight.copy_(fused)
            constant += fused[:, :, 0, 0] @ projection.proj.bias
        ours.decoder.norm.load_state_dict(head.batch_norm.state_dict())
        ours.decoder.norm.running_mean -= constant  # their biases, which ours has not
        ours.head("default").classifiers[0].load_state_dict(head.classifier.state_dict())
        image = torch.randn(2, 3, 64, 96)
        expected = theirs(image).logits
        assert expected.abs().mean() > 0.1
        assert_close(ours(image)["default"].logits, expected, atol=1e-5, rtol=1e-4)
