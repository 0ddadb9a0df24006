"""SSUL: which output each pixel learns, what is trained and frozen, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from everseg.errors import ConfigError
from everseg.labels import LabelSpace
from everseg.methods.mib import MiB
from everseg.methods.ssul import SSUL
from everseg.methods.unknown import candidate_labels, joined, output_labels
from everseg.models.blocks import NORM_TYPES
from everseg.types import Batch, SegOutput
from saying import must_say

WIDTH = {"head_width": 6}


def batch_of(label: list[list[int]], saliency: list[list[int]] | None = None, memory=None) -> Batch:
    given = torch.tensor([label])
    extra = {} if saliency is None else {"saliency": torch.tensor([saliency])}
    return Batch(torch.zeros(1, 3, *given.shape[1:]), given, "a", extra=extra, memory=memory)


def test_every_pixel_has_its_output():
    """Classes 0 (background), 1, 2; outputs 0 unknown, 1 background, 2 and 3 the classes."""
    label, saliency = [[0, 0, 1], [2, 255, 0]], [[0, 9, 9], [9, 9, 255]]
    batch = batch_of(label, saliency)
    assert output_labels(batch, 3, "salient").tolist() == [[[1, 0, 2], [3, 255, 0]]]
    assert output_labels(batch, 3, "all").tolist() == [[[0, 0, 2], [3, 255, 0]]]
    assert output_labels(batch, 3, "none").tolist() == [[[1, 1, 2], [3, 255, 1]]]


@pytest.mark.parametrize("official", [False, True])
def test_labels_of_memory_images_lack_the_offset_only_where_asked_for(official):
    one = batch_of([[0, 1, 255, 2]], [[9, 0, 0, 0]])
    both = Batch(
        one.image.repeat(2, 1, 1, 1), one.label.repeat(2, 1, 1), "a",
        extra={"saliency": one.extra["saliency"].repeat(2, 1, 1)}, memory=torch.tensor([False, True]),
    )  # fmt: skip
    found = output_labels(both, 3, "salient", official_memory=official).tolist()
    assert found[0] == [[0, 2, 255, 3]]
    assert found[1] == ([[0, 1, 255, 2]] if official else found[0])


def test_the_unknown_may_be_the_256th_output():
    """With 255 classes ignored is 255; with the unknown there are 256 outputs, and 255 is a class."""
    found = output_labels(batch_of([[0, 254, 255]], [[0, 0, 0]]), 255, "salient")
    assert found.tolist() == [[[1, 255, 65535]]]


def test_candidates_of_a_memory_are_labelled_by_their_own_classes_and_the_models():
    batch = batch_of([[0, 0, 2, 255, 0]])
    logits = torch.full((1, 3, 1, 5), -4.0)  # background, class 1, class 2
    logits[0, 1, 0, :2] = torch.tensor([4.0, 0.1])
    unknown = torch.full((1, 1, 1, 5), -4.0)
    unknown[..., 4] = 5.0
    output = SegOutput(logits, {}, {"unknown": unknown})
    assert candidate_labels(output, batch, 0.7).tolist() == [[[1, 0, 2, 255, 0]]]


def slow_loss(logits: list[list[float]], outputs: list[int]) -> float:
    """Mean over pixels of the binary cross-entropies, without torch."""
    total, number = 0.0, 0
    for values, wanted in zip(logits, outputs, strict=True):
        if wanted == 255:
            continue
        number += 1
        for place, value in enumerate(values):
            p = 1 / (1 + math.exp(-value))
            total -= math.log(p if place == wanted else 1 - p)
    return total / number


@pytest.mark.parametrize("unknown", ["salient", "all", "none"])
def test_the_loss_of_a_step_by_hand(toy, unknown):
    method, model = SSUL(unknown=unknown, threshold=0.6, **WIDTH), toy.model()
    toy.train(method, model, toy.steps[0])
    model.double()
    run = toy.begin(method, model, toy.steps[1])
    head = run.teacher.head("a")
    head.classifiers[0].classifier.bias[0] += (
        2.0  # class 1: the first row, as the background has a head of its own
    )
    batch = toy.batches(toy.steps[1], 1)[0]
    batch.image = batch.image.double()
    with torch.no_grad():
        maps = [joined(m(batch.image, ("a",))["a"]) for m in (run.model, run.teacher)]
        student, teacher = (
            torch.nn.functional.interpolate(m, batch.label.shape[1:], mode="bilinear").permute(0, 2, 3, 1)
            for m in maps
        )
    outputs, filled = [], 0
    for place in ((b, i, j) for b in range(2) for i in range(16) for j in range(16)):
        y, salient = int(batch.label[place]), int(batch.extra["saliency"][place])
        wanted = 255 if y == 255 else y + 1
        if y == 0 and (unknown == "all" or (unknown == "salient" and salient > 0)):
            wanted = 0
        t = [1 / (1 + math.exp(-v)) for v in teacher[place].tolist()]
        best = t.index(max(t))
        if wanted < 2 and best >= 2 and t[best] >= 0.6:
            wanted, filled = best, filled + 1
        outputs.append(wanted)
    assert filled
    expected = slow_loss(student.reshape(-1, student.shape[-1]).tolist(), outputs)
    assert float(run.take(batch).terms[0]["bce"].detach()) == pytest.approx(expected, rel=1e-9)


def test_a_later_step_trains_the_new_head_the_unknown_and_slowly_the_background(toy):
    method, model = SSUL(**WIDTH), toy.model()
    toy.train(method, model, toy.steps[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = toy.begin(method, model, toy.steps[1])
    start = {name: value.clone() for name, value in model.state_dict().items()}
    run.take(*toy.batches(toy.steps[1]))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    places = ("conv.weight", "classifier.weight", "classifier.bias")
    parts = ("classifiers.1", "others.unknown", "others.background")
    assert moved == {f"heads.a.{part}.{place}" for part in parts for place in places}
    # The new head began as the unknown's, statistics included.
    for place in (*places[:2], "norm.weight", "norm.running_mean", "norm.running_var"):
        new, old = start[f"heads.a.classifiers.1.{place}"], before[f"heads.a.others.unknown.{place}"]
        assert torch.equal(new, old.expand_as(new) if place == "classifier.weight" else old)
    rates = {id(w): group["lr_scale"] for group in run.optimizer.param_groups for w in group["params"]}
    parts = model.head("a").parts
    assert {rates[id(w)] for w in parts["background"].parameters() if w.requires_grad} == {1e-4}
    assert {
        rates[id(w)] for name in ("1", "unknown") for w in parts[name].parameters() if w.requires_grad
    } == {1.0}


def test_norms_rest_in_a_later_step_while_dropout_goes_on(toy):
    method, model = SSUL(**WIDTH), toy.model()
    model.decoder.dropout = nn.Dropout(0.1)
    toy.train(method, model, toy.steps[0])
    toy.begin(method, model, toy.steps[1])
    assert model.decoder.dropout.training
    assert not any(m.training for m in model.modules() if isinstance(m, NORM_TYPES))
    assert not any(
        p.requires_grad for m in model.modules() if isinstance(m, NORM_TYPES) for p in m.parameters()
    )


def test_the_first_step_spares_the_encoder(toy):
    run = toy.begin(SSUL(encoder_rate=0.25, **WIDTH), toy.model(), toy.steps[0])
    slow, rest = run.optimizer.param_groups
    assert (slow["lr_scale"], rest["lr_scale"]) == (0.25, 1.0)
    assert {id(w) for w in slow["params"]} == {id(w) for w in run.model.encoder.parameters()}


def test_the_threshold_and_the_offset_of_the_memory_act(toy):
    def loss(**options) -> float:
        torch.manual_seed(0)
        method, model = SSUL(**WIDTH, **options), toy.model()
        toy.train(method, model, toy.steps[0])
        run = toy.begin(method, model, toy.steps[1])
        run.teacher.head("a").classifiers[0].classifier.bias[0] += 1.0
        batch = toy.batches(toy.steps[1], 1)[0]
        return float(run.take(dataclasses.replace(batch, memory=torch.tensor([False, True]))).terms[0]["bce"])

    plain = loss()
    assert loss(threshold=0.3) != plain
    assert loss(memory_offset="official") != plain


def test_nothing_but_memory_or_nothing_but_ignored_pixels_is_fine(toy):
    method, model = SSUL(**WIDTH), toy.model()
    toy.train(method, model, toy.steps[0])
    batch = toy.batches(toy.steps[1], 1)[0]
    empty = dataclasses.replace(batch, label=torch.full_like(batch.label, 255))
    full = dataclasses.replace(batch, memory=torch.tensor([True, True]))
    run = toy.begin(method, model, toy.steps[1]).take(empty, full)
    assert float(run.terms[0]["bce"]) == 0
    assert math.isfinite(float(run.terms[1]["bce"]))


def test_what_it_cannot_do_is_refused_in_a_sentence(toy):
    for key, value in (("freeze_heads", "all"), ("pretune", 1)):
        with pytest.raises(ValueError, match=key):
            SSUL(**{key: value})
    step = toy.steps[0]
    space = step.spaces["a"]
    bare = dataclasses.replace(step, spaces={"a": LabelSpace(space.groups, space.names, background=None)})
    with pytest.raises(ConfigError) as error:
        SSUL().prepare_model(toy.model(), bare)
    must_say(error.value, "'ssul'", "background")
    model = toy.model()
    toy.train(MiB(), model, toy.steps[0])
    with pytest.raises(ConfigError) as error:
        SSUL().prepare_model(model, toy.steps[1])
    must_say(error.value, "method")


def test_it_asks_for_saliency_only_where_it_reads_it():
    assert SSUL().needs_extra == ("saliency",)
    assert SSUL(unknown="all").needs_extra == SSUL(unknown="none").needs_extra == ()
