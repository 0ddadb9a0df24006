"""What every method, built-in or installed, must hold to."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import safetensors.torch
import torch

from conftest import NETWORKS
from everseg import registry
from everseg.engine.optim import check_param_groups, load_optimizer_state, optimizer_state
from everseg.errors import ConfigError
from everseg.methods.base import Method
from everseg.methods.ft import FineTuning
from everseg.models.build import from_description
from everseg.models.folding import folded_copy

METHODS = registry.names("method")
NEEDS: dict[str, dict[str, Any]] = {
    "freeze_from": {"freeze_encoder": True},
    "frozen_statistics": {"freeze_encoder": True},
    "background_from_labels": {"form": "disjoint"},
    "fuse_changed": {"fuse": "changed"},
    "init_background": {"pretune": 0},
    "pretune_lr_scale": {"pretune": 1},
    "pretune_kd_weight": {"pretune": 1},
    "pretune_unbiased_ce": {"pretune": 1},
}
"""Hyper-parameters that act only together with another one."""
ALL_TRAINED: dict[str, dict[str, Any]] = {"ucd": {"freeze_first_head": False}}
"""What frees weights that a method keeps as they were drawn."""
BY_PIXEL = ("sdr", "ucd", "star", "barm")
"""Methods that compare the pixels of feature maps, also those of old classes: a map of one pixel shows nothing."""
OVER_DOMAINS = ("mdil", "mdil+mib")
"""Methods whose hyper-parameters act where there are several branches."""
ELSEWHERE = ("plop", "reminder", "acil", "dft*", "mbs")
"""Methods whose hyper-parameters act on a teacher that is certain, or on the images of a pass or on steps to come:
test_plop.py, test_acil.py, test_dft.py and test_mbs.py try each."""
OVER_VALID = ("mbs",)
"""Methods whose cross-entropy is a mean over the pixels that are not ignored, from the first step on."""
CERTAIN = {
    ("complete", "sure"),
    ("sats", "threshold"),
    ("sats", "entropy_norm"),
    ("ssul", "threshold"),
    ("ssul", "memory_offset"),
    ("star", "noise"),
    ("star", "old_logit"),
    ("star", "background_decay"),
    ("barm", "threshold"),
    ("barm", "empty_background"),
    ("microseg", "threshold"),
    ("microseg", "memory_offset"),
    *itertools.product(("mib", "ewf", "nest"), ("memory_loss", "memory_void")),
}
"""Single hyper-parameters that act on a teacher that is certain or on images of a memory. Those of SATS are of PLOP's
parts; test_complete.py tries that of complete, test_ssul.py SSUL's, test_barm.py BARM's, test_star.py STAR's,
test_mib_memory.py those of MiB."""
CLASSES_ONLY = ("dkd", "star", "ssul", "barm", "microseg", "acil", "dft*")
"""Methods of one domain's classes: they refuse several domains, and later steps without a new class."""
OWN_FIRST_STEP = ("dkd", "star", "ssul", "barm", "microseg", "acil", "dft*")
"""Methods whose first step is not that of fine-tuning: their network has other outputs, or learns them otherwise."""
MOVE_ENCODER = ("rcil",)
"""Methods that change the encoder by their nature, and refuse to freeze it."""
PLAIN: dict[tuple[str, str], list[torch.Tensor]] = {}
"""Results with default values, to compare the changed ones with."""


def build(name: str, **options: Any):
    return registry.resolve("method", name)(**options)


def fields() -> list[tuple[str, str]]:
    """Each method's own fields; those of the base for two methods, one with a `prepare_model` of its own."""
    shared = {f.name for f in dataclasses.fields(Method)}
    found = [(n, f.name) for n in METHODS for f in dataclasses.fields(registry.resolve("method", n))]
    return [
        (n, name)
        for n, name in found
        if ((name not in shared and n not in ELSEWHERE) or n in ("ft", "mib")) and (n, name) not in CERTAIN
    ]


