"""RCIL against a second implementation that never merges anything, and what belongs to it alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from everseg.config.fields import TrainConfig
from everseg.errors import ConfigError
from everseg.methods.rcil import RCIL
from everseg.methods.switches import finish
from everseg.models.build import deeplabv3, from_description
from everseg.models.compensation import compensated
from everseg.models.model import SegmentationModel
from everseg.scenarios.steps import Step
from everseg.types import Batch

TRAIN = TrainConfig(lr=0.05)
"""As in the fixture `toy`."""
SIZES = ({"a": (3,)}, {"a": (3, 2)}, {"a": (3, 2, 1)})
STRIDES = {"layer1": (1, 1), "layer2": (2, 1), "layer3": (2, 1), "layer4": (1, 2)}
RATES = (1, 2, 3)
State = dict[str, Tensor]


def network() -> SegmentationModel:
    torch.manual_seed(4)
    return deeplabv3(
        norm="iabn", blocks=(1, 1, 1, 1), stem=4, widths=(2, 2, 3, 3), hidden=3, out_channels=5, rates=RATES,
        compensation=True,
    ).double()  # fmt: skip


@pytest.fixture
def steps(toy) -> list[Step]:
    """Three classes, then two, then one."""
    return [toy.step(k, sizes, {"a": sizes["a"][-1]}, "a") for k, sizes in enumerate(SIZES)]


def batches(step: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(step)
    old, total = ((0, 3), (3, 5), (5, 6))[step]
    found = []
    for _ in range(2):
        image = torch.randn(2, 3, 48, 48, generator=generator).double()
        label = torch.randint(old, total, (2, 48, 48), generator=generator)
        label[torch.rand(label.shape, generator=generator) < 0.4] = 0
        label[:, :2] = 255
        found.append(Batch(image, label, "a"))
    return found


# ---------------------------------------------------------------- the second implementation


@dataclass
class Oracle:
    """The network as functions of a dict of weights. An old convolution is the sum of all that was merged into it."""

    state: State
    """Ours by name; classifiers and new convolutions are trained, old ones only in step 0."""
    eps: float
    history: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)
    """Convolution -> (weight, factor, offset) of the convolutions whose sum the old one stands for."""
    momentum: State = field(default_factory=dict)
    draws: Iterator[Tensor] | None = None

    def affine(self, name: str, new: bool = False) -> tuple[Tensor, Tensor]:
        name += "_new" if new else ""
        s = self.state
        factor = (s[f"{name}.weight"].abs() + self.eps) / (s[f"{name}.running_var"] + self.eps).sqrt()
        return factor, s[f"{name}.bias"] - s[f"{name}.running_mean"] * factor

    def norm(self, x: Tensor, name: str, train: bool) -> Tensor:
        s = self.state
        if not train:
            factor, offset = self.affine(name)
            return x * factor.view(1, -1, 1, 1) + offset.view(1, -1, 1, 1)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        count = x.numel() / x.shape[1]
        s[f"{name}.running_mean"] = 0.9 * s[f"{name}.running_mean"] + 0.1 * mean.detach()
        s[f"{name}.running_var"] = 0.9 * s[f"{name}.running_var"] + 0.1 * var.detach() * count / (count - 1)
        factor = (s[f"{name}.weight"].abs() + self.eps) / (var + self.eps).sqrt()
        return (x - mean.view(1, -1, 1, 1)) * factor.view(1, -1, 1, 1) + s[f"{name}.bias"].view(1, -1, 1, 1)

    def unit(
        self, x: Tensor, convs: list[str], news: list[str], norm: str, how: list[tuple], train: bool
    ) -> Tensor:
        def conv(weight: Tensor, number: int) -> Tensor:
            stride, dilation = how[number]
            return F.conv2d(x, weight, None, stride, dilation if weight.shape[-1] > 1 else 0, dilation)

        if self.history:
            parts = []
            for number, name in enumerate(convs):
                old = [
                    conv(w, number) * f.view(1, -1, 1, 1) + o.view(1, -1, 1, 1)
                    for w, f, o in self.history[name]
                ]
                parts.append(torch.stack(old).sum(0))
            old = torch.cat(parts, 1)
        else:
            old = torch.cat([conv(self.state[f"{n}.weight"], i) for i, n in enumerate(convs)], 1)
            old = self.norm(old, norm, train)
        new = torch.cat([conv(self.state[f"{n}.weight"], i) for i, n in enumerate(news)], 1)
        new = self.norm(new, f"{norm}_new", train)
        if not train:
            return 0.5 * old + 0.5 * new
        assert self.draws is not None
        channels = []
        for c in range(old.shape[1]):
            r = float(next(self.draws))
            both = (old[:, c], new[:, c])
            channels.append(both[0] if r < 0.33 else both[1] if r < 0.66 else (both[0] + both[1]) / 2)
        return torch.stack(channels, 1)

    def __call__(self, image: Tensor, train: bool) -> list[Tensor]:
        """The four stages' maps, the head's, and the small logits."""
        s = self.state
        x = self.norm(F.conv2d(image, s["encoder.conv1.weight"], None, 2, 3), "encoder.bn1", train)
        x = F.max_pool2d(x, 3, 2, 1)
        maps = []
        for stage, (stride, dilation) in STRIDES.items():
            at = f"encoder.{stage}.0."
            y = F.leaky_relu(self.norm(F.conv2d(x, s[at + "conv1.weight"]), at + "bn1", train), 0.01)
            y = self.unit(y, [at + "conv2"], [at + "conv2_new"], at + "bn2", [(stride, dilation)], train)
            y = self.norm(F.conv2d(F.leaky_relu(y, 0.01), s[at + "conv3.weight"]), at + "bn3", train)
            if at + "downsample.0.weight" in s:
                x = F.conv2d(x, s[at + "downsample.0.weight"], None, stride)
                x = self.norm(x, at + "downsample.1", train)
            x = F.leaky_relu(x + y, 0.01)
            maps.append(x)
        names = [f"decoder.aspp.{i}" for i in range(4)]
        y = self.unit(
            x, names, [n.replace("aspp", "aspp_new") for n in names], "decoder.aspp_norm",
            [(1, rate) for rate in (1, *RATES)], train,
        )  # fmt: skip
        y = F.conv2d(F.leaky_relu(y, 0.01), s["decoder.reduce.weight"])
        pooled = F.conv2d(x.mean((2, 3), keepdim=True), s["decoder.pool_conv.weight"])
        pooled = F.leaky_relu(self.norm(pooled, "decoder.pool_norm", train), 0.01)
        y = y + F.conv2d(pooled, s["decoder.pool_reduce.weight"])
        maps.append(F.leaky_relu(self.norm(y, "decoder.norm", train), 0.01))
        heads = sorted({n.rpartition(".")[0] for n in s if n.startswith("heads.")})
        logits = [F.conv2d(maps[-1], s[f"{h}.weight"], s[f"{h}.bias"]) for h in heads]
        return [*maps, torch.cat(logits, 1)]

    def merge(self, factor: float) -> None:
        """Half of the old and half of the new convolution; an old one that was merged before counts `factor`."""
        units = [([f"encoder.{stage}.0.conv2"], f"encoder.{stage}.0.bn2") for stage in STRIDES]
        units.append(([f"decoder.aspp.{i}" for i in range(4)], "decoder.aspp_norm"))
        merged = {}
        for convs, norm in units:
            size = len(self.affine(norm, new=True)[0]) // len(convs)
            for number, name in enumerate(convs):
                here = slice(number * size, (number + 1) * size)
                f, o = (value[here] for value in self.affine(norm, new=True))
                new = name.replace("aspp", "aspp_new") if "aspp" in name else f"{name}_new"
                terms = [(self.state[f"{new}.weight"].clone(), f / 2, o / 2)]
                if self.history:
                    terms += [(w, f * factor / 2, o * factor / 2) for w, f, o in self.history[name]]
                else:
                    f, o = (value[here] for value in self.affine(norm))
                    terms.append((self.state[f"{name}.weight"], f / 2, o / 2))
                merged[name] = [tuple(x.detach().clone() for x in term) for term in terms]
        self.history = merged

    def scaled(self, factor: float) -> Oracle:
        """A copy whose old convolutions are multiplied, as the authors' model is once it was read from disk."""
        history = {n: [(w, f * factor, o * factor) for w, f, o in terms] for n, terms in self.history.items()}
        return Oracle({n: v.detach().clone() for n, v in self.state.items()}, self.eps, history)

    @property
    def trained(self) -> list[str]:
        def is_old(name: str) -> bool:
            return name.rpartition(".")[0] in self.history or ".bn2." in name or ".aspp_norm." in name

        names = [n for n in self.state if not n.endswith(("running_mean", "running_var"))]
        return [n for n in names if not (self.history and is_old(n))]

    def learn(
        self, batch: Batch, teacher: Oracle | None, method: RCIL, draws: Tensor, lr: float
    ) -> dict[str, float]:
        weights = {name: self.state[name].detach().requires_grad_() for name in self.trained}
        self.state |= weights
        self.draws = iter(draws)
        *maps, small = self(batch.image, train=True)
        with torch.no_grad():
            theirs = None if teacher is None else teacher(batch.image, train=False)
        terms = losses(maps, small, theirs, batch.label, method)
        sum(terms.values()).backward()
        for name, weight in weights.items():
            grad = (
                torch.zeros_like(weight) if weight.grad is None else weight.grad
            )  # none: no channel was drawn
            grad = grad + TRAIN.weight_decay * weight.detach()
            kept = TRAIN.momentum * self.momentum.get(name, torch.zeros_like(grad)) + grad
            self.momentum[name] = kept
            self.state[name] = weight.detach() - lr * (grad + TRAIN.momentum * kept)
        return {name: float(value.detach()) for name, value in terms.items()}


