from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from everseg.errors import CheckpointError, ConfigError
from everseg.models.blocks import BatchNorm, BranchDict
from everseg.models.build import deeplabv3, deeplabv3_tiny, from_description
from everseg.models.erfnet import erfnet
from everseg.models.model import SegmentationModel, frozen_copy, init_from_background


def tiny(norm: str = "abn", **options) -> SegmentationModel:
    small = {"stem": 4, "widths": (4, 4, 6, 8), "hidden": 4, "out_channels": 6}
    model = deeplabv3_tiny(norm=norm, **{**small, **options})
    model.grow({"default": 3})
    return model


def trained_once(model: SegmentationModel) -> SegmentationModel:
    """Take one real optimiser step and return the model from before it."""
    before = copy.deepcopy(model)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    outputs = model(torch.randn(2, 3, 32, 32))
    sum(o.logits.square().sum() for o in outputs.values()).backward()
    optimizer.step()
    return before


def changed(before: nn.Module, after: nn.Module) -> set[str]:
    old = before.state_dict()
    return {name for name, value in after.state_dict().items() if not torch.equal(value, old[name])}


def norm_weights(model: SegmentationModel) -> set[str]:
    return {
        f"{n}.{leaf}"
        for n, m in model.named_modules()
        if isinstance(m, nn.BatchNorm2d)
        for leaf in ("weight", "bias")
    }


def test_growth_keeps_old_logits_bit_equal_and_old_names():
    model = tiny().eval()
    x = torch.randn(2, 3, 40, 24)
    before, names = model(x)["default"].logits, list(model.state_dict())
    model.grow({"default": 2})
    after = model(x)["default"].logits
    assert after.shape[1] == 5
    assert torch.equal(after[:, :3], before)
    assert list(model.state_dict())[: len(names)] == names
    assert model.growth == [{"default": 3}, {"default": 2}]


def test_growth_by_zero_does_nothing_and_bad_growth_changes_nothing():
    model = tiny()
    model.grow({"default": 0, "other": 0})
    assert model.branches == ("default",)
    for grows in ({"other": 2, "default": -1}, {"other": 2, "a.b": 1}):
        with pytest.raises(ConfigError):
            model.grow(grows)
    assert model.branches == ("default",)
    assert model.head("default").sizes == (3,)
    assert model.growth == [{"default": 3}]


def test_a_new_branchs_classifiers_start_afresh():
    model = tiny()
    model.grow({"copy": 3}, init_from="default")
    assert not torch.equal(
        model.head("copy").classifiers[0].weight, model.head("default").classifiers[0].weight
    )
    with pytest.raises(ConfigError, match="no branch 'nobody'"):
        model.grow({"x": 3}, init_from="nobody")


def test_growth_follows_the_models_dtype_and_draws_the_same_weights():
    models = [tiny(), tiny().double()]
    for model in models:
        torch.manual_seed(3)
        model.grow({"default": 2, "night": 1})
    for branch in ("default", "night"):
        weights = [m.head(branch).classifiers[-1].weight for m in models]
        assert [w.dtype for w in weights] == [torch.float32, torch.float64]
        assert torch.equal(weights[0].double(), weights[1])


def test_forward_gives_small_logits_and_the_named_taps():
    model = tiny(norm="bn", output_stride=8).eval()
    output = model(torch.randn(2, 3, 64, 48))["default"]
    assert output.logits.shape == (2, 3, 8, 6)
    assert list(output.features) == ["layer1", "layer2", "layer3", "layer4", "encoder", "decoder"]
    assert output.features["encoder"] is output.features["layer4"]
    assert [tuple(output.features[f"layer{i}"].shape[1:]) for i in (1, 2, 3, 4)] == [
        (4, 32, 24), (4, 16, 12), (6, 8, 6), (8, 8, 6)
    ]  # fmt: skip
    assert output.features["decoder"].shape == (2, 6, 8, 6)
    assert output.features["encoder"].min() == 0  # after the ReLU
    assert_close(output.logits, model.head("default")(output.features["decoder"]).logits)


