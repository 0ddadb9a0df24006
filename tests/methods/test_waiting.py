"""The engine's iteration, with every method, never reads a value from the device."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from no_waiting import NoWaiting

from everseg import registry
from everseg.engine.finite import Guard
from everseg.engine.step import train_batch
from everseg.losses import background_shift, banded, classification, regions, similarity


@pytest.mark.parametrize("name", registry.names("method"))
def test_an_iteration_never_waits_for_the_device(toy, name, monkeypatch):
    """What the CPU alone does - closed forms, checks of label values - is off, as it is on other devices."""
    method, model = registry.resolve("method", name)(), toy.model(name)
    steps = toy.domains if name.startswith("mdil") else toy.steps
    toy.train(method, model, steps[0])
    run = toy.begin(method, model, steps[1])
    if run.optimizer is None:
        pytest.skip("no iterations in later steps: the pass picks pixels by their labels, which waits")
    here = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    guard = Guard(model, run.optimizer, here, scaled=False, where="", remedy="", end=lambda: None)
    guard.at_once = False
    monkeypatch.setattr(banded, "_CLOSED_ON", frozenset())
    for module in (background_shift, banded, classification, regions, similarity):
        monkeypatch.setattr(module, "checked_label", lambda loss, label, logits: label.long())
    batches = toy.batches(steps[1])
    for number, batch in enumerate(batches):
        with NoWaiting():
            train_batch(method, batch, run.ctx, run.optimizer, check=guard.watch(number, ()))
    guard.look()
    assert math.isfinite(guard.norm)