def losses(
    maps: list[Tensor], small: Tensor, theirs: list[Tensor] | None, label: Tensor, method: RCIL
) -> dict[str, Tensor]:
    """MiB's two terms in probabilities, the pooled cube with k x k windows and shifted channels."""
    size = label.shape[1:]
    p = F.interpolate(small, size, mode="bilinear").softmax(1)
    valid = label != 255
    if theirs is None:
        nll = -p.gather(1, label.clamp(max=p.shape[1] - 1)[:, None])[:, 0].log()
        return {"ce": (nll * valid).sum() / label.numel()}
    old, outputs = theirs[-1].shape[1], small.shape[1]
    of_label = torch.where(
        label < old, p[:, :old].sum(1), p.gather(1, label.clamp(max=outputs - 1)[:, None])[:, 0]
    )
    q = F.interpolate(theirs[-1], size, mode="bilinear").softmax(1)
    background = p[:, 0] + p[:, old:].sum(1)
    kept = q[:, 0] * background.log() + (q[:, 1:] * p[:, 1:old].log()).sum(1)
    growth = math.sqrt(outputs / (outputs - old))
    summed = torch.cat([small[:, :1] + small[:, old:].sum(1, keepdim=True), small[:, 1:old]], 1)
    spatial, channel = [], []
    for number, (ours, other) in enumerate(zip([*maps, summed], theirs, strict=True)):
        d = other.square() - ours.square()
        windows = [
            F.avg_pool2d(d, k, 1, k // 2).square().sum((1, 2, 3)).sqrt().mean()
            for k in (4, 8, 12, 16, 20, 24)
        ]
        weight = method.spatial_logits_weight if number == 5 else method.spatial_weight
        spatial.append(weight * sum(windows) / 6)
        if number < 5:
            before, after = F.pad(d, (0, 0, 0, 0, 1, 0))[:, :-1], F.pad(d, (0, 0, 0, 0, 0, 1))[:, 1:]
            weight = method.channel_decoder_weight if number == 4 else method.channel_weight
            channel.append(weight * ((before + d + after) / 3).square().sum((1, 2, 3)).sqrt().mean())
    return {
        "ce": (-of_label.log() * valid).sum() / label.numel(),
        "kd": method.kd_weight * -kept.mean() / old,
        "spatial": growth * sum(spatial) / 6,
        "channel": growth * sum(channel) / 5,
    }


@pytest.mark.parametrize("merge", ["official", "exact"])
def test_three_steps_agree_with_an_implementation_that_merges_nothing(toy, steps, merge):
    """Every loss of every iteration, and all weights at the end, with the same draws on both sides."""
    method, model = RCIL(kd_weight=5.0, spatial_weight=0.3, channel_weight=0.2, merge=merge), network()
    oracle: Oracle | None = None
    for step in steps:
        run = toy.begin(method, model, step)
        model.double()
        state = {n: v.clone() for n, v in model.state_dict().items() if not n.endswith("tracked")}
        heads = {n: v for n, v in state.items() if n.startswith("heads.")}
        eps = model.encoder.bn1.eps
        if oracle is None:
            oracle, teacher = Oracle(state, eps), None
        else:
            # The identity norm of the authors' files: (1 + eps) / sqrt(1 + eps) once they are read.
            factor = math.sqrt(1 + eps) if merge == "official" else 1.0
            teacher = oracle.scaled(factor)
            oracle.state = {n: v for n, v in oracle.state.items() if not n.startswith("heads.")} | heads
            oracle.merge(factor)
            oracle.momentum = {}
        generator = torch.Generator().manual_seed(step.index)
        for batch in batches(step.index):
            draws = torch.rand(2 + 2 + 3 + 3 + 12, generator=generator)
            stream = iter(draws)
            for module in compensated(model):
                module.draw = lambda n, like, stream=stream: torch.stack([next(stream) for _ in range(n)])
            run.take(batch)
            theirs = oracle.learn(batch, teacher, method, draws, 0.05)
            ours = {name: value.item() for name, value in run.terms[-1].items()}
            assert ours == pytest.approx(theirs, rel=1e-9)
        finish(method, run.ctx)
        ours = model.state_dict()
        for name in oracle.trained:
            assert_close(ours[name], oracle.state[name], rtol=1e-8, atol=1e-9, msg=name)
    image = torch.randn(1, 3, 48, 48).double()
    expected = oracle.scaled(math.sqrt(1 + eps) if merge == "official" else 1.0)(image, train=False)
    found = model.eval()(image)["a"]
    assert_close(found.logits, expected[-1], rtol=1e-8, atol=1e-9)
    again = from_description(model.describe()).double()
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again.eval()(image)["a"].logits, found.logits), "memory and disk compute the same"


