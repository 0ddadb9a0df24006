"""Norms and adapters per branch inside encoders of transformers, and stand-ins for what other libraries do."""

from __future__ import annotations

import json

import pytest
import torch
from encoders import TYPES, need_transformers, tiny
from torch import nn
from torch.testing import assert_close

from everseg.config.fields import ModelConfig
from everseg.errors import ConfigError
from everseg.models.adapters.per_branch import LowRank, merge, own_parts, through_branch
from everseg.models.blocks import BranchDict, is_norm
from everseg.models.build import build_model, from_description
from everseg.models.folding import united
from everseg.models.model import SegmentationModel, frozen_copy
from saying import must_say

need_transformers()
import transformers  # noqa: E402

CHOICES = ("norm", "adapter")


def two(kind: str = "segformer", per_branch: str = "adapter", **options) -> SegmentationModel:
    model = tiny(kind, options={"per_branch": per_branch, **options})
    model.grow({"day": 3})
    model.grow({"night": 2}, init_from="day")
    return model


def image(seed: int = 0, *size: int) -> torch.Tensor:
    return torch.randn(2, 3, *(size or (40, 56)), generator=torch.Generator().manual_seed(seed))


def moved(model: SegmentationModel, branch: str) -> SegmentationModel:
    """Move a branch's weights away from where they start: adapters from zero, norms from one."""
    with torch.no_grad():
        for weight in model.branch_parameters(branch):
            weight += 0.05 * torch.randn(
                weight.shape, generator=torch.Generator().manual_seed(weight.numel())
            )
    return model


@pytest.mark.parametrize(
    ("kind", "per_branch"),
    [*((kind, "adapter") for kind in TYPES), ("segformer", "norm"), ("resnet", "norm")],
)
def test_every_family_starts_as_the_library_has_it_and_trains_whole(kind, per_branch):
    model = two(kind, per_branch)
    plain = tiny(kind).encoder.eval()
    found, wanted = model.eval().encoder(image(), ("day", "night")), plain(image())
    assert all(torch.equal(found[branch][name], wanted[name]) for branch in found for name in wanted)
    outputs = model.train()(image())
    sum(output.logits.square().mean() for output in outputs.values()).backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
    assert model.encoder.merged("day").state_dict().keys() == plain.state_dict().keys()
    again = from_description(json.loads(json.dumps(model.describe())))
    again.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("kind", ["segformer", "resnet", "regnet"])
def test_merged_into_plain_weights_a_branch_gives_the_same_maps(kind):
    model = moved(moved(two(kind), "day"), "night").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for branch in ("day", "night"):
        plain = united(model, branch)
        assert not any(isinstance(module, BranchDict) for module in plain.encoder.modules())
        found, wanted = plain(image(), (branch,))[branch], model(image(), (branch,))[branch]
        assert_close(found.logits, wanted.logits, atol=1e-5, rtol=1e-5)
        assert_close(found.features["encoder"], wanted.features["encoder"], atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_branch_changes_nothing_of_another_and_starts_as_the_one_before():
    model = two().eval()
    day = model(image(), ("day",))["day"].logits
    moved(model, "night")
    assert torch.equal(model(image(), ("day",))["day"].logits, day)
    model.grow({"dawn": 2}, init_from="night")
    for owner in model.encoder.modules():
        if isinstance(owner, BranchDict):
            night, dawn = owner["night"].state_dict(), owner["dawn"].state_dict()
            assert all(torch.equal(night[name], dawn[name]) for name in night if "running" not in name)


def test_a_branch_owns_norms_and_adapters_and_shares_the_rest():
    names = {}
    for choice in ("head", "decoder", *CHOICES):
        model = two("segformer", choice)
        own = {id(weight) for weight in model.branch_parameters("night")}
        names[choice] = {name for name, weight in model.encoder.named_parameters() if id(weight) in own}
        assert len(own) + len(model.branch_parameters("day")) + len(model.shared_parameters()) == len(
            list(model.parameters())
        )
    assert names["head"] == names["decoder"] == set()
    assert names["norm"] < names["adapter"]
    assert len(names["norm"]) == 2 * sum(
        isinstance(module, nn.LayerNorm) for module in tiny().encoder.modules()
    )
    beside = {name.split(".adapter.")[0] for name in names["adapter"] - names["norm"]}
    layers = dict(tiny().encoder.named_modules())
    # All of SegFormer's: projections, overlapping patches, depthwise convolutions; not those that reduce the keys,
    # whose cells have no middle.
    assert beside == {
        name
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size[0] % 2 == 1)
    }


def test_frozen_the_encoder_trains_the_new_branch_alone():
    model = two()
    model.freeze(encoder=True, branches=("day",))
    trained = {name for name, weight in model.encoder.named_parameters() if weight.requires_grad}
    assert trained
    assert all(".night." in name for name in trained)
    teacher = frozen_copy(model)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], 0.1)
    before = model.eval()(image(), ("day",))["day"].logits
    for seed in range(2):
        model.train()
        optimizer.zero_grad()
        model(image(seed), ("night",))["night"].logits.square().mean().backward()
        optimizer.step()
    after = model.eval()(image())
    assert torch.equal(after["day"].logits, before)
    assert not torch.equal(after["night"].logits, teacher(image())["night"].logits)


