"""Class tokens: the transformer against torch's own, growth, restoring, and what does not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from token_model import tokens
from torch import nn
from torch.testing import assert_close

from everseg.deploy.onnx import Deployed, check_parity, to_onnx
from everseg.errors import ConfigError
from everseg.models.build import from_description
from everseg.models.heads import Head
from everseg.models.model import init_from_background
from everseg.models.token_head import Block, TokenHead
from everseg.runs.input_form import InputForm
from saying import must_say


def grown(*sizes: int) -> TokenHead:
    torch.manual_seed(1)
    head = TokenHead(12, heads=3, dropout=0.0).double()
    for size in sizes:
        head.grow(size)
    return head.double()


def test_a_block_is_torchs_encoder_layer_with_norms_first():
    torch.manual_seed(0)
    block = Block(12, 3, 0.0).double()
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.3)
    theirs = nn.TransformerEncoderLayer(
        12, 3, 48, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    names = {
        "self_attn.in_proj_weight": block.qkv.weight, "self_attn.in_proj_bias": block.qkv.bias,
        "self_attn.out_proj.weight": block.out.weight, "self_attn.out_proj.bias": block.out.bias,
        "linear1.weight": block.fc1.weight, "linear1.bias": block.fc1.bias,
        "linear2.weight": block.fc2.weight, "linear2.bias": block.fc2.bias,
        "norm1.weight": block.norm1.weight, "norm1.bias": block.norm1.bias,
        "norm2.weight": block.norm2.weight, "norm2.bias": block.norm2.bias,
    }  # fmt: skip
    theirs.load_state_dict(names, strict=True)
    theirs.train()  # the fast path of evaluation would run else
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    assert_close(block(x), theirs(x), rtol=1e-10, atol=1e-12)


def test_logits_are_cosines_of_what_the_taps_show():
    head = grown(3, 2)
    with torch.no_grad():
        head.mask_scale.fill_(7.0)
        head.classifiers[1].weight.normal_()
    features = torch.randn(2, 12, 3, 5, dtype=torch.float64)
    found = head(features)
    assert found.logits.shape == (2, 5, 3, 5)
    patches, classes = found.features["patches"], found.features["class_features"]
    for b, c, row, column in [(0, 0, 0, 0), (1, 4, 2, 3), (1, 2, 1, 4)]:
        cosine = torch.cosine_similarity(patches[b, :, row, column], classes[b, c], dim=0)
        assert_close(found.logits[b, c, row, column], 7.0 * cosine)
    refined = head.class_projection(found.features["class_tokens"])
    assert_close(refined, classes)
    assert found.logits.abs().max() <= 7.0


def test_cells_and_tokens_are_one_sequence():
    """Other cells of the image change a class's features, other images of the batch do not."""
    head = grown(3)
    with torch.no_grad():
        for block in head.blocks:
            for weight in block.parameters():
                weight.add_(0.3 * torch.randn_like(weight))
    features = torch.randn(2, 12, 2, 2, dtype=torch.float64)
    before = head(features).features["class_features"]
    changed = features.clone()
    changed[1, 3, 1, 1] += 1.0  # one channel: a norm takes away what all have in common
    after = head(changed).features["class_features"]
    assert torch.equal(before[0], after[0])
    assert (before[1] - after[1]).abs().min() > 1e-9


def test_new_tokens_are_the_first_one_and_old_ones_keep_their_names():
    head = grown(3)
    old = {name: value.clone() for name, value in head.state_dict().items()}
    head.grow(2)
    state = head.state_dict()
    assert state.keys() - old.keys() == {"classifiers.1.weight"}
    assert all(torch.equal(state[name], value) for name, value in old.items())
    assert torch.equal(state["classifiers.1.weight"], old["classifiers.0.weight"][:1].expand(2, -1))
    assert head.sizes == (3, 2)
    logits = head(torch.randn(1, 12, 2, 2, dtype=torch.float64)).logits
    assert_close(logits[:, 3], logits[:, 0])


def test_a_description_rebuilds_the_grown_model():
    model = tokens()
    for number in (3, 1, 2):
        model.grow({"default": number})
    again = from_description(json.loads(json.dumps(model.describe())), tokens)
    again.load_state_dict(model.state_dict(), strict=True)
    image = torch.randn(1, 3, 18, 22)
    ours, theirs = (one.eval()(image)["default"] for one in (model, again))
    assert torch.equal(ours.logits, theirs.logits)
    assert {"encoder", "decoder", "patches", "class_tokens", "class_features"} <= ours.features.keys()


def test_freezing_old_classes_holds_their_tokens_and_trains_the_transformer():
    model = tokens()
    model.grow({"default": 3})
    model.grow({"default": 2})
    model.freeze(heads={"default": 1})
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {"heads.default.classifiers.0.weight"}
    model.freeze(branches=["default"])
    owned = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    assert owned
    assert all(name.startswith("heads.default.") for name in owned)


def test_half_precision_trains():
    model = tokens()
    model.grow({"default": 4})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(torch.randn(2, 3, 16, 16))["default"]
        loss = (
            output.logits.float().logsumexp(dim=1).mean()
            + output.features["class_tokens"].float().square().mean()
        )
    loss.backward()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in model.parameters())


def test_outputs_that_tokens_cannot_have_are_refused_and_the_model_stays():
    model = tokens()
    for head in (Head(hidden=8), Head(auxiliary={"unknown": 1}), Head(background="own")):
        with pytest.raises(ConfigError) as caught:
            model.grow({"default": 3}, heads={"default": head})
        must_say(caught.value, "tokens", "branch 'default'")
    assert model.branches == ()


@pytest.mark.parametrize(
    "options", [{"heads": 5}, {"layers": -1}, {"dropout": 1.0}, {"heads": 0, "dropout": -0.1}]
)
def test_dimensions_that_cannot_be_are_refused(options):
    with pytest.raises(ConfigError, match="hidden 12"):
        TokenHead(12, **options)


def test_starting_from_the_background_in_mibs_way_needs_a_bias():
    model = tokens()
    model.grow({"default": 3})
    model.grow({"default": 1})
    with pytest.raises(ConfigError, match="bias"):
        init_from_background(model, "default")


@pytest.mark.slow
def test_the_onnx_file_gives_the_same():
    """Of a network of our own: encoders of other libraries, which pad by the image's size, cannot be exported."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = tokens().eval()
    model.grow({"default": 2})
    model.grow({"default": 1})
    deployed = Deployed(model, "default", (0, 1, 2), InputForm())
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (height, width, 3), np.uint8) for height, width in ((64, 96), (76, 52))]
    parity = check_parity(deployed, to_onnx(deployed, {}), images, "noise")
    assert parity.equal_pixels > 0.999
