"""DKD: its loss by hand, what is trained and frozen, its background without an output, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest
import torch
from torch import nn

from everseg.errors import ConfigError
from everseg.labels import LabelSpace
from everseg.losses.argmax import predict_ids
from everseg.methods import switches
from everseg.methods.dkd import DKD
from everseg.methods.mib import MiB
from everseg.methods.star import STAR
from everseg.models.blocks import NORM_TYPES
from everseg.models.build import erfnet, from_description
from everseg.types import Batch
from saying import must_say

METHODS = (DKD, STAR)
full = partial(nn.functional.interpolate, mode="bilinear")


@pytest.fixture
def large(toy):
    """The toy with maps of 4 x 4."""
    toy.side = 64
    return toy


def cost(x: float, target: float, weight: float = 1.0) -> float:
    """Binary cross-entropy of one sigmoid; the weight is of its positive part."""
    p = 1 / (1 + math.exp(-x))
    return -weight * target * math.log(p) - (1 - target) * math.log(1 - p)


def sums(values: torch.Tensor, targets: torch.Tensor, weight: float = 1.0) -> float:
    """Mean over pixels of the costs, summed over the channels of (B, C, H, W)."""
    pairs = zip(values.flatten().tolist(), targets.flatten().tolist(), strict=True)
    return sum(cost(x, t, weight) for x, t in pairs) / values[:, 0].numel()


@pytest.mark.parametrize("unlabelled", ["left out", "negative"])
def test_the_loss_of_a_later_step_by_hand(large, unlabelled):
    method, model = DKD(unlabelled=unlabelled, pos_weight_next=3.0), large.model()
    large.train(method, model, large.steps[0])
    model.double()
    run = large.begin(method, model, large.steps[1])
    batch = large.batches(large.steps[1], 1)[0]
    batch.image = batch.image.double()
    with torch.no_grad():
        student, teacher = (m(batch.image, ("a",))["a"] for m in (run.model, run.teacher))
    size = batch.label.shape[1:]
    logits, old = full(student.logits, size), full(teacher.logits, size)
    one_hot = torch.stack([batch.label == c for c in (3, 4)], dim=1).double()
    counted = (batch.label != 255 if unlabelled == "left out" else batch.label >= 0).double()[:, None]
    new = [
        sum(
            w * cost(x, t, 3.0)
            for x, t, w in zip(
                logits[:, c].flatten().tolist(),
                one_hot[:, c - 3].flatten().tolist(),
                counted.flatten().tolist(),
                strict=True,
            )
        )
        / batch.label.numel()
        for c in (3, 4)
    ]
    expected = {
        "mbce": sum(new),
        "auxiliary": sums(full(student.auxiliary["auxiliary"], size), torch.zeros(2, 1, *size)),
        "kd": 5 * sums(logits[:, 1:3], old[:, 1:3].sigmoid()),
    }
    for sign, part in (("positive", lambda w: w.clamp(min=0)), ("negative", lambda w: w.clamp(max=0))):
        mine, theirs = (
            nn.functional.conv2d(out.features["decoder"], part(m.head("a").classifiers[0].weight.detach()))
            for m, out in ((run.model, student), (run.teacher, teacher))
        )
        expected[sign] = 5 * sums(mine, theirs.sigmoid())
    terms = run.take(batch).terms[0]
    assert {name: float(value.detach()) for name, value in terms.items()} == pytest.approx(expected, rel=1e-9)


def test_the_first_step_learns_labels_and_the_auxiliary_output_with_its_own_weight_of_positives(large):
    found = [
        large.begin(DKD(pos_weight=weight, pos_weight_next=later), large.model(), large.steps[0])
        .take(large.batches(large.steps[0])[0])
        .terms[0]
        for weight, later in ((2.0, 1.0), (2.0, 9.0), (4.0, 1.0))
    ]
    assert set(found[0]) == {"mbce", "auxiliary"}
    assert found[0]["mbce"] == found[1]["mbce"] < found[2]["mbce"]


def test_a_missing_weight_of_later_positives_is_that_of_the_first_step(large):
    batch = large.batches(large.steps[1], 1)[0]
    losses = []
    for later in (None, 7.0, 1.0):
        method, model = DKD(pos_weight=7.0, pos_weight_next=later), large.model()
        large.train(method, model, large.steps[0])
        losses.append(large.begin(method, model, large.steps[1]).take(batch).terms[0]["mbce"].item())
    assert losses[0] == losses[1] != losses[2]


def test_the_auxiliary_output_sends_nothing_back_and_new_classifiers_start_from_it(large):
    method, model = DKD(), large.model()
    large.train(method, model, large.steps[0])
    run = large.begin(method, model, large.steps[1])
    head = model.head("a")
    assert torch.equal(head.classifiers[1].weight, head.others["auxiliary"].weight.expand(2, -1, -1, -1))
    assert torch.equal(head.classifiers[1].bias, head.others["auxiliary"].bias.expand(2))
    batch = large.batches(large.steps[1], 1)[0]
    next(iter(method.losses(batch, run.ctx)))["auxiliary"].backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == {f"heads.a.others.auxiliary.{leaf}" for leaf in ("weight", "bias")}


@pytest.mark.parametrize("cls", METHODS)
def test_the_background_has_no_output_and_is_where_no_sigmoid_is_above_a_half(large, cls):
    method, model = cls(), large.model()
    run = large.train(method, model, *large.steps)
    assert [part.out_channels for part in model.head("a").classifiers] == [2, 2]
    model.eval()
    output = model(large.batches(large.steps[1], 1)[0].image, ("a",))["a"]
    assert not output.logits[:, 0].any()
    ids = predict_ids(output.logits, (64, 64))
    scores = full(output.logits[:, 1:], (64, 64)).sigmoid()
    expected = torch.where(scores.amax(dim=1) > 0.5, scores.argmax(dim=1) + 1, 0)
    assert torch.equal(ids.long(), expected)
    again = from_description(model.describe())
    again.load_state_dict(model.state_dict(), strict=True)
    image = large.batches(run.step, 1)[0].image
    assert torch.equal(again.eval()(image, ("a",))["a"].logits, model(image, ("a",))["a"].logits)


@pytest.mark.parametrize("cls", METHODS)
def test_norms_and_dropout_rest_in_later_steps(large, cls):
    method, model = cls(), large.model()
    model.decoder.dropout = nn.Dropout(0.1)
    large.train(method, model, large.steps[0])
    assert model.decoder.dropout.training
    large.begin(method, model, large.steps[1])
    assert not model.decoder.dropout.training
    norms = [m for m in model.modules() if isinstance(m, NORM_TYPES)]
    assert norms
    assert not any(m.training or any(p.requires_grad for p in m.parameters()) for m in norms)


def test_weight_decay_is_the_new_classifiers_alone(large):
    decays = {}
    for decay in ("new", "all"):
        method, model = DKD(decay=decay), large.model()
        first = large.train(method, model, large.steps[0])
        assert all(group["weight_decay"] > 0 for group in first.optimizer.param_groups)
        run = large.begin(method, model, large.steps[1])
        names = {id(p): n for n, p in model.named_parameters()}
        decays[decay] = {
            names[id(p)]
            for group in run.optimizer.param_groups
            if group["weight_decay"]
            for p in group["params"]
        }
    assert decays["new"] == {f"heads.a.classifiers.1.{leaf}" for leaf in ("weight", "bias")}
    assert decays["all"] > decays["new"]


def test_class_weights_multiply_the_loss_of_each_class(large):
    batch = large.batches(large.steps[1], 1)[0]
    losses = []
    for weights in (None, (1.0,) * 5, (9.0, 9.0, 9.0, 1.0, 1.0), (1.0, 1.0, 1.0, 2.0, 2.0)):
        step = dataclasses.replace(large.steps[1], class_weights={"a": weights} if weights else {})
        method, model = DKD(), large.model()
        large.train(method, model, large.steps[0])
        losses.append(large.begin(method, model, step).take(batch).terms[0]["mbce"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[1] == pytest.approx(losses[2], rel=1e-6)
    assert losses[3] == pytest.approx(2 * losses[1], rel=1e-6)


@pytest.mark.parametrize("cls", METHODS)
def test_candidates_of_a_memory_are_completed_by_the_largest_sigmoid_of_a_class(large, cls):
    method, model = cls(), large.model()
    run = large.begin(method, model, large.steps[0])
    model.eval()
    with torch.no_grad():
        for weight in model.head("a").classifiers[0].parameters():
            weight.zero_()
        model.head("a").classifiers[0].bias[:] = torch.tensor([2.0, 2.5])
    batch = large.batches(large.steps[0], 1)[0]
    batch = Batch(batch.image[:1], batch.label[:1].clone(), "a")
    batch.label[0, :8], batch.label[0, 8:16] = 0, 1
    sure, unsure = (method.memory_labels(batch, run.ctx, threshold) for threshold in (0.92, 0.93))
    assert (sure[0, :8] == 2).all()
    assert (sure[0, 8:16] == 1).all()
    assert torch.equal(unsure, batch.label)


@pytest.mark.parametrize("cls", METHODS)
def test_bfloat16_stays_finite(large, cls):
    method, model = cls(), large.model()
    large.train(method, model, large.steps[0])
    run = large.begin(method, model, large.steps[1], begin=False)
    run.ctx.autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    switches.begin(method, run.ctx)
    run.take(*large.batches(large.steps[1]))
    switches.finish(method, run.ctx)
    assert all(torch.isfinite(value) for terms in run.terms for value in terms.values())
    assert all(torch.isfinite(value).all() for value in method.state_dict().values())


@pytest.mark.parametrize("cls", METHODS)
def test_refusals_come_before_the_first_step_in_one_sentence_each(large, cls):
    name = cls.__name__.lower()
    assert switches.unfit(cls(), large.steps) == []
    (domains,) = switches.unfit(cls(), large.domains)
    must_say(domains, f"'{name}'", "one domain", "mdil")
    spaces = {b: LabelSpace(s.groups, s.names, background=None) for b, s in large.steps[0].spaces.items()}
    (bare,) = switches.unfit(cls(), [dataclasses.replace(large.steps[0], spaces=spaces)])
    must_say(bare, f"'{name}'", "background", "'a'")
    (idle,) = switches.unfit(cls(), [*large.steps, large.step(2, {"a": (3, 2)}, {}, "a")])
    must_say(idle, f"'{name}'", "step 2", "no new class")
    (tuned,) = switches.unfit(cls(pretune=1), large.steps)
    must_say(tuned, "method.pretune", "1x1")
    assert all(message.count(". ") == 0 for message in (domains, bare, idle, tuned))


@pytest.mark.parametrize("cls", METHODS)
def test_a_model_of_another_method_or_of_other_classifiers_is_refused(large, cls):
    name, model = cls.__name__.lower(), large.model()
    large.train(MiB(), model, large.steps[0])
    with pytest.raises(ConfigError) as told:
        cls().prepare_model(model, large.steps[1])
    must_say(str(told.value), f"'{name}'", "first step", "background")
    with pytest.raises(ConfigError) as told:
        cls().prepare_model(erfnet(), large.steps[0])
    must_say(str(told.value), f"'{name}'", "1x1", "model.name")


def test_dkd_goes_on_from_no_model_of_star(large):
    method, model = STAR(), large.model()
    large.train(method, model, large.steps[0])
    with pytest.raises(ConfigError) as told:
        DKD().prepare_model(model, large.steps[1])
    must_say(str(told.value), "'auxiliary'")