def test_the_library_s_weights_are_where_the_first_branches_begin(tmp_path):
    config = transformers.AutoConfig.for_model("resnet", **TYPES["resnet"])
    torch.manual_seed(3)
    original = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for module in original.modules():
            if is_norm(module):
                module.weight.uniform_(0.5, 2)
                module.running_mean.uniform_(-1, 1)
    original.save_pretrained(tmp_path)

    def on(per_branch: str) -> SegmentationModel:
        options = {"hidden": 8, "per_branch": per_branch}
        return build_model(ModelConfig(name="mlp", encoder=f"hf:{tmp_path}", options=options))

    model, plain = on("norm"), on("decoder")
    model.grow({"day": 2})
    found = model.eval().encoder(image(), ("day",))["day"]
    wanted = plain.eval().encoder(image())
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert bool(wanted["layer4"].any())


def test_layers_of_the_encoder_hold_their_branches_parts():
    model = two("dinov2")
    grouped = [id(weight) for layer in model.encoder.parameter_layers() for weight in layer]
    assert sorted(grouped) == sorted(id(weight) for weight in model.encoder.parameters())
    assert len(model.encoder.parameter_layers()) == len(tiny("dinov2").encoder.parameter_layers())


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"per_branch": "norm", "rank": 4}, ["rank", "'norm'"]),
        ({"per_branch": "adapter", "rank": 0}, ["rank", "0"]),
        ({"per_branch": "adapter", "rank": "4"}, ["rank", "'4'"]),
        ({"per_branch": "all"}, ["per_branch", "'all'", "adapter"]),
    ],
)
def test_options_that_cannot_be(options, facts):
    with pytest.raises(ConfigError) as caught:
        tiny(options=options)
    must_say(caught.value, *facts)


def test_the_rank_is_part_of_the_description_where_it_was_chosen():
    few, usual = two(rank=2), two()
    assert few.describe()["options"]["rank"] == 2
    assert "rank" not in usual.describe()["options"]
    assert len(few.branch_parameters("day")) == len(usual.branch_parameters("day"))
    assert sum(w.numel() for w in few.branch_parameters("day")) < sum(
        w.numel() for w in usual.branch_parameters("day")
    )


# ---------------------------------------------------------------- what libraries do


class RmsNorm(nn.Module):
    """As timm's, which is none of PyTorch's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input * input.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * self.weight


class Standardised(nn.Conv2d):
    """A convolution that standardises its weights, so that nothing can be merged into them."""


class Net(nn.Module):
    """A layer of each kind; `peeks` makes it look into its norm, which a branch's norms do not allow."""

    def __init__(self, *, norm: bool = True, peeks: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 2, stride=2)
        self.dense = nn.Conv2d(4, 4, 3, stride=2, padding=2, dilation=2)
        self.depthwise = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4)
        self.point = nn.Conv2d(4, 6, 1)
        self.other = Standardised(6, 6, 3, padding=1)
        self.same = nn.Conv2d(6, 6, 3, padding="same")
        self.linear = nn.Linear(6, 5)
        self.unseen = nn.Linear(5, 5)
        self.norm = RmsNorm(5) if norm else nn.Identity()
        self.again = self.norm
        self.peeks = peeks

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.same(self.other(self.point(self.depthwise(self.dense(self.patches(x))))))
        x = nn.functional.linear(self.linear(x.permute(0, 2, 3, 1)), self.unseen.weight)
        if self.peeks:
            x = x + self.norm.weight
        return [self.again(self.norm(x)).permute(0, 3, 1, 2)]


def given(net: Net, **options) -> Net:
    net.eval()
    x = torch.rand(1, 3, 16, 16)
    own_parts(net, lambda: net(x), **{"adapters": True, **options})
    return net


def test_adapters_stand_where_they_can_be_merged_and_only_there():
    torch.manual_seed(1)
    net = given(Net(), rank=2)
    beside = {
        name.removesuffix(".adapter") for name, module in net.named_modules() if name.endswith(".adapter")
    }
    assert beside == {"dense", "depthwise", "point", "linear"}
    assert net.norm is net.again
    for owner in (module for module in net.modules() if isinstance(module, BranchDict)):
        owner.add("day")
        with torch.no_grad():
            for weight in owner["day"].parameters():
                weight.uniform_(-1, 1)
    kinds = {name: type(net.get_submodule(f"{name}.adapter.day")) for name in beside}
    assert (kinds["dense"], kinds["point"], kinds["linear"]) == (nn.Conv2d, LowRank, LowRank)
    depthwise = net.depthwise.adapter["day"]
    assert depthwise.groups == 4
    assert_close(depthwise(x := torch.randn(2, 4, 5, 6)), nn.Conv2d.forward(depthwise, x))
    x = torch.randn(2, 3, 19, 23)
    with through_branch("day"):
        wanted = net(x)[0]
    merge(net, "day")
    assert_close(net(x)[0], wanted, atol=1e-5, rtol=1e-5)
    assert [
        module for module in net.modules() if module._forward_hooks or isinstance(module, BranchDict)
    ] == []


def test_trying_leaves_the_random_numbers_as_they_were():
    net = Net()
    torch.manual_seed(4)
    wanted = torch.rand(3)
    torch.manual_seed(4)
    state = torch.get_rng_state()
    net.eval()
    x = torch.ones(1, 3, 16, 16)
    own_parts(net, lambda: net(x), adapters=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("flaw", ["norm", "peeks", "nothing"])
def test_an_encoder_that_cannot_have_parts_per_branch_is_refused(flaw):
    net = Net(norm=flaw != "norm", peeks=flaw == "peeks")
    if flaw == "nothing":
        net = nn.Sequential(RmsNorm(16))
        run, fact = lambda: [net(torch.rand(1, 16))], "'norm'"
    else:
        x = torch.rand(1, 3, 16, 16)
        run, fact = lambda: net.eval()(x), "'head'"
    with pytest.raises(ConfigError) as caught:
        own_parts(net, run, adapters=True)
    must_say(caught.value, "per_branch", fact)