def other_value(cls: type, name: str) -> Any:
    default = {f.name: f.default for f in dataclasses.fields(cls)}[name]
    hint = get_type_hints(cls)[name]
    if get_origin(hint) is Literal:
        return next(value for value in get_args(hint) if value != default)
    if hint is bool:
        return not default
    other = {
        "freeze_from": 0,
        "period": 1,
        "pretune": 2,
        "pretune_kd_weight": 1.0,
        "head_width": 8,
        "clusters": 2,
        "proposals": 3,
    }
    return other.get(name, default * 0.5)


def fingerprint(run) -> list[torch.Tensor]:
    logged = [value.double() for terms in run.terms for value in terms.values()]
    return logged + [value.double() for value in run.model.state_dict().values()]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("name", METHODS)
def test_two_steps_stay_finite_and_learn(toy, name):
    model = toy.model(name)
    first = toy.train(build(name, **ALL_TRAINED.get(name, {})), model, toy.steps[0])
    start = {k: v.clone() for k, v in model.named_parameters()}
    second = toy.train(first.method, model, toy.steps[1])
    for run in (first, second):
        assert all(torch.isfinite(value) for terms in run.terms for value in terms.values())
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    trained = [(k, v) for k, v in model.named_parameters() if k in start and v.requires_grad]
    unmoved = [k for k, v in trained if torch.equal(v, start[k])]
    assert not unmoved


@pytest.mark.parametrize("name", METHODS)
def test_teacher_is_bit_unchanged_and_the_model_of_before(toy, name):
    method, model = build(name), toy.model(name)
    toy.train(method, model, toy.steps[0])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = toy.begin(method, model, toy.steps[1]).take(*toy.batches(toy.steps[1]))
    if method.needs_teacher:
        assert equal(before, run.teacher.state_dict())
        assert not any(p.requires_grad or p.grad is not None for p in run.teacher.parameters())
    else:
        assert run.teacher is None


@pytest.mark.parametrize(("name", "field"), fields())
def test_every_hyperparameter_changes_the_result(toy, name, field):
    needs = NEEDS.get(field, {})
    value = other_value(registry.resolve("method", name), field)
    over_domains = name in OVER_DOMAINS or field in ("shared_lr_scale", "keep_shared_statistics")
    key = (name, str(needs), over_domains)
    if name in BY_PIXEL:
        toy.side, toy.teacher_sees = 64, 3.0
    steps = toy.domains if over_domains else toy.steps
    if key not in PLAIN:
        PLAIN[key] = fingerprint(toy.train(build(name, **needs), toy.model(name), *steps))
    ours = PLAIN[key]
    theirs = fingerprint(toy.train(build(name, **needs | {field: value}), toy.model(name), *steps))
    assert len(ours) != len(theirs) or any(not torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_batch_of_ignored_pixels_stays_finite(toy, name):
    method, model = build(name), toy.model(name)
    toy.train(method, model, toy.steps[0])
    batch = toy.batches(toy.steps[1], 1)[0]
    batch.label.fill_(255)
    run = toy.begin(method, model, toy.steps[1]).take(batch)
    assert all(torch.isfinite(value) for value in run.terms[0].values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in OWN_FIRST_STEP])
