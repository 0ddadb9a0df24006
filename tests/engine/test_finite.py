"""What is not finite never reaches a weight, and nobody waits for the device to see it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from no_waiting import NoWaiting
from torch import nn

from everseg.config.fields import TrainConfig
from everseg.engine.finite import Guard
from everseg.engine.optim import make_optimizer
from everseg.errors import DivergedError

HERE = SimpleNamespace(device=torch.device("cpu"), num_processes=1)


def guarded(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, deferred: bool, scaled: bool = False
) -> Guard:
    guard = Guard(
        model, optimizer, HERE, scaled=scaled, where="step 1", remedy="Try something.", end=lambda: None
    )
    guard.at_once = not deferred
    return guard


@pytest.fixture(params=["sgd", "adam"])
def trained(request):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    train = TrainConfig(optimizer=request.param, lr=0.1)
    return model, make_optimizer([{"params": [*model.parameters()]}], train, lr=0.1)


def update(model, optimizer, check, factor: float) -> None:
    optimizer.zero_grad()
    loss = factor * model(torch.ones(2, 3)).square().sum()
    loss.backward()
    check({"ce": loss, "kd": loss * 0 + 1})
    optimizer.step()


def test_at_once_it_raises_before_the_update(trained):
    model, optimizer = trained
    guard = guarded(model, optimizer, deferred=False)
    update(model, optimizer, guard.watch(0, ("a",)), 1.0)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(DivergedError) as caught:
        update(model, optimizer, guard.watch(1, ("b", "c")), math.nan)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    text = str(caught.value)
    for part in (
        "step 1, iteration 1: not finite: ce=nan, kd=nan",
        "batch: b, c",
        "Try something.",
    ):
        assert part in text


def test_deferred_it_skips_every_update_from_the_bad_one_on_and_names_that_one(trained):
    model, optimizer = trained
    guard = guarded(model, optimizer, deferred=True)
    update(model, optimizer, guard.watch(6, ("good",)), 1.0)
    guard.look()
    assert math.isfinite(guard.norm)
    before = [p.clone() for p in model.parameters()]
    with NoWaiting():
        for iteration, (image, factor) in enumerate([("bad", math.inf), ("later", 1.0), ("last", 1.0)], 7):
            update(model, optimizer, guard.watch(iteration, (image,)), factor)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    with pytest.raises(DivergedError, match=r"step 1, iteration 7: not finite: ce=inf.*\n.*batch: bad\n"):
        guard.look()


def test_deferred_finite_updates_are_those_without_guard(trained):
    model, optimizer = trained
    guard = guarded(model, optimizer, deferred=True)
    for iteration in range(4):
        update(model, optimizer, guard.watch(iteration, ()), 1.0)
    torch.manual_seed(0)
    other = nn.Linear(3, 2)
    plain = make_optimizer(
        [{"params": [*other.parameters()]}],
        TrainConfig(optimizer="sgd" if isinstance(optimizer, torch.optim.SGD) else "adam", lr=0.1),
        lr=0.1,
    )
    for _ in range(4):
        update(other, plain, lambda terms: None, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    guard.look()


def test_scaled_gradients_that_overflow_are_the_scalers_to_handle(trained):
    model, optimizer = trained
    guard = guarded(model, optimizer, deferred=True, scaled=True)
    model(torch.ones(2, 3)).sum().backward()
    model.weight.grad[0, 0] = math.inf
    guard.watch(0, ())({"ce": torch.tensor(1.0)})
    guard.look()
    assert not hasattr(optimizer, "found_inf")


def test_weights_that_an_update_made_infinite_are_found(trained):
    model, optimizer = trained
    guard = guarded(model, optimizer, deferred=False)
    guard.watch(3, ("a",))
    with torch.no_grad():
        model.bias[1] = math.inf
    with pytest.raises(DivergedError, match=r"step 1, iteration 9.*weights.*not finite: bias"):
        guard.check_weights(9, ("a",))
