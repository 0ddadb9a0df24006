"""Encoders of transformers: every family, odd sizes, freezing, checkpoints, and nothing run because a file says so."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from encoders import TYPES, WITH_PATCHES, need_transformers, tiny
from torch import nn
from torch.testing import assert_close

from everseg import registry
from everseg.config.fields import ModelConfig
from everseg.errors import CheckpointError, ConfigError
from everseg.methods.switches import check_model, compared_otherwise
from everseg.models.blocks import NORM_TYPES
from everseg.models.build import build_model, from_description
from everseg.models.model import frozen_copy
from saying import must_say

need_transformers()

FEW = ("segformer", "resnet", "swin", "dinov2")


def grown(kind: str = "segformer", name: str = "mlp", **changes):
    model = tiny(kind, name, **changes)
    model.grow({"default": 3})
    return model


def strides(kind: str) -> list[int]:
    if kind in WITH_PATCHES:
        return [WITH_PATCHES[kind]] * 4
    return [8, 16, 32, 32] if kind == "focalnet" else [4, 8, 16, 32]


@pytest.mark.parametrize("name", ["mlp", "deeplabv3"])
@pytest.mark.parametrize("kind", TYPES)
def test_every_family_trains_whole_and_takes_odd_sizes(kind, name):
    model = grown(kind, name).train()
    output = model(torch.randn(2, 3, 64, 96))["default"]
    output.logits.square().mean().backward()
    assert [
        n for n, p in model.named_parameters() if p.grad is None
    ] == []  # DDP refuses weights without gradient
    assert list(output.features) == ["layer1", "layer2", "layer3", "layer4", "encoder", "decoder"]
    assert output.features["encoder"] is output.features["layer4"]
    model.eval()
    for height, width in ((75, 53), (33, 97), (9, 20)):
        features = (found := model(torch.randn(1, 3, height, width))["default"]).features
        sizes = [(-(-height // s), -(-width // s)) for s in strides(kind)]
        assert [tuple(features[f"layer{k + 1}"].shape[2:]) for k in range(4)] == sizes
        assert tuple(found.logits.shape[2:]) == sizes[0 if name == "mlp" else -1]
        assert found.logits.isfinite().all()


@pytest.mark.parametrize("kind", TYPES)
def test_a_description_rebuilds_the_model_without_the_library_being_asked_for_a_file(kind, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = grown(kind).eval()
    again = from_description(json.loads(json.dumps(model.describe())))
    assert list(again.state_dict()) == list(model.state_dict())
    again.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(1, 3, 40, 56)
    assert torch.equal(again.eval()(x)["default"].logits, model(x)["default"].logits)
    assert again.describe() == model.describe()


def test_the_image_is_seen_through_whole_cells_and_pixels_beyond_it_are_its_border():
    encoder = tiny("convnext").encoder.eval()
    image = torch.randn(1, 3, 40, 50)
    padded = nn.functional.pad(image, (0, 14, 0, 24), mode="replicate")
    assert padded.shape[2:] == (64, 64)
    small, large = encoder(image), encoder(padded)
    for name, (_, stride) in encoder.taps.items():
        assert torch.equal(small[name], large[name][..., : -(-40 // stride), : -(-50 // stride)])


def test_equal_seeds_give_equal_weights_and_others_do_not():
    options = {"config": TYPES["swin"], "hidden": 8}
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = build_model(ModelConfig(name="mlp", encoder="hf:swin", options=options))
        states.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("kind", FEW)
def test_a_frozen_encoder_is_bit_unchanged_and_runs_without_dropout(kind):
    config = {"drop_path_rate": 0.5, "hidden_dropout_prob": 0.5} if kind != "resnet" else {}
    model = grown(kind, options={"config": {**TYPES[kind], **config}, "dropout": 0.0})
    x = torch.randn(2, 3, 64, 64)

    def taps() -> torch.Tensor:
        return model(x)["default"].features["encoder"].detach()

    model.train()
    if kind != "resnet":
        assert not torch.equal(taps(), taps())  # dropout
    model.freeze(encoder=True)
    before = copy.deepcopy(model.state_dict())
    assert torch.equal(taps(), taps())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x)["default"].logits.square().mean().backward()
    optimizer.step()
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {n for n in before if not n.startswith("encoder.")}
    model.freeze()
    assert all(m.training for m in model.encoder.body.modules())


def test_statistics_move_in_a_frozen_encoder_only_where_asked():
    for statistics in (True, False):
        model = grown("resnet").train()
        model.freeze(encoder=True, norm=True, statistics=statistics)
        norms = [m for m in model.encoder.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms
        before = norms[-1].running_mean.clone()
        model(torch.randn(2, 3, 64, 64))
        assert torch.equal(norms[-1].running_mean, before) is statistics
    affine = [p for m in model.modules() if isinstance(m, NORM_TYPES) for p in m.parameters()]
    assert affine
    assert not any(p.requires_grad for p in affine)


@pytest.mark.parametrize("kind", FEW)
def test_a_teacher_is_a_model_of_its_own(kind):
    model = grown(kind).train()
    teacher = frozen_copy(model)
    x = torch.randn(2, 3, 40, 40)
    old = teacher(x)["default"]
    model.grow({"default": 2})
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1)
    model(x)
    new = teacher(x)["default"]
    assert torch.equal(old.logits, new.logits)
    assert all(torch.equal(old.features[name], new.features[name]) for name in old.features)
    student = model.eval()(x)["default"]
    assert student.logits.shape[1] == 5
    assert not torch.equal(student.features["encoder"], new.features["encoder"])


def test_decoders_may_belong_to_branches():
    model = tiny(options={"per_branch": "decoder"})
    model.grow({"day": 3})
    model.grow({"night": 2}, init_from="day")
    outputs = model.eval()(torch.randn(1, 3, 32, 32))
    assert {b: o.logits.shape[1] for b, o in outputs.items()} == {"day": 3, "night": 2}
    assert len(model.branch_parameters("night")) > 2


def test_taps_can_be_chosen():
    model = tiny("dinov2", options={"taps": ["stage2", "stage8"]})
    assert list(model.encoder.taps) == ["layer1", "layer2"]
    assert len(model.encoder.body.encoder.layer) == 8
    by_number = tiny("segformer", options={"taps": [1, 3]})
    assert list(by_number.encoder.taps.values()) == [(8, 8), (16, 32)]
    assert by_number.describe()["options"]["encoder"]["taps"] == [1, 3]
    tap = tiny("dinov2").describe()["options"]["encoder"]["taps"]
    assert tap == ["stage2", "stage4", "stage6", "stage8"]  # even depths


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"encoder": "hf:segformr"}, "did you mean 'segformer'.*types: .*convnext"),
        ({"encoder": "hf:bert"}, "'hf:bert'.* type of encoder"),
        ({"encoder": "hf:timm_backbone"}, "'hf:timm_backbone'.* type of encoder"),
        ({"encoder": "segformer"}, "expected hf:NAME or timm:NAME"),
        ({"encoder": "tv:resnet18"}, "expected hf:NAME or timm:NAME"),
        ({"name": "erfnet"}, "its own.*model.name=mlp or deeplabv3"),
        ({"name": "deeplabv3-resnet18"}, "deeplabv3-resnet18.*of its own"),
        ({"output_stride": 8}, "model.output_stride=null"),
        ({"weights": "x.pth"}, "file of weights"),
        ({"options": {"config": {"depth": [1, 1, 1, 1]}}}, "no depth; .*'depths'"),
        ({"options": {"config": {"depths": "many"}}}, "configuration of 'segformer' is wrong.*depths"),
        ({"options": {"config": 3}}, "config needs keys"),
        ({"options": {"config": {"num_channels": 4}}}, "num_channels is 4.* have 3"),
        ({"options": {"taps": [0, 9]}}, "hidden states, 0 to 3"),
        ({"options": {"taps": ["stage1"]}}, "hidden states"),
        ({"options": {"taps": [3, 0]}}, "fine to coarse"),
        ({"encoder": "hf:resnet", "options": {"taps": ["stage9"]}}, "stage9"),
        ({"encoder": "hf:resnet", "options": {"taps": [1]}}, "names of stages"),
        ({"encoder": "hf:hiera"}, "one size only"),
        ({"options": {"widths": [1]}}, "widths.*encoder, norm, hidden"),
        ({"options": {"hidden": 0}}, "hidden .*positive"),
        ({"options": {"dropout": 1.0}}, "dropout .*below 1"),
        ({"encoder": "hf:someone/no-such-model"}, r"this machine.*model\.download=true"),
        ({"encoder": "timm:resnet18"}, "pip install 'everseg.timm.'|no model|cannot be"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told(config, words, monkeypatch):
    if config.get("encoder") == "timm:resnet18":
        monkeypatch.setitem(__import__("sys").modules, "timm", None)  # as where it is not installed
        words = "pip install 'everseg.timm.'"
    with pytest.raises(ConfigError, match=words):
        build_model(ModelConfig(**{"name": "mlp", "encoder": "hf:segformer", **config}))


@pytest.mark.parametrize("kind", TYPES)
def test_images_of_other_channels(kind):
    model = build_model(
        ModelConfig(name="mlp", encoder=f"hf:{kind}", options={"config": TYPES[kind], "hidden": 8}),
        in_channels=5,
    )
    model.grow({"default": 2})
    image = torch.randn(2, 5, 64, 96)
    model.train()(image)["default"].logits.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    again = from_description(model.describe())
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again.eval()(image)["default"].logits, model.eval()(image)["default"].logits)


def test_a_type_that_takes_rgb_alone_says_so():
    with pytest.raises(ConfigError, match=r"model\.encoder: .*'pp_lcnet'.* have 5"):
        build_model(ModelConfig(name="mlp", encoder="hf:pp_lcnet"), in_channels=5)


def test_a_decoder_alone_asks_for_its_encoder_and_without_the_extra_it_is_named(monkeypatch):
    with pytest.raises(ConfigError, match=r"'mlp' needs an encoder: model\.encoder=hf:NAME or timm:NAME"):
        build_model(ModelConfig(name="mlp"))
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'everseg\[hf\]'"):
        tiny()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": {"auto_map": {"AutoModel": "evil.Model"}}}, "auto_map"),
        ({"config": {"trust_remote_code": True}}, "trust_remote_code"),
        ({"config": {"attn_implementation": "someone/kernel"}}, "attn_implementation"),
        ({"config": {"_attn_implementation": "someone/kernel"}}, "_attn_implementation"),
        ({"config": {"quantization_config": {}}}, "quantization_config"),
        ({"config": {"dtype": "bfloat16"}}, "dtype"),
        ({"type": "timm_backbone"}, "'hf:timm_backbone'.* type of encoder"),
        ({"type": "../../evil"}, r"'hf:\.\./\.\./evil'.* type of encoder"),
        ({"trust_remote_code": True}, "encoder needs config"),
        ({"library": "evil"}, "unknown library 'evil'"),
        ({"library": ["hf"]}, "unknown library"),
        ({"taps": {"a": 1}}, "hidden states"),
        ({"inputs": {"scale": [1, 2], "shift": [0, 0, 0]}}, "three numbers each"),
        ({"inputs": 3}, "scale and shift"),
    ],
)
def test_a_checkpoints_description_cannot_ask_for_code_or_files(changes, words):
    described = grown().describe()
    described["options"]["encoder"] |= changes
    with pytest.raises(CheckpointError, match=words):
        from_description(described)


@pytest.mark.parametrize("name", ["mlp", "deeplabv3"])
def test_bf16_is_close(name):
    model = grown("segformer", name).eval()
    x = torch.randn(1, 3, 50, 70)
    full = model(x)["default"].logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(x)["default"].logits
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), full, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", TYPES)
def test_layers_are_stem_and_blocks_in_the_order_in_which_they_run(kind):
    encoder = grown(kind).train().encoder
    layers = encoder.parameter_layers()
    assert encoder.body.training
    assert all(module.training for module in encoder.body.modules())
    held = [id(weight) for layer in layers for weight in layer]
    assert len(held) == len(set(held))
    assert set(held) == {id(weight) for weight in encoder.parameters()}
    blocks = {"mobilenet_v2": 16, "mobilevit": 7, "swin": 5, "swinv2": 5}.get(
        kind, 8 if kind in WITH_PATCHES else 4
    )
    assert len(layers) == blocks + 1
    names = {id(weight): name for name, weight in encoder.body.named_parameters()}
    inside = [[name for p in layer if "norms." not in (name := names[id(p)])] for layer in layers[1:]]
    # stage and block, the largest of each layer's weights: those between blocks come before them
    numbers = [
        max([int(part) for part in re.findall(r"\d+", name)][:2] for name in layer) for layer in inside
    ]
    assert numbers == sorted(numbers)
    assert len({tuple(number) for number in numbers}) == blocks


def test_what_lies_between_blocks_belongs_to_the_next_one():
    def layer_of(kind: str, name: str) -> int:
        encoder = grown(kind).encoder
        wanted = encoder.body.get_parameter(name)
        return next(
            k for k, layer in enumerate(encoder.parameter_layers()) if any(p is wanted for p in layer)
        )

    assert layer_of("convnext", "embeddings.patch_embeddings.weight") == 0
    assert (
        layer_of("convnext", "encoder.stages.1.downsampling_layer.1.weight") == 2
    )  # before the stage's block
    assert (
        layer_of("swin", "swin.encoder.layers.1.downsample.reduction.weight") == 3
    )  # after the stage's block
    assert layer_of("dinov2", "embeddings.cls_token") == 0
    assert layer_of("dinov2", "layernorm.weight") == 8


def test_blocks_that_names_do_not_tell_apart_are_refused():
    encoder = grown().encoder
    encoder.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    encoder._read = lambda body, image: [body(image)]
    with pytest.raises(ConfigError, match=r"train\.layer_decay: the names"):
        encoder.parameter_layers()


def test_attention_maps_are_asked_for_by_name_and_change_nothing_else():
    model = tiny("segformer")
    model.grow({"default": 3})
    model.eval()
    image = torch.randn(2, 3, 40, 70)
    plain, both = model(image)["default"], model(image, taps=("attention",))["default"]
    names = [name for name in both.features if name.startswith("attention")]
    assert names == ["attention1", "attention2", "attention3", "attention4"]
    assert not set(names) & set(plain.features)
    assert_close(plain.logits, both.logits, rtol=1e-4, atol=1e-5)  # another kernel
    assert both.features["encoder"] is both.features["layer4"]
    shapes = [tuple(both.features[name].shape) for name in names]
    assert shapes[0] == (2, 1, 10, 18, 2, 3)  # stride 4 looks at stride 32, cut to the image
    assert [shape[2:4] for shape in shapes] == [
        tuple(both.features[f"layer{k}"].shape[2:]) for k in (1, 2, 3, 4)
    ]
    whole = model(torch.randn(1, 3, 64, 64), taps=("attention",))["default"].features["attention2"]
    assert_close(whole.sum(dim=(4, 5)), torch.ones(whole.shape[:4]))


@pytest.mark.parametrize(("kind", "in_place"), [("resnet", False), ("resnet", True), ("regnet", False)])
def test_a_stage_that_ends_in_an_activation_gives_its_map_before_it(kind, in_place):
    model = tiny(kind)
    model.grow({"default": 3})
    model.eval()
    ends = {
        name: model.encoder.body.get_submodule(end) for name, end in model.encoder._last_activations.items()
    }
    for end in ends.values():
        end.inplace = in_place  # as timm's
    image = torch.randn(2, 3, 40, 70)
    plain, both = model(image)["default"], model(image, taps=("before_activation",))["default"]
    assert torch.equal(plain.logits, both.logits)
    assert {name for name in both.features if name.endswith(".pre")} == {f"{name}.pre" for name in ends}
    for name, end in ends.items():
        before, after = both.features[f"{name}.pre"], both.features[name]
        assert before.shape == after.shape
        assert (before < 0).any()
        assert torch.equal(end(before.clone()), after)
        assert torch.equal(after, plain.features[name])


def test_what_a_method_compares_instead_is_said():
    plop = registry.resolve("method", "plop")()
    assert compared_otherwise(plop, tiny("resnet")) == []
    (note,) = compared_otherwise(plop, tiny("swin"))
    assert "layer1, layer2, layer3, layer4" in note
    (note,) = compared_otherwise(plop, tiny("mobilevit"))
    assert "layer1 " in note
    assert "layer2" not in note
    assert compared_otherwise(registry.resolve("method", "mib")(), tiny("swin")) == []
    own_norms = tiny(
        "swin", options={"per_branch": "norm"}
    )  # which runs through a branch only, and has none yet
    state = torch.get_rng_state()
    assert len(compared_otherwise(plop, own_norms)) == 1
    assert own_norms.branches == ()
    assert torch.equal(torch.get_rng_state(), state)
    swin = tiny("swin")
    swin.grow({"default": 3})
    with pytest.raises(ConfigError) as error:
        swin(torch.randn(1, 3, 64, 64), taps=("layer4.pre",))
    must_say(error.value, "layer4.pre", "layer1", "decoder")


def test_a_network_that_cannot_run_the_trial_image_is_no_reason_to_stop():
    model = tiny("swin")
    for fails in (RuntimeError("only 512 x 512\nmore"), AssertionError()):
        model.encoder.forward = lambda *_, fails=fails, **__: (_ for _ in ()).throw(fails)
        with pytest.raises(ConfigError) as error:
            model.tap_names()
        must_say(error.value, "128", "64")
        (note,) = compared_otherwise(registry.resolve("method", "plop")(), model)
        assert note.count("\n") == 0
    must_say(note, "128")


@pytest.mark.parametrize("kind", ["swin", "beit", "convnext", "resnet"])
def test_networks_without_attention_over_the_image_say_so(kind):
    model = tiny(kind)
    assert not model.gives_attention
    with pytest.raises(ConfigError, match="SegFormer"):
        check_model(registry.resolve("method", "sats")(), model)
    assert tiny("segformer").gives_attention
