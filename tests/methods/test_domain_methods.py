"""What methods do where there are several branches, on a tiny model: values, weights and gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from everseg import registry
from everseg.labels import LabelSpace
from everseg.methods.base import Method, StepContext
from everseg.methods.terms import at_label_size, label_terms
from everseg.models.erfnet import erfnet
from everseg.scenarios.steps import Source, Step
from everseg.types import Batch, SegOutput


def build(name: str, **options):
    return registry.resolve("method", name)(**options)


def upsampled(logits: Tensor, batch: Batch) -> Tensor:
    size = batch.label.shape[-2:]
    return torch.nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False).double()


# ---------------------------------------------------------------- what is compared with what


@pytest.fixture
def third(toy):
    """A method's third domain, begun after plain training of two; first terms, student and teacher outputs."""

    def begin(name: str, **options):
        model = toy.model()
        toy.train(build("ft"), model, *toy.domains[:2])
        with torch.no_grad():  # a student that has left its teacher, as after some iterations
            run = toy.begin(build(name, **options), model, toy.domains[2])
            for weight in model.parameters():
                weight.add_(
                    0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
                )
        batch = toy.batches(toy.domains[2], 1)[0]
        state = {name: value.clone() for name, value in model.state_dict().items()}
        student = {b: upsampled(o.logits, batch).detach() for b, o in model(batch.image).items()}
        model.load_state_dict(state)  # running statistics too
        teacher = {b: upsampled(o.logits, batch) for b, o in run.teacher(batch.image).items()}
        terms = next(iter(run.method.losses(batch, run.ctx)))
        return {name: float(value.detach()) for name, value in terms.items()}, student, teacher

    return begin


def softened(logits: Tensor) -> np.ndarray:
    """Softmax over channels as (pixels, C), in NumPy."""
    x = logits.movedim(1, -1).reshape(-1, logits.shape[1]).numpy()
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_lwf_keeps_the_outputs_of_every_old_branch_on_the_new_images(third):
    terms, student, teacher = third("lwf", kd_weight=7.0)
    wanted = sum(
        -(softened(teacher[b]) * np.log(softened(student[b]))).sum(1).mean() / teacher[b].shape[1]
        for b in "ab"
    )
    assert terms["kd"] == pytest.approx(7 * wanted, rel=1e-4)


def test_lwf_mc_keeps_the_sigmoids_of_every_old_branch_in_both_forms(third):
    for form in ("combined", "disjoint"):
        terms, student, teacher = third("lwf-mc", form=form, importance=3.0)
        wanted = 0.0
        for branch in "ab":
            target, p = torch.sigmoid(teacher[branch]).numpy(), torch.sigmoid(student[branch]).numpy()
            wanted += -(target * np.log(p) + (1 - target) * np.log(1 - p)).sum(1).mean()
        assert terms.keys() == {"bce", "kd"}
        assert terms["kd"] == pytest.approx(3 * wanted, rel=1e-4)


@pytest.mark.parametrize("kl", ["log", "probabilities"])
def test_mdil_adds_up_the_divergence_of_the_old_branches(third, kl):
    terms, student, teacher = third("mdil", kd_weight=0.5, kl=kl)
    wanted = 0.0
    for branch in "ab":
        q, p = softened(teacher[branch]), softened(student[branch])
        wanted += (q * (np.log(q) - (np.log(p) if kl == "log" else p))).mean()
    assert terms["kd"] == pytest.approx(0.5 * wanted, rel=1e-3, abs=1e-7)


def test_mib_knows_one_branch_only(third):
    assert third("mib")[0].keys() == {"ce"}


@pytest.mark.parametrize(("updates", "number"), [("one", 1), ("two", 2), ("two-legacy", 2)])
def test_mdil_takes_two_updates_from_the_third_domain_on_where_asked(toy, updates, number):
    """Also where classes were added in between: what counts is the number of old domains."""
    steps = (
        toy.domains[0],
        toy.step(1, {"a": (3, 2)}, {"a": 2}, "a"),
        toy.step(2, {"a": (3, 2), "b": (4,)}, {"b": 4}, "b"),
        toy.step(3, {"a": (3, 2), "b": (4,), "c": (2,)}, {"c": 2}, "c"),
    )
    model, method = toy.model(), build("mdil", updates=updates)
    for step in steps:
        run = toy.begin(method, model, step)
        batch = toy.batches(step, 1)[0]
        assert len(list(method.losses(batch, run.ctx))) == (number if step.index == 3 else 1)
        method.end_step(run.ctx)