def test_first_step_is_the_plain_loss(toy, name):
    method = build(name, **ALL_TRAINED.get(name, {}))
    run = toy.begin(method, toy.model(name), toy.steps[0]).take(toy.batches(toy.steps[0])[0])
    plain = build("ft", bce=name == "lwf-mc")
    batch = toy.batches(toy.steps[0])[0]
    expected = toy.begin(plain, toy.model(name), toy.steps[0]).take(batch)
    if name in OVER_VALID:
        share = (batch.label != 255).double().mean().item()
        assert run.terms[0]["ce"].item() == pytest.approx(expected.terms[0]["ce"].item() / share, rel=1e-6)
        return
    assert run.terms[0] == expected.terms[0]
    assert equal(run.model.state_dict(), expected.model.state_dict())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_restart_inside_a_step_is_bit_equal(toy, name, index):
    """Steps 0 and 1 of the classes; steps 2 and 3 of the domains."""
    if index >= 2 and name in CLASSES_ONLY:
        pytest.skip("refuses several domains")
    steps = toy.steps if index < 2 else toy.domains
    options = {"rw": {"period": 2}, "ilt": {"feature_weight": 1.0}}.get(name, {})
    model, method = toy.model(name), build(name, **options)
    for step in steps[:index]:
        toy.train(method, model, step)
    described = model.describe()
    before, carried = [
        {k: v.clone() for k, v in s.items()} for s in (model.state_dict(), method.state_dict())
    ]
    step, data = steps[index], toy.batches(steps[index], 7)
    run = toy.begin(method, model, step).take(*data[:3])
    tensors, document = ({}, {}) if run.optimizer is None else optimizer_state(run.optimizer, model)
    files = [safetensors.torch.save(clones(s)) for s in (model.state_dict(), tensors, method.state_dict())]
    document = json.loads(json.dumps(document))
    run.take(*data[3:])
    method.end_step(run.ctx)

    fresh, again = build(name, **options), from_description(described, NETWORKS.get(name))
    again.load_state_dict(before)
    again.readout = model.readout  # stored beside the weights, not in the description
    fresh.load_state_dict(carried)
    resumed = toy.begin(fresh, again, step, begin=False)
    weights, momenta, state = [safetensors.torch.load(data) for data in files]
    again.load_state_dict(weights)
    if resumed.optimizer is not None:
        load_optimizer_state(resumed.optimizer, again, momenta, document)
    fresh.load_state_dict(state)
    fresh.begin_step(resumed.ctx)  # harmless where the engine calls it after a restart
    resumed.take(*data[3:])
    fresh.end_step(resumed.ctx)

    assert equal(model.state_dict(), again.state_dict())
    assert equal(method.state_dict(), fresh.state_dict())
    assert run.terms[3:] == resumed.terms


def clones(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


@pytest.mark.parametrize("name", METHODS)
def test_unknown_hyperparameter_is_an_error(name):
    with pytest.raises(TypeError, match="kd_wieght"):
        build(name, kd_wieght=1.0)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("options", [{}, {"freeze_encoder": True}, {"freeze_norm": True}])
def test_param_groups_hold_every_trainable_weight_once(toy, name, options):
    if name in MOVE_ENCODER and options.get("freeze_encoder"):
        pytest.skip("refuses to freeze the encoder")
    method, model = build(name, **options), toy.model(name)
    for step in toy.steps if name in CLASSES_ONLY else toy.domains:
        method.prepare_model(model, step)
        if method.trains(step):
            check_param_groups(model, method.param_groups(model, step))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in MOVE_ENCODER])
def test_frozen_encoder_is_bit_unchanged_with_its_statistics(toy, name):
    method, model = build(name, freeze_encoder=True), toy.model(name)
    toy.train(method, model, toy.steps[0])
    before = {k: v.clone() for k, v in model.encoder.state_dict().items()}
    toy.train(method, model, toy.steps[1])
    assert equal(before, model.encoder.state_dict())


@pytest.mark.parametrize("name", ["lwf", "lwf-mc", "ilt", "mib", "plop"])
def test_a_frozen_encoder_runs_once_for_student_and_teacher(toy, name, monkeypatch):
    def terms(*, shared: bool):
        model = toy.model(name)
        method = build(name, freeze_encoder=True)
        toy.train(method, model, toy.steps[0])
        run = toy.begin(method, model, toy.steps[1])
        run.ctx.folded_teacher = folded_copy(run.teacher)
        seen = []
        for part in (model, run.teacher, run.ctx.folded_teacher):
            part.encoder.register_forward_hook(lambda *_: seen.append(1))
        if not shared:
            monkeypatch.setattr(type(model), "encoder_is_constant", False)
        run.take(*toy.batches(toy.steps[1]))
        return run.terms, len(seen)

    (ours, runs), (plain, twice) = terms(shared=True), terms(shared=False)
    assert (runs, twice) == (3, 6)
    for one, other in zip(ours, plain, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_new_branch_learns_and_leaves_the_old_ones_weights_alone(toy, name):
    method, model = build(name), toy.model(name)
    toy.train(method, model, toy.steps[0])
    if name in CLASSES_ONLY:
        with pytest.raises(ConfigError, match=f"'{re.escape(name)}'.* one domain"):
            toy.train(method, model, toy.step(1, {"a": (3,), "b": (4,)}, {"b": 4}, "b"))
        return
    head = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("heads.a.")}
    assert head
    run = toy.train(method, model, toy.step(1, {"a": (3,), "b": (4,)}, {"b": 4}, "b"))
    assert set(run.terms[-1]) - {"ce", "bce"} == {
        "lwf": {"kd"}, "lwf-mc": {"kd"}, "ilt": {"kd", "feature"}, "mdil": {"kd"}, "mdil+mib": {"kd_domains"},
        "plop": {"pod"}, "reminder": {"pod"}, "rcil": {"kd", "spatial", "channel"}, "complete": {"kd"},
        "ewc": {"penalty"}, "rw": {"penalty"}, "pi": {"penalty"}, "sats": {"attention"},
    }.get(name, set())  # fmt: skip
    after = {k: v for k, v in model.state_dict().items() if k.startswith("heads.a.")}
    assert equal(head, after)


