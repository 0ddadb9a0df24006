"""PLOP and REMINDER: their losses from the formulas, thresholds, prototypes, every switch, and the edges."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from everseg import losses
from everseg.config.fields import MethodConfig
from everseg.errors import ConfigError
from everseg.methods import switches
from everseg.methods.base import Method
from everseg.methods.build import build_method
from everseg.methods.plop import PLOP
from everseg.methods.plop_terms import PodRule, pod_term
from everseg.methods.reminder import REMINDER
from everseg.types import Batch, SegOutput

BOTH = [PLOP, REMINDER]
CERTAIN = 3.0
"""Standard deviation of the first step's logits over pixels: the little network's teacher then has opinions."""


def samples(step, size: tuple[int, int] = (32, 32), count: int = 3) -> list[Batch]:
    """Batches of a step of branch "a", large enough for maps of several cells; a part of each is ignored."""
    generator = torch.Generator().manual_seed(step.index)
    old, total = step.num_old("a"), step.spaces["a"].num_classes
    found = []
    for _ in range(count):
        image = F.interpolate(torch.randn(2, 3, 8, 8, generator=generator), size, mode="bilinear")
        label = torch.randint(0, total, (2, *size), generator=generator)
        label[label < old] = 0
        label[:, :3] = 255
        found.append(Batch(image, label, "a"))
    return found


def second_step(
    toy,
    method: Method,
    *,
    size: tuple[int, int] = (32, 32),
    transform=lambda batch: batch,
    train: bool = True,
):
    """The second step, begun and trained, of a model whose first step ended with a classifier of varied opinions."""
    model, (first, step) = toy.model(), toy.steps
    toy.train(method, model, first)
    data = [transform(batch) for batch in samples(step, size)]
    with torch.no_grad():
        features = torch.cat([model.eval()(batch.image)["a"].features["decoder"] for batch in data])
        (classifier,) = model.head("a").classifiers
        classifier.weight.copy_(
            torch.randn(3, 6, generator=torch.Generator().manual_seed(1))[..., None, None]
        )
        logits = classifier(features)
        classifier.weight.mul_(CERTAIN / logits.std((0, 2, 3)).view(3, 1, 1, 1))
        classifier.bias.zero_()
        classifier.bias.sub_(classifier(features).mean((0, 2, 3)))
    run = toy.begin(method, model, step, begin=False)
    run.ctx.epoch_batches = lambda: iter(data)
    switches.begin(method, run.ctx)
    return run.take(*data) if train else run


def full(logits, label):
    return losses.upsample(logits, label.shape[1:])


def class_loss(student, teacher, label, thresholds, *, every: int, epsilon: float) -> float:
    """Of a batch, pixel by pixel and without torch."""
    x, t, y = (a.double().numpy() for a in (full(student, label), full(teacher, label), label))
    old = t.shape[1]
    total = 0.0
    for b in range(len(y)):
        summed, number, accepted = 0.0, 0, 0
        for row, column in np.ndindex(y.shape[1:]):
            target = int(y[b, row, column])
            if target == 255:
                continue
            if target < old:
                number += 1
                q = np.exp(t[b, :, row, column] - t[b, :, row, column].max())
                q /= q.sum()
                u = -(q * np.log(q + 1e-8)).mean() / math.log(old + 1e-8) / math.log(every)
                target = int(q.argmax())
                if not u < thresholds[target]:
                    continue
                accepted += 1
            z = x[b, :, row, column]
            summed += math.log(np.exp(z - z.max()).sum()) + z.max() - z[target]
        total += summed * accepted / (number + epsilon) if number else 0.0
    return total / y.size


@pytest.mark.parametrize("cls", BOTH)
def test_class_loss_and_pod_from_the_formulas(toy, cls):
    run = second_step(toy, cls(median="exact"), train=False)
    method, batch = run.method, samples(toy.steps[1])[0]
    thresholds = method.state_dict()["thresholds/a"].tolist()
    student = run.ctx.student(
        batch, taps=("before_activation",)
    )  # in training mode: the norms see the same batch below
    teacher = run.ctx.teach(batch, taps=("before_activation",))
    terms = run.take(batch).terms[-1]
    expected = class_loss(
        student.logits.detach(), teacher.logits, batch.label, thresholds, every=5,
        epsilon=1e-6 if cls is PLOP else 0.0,
    )  # fmt: skip
    assert terms["ce"].item() == pytest.approx(expected, rel=1e-4)
    assert expected > 0
    names = [f"layer{i}.pre" for i in (1, 2, 3, 4)] + ["decoder"]
    maps = [(0.01, student.features[name], teacher.features[name]) for name in names]
    merged = student.logits[:, :3].clone()
    merged[:, 0] += student.logits[:, 3] + student.logits[:, 4]
    maps.append((0.0005, merged, teacher.logits))
    pod = sum(
        weight * math.sqrt(5 / 2) * losses.local_pod(one.float(), other.float()).item() / 6
        for weight, one, other in maps
    )
    assert terms["pod"].item() == pytest.approx(pod, rel=1e-5)


def test_similarity_term_from_the_formulas(toy):
    run = second_step(toy, REMINDER(delta=1.0), train=False)
    batch = samples(toy.steps[1])[0]
    student, teacher = run.ctx.student(batch), run.ctx.teach(batch)
    old = run.method.state_dict()["prototypes/a"]
    assert old.shape == (3, 6)
    terms = run.take(batch).terms[-1]
    features = F.interpolate(
        student.features["decoder"].detach(), (32, 32), mode="bilinear", align_corners=True
    )
    x, t = full(student.logits.detach(), batch.label), full(teacher.logits, batch.label)
    values = []
    for c in (3, 4):
        here = batch.label == c
        mean = features.movedim(1, 3)[here].mean(0)
        share = torch.softmax(torch.stack([torch.cosine_similarity(mean, p, dim=0) for p in old]), 0)
        share[share < 1 / 3] = 0
        target = torch.softmax(t.movedim(1, 3)[here] / 3, 1) * share + 1e-7
        values.append(-9 * (target * torch.log_softmax(x.movedim(1, 3)[here][:, :3] / 3, 1)).sum(1))
    assert terms["csw"].item() == pytest.approx(0.5 * torch.cat(values).mean().item(), rel=1e-4)


def test_prototypes_are_plain_means_over_the_batches_that_show_a_class_and_old_ones_stay(toy):
    method, model = REMINDER(), toy.model()
    toy.train(method, model, toy.steps[0])
    first = method.state_dict()["prototypes/a"]
    expected = [[] for _ in range(3)]
    model.eval()
    with torch.no_grad():
        for batch in toy.batches(toy.steps[0]):
            features = model(batch.image)["a"].features["decoder"]
            features = F.interpolate(features, (16, 16), mode="bilinear", align_corners=True).movedim(1, 3)
            for c in range(3):
                if (batch.label == c).any():
                    expected[c].append(features[batch.label == c].mean(0))
    torch.testing.assert_close(first, torch.stack([torch.stack(means).mean(0) for means in expected]))
    toy.train(method, model, toy.steps[1])
    second = method.state_dict()["prototypes/a"]
    assert second.shape == (5, 6)
    assert second[:3].equal(first)
    assert second[3:].abs().sum(1).min() > 0


@pytest.mark.parametrize("cls", BOTH)
def test_thresholds_of_two_processes_are_those_of_one(toy, cls):
    run = second_step(toy, cls(median="exact"), train=False)
    whole = run.method.state_dict()["thresholds/a"]
    assert whole[:3].max() > 0.001  # at least one class has a median of its own
    data = samples(toy.steps[1])
    parts = [[Batch(b.image[i : i + 1], b.label[i : i + 1], b.branch) for b in data] for i in (0, 1)]
    seen: list[torch.Tensor] = []
    for rank, share in enumerate(parts):

        def reduce(counts, rank=rank):
            seen.append(counts)
            return counts if rank == 0 else seen[0] + counts

        run.ctx.epoch_batches, run.ctx.all_reduce = lambda share=share: iter(share), reduce
        state = {k: v for k, v in run.method.state_dict().items() if not k.startswith("thresholds")}
        run.method.load_state_dict(state)
        run.method.begin_step(run.ctx)
    assert run.method.state_dict()["thresholds/a"].equal(whole)


@pytest.mark.parametrize("cls", BOTH)
def test_thresholds_live_as_long_as_their_step_and_are_not_found_twice(toy, cls):
    run = second_step(toy, cls())
    before = run.method.state_dict()["thresholds/a"]
    run.ctx.epoch_batches = lambda: pytest.fail("a second teacher pass")
    run.method.begin_step(run.ctx)
    assert run.method.state_dict()["thresholds/a"].equal(before)
    run.ctx.epoch_batches = lambda: iter(samples(toy.steps[1]))
    switches.finish(run.method, run.ctx)
    assert not [key for key in run.method.state_dict() if key.startswith("thresholds")]


def test_the_first_step_leaves_no_state_so_that_other_methods_can_share_it(toy):
    assert toy.train(PLOP(), toy.model(), toy.steps[0]).method.state_dict() == {}


NEEDS: dict[str, dict[str, Any]] = {
    "pod_cells": {},
    "bins": {"threshold": 0.0},
    "median": {"bins": 20, "threshold": 0.0},
    "finite_thresholds": {"bins": 20},
    "rejected": {"threshold": 0.02},
    "learn": {"threshold": 0.05},
    "min_factor": {"threshold": 0.02},
}
"""What a switch needs beside itself to make a difference."""
OTHER = {
    "pod_logits_weight": None,
    "pod_scales": (1,),
    "threshold": 0.05,
    "bins": 7,
    "min_factor": 0.9,
    "empty_factor": 1.0,
    "delta": 1.02,
}


def own_fields():
    shared = {f.name for f in dataclasses.fields(Method)}
    return [(cls, f.name) for cls in BOTH for f in dataclasses.fields(cls) if f.name not in shared]


def fingerprint(run) -> list[torch.Tensor]:
    logged = [value.double() for terms in run.terms for value in terms.values()]
    return logged + [value.double() for value in run.model.state_dict().values()]


@pytest.mark.parametrize(("cls", "field"), own_fields())
def test_every_hyperparameter_changes_the_result(toy, cls, field):
    if (cls, field) == (REMINDER, "empty"):
        pytest.skip("below: it acts where the loss is not defined")
    default = {f.name: f.default for f in dataclasses.fields(cls)}[field]
    hint = get_type_hints(cls)[field]
    if field in OTHER:
        value = OTHER[field]
    elif get_origin(hint) is Literal:
        value = next(v for v in get_args(hint) if v != default)
    else:
        value = not default if hint is bool else default * 0.5

    def shape(batch):
        if field == "empty_factor":
            label = batch.label.clone()
            label[0][label[0] < 3] = 255
            return Batch(batch.image, label, batch.branch)
        return batch

    options = NEEDS.get(field, {}) if cls is PLOP else {}
    size = (48, 32) if field == "pod_cells" else (32, 32)
    ours = fingerprint(second_step(toy, cls(**options), size=size, transform=shape))
    theirs = fingerprint(second_step(toy, cls(**options | {field: value}), size=size, transform=shape))
    assert all(v.isfinite().all() for v in (*ours, *theirs))
    assert len(ours) != len(theirs) or any(not torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"pseudo": "median", "threshold": 0.9},
        {"pseudo": "threshold", "threshold": 0.7},
        {"pseudo": "confidence"},
        {"pseudo": "naive"},
        {"pseudo": "none"},
        {"pseudo": "none", "unbiased_ce": True},
        {"unbiased_ce": True},
        {"rejected": "soft"},
        {"rejected": "kept"},
        {"learn": "agreeing"},
        {"learn": "new"},
        {"pod": "spatial", "pod_cells": "width"},
        {"pod_weight": 0.0, "pod_logits_weight": None},
    ],
)
def test_every_form_learns_on_wide_images_too(toy, options):
    run = second_step(toy, PLOP(**options), size=(32, 48))
    assert all(value.isfinite() for terms in run.terms for value in terms.values())
    pod = options.get("pod_weight") != 0.0
    assert {"ce"} | ({"pod"} if pod else set()) <= set(run.terms[0])


def test_an_image_without_old_pixels_is_not_learnt_unless_asked_for(toy):
    batch = samples(toy.steps[1])[0]
    batch.label[batch.label < 3] = 255
    assert (batch.label != 255).any()
    assert second_step(toy, PLOP(), train=False).take(batch).terms[-1]["ce"] == 0
    assert second_step(toy, PLOP(empty_factor=1.0), train=False).take(batch).terms[-1]["ce"] > 0
    assert second_step(toy, REMINDER(), train=False).take(batch).terms[-1]["ce"] == 0
    assert second_step(toy, REMINDER(empty="nan"), train=False).take(batch).terms[-1]["ce"].isnan()


def test_a_batch_without_new_pixels_has_no_similarity_term_unless_asked_for(toy):
    batch = samples(toy.steps[1])[0]
    batch.label[batch.label != 255] = 0
    run = second_step(toy, REMINDER(), train=False).take(batch)
    assert run.terms[-1]["csw"] == 0
    assert all(p.grad.isfinite().all() for p in run.model.parameters() if p.grad is not None)
    assert second_step(toy, REMINDER(empty="nan"), train=False).take(batch).terms[-1]["csw"].isnan()


@pytest.mark.parametrize("cls", BOTH)
def test_a_step_after_a_single_class(toy, cls):
    """K = 1: the background alone."""
    steps = (toy.step(0, {"a": (1,)}, {"a": 1}, "a"), toy.step(1, {"a": (1, 2)}, {"a": 2}, "a"))
    for norm in ("code", "paper"):
        run = toy.train(cls(entropy_norm=norm), toy.model(), *steps)
        assert all(value.isfinite() for terms in run.terms for value in terms.values())


@pytest.mark.parametrize("cls", BOTH)
def test_other_branches_are_held_by_pod_alone(toy, cls):
    method, model = cls(), toy.model()
    for step in toy.domains:
        run = toy.train(method, model, step)
        assert all(value.isfinite() for terms in run.terms for value in terms.values())
        expected = {"ce", "pod"} if step.index else {"ce"}
        assert set(run.terms[0]) == expected | ({"csw"} if cls is REMINDER and step.index == 3 else set())


def test_cells_by_width_are_refused_in_a_sentence_where_maps_are_wide(toy):
    with pytest.raises(ConfigError, match=r"method\.pod_cells: .*as high as wide"):
        second_step(toy, PLOP(pod_cells="width"), size=(32, 48))


def test_scales_that_no_map_holds_are_refused_in_a_sentence(toy):
    with pytest.raises(ConfigError, match=r"method\.pod_scales: .*none of the scales"):
        second_step(toy, PLOP(pod_scales=(64,)))


def test_reminder_needs_the_prototypes_of_the_steps_before(toy):
    model = toy.model()
    toy.train(PLOP(), model, toy.steps[0])
    with pytest.raises(ConfigError, match=r"no prototypes .* 'a'"):
        toy.begin(REMINDER(), model, toy.steps[1])


@pytest.mark.parametrize("other", [{"pseudo": "confidence"}, {"rejected": "kept"}, {"rejected": "soft"}])
def test_two_rules_for_the_same_pixels_are_refused_in_a_sentence(other):
    config = MethodConfig(name="plop", **other, unbiased_ce=True)
    with pytest.raises(ConfigError, match=r"method\.unbiased_ce: it says how pixels .* does not go with"):
        build_method(config)


def test_a_subclass_may_compare_the_last_stages_alone():
    names = ("layer1", "layer2", "layer3", "encoder", "decoder")

    def output(value: float) -> dict[str, SegOutput]:
        maps = {name: torch.full((1, 2, 4, 4), value * (index + 1)) for index, name in enumerate(names)}
        return {"a": SegOutput(torch.full((1, 3, 4, 4), value), maps)}

    def pod(student, **rule) -> float:
        return float(pod_term(student, output(1.0), None, PodRule(pod_logits_weight=None, **rule))["pod"])

    assert pod(output(2.0), pod_stages=3) == pod(output(2.0)) == pod(output(2.0), pod_stages=9)
    for first, stages in ((0, None), (1, 2), (2, 1), (3, 0)):
        student = output(1.0)
        for name in names[:first]:  # what is not compared may differ
            student["a"].features[name] *= 2
        assert pod(student, pod_stages=stages) == 0
        if stages is not None:
            assert pod(student, pod_stages=stages + 1) > 0

    @dataclasses.dataclass(kw_only=True)
    class Late(PLOP):
        pod_stages: int = 2

    assert (PodRule.of(Late()).pod_stages, PodRule.of(PLOP()).pod_stages) == (2, None)
