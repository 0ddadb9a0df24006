"""What branches own and share: ERFNet and the ResNet family."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from everseg.config.fields import ModelConfig
from everseg.errors import ConfigError
from everseg.models.blocks import BranchDict, synchronise_norms
from everseg.models.build import build_model, deeplabv3_tiny, from_description
from everseg.models.erfnet import erfnet
from everseg.models.model import SegmentationModel, init_from_background

CHOICES = ["head", "decoder", "norm", "adapter"]
BUILDERS = {
    "erfnet": partial(erfnet, widths=(4, 6, 8), blocks=(1, 2)),
    "basic": partial(deeplabv3_tiny, stem=4, widths=(4, 4, 6, 8), hidden=4, out_channels=6),
    "bottleneck": partial(
        deeplabv3_tiny,
        stem=4,
        widths=(2, 2, 3, 4),
        hidden=4,
        out_channels=6,
        bottleneck=True,
        output_stride=8,
    ),
}


def two(kind: str, per_branch: str, **options) -> SegmentationModel:
    """A model of two branches, of 3 and 2 classes."""
    torch.manual_seed(1)
    model = BUILDERS[kind](per_branch=per_branch, **options)
    model.grow({"day": 3})
    model.grow({"night": 2}, init_from="day")
    return model


def image(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", BUILDERS)
def test_each_choice_gives_a_branch_more_of_its_own(kind):
    owned = []
    for per_branch in CHOICES:
        model = two(kind, per_branch)
        groups = [model.branch_parameters("day"), model.branch_parameters("night"), model.shared_parameters()]
        ids = [id(p) for group in groups for p in group]
        assert sorted(ids) == sorted(id(p) for p in model.parameters())
        assert len(groups[0]) == len(groups[1])
        parts = {n.split(".")[0] for n, p in model.named_parameters() if any(p is q for q in groups[1])}
        norms = [m for m in model.encoder.modules() if isinstance(m, nn.BatchNorm2d)]
        names = {n for n, _ in model.named_parameters()}
        owned.append((len(groups[1]), parts, len(norms), any("adapter" in n for n in names)))
    counts, parts, norms, adapters = zip(*owned, strict=True)
    assert counts[0] == 2
    assert list(counts) == sorted(set(counts))
    assert parts == ({"heads"}, {"heads", "decoder"}, *[{"heads", "decoder", "encoder"}] * 2)
    assert norms == (norms[0], norms[0], 2 * norms[0], 2 * norms[0])
    assert adapters == (False, False, False, True)


@pytest.mark.parametrize("per_branch", CHOICES)
@pytest.mark.parametrize("kind", BUILDERS)
def test_one_forward_for_two_branches_equals_two_and_runs_what_they_share_once(kind, per_branch):
    options = {"dropout": (0, 0)} if kind == "erfnet" else {}
    model = two(kind, per_branch, **options).eval()
    with torch.no_grad():
        alone = {b: model(image(), (b,))[b] for b in model.branches}
    calls = Counter[str]()
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    with torch.no_grad():
        together = model(image())
    for branch, output in alone.items():
        assert_close(together[branch].logits, output.logits)
        assert list(together[branch].features) == list(output.features)
        for tap, value in output.features.items():
            assert_close(together[branch].features[tap], value)
    first = "encoder.down1.conv" if kind == "erfnet" else "encoder.conv1"
    used = {n for n in calls if isinstance(model.get_submodule(n), nn.Conv2d | nn.BatchNorm2d)}
    own = {n for n in used if {"day", "night"} & set(n.split("."))}
    for name in used:
        if name in own or name == first or per_branch in ("head", "decoder"):
            assert calls[name] == 1, name  # a branch's own, or before the branches differ
        else:
            assert calls[name] == 2, name
            assert name.startswith("encoder.")
            assert isinstance(model.get_submodule(name), nn.Conv2d)


def test_plain_parts_run_once_for_all_branches_behind_paths_of_the_encoder_once_for_each():
    calls = Counter[str]()

    class Paths(nn.Module):
        by_branch = True

        def __init__(self):
            super().__init__()
            self.scale = BranchDict(partial(nn.Conv2d, 3, 4, 1))

        def forward(self, image, branches):
            return {b: {"only": self.scale[b](image)} for b in branches}

    class Decoder(nn.Module):
        out_channels = 4

        def forward(self, features):
            calls["decoder"] += 1
            return features["encoder"] + 1

    model = SegmentationModel(Paths(), Decoder())
    model.grow({"a": 2, "b": 2})
    outputs = model(image())
    assert calls["decoder"] == 2
    for branch in "ab":
        assert_close(outputs[branch].features["decoder"], model.encoder.scale[branch](image()) + 1)


@pytest.mark.parametrize("per_branch", ["decoder", "adapter"])
@pytest.mark.parametrize("kind", BUILDERS)
def test_a_new_branch_starts_from_another_one_except_for_encoder_statistics_and_classifiers(kind, per_branch):
    torch.manual_seed(1)
    model = BUILDERS[kind](per_branch=per_branch)
    model.grow({"day": 3})
    model(image())  # moves the statistics
    before = {n: v.clone() for n, v in model.state_dict().items()}
    model.grow({"night": 3, "fog": 3}, init_from="day")
    after = model.state_dict()
    assert all(torch.equal(after[n], v) for n, v in before.items())
    for name, value in after.items():
        if ".night." not in name:
            continue
        origin = after[name.replace(".night.", ".day.")]
        statistics = "running" in name or "tracked" in name
        copied = name.startswith("decoder") or (name.startswith("encoder") and not statistics)
        assert torch.equal(value, origin) == copied, name
        assert torch.equal(value, after[name.replace(".night.", ".fog.")]) == (not name.startswith("heads"))
        assert value.data_ptr() != origin.data_ptr()


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_new_branch_without_origin_is_drawn_afresh_with_a_seed_in_any_dtype(kind):
    models = [two(kind, "adapter"), two(kind, "adapter").double()]
    for model in models:
        torch.manual_seed(4)
        model.grow({"fog": 2})
    states = [model.state_dict() for model in models]
    for name, value in states[0].items():
        other = states[1][name]
        assert other.dtype == (torch.float64 if value.is_floating_point() else value.dtype)
        assert torch.equal(value.to(other.dtype), other)
    names = [n for n in states[0] if ".fog." in n and n.endswith("weight") and states[0][n].ndim == 4]
    assert any("adapter" in n for n in names)
    assert not any(torch.equal(states[0][n], states[0][n.replace(".fog.", ".night.")]) for n in names)


def test_a_bad_branch_name_changes_nothing_anywhere():
    model = two("erfnet", "adapter")
    names = list(model.state_dict())
    for grows in ({"fog": 2, "a.b": 1}, {"fog": 2, "keys": 1}, {"fog": 2, "day": -1}):
        with pytest.raises(ConfigError):
            model.grow(grows)
    with pytest.raises(ConfigError, match="no branch 'nobody'"):
        model.grow({"fog": 2}, init_from="nobody")
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_described_model_with_paths_is_rebuilt_and_loads_strictly(kind):
    model = two(kind, "adapter")
    model.grow({"day": 1})
    description = json.loads(json.dumps(model.describe()))
    again = from_description(description)
    assert again.describe() == description
    assert list(again.state_dict()) == list(model.state_dict())
    again.load_state_dict(model.state_dict(), strict=True)
    for branch, output in model.eval()(image()).items():
        assert torch.equal(again.eval()(image())[branch].logits, output.logits)


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("kind", BUILDERS)
def test_a_frozen_branch_keeps_all_it_owns_or_lets_its_statistics_move(kind, statistics):
    """The corrected and the authors' form of distilling through an old domain's branch."""
    model = two(kind, "adapter")
    model.freeze(branches=["day"], statistics=statistics)
    model.train()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sum(o.logits.square().sum() for o in model(image()).values()).backward()
    optimizer.step()
    moved = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    old = {n for n in before if ".day." in n}
    buffers = {n for n, _ in model.named_buffers()}
    assert moved & old == (set() if statistics else old & buffers)
    assert moved >= {n for n in before if ".night." in n}
    assert any(".day." not in n and ".night." not in n for n in moved)


@pytest.mark.parametrize("kind", ["erfnet", "basic"])
def test_norms_of_branches_are_synchronised_in_place(kind):
    model = two(kind, "adapter")
    names = list(model.state_dict())
    expected = model.eval()(image())
    synchronise_norms(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not norms
    assert list(model.state_dict()) == names
    for branch, output in model(image()).items():
        assert torch.equal(output.logits, expected[branch].logits)
    model.grow({"fog": 2}, init_from="day")  # plain until they are synchronised in turn
    assert len([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]) > 0
    synchronise_norms(model)
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_erfnet_gives_full_resolution_and_its_taps():
    model = two("erfnet", "adapter").eval()
    output = model(torch.randn(1, 3, 64, 48))["day"]
    assert output.logits.shape == (1, 3, 64, 48)
    shapes = {name: tuple(tap.shape[1:]) for name, tap in output.features.items()}
    assert shapes == {
        "down1": (4, 32, 24), "down2": (6, 16, 12), "down3": (8, 8, 6), "encoder": (8, 8, 6), "decoder": (4, 32, 24),
    }  # fmt: skip
    assert output.features["encoder"] is output.features["down3"]


@pytest.mark.parametrize("size", [(33, 47), (40, 41), (17, 8)])
def test_erfnet_takes_any_size_and_its_logits_fit_the_image(size):
    model = two("erfnet", "adapter").eval()
    picture = torch.randn(1, 3, *size)
    logits = model(picture)["night"].logits
    assert logits.shape == (1, 2, *size)
    assert model.train()(torch.cat([picture, picture]))["night"].logits.shape == (2, 2, *size)


def test_erfnet_drops_channels_in_the_encoder_only_in_training():
    model = two("erfnet", "adapter", dropout=(0.5, 0.9))
    assert [m.p for m in model.encoder.modules() if isinstance(m, nn.Dropout2d)] == [0.5, 0.9, 0.9]
    assert {m.p for m in model.decoder.modules() if isinstance(m, nn.Dropout2d)} == {0.0}
    first, second = (model.eval()(image())["day"].logits for _ in range(2))
    assert torch.equal(first, second)


def test_dilations_of_erfnets_third_stage():
    model = erfnet()
    assert [b.vertical2.dilation for b in model.encoder.blocks3] == [(d, 1) for d in (2, 4, 8, 16)] * 2
    assert [b.horizontal2.dilation for b in model.encoder.blocks3] == [(1, d) for d in (2, 4, 8, 16)] * 2
    assert {b.vertical1.dilation for b in model.encoder.blocks3} == {(1, 1)}
    assert {b.vertical2.dilation for b in model.encoder.blocks2} == {(1, 1)}
    assert {m.eps for m in erfnet(per_branch="head").modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}


def test_an_adapter_adds_its_output_before_the_norm():
    model = two("bottleneck", "adapter").double().eval()
    block = model.encoder.layer3[0]
    seen = {}
    for part in ("conv2", "bn2"):
        module = getattr(block, part)
        module = module["day"] if part == "bn2" else module
        module.register_forward_hook(lambda m, i, o, part=part: seen.update({part: (i[0], o)}))
    model(image().double(), ("day",))
    (given, plain), (normed, _) = seen["conv2"], seen["bn2"]
    weight = block.adapter2["day"].weight[:, :, 0, 0]
    stride = block.conv2.stride[0]
    expected = plain + torch.einsum("oc,bchw->bohw", weight, given)[..., ::stride, ::stride]
    assert_close(normed, expected)


def test_without_adapters_a_resnet_has_the_names_it_always_had():
    plain, paths = two("basic", "head"), two("basic", "adapter")
    names = set(plain.encoder.state_dict())
    assert not any("adapter" in n or "day" in n for n in names)
    shared = {n for n in paths.encoder.state_dict() if ".day." not in n and ".night." not in n}
    assert shared == {
        n for n in names if n.replace("downsample.0", "").split(".")[-2] != "1" and "bn" not in n
    }


def test_background_initialisation_of_transposed_classifiers_keeps_old_probabilities():
    model = two("erfnet", "adapter").eval()
    old = model(image())["day"].logits.softmax(1)
    model.grow({"day": 2})
    assert model.head("day").classifiers[1].weight.shape == (4, 2, 2, 2)
    init_from_background(model, "day")
    new = model(image())["day"].logits.softmax(1)
    assert_close(new[:, 1:3], old[:, 1:])
    assert_close(new[:, 0] + new[:, 3:].sum(1), old[:, 0])
    assert_close(new[:, 3], new[:, 0])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"norm": "iabn"}, r"'erfnet'.*model\.norm=iabn"),
        ({"output_stride": 8}, r"'erfnet'.*model\.output_stride=8"),
        (
            {"options": {"per_branch": "all"}},
            "per_branch 'all'.*head, decoder, norm",
        ),
        ({"options": {"widths": [3, 64, 128]}}, "increasing"),
        ({"options": {"blocks": [5]}}, "blocks needs two"),
        ({"options": {"dropout": [0.1, 1.0]}}, "probabilities below 1"),
        ({"options": {"colour": 3}}, "colour.*it takes per_branch, dropout, widths, blocks"),
        ({"name": "deeplabv3-tiny", "options": {"per_branch": "all"}}, "per_branch 'all' is unknown"),
        ({"name": "deeplabv3-tiny", "options": {"per_branch": "norm", "hidden": 0}}, "hidden"),
    ],
)
def test_what_a_model_cannot_be_is_told(config, words):
    with pytest.raises(ConfigError, match=words):
        build_model(ModelConfig(**{"name": "erfnet", **config}))


def test_architectures_without_stride_or_norm_keep_their_own():
    assert build_model(ModelConfig(name="erfnet", options={"blocks": [0, 0]})).describe()["options"] == {
        "per_branch": "adapter", "dropout": [0.03, 0.3], "widths": [16, 64, 128], "blocks": [0, 0],
    }  # fmt: skip
    options = build_model(ModelConfig(name="deeplabv3-tiny")).describe()["options"]
    assert (options["norm"], options["output_stride"], options["per_branch"]) == ("abn", 16, "head")