@pytest.mark.parametrize("name", METHODS)
def test_step_without_new_classes_runs(toy, name):
    method, model = build(name), toy.model(name)
    toy.train(method, model, *toy.steps)
    if method.fuse != "none":
        with pytest.raises(ConfigError, match=r"step 2: method\.fuse .* adds no class"):
            toy.train(method, model, toy.step(2, {"a": (3, 2)}, {}, "a"))
        return
    if name in CLASSES_ONLY and name != "acil":  # more images of known classes only add to its sums
        with pytest.raises(ConfigError, match=f"'{re.escape(name)}'.* no new class"):
            toy.train(method, model, toy.step(2, {"a": (3, 2)}, {}, "a"))
        return
    run = toy.train(method, model, toy.step(2, {"a": (3, 2)}, {}, "a"))
    assert all(torch.isfinite(value) for value in run.terms[-1].values())
    assert model.head("a").num_classes == 5


def test_only_mib_with_its_initialisation_starts_from_the_background(toy):
    for name, options, expected in (
        ("mib", {}, True),
        ("mdil+mib", {}, True),
        ("mdil", {}, False),
        ("mib", {"init_background": False}, False),
        ("lwf", {}, False),
    ):
        model = toy.model()
        method = build(name, **options)
        toy.train(method, model, toy.steps[0])
        toy.begin(method, model, toy.steps[1])
        old, new = model.head("a").classifiers
        assert torch.equal(new.weight, old.weight[:1].expand_as(new.weight)) is expected


@dataclass(kw_only=True)
class Halved(FineTuning):
    """Halves the weights of the classifiers at the end of each step, and remembers what `end_step` then saw."""

    def finish_model(self, ctx):
        with torch.no_grad():
            for weight in ctx.module.head(ctx.step.branch).parameters():
                weight.mul_(0.5)

    def end_step(self, ctx):
        self.seen = [w.detach().clone() for w in ctx.module.head(ctx.step.branch).parameters()]


def test_the_model_is_finished_before_the_step_ends(toy):
    plain = toy.train(build("ft"), toy.model(), toy.steps[0])
    halved = toy.train(Halved(), toy.model(), toy.steps[0])
    ours, theirs = (list(run.model.head("a").parameters()) for run in (halved, plain))
    for one, other, seen in zip(ours, theirs, halved.method.seen, strict=True):
        assert torch.equal(one, other * 0.5)
        assert torch.equal(one, seen)


@pytest.mark.parametrize("freeze_heads", ["none", "old", "all"])
def test_classifiers_are_frozen_by_age(toy, freeze_heads):
    method, model = build("mib", freeze_heads=freeze_heads, init_background=False), toy.model()
    toy.train(method, model, toy.steps[0])
    old = [w.clone() for w in model.head("a").parameters()]
    run = toy.begin(method, model, toy.steps[1])
    new = [w.clone() for w in model.head("a").classifiers[1].parameters()]
    run.take(*toy.batches(toy.steps[1]))
    head = model.head("a").classifiers
    now = [list(head[k].parameters()) for k in (0, 1)]
    stood = [all(map(torch.equal, was, there)) for was, there in zip((old, new), now, strict=True)]
    assert stood == {"none": [False, False], "old": [True, False], "all": [True, True]}[freeze_heads]
