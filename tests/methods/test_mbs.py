"""MBS: its terms, its hyper-parameters where the teacher is certain, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from everseg.errors import ConfigError
from everseg.labels import LabelSpace
from everseg.methods import switches
from everseg.methods.ft import FineTuning
from everseg.methods.mbs import MBS
from everseg.methods.mib import MiB
from saying import must_say

K, C = 3, 5


@pytest.fixture
def made(toy):
    """A second step whose teacher is sure of the background on the left, of class 1 on the right."""

    def make(**options):
        method, model = MBS(**options), toy.model("mbs")
        toy.train(method, model, toy.steps[0])
        # Images of everyday size of cells, and a teacher that says something else in each corner.
        torch.manual_seed(7)
        run = toy.begin(method, model, toy.steps[1])

        def opinion(_module, _given, found):
            output = found["a"]
            width = output.logits.shape[3]
            sure = torch.zeros_like(output.logits)
            sure[:, 0, :, : width // 2] = 6.0
            sure[:, 1, :, width // 2 :] = 6.0
            sure[:, 2, -1:] = 5.5  # less than certain of class 2, at the bottom
            return {"a": output._replace(logits=output.logits + sure)}

        run.teacher.register_forward_hook(opinion)
        return run

    return make


def independent(run, batch, *, threshold=0.7):
    """The terms once more, straight from the description."""
    with torch.no_grad():
        student, teacher = run.model(batch.image)["a"], run.teacher(batch.image)["a"]
    size = batch.label.shape[1:]
    x = F.interpolate(student.logits, size, mode="bilinear")
    t = F.interpolate(teacher.logits, size, mode="bilinear").softmax(1)
    label = batch.label
    score, best = t.max(1)
    target = torch.where((label == 0) & (best > 0) & (score >= threshold), best, label)
    target = torch.where((target == 0) & (t[:, 0] < t[:, 1:].sum(1)), 255, target)
    wanted = torch.zeros_like(x)
    wanted[:, :K] = t
    for c in range(K, C):
        here = label == c
        wanted[:, c][here], wanted[:, 0][here] = t[:, 0][here], 0.0
    ours, theirs = student.features, teacher.features
    cells = F.interpolate(target[:, None].double(), teacher.logits.shape[2:], mode="nearest")[:, 0]
    weight = torch.zeros_like(cells)
    weight[(cells > 0) & (cells < K)] = 1
    weight = torch.where(cells == 0, teacher.logits.softmax(1)[:, 0].double(), weight)
    apart = (ours["patches"] - theirs["patches"]).square().sum(1)
    pairs = F.cosine_similarity(ours["class_tokens"][:, K:, None], ours["class_tokens"][:, None], dim=3).abs()
    sum_of_pairs = pairs.sum() - pairs[:, range(C - K), range(K, C)].sum()
    return {
        "ce": F.cross_entropy(x, target, ignore_index=255),
        "kd": -25 * (wanted * x.log_softmax(1)).mean(),
        "feature": (weight * apart).sum() / (weight > 0).sum() / apart.new_tensor(ours["patches"].shape[1]),
        "class": F.mse_loss(ours["class_features"][:, :K], theirs["class_features"]),
        "token": sum_of_pairs / (len(x) * (C - K) * (C - 1)) * (C - K) / C,
    }, (target, cells)


def test_terms_are_those_of_the_description(toy, made):
    run = made()
    run.take(toy.batches(toy.steps[1])[0])  # student and teacher differ after an update
    batch = toy.batches(toy.steps[1])[1]
    run.model.eval()  # no dropout, and the norms as in evaluation
    expected, (target, cells) = independent(run, batch)
    (found,) = run.method.losses(batch, run.ctx)
    assert list(found) == list(expected)
    for name, value in found.items():
        assert_close(value.detach().double(), expected[name].double(), rtol=2e-5, atol=1e-7, msg=name)
    ids = set(target.unique().tolist())
    assert {0, 1, 3, 4, 255} <= ids  # every rule has had its say
    assert ((target == 255) & (batch.label == 0)).any()
    assert {0.0, 1.0} <= set(cells.unique().tolist())


@pytest.mark.parametrize(
    ("options", "moved"),
    [
        ({"threshold": 0.999}, {"ce", "feature"}),
        ({"ignore_doubted": False}, {"ce"}),
        ({"kd_weight": 10.0}, {"kd"}),
        ({"moved": False}, {"kd"}),
        ({"feature_weight": 0.5}, {"feature"}),
        ({"adaptive": False}, {"feature"}),
        ({"class_weight": 0.5}, {"class"}),
        ({"orthogonality_weight": 0.5}, {"token"}),
    ],
)
def test_each_hyperparameter_acts_where_it_should(toy, made, options, moved):
    first, second = toy.batches(toy.steps[1])[:2]
    run = made().take(first)
    run.model.eval()
    (plain,) = run.method.losses(second, run.ctx)
    (other,) = dataclasses.replace(run.method, **options).losses(second, run.ctx)
    changed = {name for name in plain if not torch.equal(plain[name], other[name])}
    assert moved <= changed <= moved | {"feature"}


def test_new_tokens_start_from_the_background_and_old_ones_stay(toy):
    model = toy.model("mbs")
    toy.train(MBS(), model, toy.steps[0])
    old = model.head("a").classifiers[0].weight.clone()
    toy.begin(MBS(), model, toy.steps[1])
    first, new = (part.weight for part in model.head("a").classifiers)
    assert torch.equal(first, old)
    assert torch.equal(new, old[:1].expand(2, -1))


def test_without_background_nothing_is_completed_or_moved(toy, made):
    run = made()
    space = LabelSpace(tuple(run.step.spaces["a"].groups), run.step.spaces["a"].names, background=None)
    run.ctx.step = dataclasses.replace(run.step, spaces={"a": space})
    batch = toy.batches(toy.steps[1])[0]
    (terms,) = run.method.losses(batch, run.ctx)
    assert run.method.targets(batch, run.ctx, run.ctx.teach(batch)) is batch.label
    assert {"ce", "kd", "feature", "class", "token"} == set(terms)
    assert all(value.isfinite() for value in terms.values())


def test_a_network_without_tokens_is_refused_before_training(toy):
    with pytest.raises(ConfigError) as caught:
        switches.check_model(MBS(), toy.model())
    must_say(caught.value, "class tokens", "model.name=segmenter")
    switches.check_model(MBS(), toy.model("mbs"))


@pytest.mark.parametrize("method", [FineTuning, MiB])
def test_other_methods_train_tokens(toy, method):
    options = (
        {"init_background": False} if method is MiB else {}
    )  # tokens have no bias that could be shared out
    run = toy.train(method(**options), toy.model("mbs"))
    assert all(value.isfinite() for value in run.terms[-1].values())