def test_the_teacher_uses_the_batch_statistics_in_the_authors_form_only(toy):
    model = toy.model()
    toy.train(build("mdil"), model, *toy.domains[:2])
    values = {}
    for form in ("running", "authors"):
        method = build("mdil", teacher_statistics=form)
        copy = toy.model()
        for step in toy.domains[:2]:
            copy.grow(step.grows)
        copy.load_state_dict(model.state_dict())
        copy.freeze(branches=copy.branches[:1], norm=True)  # as the step before left it
        run = toy.begin(method, copy, toy.domains[2])
        list(method.losses(toy.batches(toy.domains[2], 1)[0], run.ctx))
        values[form] = {module.training for module in run.teacher.modules()}
    assert values == {"running": {False}, "authors": {True}}


# ---------------------------------------------------------------- which weights move, and how fast


@pytest.mark.parametrize("name", ["ft", "lwf", "ewc", "mib"])
@pytest.mark.parametrize("number", [2, 3])
def test_shared_weights_learn_at_one_nth_of_the_rate_where_n_branches_take_turns(toy, name, number):
    branches = "abc"[:number]
    spaces = {b: LabelSpace(((0, 1, 2),), ("x", "y", "z")) for b in branches}
    sources = tuple(Source(b, b, "train", (), bytes(256), b) for b in branches)
    step = Step(0, sources, (), spaces, dict.fromkeys(branches, 3))
    model, method = toy.model(), build(name)
    method.prepare_model(model, step)
    groups = method.param_groups(model, step)
    assert [group["lr_scale"] for group in groups] == [1 / number, 1.0]
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in model.shared_parameters()}
    assert {id(p) for p in groups[1]["params"]} == {
        id(p) for b in branches for p in model.branch_parameters(b)
    }


@pytest.mark.parametrize("name", ["mdil", "mdil+mib"])
def test_mdil_moves_shared_weights_slowly_after_the_first_step(toy, name):
    model, method = toy.model(), build(name, shared_lr_scale=0.25)
    scales = []
    for step in (*toy.domains[:2], replace(toy.step(2, {"c": (2,)}, {"c": 2}, "c"), fresh=True)):
        if step.fresh:
            model = toy.model()
        method.prepare_model(model, step)
        groups = method.param_groups(model, step)
        scales.append([group["lr_scale"] for group in groups])
        if len(groups) == 2:
            assert {id(p) for p in groups[1]["params"]} == {id(p) for p in model.branch_parameters("b")}
    assert scales == [[1.0], [0.25, 1.0], [1.0]]


@pytest.mark.parametrize(("name", "copied"), [("mdil", True), ("mdil+mib", True), ("ft", False)])
def test_a_new_branch_starts_from_the_one_met_before_it(toy, name, copied):
    """Adapters, affine weights and decoder; the classifier and the encoder's statistics start afresh."""
    model, method = erfnet(widths=(4, 6, 8), blocks=(1, 1)), build(name)
    for step in toy.domains[:3]:
        method.prepare_model(model, step)
        state = model.state_dict()
        with torch.no_grad():
            for key, value in state.items():
                if value.is_floating_point() and f".{step.branch}." in key and step.index != 2:
                    value.add_(torch.rand(value.shape))
    known = {key for key in state if ".b." in key}
    assert any("adapter" in key for key in known)
    for key in known:
        same = torch.equal(state[key], state.get(key.replace(".b.", ".c."), torch.empty(0)))
        fresh = key.startswith("heads.") or (key.startswith("encoder.") and "running_" in key)
        if "num_batches" not in key:
            assert same == (copied and not fresh), key


@pytest.mark.parametrize("name", ["ewc", "rw", "pi"])
def test_the_penalty_pulls_shared_weights_only(toy, name):
    model, method = toy.model(), build(name)
    toy.train(method, model, toy.domains[0])
    run = toy.begin(method, model, toy.domains[1]).take(*toy.batches(toy.domains[1], 2))
    run.optimizer.zero_grad(set_to_none=True)
    (terms,) = method.losses(toy.batches(toy.domains[1], 1)[0], run.ctx)
    sum(terms.values()).backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert float(method.after_backward(run.ctx)["penalty"]) > 0
    pulled = {n for n, p in model.named_parameters() if n in plain and not torch.equal(p.grad, plain[n])}
    own = {n for n in plain if n.startswith("heads.b.")}
    assert own
    assert not own & pulled
    assert not any(n.startswith("heads.a.") for n in plain)
    assert len(pulled) > 10


