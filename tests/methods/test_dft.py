"""dft and dft*: outputs of all steps from the start, nothing but classifiers trained after the first, refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from everseg.errors import ConfigError
from everseg.methods.dft import DFT, DFTStar, all_outputs
from everseg.methods.ft import FineTuning
from everseg.models.build import from_description
from everseg.scenarios.steps import with_outlook
from saying import must_say


def three(toy):
    """3 classes, then 2, then 1."""
    sizes = (3, 2, 1)
    return with_outlook([toy.step(i, {"a": sizes[: i + 1]}, {"a": n}, "a") for i, n in enumerate(sizes)])


def test_steps_know_what_is_to_come(toy):
    first, second, third = three(toy)
    assert (first.to_come, second.to_come, third.to_come) == ({"a": (2, 1)}, {"a": (1,)}, {})
    alone = with_outlook([first, dataclasses.replace(second, fresh=True), third])
    assert (alone[0].to_come, alone[1].to_come) == ({}, {"a": (1,)})


def test_outputs_of_all_steps_are_in_the_softmax_from_the_start(toy):
    step = three(toy)[0]
    model = toy.model()
    run = toy.begin(DFTStar(), model, step)
    batch = toy.batches(step)[0]
    (terms,) = DFTStar().losses(batch, run.ctx)
    model.eval()
    model.train()
    logits = all_outputs(run.ctx.student(batch)).detach()
    assert logits.shape[1] == 6
    full = torch.nn.functional.interpolate(logits, batch.label.shape[1:], mode="bilinear").double().numpy()
    shifted = full - full.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    label = batch.label.numpy()
    known = label != 255
    picked = np.take_along_axis(log_p, np.where(known, label, 0)[:, None], 1)[:, 0]
    assert float(terms["ce"].detach()) == pytest.approx(-(picked * known).sum() / label.size, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "moved"),
    [
        ({}, {"classifiers.1", "future.0"}),
        ({"future": "fixed"}, {"classifiers.1"}),
        ({"old_classifiers": "trained"}, {"classifiers.0", "classifiers.1", "future.0"}),
        ({"preallocate": False}, {"classifiers.1"}),
        ({"network": "trained"}, {"classifiers.1", "future.0", "encoder", "decoder"}),
    ],
)
def test_only_these_weights_move_in_a_later_step(toy, options, moved):
    first, second, _ = three(toy)
    model, method = toy.model(), DFTStar(**options)
    toy.train(method, model, first)
    run = toy.begin(method, model, second)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run.take(*toy.batches(second))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    parts = {
        ".".join(name.split(".")[2:4]) if name.startswith("heads") else name.split(".")[0] for name in changed
    }
    assert parts == moved


def test_classifiers_to_come_keep_what_they_learnt(toy):
    first, second, _ = three(toy)
    model, method = toy.model(), DFTStar()
    toy.train(method, model, first)
    coming = model.head("a").future[0].weight.clone()
    method.prepare_model(model, second)
    assert torch.equal(model.head("a").classifiers[1].weight, coming)
    again = from_description(model.describe())
    again.load_state_dict(model.state_dict())
    assert model.head("a").sizes == again.head("a").sizes == (3, 2)


def test_class_weights_reach_the_classes_that_have_them(toy):
    step = dataclasses.replace(three(toy)[0], class_weights={"a": (1.0, 2.0, 0.5)})
    run = toy.train(DFTStar(), toy.model(), step)
    assert all(torch.isfinite(value) for terms in run.terms for value in terms.values())


def test_another_number_of_classes_than_reserved_is_refused(toy):
    first, *_ = three(toy)
    model, method = toy.model(), DFTStar()
    toy.train(method, model, first)
    with pytest.raises(ConfigError) as told:
        method.prepare_model(model, toy.step(1, {"a": (3, 4)}, {"a": 4}, "a"))
    must_say(told.value, "2", "4")


def test_dft_is_fine_tuning(toy):
    found = []
    for method in (DFT(), FineTuning()):
        model = toy.model()
        toy.train(method, model)
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