# ---------------------------------------------------------------- its own properties


def later(toy, steps, **options):
    """The beginning of the second step: what the first one left, and the student."""
    method, model = RCIL(**options), network()
    finish(method, toy.begin(method, model, steps[0]).take(*batches(0)).ctx)
    return toy.begin(method, model, steps[1])


def test_the_merged_convolutions_alone_are_the_teacher_and_the_student_is_not(toy, steps):
    """New convolutions are not started anew: the student is a quarter old and three quarters new."""
    run = later(toy, steps)
    image = torch.randn(2, 3, 48, 48).double()
    with torch.no_grad():
        wanted = run.teacher(image)["a"].features
        student = run.model.eval()(image)["a"].features["decoder"]
        for module in compensated(run.model):
            module.combined = lambda old, new: old
        found = run.model(image)["a"].features
    for name, value in wanted.items():
        assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)
    assert (student - wanted["decoder"]).norm() / wanted["decoder"].norm() > 0.01


def test_merged_convolutions_never_move_again(toy, steps):
    run = later(toy, steps)
    constant = [part for module in compensated(run.model) for part in module.constant]
    assert len(constant) == 4 * 2 + 5
    run.model.freeze()  # a second call means what it says, and merged convolutions stay constant
    run.model.train()
    before = [value.clone() for part in constant for value in part.state_dict().values()]
    assert not any(part.training for part in constant if not isinstance(part, torch.nn.Conv2d))
    run.take(*batches(1))
    assert all(weight.grad is None for part in constant for weight in part.parameters())
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, (v for part in constant for v in part.state_dict().values()), strict=True)
    )
    held = {id(weight) for group in run.optimizer.param_groups for weight in group["params"]}
    assert not any(id(weight) in held for part in constant for weight in part.parameters()), (
        "no weight decay either"
    )