def test_growing_a_path_with_mdil_and_mib_keeps_what_is_known(toy):
    """Old classes' logits bit by bit, the background's probability shared with the new ones, other paths untouched."""
    model = toy.model()
    toy.train(build("ft"), model, *toy.domains[:3])
    model.eval()
    image = toy.batches(toy.domains[3], 1)[0].image
    with torch.no_grad():
        before = {b: o.logits for b, o in model(image).items()}
        build("mdil+mib").prepare_model(model, toy.domains[3])
        after = {b: o.logits for b, o in model.eval()(image).items()}
    assert after["a"].shape[1] == 5
    assert torch.equal(after["a"][:, 1:3], before["a"][:, 1:])
    for branch in "bc":
        assert torch.equal(after[branch], before[branch])
    old, new = before["a"].softmax(1), after["a"].softmax(1)
    torch.testing.assert_close(new[:, 1:3], old[:, 1:])
    for part in (0, 3, 4):
        torch.testing.assert_close(new[:, part], old[:, 0] / 3)


def test_mib_takes_no_first_class_for_a_background(toy):
    """A path without background that grows: every form of MiB is the plain one."""
    before, after = (
        LabelSpace(groups, ("car", "road", "tree")[: sum(map(len, groups))], background=None)
        for groups in (((1, 2),), ((1, 2), (3,)))
    )
    source = Source("a", "x", "train", (), bytes(256), "x")
    steps = Step(0, (source,), (), {"a": before}, {"a": 2}), Step(1, (source,), (), {"a": after}, {"a": 1})
    image = torch.randn(2, 3, 16, 16)
    batch = Batch(image, torch.randint(0, 3, (2, 16, 16)), "a")
    found = []
    for options in ({}, {"unbiased_ce": False, "unbiased_kd": False, "init_background": False}):
        model = toy.model()
        toy.begin(build("ft"), model, steps[0])
        run = toy.begin(build("mib", **options), model, steps[1]).take(batch)
        found.append(run.terms[0])
    assert found[0] == found[1]
    assert found[0].keys() == {"ce", "kd"}


# ---------------------------------------------------------------- class weights


@pytest.mark.parametrize("bce", [False, True])
def test_class_weights_are_sums_over_the_pixels_that_count(bce):
    """Softmax: sum(w nll) / sum(w). Sigmoids: each weighed, divided by the number of pixels."""
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(2, 3, 4, 5)), rng.integers(0, 3, (2, 4, 5))
    label[:, 0] = 255
    weights = (0.5, 3.0, 0.0)
    space = LabelSpace(((0, 1, 2),), ("x", "y", "z"))
    source = Source("a", "x", "train", (), bytes(256))
    step = Step(0, (source,), (), {"a": space}, {"a": 3}, class_weights={"a": weights})
    ctx = StepContext(step=step, model=torch.nn.Identity(), module=None, teacher=None)
    batch = Batch(torch.zeros(2, 3, 4, 5), torch.tensor(label), "a")
    output = SegOutput(torch.tensor(logits), {})
    terms = label_terms(output.logits, batch, ctx, bce=bce)
    ((name, value),) = at_label_size(terms, output, batch).items()
    total = denominator = 0.0
    for b, y, x in np.ndindex(label.shape):
        truth, row = label[b, y, x], logits[b, :, y, x]
        if truth == 255:
            continue
        if bce:
            total += sum(
                w * (math.log(1 + math.exp(v)) - v * (c == truth))
                for c, (w, v) in enumerate(zip(weights, row, strict=True))
            )
            denominator += 1
        else:
            total += weights[truth] * -math.log(math.exp(row[truth]) / np.exp(row).sum())
            denominator += weights[truth]
    assert name == ("bce" if bce else "ce")
    assert float(value) == pytest.approx(total / denominator, rel=1e-12)


def test_a_step_from_scratch_is_never_frozen_from_a_later_step_on(toy):
    step = replace(toy.step(3, {"c": (2,)}, {"c": 2}, "c"), fresh=True)
    for options, frozen in (({}, False), ({"freeze_from": 0}, True)):
        model = toy.model()
        method: Method = build("ft", freeze_encoder=True, **options)
        method.prepare_model(model, step)
        assert model.frozen.encoder is frozen
