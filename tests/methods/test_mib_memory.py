"""MiB with images from a memory: MiB-AugM's loss, its switches, and what does not change without a memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from everseg.methods.mib import MiB

K, C = 3, 5


@pytest.fixture
def second(toy):
    """The second step of a run, and a batch whose second image comes from the memory."""

    def make(**options):
        method, model = MiB(**options), toy.model()
        toy.train(method, model, toy.steps[0])
        run = toy.begin(method, model, toy.steps[1])
        run.model.eval()
        batch = toy.batches(toy.steps[1])[0]
        label = batch.label.clone()
        label[1] = torch.randint(0, K, label[1].shape, generator=torch.Generator().manual_seed(3))
        label[1, :2] = 255
        return run, dataclasses.replace(batch, label=label, memory=torch.tensor([False, True]))

    return make


def terms(run, batch):
    (found,) = run.method.losses(batch, run.ctx)
    return {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize("void", ["ignored", "background"])
def test_terms_are_halves_as_published(second, void):
    run, batch = second(memory_void=void)
    found = terms(run, batch)
    with torch.no_grad():
        x = F.interpolate(run.model(batch.image)["a"].logits, batch.label.shape[1:], mode="bilinear")
        t = F.interpolate(
            run.teacher(batch.image)["a"].logits, batch.label.shape[1:], mode="bilinear"
        ).softmax(1)
    p = x.softmax(1)
    current, memory = batch.label
    old = p[0, :K].sum(0)
    here = torch.where(current == 0, old, p[0].gather(0, current.clamp(max=C - 1)[None])[0])
    unce = -here.log().masked_fill(current == 255, 0).mean()
    hidden = p[1, 0] + p[1, K:].sum(0)
    known = (memory > 0) & (memory < K)
    there = torch.where(known, p[1].gather(0, memory.clamp(max=K - 1)[None])[0], hidden)
    left_out = memory == 255 if void == "ignored" else torch.zeros_like(memory, dtype=torch.bool)
    replayed = -there.log().masked_fill(left_out, 0).mean()
    joined = torch.cat([p[:, :1] + p[:, K:].sum(1, keepdim=True), p[:, 1:K]], dim=1)
    assert set(found) == {"ce", "memory", "kd"}
    assert_close(found["ce"], 0.5 * unce)
    assert_close(found["memory"], 0.5 * replayed)
    assert_close(found["kd"], -10 * (t * joined.log()).sum(1).mean() / K)


def test_plain_treats_all_images_alike(second):
    run, batch = second(memory_loss="plain")
    assert terms(run, batch) == terms(run, dataclasses.replace(batch, memory=None))


@pytest.mark.parametrize("which", [[False, False], [True, True]])
def test_a_part_without_images_is_zero_and_finite(second, which):
    run, batch = second()
    run.take(dataclasses.replace(batch, memory=torch.tensor(which)))
    empty = "ce" if all(which) else "memory"
    assert run.terms[0][empty] == 0
    assert all(value.isfinite() for value in run.terms[0].values())
    assert all(w.grad.isfinite().all() for w in run.model.parameters() if w.grad is not None)


def test_without_a_memory_it_is_mib(second):
    run, batch = second()
    alone = dataclasses.replace(batch, memory=None)
    (plain,) = MiB(memory_void="background").losses(alone, run.ctx)
    assert terms(run, alone) == {name: value.detach() for name, value in plain.items()}
    assert set(plain) == {"ce", "kd"}


def test_rates_and_decay_of_later_steps(toy):
    method, model = MiB(later_rate=10.0, decay_encoder=False), toy.model()
    first = toy.begin(method, model, toy.steps[0]).optimizer.param_groups
    assert [group["lr_scale"] for group in first] == [1.0]
    groups = toy.begin(method, model, toy.steps[1]).optimizer.param_groups
    assert [(group["lr_scale"], group["weight_decay"]) for group in groups] == [
        (1.0, 0.0), (10.0, 0.0), (10.0, 1e-4),
    ]  # fmt: skip
    parts = [len(list(part.parameters())) for part in (model.encoder, model.decoder, model.heads)]
    assert [len(group["params"]) for group in groups] == parts
