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


def clipped(model, optimizer, guard, limit: float, factor: float = 1.0) -> list[torch.Tensor]:
    """Gradients that an update used."""
    optimizer.zero_grad()
    (factor * model(torch.ones(2, 3)).square().sum()).backward()
    guard.clip(limit, 3, ("a", "b"))
    optimizer.step()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("deferred", [False, True])
def test_clipping_is_that_of_torch(trained, deferred):
    model, optimizer = trained
    guard = guarded(model, optimizer, deferred=deferred)
    other = nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    other(torch.ones(2, 3)).square().sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.25)
    for one, wanted in zip(clipped(model, optimizer, guard, 0.25), other.parameters(), strict=True):
        torch.testing.assert_close(one, wanted.grad)
    guard.look()
    assert guard.norm == pytest.approx(float(norm))  # what is logged is the norm before
    assert norm > 0.25


def test_gradients_below_the_limit_keep_their_bits(trained):
    model, optimizer = trained
    model(torch.ones(2, 3)).square().sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    guarded(model, optimizer, deferred=False).clip(1e6, 0, ())
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True))


def test_clipping_does_not_hide_a_gradient_that_is_infinite(trained):
    """As where `after_backward` makes it so without a scalar to check: limit / infinity would scale others to 0."""
    model, optimizer = trained
    before = [p.clone() for p in model.parameters()]
    guard = guarded(model, optimizer, deferred=False)
    model(torch.ones(2, 3)).sum().backward()
    model.weight.grad[0, 0] = math.inf
    with pytest.raises(DivergedError, match=r"iteration 3: not finite: gradient norm inf\n.*batch: a, b\n"):
        guard.clip(1.0, 3, ("a", "b"))
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_deferred_clipping_waits_for_nothing_and_skips_what_is_not_finite(trained):
    model, optimizer = trained
    guard = guarded(model, optimizer, deferred=True)
    before = [p.clone() for p in model.parameters()]
    with NoWaiting():
        clipped(model, optimizer, guard, 1.0, math.inf)
        clipped(model, optimizer, guard, 1.0)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    with pytest.raises(DivergedError, match="iteration 3"):
        guard.look()


def test_scaled_gradients_are_unscaled_before_they_are_clipped(trained):
    model, optimizer = trained
    guard = guarded(model, optimizer, deferred=True, scaled=True)
    (1024 * model(torch.ones(2, 3)).square().sum()).backward()
    plain = [p.grad / 1024 for p in model.parameters()]
    guard.unscale = lambda: [p.grad.div_(1024) for p in model.parameters()]
    guard.clip(1e6, 0, ())
    assert all(torch.equal(p.grad, wanted) for p, wanted in zip(model.parameters(), plain, strict=True))
    assert not hasattr(optimizer, "found_inf")


def test_a_loss_scaler_accumulates_clips_and_skips_as_the_plain_arithmetic_would(trained):
    """torch's scaler on the CPU, driven as Accelerate drives it: unscale, clip, step, update."""
    model, optimizer = trained
    other = nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    kind = "sgd" if isinstance(optimizer, torch.optim.SGD) else "adam"
    plain = make_optimizer([{"params": [*other.parameters()]}], TrainConfig(optimizer=kind, lr=0.1), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    guard = guarded(model, optimizer, deferred=True, scaled=True)
    guard.unscale = lambda: scaler.unscale_(optimizer)

    def update(factor: float) -> None:
        optimizer.zero_grad()
        for part in (torch.ones(2, 3), torch.full((2, 3), 0.5)):
            scaler.scale(factor * model(part).square().sum()).backward()
        guard.clip(0.25, 0, ())
        scaler.step(optimizer)
        scaler.update()

    for _ in range(3):
        update(1.0)
        plain.zero_grad()
        (other(torch.ones(2, 3)).square().sum() + other(torch.full((2, 3), 0.5)).square().sum()).backward()
        assert torch.nn.utils.clip_grad_norm_(other.parameters(), 0.25) > 0.25
        plain.step()
    for one, wanted in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, wanted)
    before = [p.clone() for p in model.parameters()]
    update(math.inf)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == 512
    guard.look()  # the scaler's search for a scale is no reason to stop


def test_averages_that_are_not_finite_never_reach_the_disk(trained):
    model, optimizer = trained
    guard = guarded(model, optimizer, deferred=False)
    guard.average = {"bias": torch.tensor([1.0, math.nan])}
    with pytest.raises(DivergedError, match="average of bias"):
        guard.check_weights(2, ())


def test_weights_that_an_update_made_infinite_are_found(trained):
    model, optimizer = trained
    guard = guarded(model, optimizer, deferred=False)
    guard.watch(3, ("a",))
    with torch.no_grad():
        model.bias[1] = math.inf
    with pytest.raises(DivergedError, match=r"step 1, iteration 9.*weights.*not finite: bias"):
        guard.check_weights(9, ("a",))