@pytest.mark.parametrize("start", ["weights", "all", "none"])
def test_new_classifiers_take_over_what_is_asked_for(toy, steps, start):
    run = later(toy, steps, init_background=start)
    old, new = run.model.head("a").classifiers
    taught = run.teacher.head("a").classifiers[0]
    assert torch.equal(new.weight, old.weight[:1].expand_as(new.weight)) is (start != "none")
    assert torch.equal(old.bias, taught.bias) is (start != "all")
    assert bool((new.bias == old.bias[0]).all()) is (start == "all")


def test_a_network_without_new_convolutions_is_refused_with_the_option_to_give(toy):
    with pytest.raises(ConfigError, match=r"model\.options\.compensation=true"):
        RCIL().prepare_model(toy.model(), toy.steps[0])


@pytest.mark.parametrize("part", ["freeze_encoder", "freeze_decoder"])
def test_freezing_what_a_merge_changes_is_refused(part):
    """A frozen encoder is run once, through the teacher: the student would lose its merge without a word."""
    with pytest.raises(ValueError, match=part):
        RCIL(**{part: True})


def test_the_growth_factor_counts_outputs_of_the_branch(toy, steps):
    """sqrt(5 / 2) in the second step; nothing in a step that adds no class, as in the authors' domain setting."""
    terms = [later(toy, steps, growth_factor=on).take(*batches(1)[:1]).terms[0] for on in (True, False)]
    for name in ("spatial", "channel"):
        assert terms[0][name].item() == pytest.approx(math.sqrt(5 / 2) * terms[1][name].item())
    same = toy.step(1, {"a": (3,)}, {}, "a")
    terms = []
    for on in (True, False):
        method, model = RCIL(growth_factor=on), network()
        finish(method, toy.begin(method, model, steps[0]).take(*batches(0)).ctx)
        terms.append(toy.begin(method, model, same).take(batches(0)[0]).terms[0])
    assert terms[0] == terms[1]


def test_old_domains_are_kept_through_their_own_heads(toy):
    """Cubes are compared in every branch that the teacher knows; their mean counts."""
    method, model = RCIL(kd_weight=1.0), toy.model("rcil")
    toy.train(method, model, *toy.domains[:2])
    run = toy.begin(method, model, toy.domains[2])
    batch = toy.batches(toy.domains[2])[0]
    run.take(batch)
    assert set(run.terms[0]) == {"ce", "kd", "spatial", "channel"}
    assert all(value.isfinite() and value > 0 for value in run.terms[0].values())