def test_forward_runs_chosen_branches_and_refuses_unknown_ones():
    model = tiny()
    model.grow({"night": 2})
    x = torch.randn(2, 3, 32, 32)
    assert {b: o.logits.shape[1] for b, o in model(x).items()} == {"default": 3, "night": 2}
    assert list(model(x, ("night",))) == ["night"]
    with pytest.raises(ConfigError, match="no branch 'day'"):
        model(x, ("day",))
    with pytest.raises(ConfigError, match="grow it first"):
        deeplabv3_tiny()(x)


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("size", [(75, 53), (33, 97), (17, 16)])
def test_odd_sizes_work_in_both_modes(output_stride, size):
    options = {"stem_pool": True, "blocks": (1, 2, 1, 2), "bottleneck": True, "pool_size": 3}
    model = tiny(output_stride=output_stride, **options)
    shapes = [m(torch.randn(2, 3, *size))["default"].logits.shape for m in (model.train(), model.eval())]
    expected = tuple(-(-side // output_stride) for side in size)
    assert [tuple(s) for s in shapes] == [(2, 3, *expected)] * 2


@pytest.mark.parametrize("norm", ["bn", "abn", "iabn"])
def test_training_on_one_image_says_what_to_do(norm):
    model = tiny(norm).train()
    with pytest.raises(ConfigError, match="at least two images"):
        model(torch.randn(1, 3, 64, 64))
    assert model.eval()(torch.randn(1, 3, 64, 64))["default"].logits.isfinite().all()


def test_eval_pools_a_window_and_training_the_whole_map():
    x = torch.randn(2, 3, 128, 160)
    small, whole = tiny(pool_size=2), tiny(pool_size=None)
    whole.load_state_dict(small.state_dict())
    assert torch.equal(small.train()(x)["default"].logits, whole.train()(x)["default"].logits)
    assert not torch.allclose(small.eval()(x)["default"].logits, whole.eval()(x)["default"].logits)
    small.decoder.pool_size = 1000
    assert_close(small(x)["default"].logits, whole(x)["default"].logits)


def test_nothing_frozen_trains_everything():
    model = tiny()
    before = trained_once(model)
    assert changed(before, model) == set(model.state_dict())


def test_frozen_encoder_is_bit_unchanged_buffers_included():
    model = tiny()
    model.freeze(encoder=True)
    before = trained_once(model)
    moved = changed(before, model)
    assert moved == {n for n in model.state_dict() if not n.startswith("encoder.")}


def test_frozen_norms_are_bit_unchanged_buffers_included():
    model = tiny("iabn")
    model.freeze(norm=True)
    before = trained_once(model)
    buffers = {name for name, _ in model.named_buffers()}
    assert changed(before, model) == set(model.state_dict()) - norm_weights(model) - buffers


def test_without_statistics_frozen_norms_keep_moving_their_buffers():
    model = tiny()
    model.freeze(encoder=True, norm=True, statistics=False)
    before = trained_once(model)
    moved = changed(before, model)
    assert {name for name, _ in model.named_buffers()} <= moved
    assert not moved & norm_weights(model)
    assert not moved & {f"encoder.{name}" for name, _ in model.encoder.named_parameters()}


def test_freezing_is_declarative():
    model = tiny()
    model.grow({"night": 2})
    model.freeze(branches=["default"], encoder=True, norm=True)
    model.freeze(branches=["night"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"heads.night.classifiers.0.{leaf}" for leaf in ("weight", "bias")}
    model.train()
    assert all(m.training for m in model.modules())
    model.freeze()
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ConfigError, match="no branch 'day'"):
        model.freeze(branches=["day"])


def test_freezing_survives_growth_and_keeps_the_mode():
    model = tiny().eval()
    model.freeze(norm=True)
    assert not model.training
    model.grow({"default": 1})
    assert all(p.requires_grad for p in model.head("default").parameters())
    model.train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(m.training for m in norms)
    assert model.training
    model.freeze()
    assert all(m.training for m in norms)


def test_a_branchs_own_norms_freeze_with_it():
    model = tiny()
    model.decoder.adapters = BranchDict(partial(nn.BatchNorm2d, 3))
    model.decoder.adapters.add("default")
    model.grow({"night": 1})
    model.freeze(branches=["default"])
    model.train()
    adapters = model.decoder.adapters
    assert not adapters["default"].training
    assert not adapters["default"].weight.requires_grad
    assert adapters["night"].training
    assert adapters["night"].weight.requires_grad


def test_every_weight_belongs_to_one_branch_or_to_all():
    model = tiny()
    model.grow({"night": 2})
    groups = [model.branch_parameters("default"), model.branch_parameters("night"), model.shared_parameters()]
    assert [len(g) for g in groups[:2]] == [2, 2]
    ids = [id(p) for group in groups for p in group]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert model.parameter_count == sum(p.numel() for group in groups for p in group)


def test_a_teacher_copy_does_not_follow_the_student():
    model = tiny()
    teacher = frozen_copy(model)
    trained_once(model)
    x = torch.randn(2, 3, 32, 32)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    assert not torch.equal(teacher(x)["default"].logits, model.eval()(x)["default"].logits)


def test_a_described_model_is_rebuilt_and_loads_strictly():
    model = tiny("iabn", output_stride=8, pool_size=5, rates=(1, 2, 3))
    model.grow({"default": 2, "night": 4})
    model.grow({"night": 1})
    description = json.loads(json.dumps(model.describe()))
    assert description["growth"] == [{"default": 3}, {"default": 2, "night": 4}, {"night": 1}]
    again = from_description(description)
    assert again.describe() == description
    again.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 3, 72, 64)
    for branch, output in model.eval()(x).items():
        assert torch.equal(again.eval()(x)[branch].logits, output.logits)


def test_a_description_never_imports_anything(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    for name in ("evil.py:build", "evil:build", "os:system", 3, None):
        with pytest.raises(CheckpointError, match="unknown model"):
            from_description({"name": name, "options": {}, "growth": []})


@pytest.mark.parametrize(
    "description",
    [
        {"name": "deeplabv3-tiny"},
        {"name": "deeplabv3-tiny", "options": {"colour": 1}, "growth": []},
        {"name": "deeplabv3-tiny", "options": {"norm": "gn"}, "growth": []},
        {"name": "deeplabv3-tiny", "options": {"widths": "abc"}, "growth": []},
        {"name": "deeplabv3-tiny", "options": {}, "growth": [{"default": -1}]},
        {"name": "deeplabv3-tiny", "options": {}, "growth": [3]},
        "deeplabv3-tiny",
    ],
)
def test_a_damaged_description_is_a_checkpoint_error(description):
    with pytest.raises(CheckpointError, match="description"):
        from_description(description)


def test_background_initialisation_keeps_the_old_probabilities():
    model = tiny().eval()
    x = torch.randn(2, 3, 32, 32)
    old = model(x)["default"].logits.softmax(1)
    model.grow({"default": 2})
    init_from_background(model, "default")
    new = model(x)["default"].logits.softmax(1)
    assert_close(new[:, 1:3], old[:, 1:])
    assert_close(new[:, 0] + new[:, 3:].sum(1), old[:, 0])
    assert_close(new[:, 3], new[:, 0])
    assert_close(new[:, 4], new[:, 0])


def test_background_initialisation_rounds_the_bias_to_float32_in_float64_models():
    model = tiny().double()
    model.grow({"default": 2})
    head = model.head("default")
    with torch.no_grad():
        head.classifiers[0].bias[0] = 0.1
    init_from_background(model, "default")
    bias = head.classifiers[0].bias[0].item()
    assert bias == torch.tensor(bias).to(torch.float32).item()
    assert abs(bias - (0.1 - 1.0986122886681098)) < 1e-7
    assert head.classifiers[1].bias.tolist() == [bias, bias]


def test_background_initialisation_needs_an_older_classifier():
    with pytest.raises(ConfigError, match="no older classifier"):
        init_from_background(tiny(), "default")


def test_a_foreign_encoder_and_decoder_fit_the_same_contract():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, stride=2)

        def forward(self, image):
            return {"only": self.conv(image)}

    class Decoder(nn.Module):
        out_channels = 4

        def forward(self, features):
            return features["encoder"] * 2

    def build(output_stride: int, norm: str) -> SegmentationModel:
        return SegmentationModel(Encoder(), Decoder())

    model = build(16, "bn")
    model.grow({"default": 2})
    output = model(torch.randn(1, 3, 9, 9))["default"]
    assert_close(output.features["decoder"], output.features["only"] * 2)
    description = {
        "name": "x:build",
        "options": {"output_stride": 8, "norm": "bn"},
        "growth": [{"default": 2}],
    }
    again = from_description(description, builder=build)
    again.load_state_dict(model.state_dict(), strict=True)
    assert again.describe() == description


def test_dilation_applies_to_every_block_of_a_stage_and_replaces_its_stride():
    model = deeplabv3(
        blocks=(1, 1, 2, 2), stem=4, widths=(2, 2, 2, 2), hidden=2, out_channels=2, output_stride=8
    )
    convs = {n: m for n, m in model.encoder.named_modules() if n.endswith("conv2")}
    assert {n: (m.stride[0], m.dilation[0]) for n, m in convs.items()} == {
        "layer1.0.conv2": (1, 1), "layer2.0.conv2": (2, 1), "layer3.0.conv2": (1, 2), "layer3.1.conv2": (1, 2),
        "layer4.0.conv2": (1, 4), "layer4.1.conv2": (1, 4),
    }  # fmt: skip
    assert [conv.dilation[0] for conv in model.decoder.aspp] == [1, 12, 24, 32]


def test_a_frozen_encoder_leaves_the_norms_and_adapters_of_a_new_branch_trainable():
    model = erfnet(widths=(6, 8, 10), blocks=(1, 1))
    model.grow({"day": 2})
    model.grow({"dusk": 2}, init_from="day")
    model.freeze(branches=["day"], encoder=True)
    model.train()
    names = {name for name, weight in model.encoder.named_parameters() if weight.requires_grad}
    assert names
    assert all(".dusk." in f".{name}." for name in names)
    norms = {
        name: module.training
        for name, module in model.encoder.named_modules()
        if isinstance(module, BatchNorm)
    }
    assert {name.rpartition(".")[2] for name, training in norms.items() if training} == {"dusk"}
    assert {name.rpartition(".")[2] for name, training in norms.items() if not training} == {"day"}
