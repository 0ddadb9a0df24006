"""EWC, PI and RW against loops written out from the papers' formulas, in NumPy."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from everseg.methods.ewc import EWC
from everseg.methods.pi import PI
from everseg.methods.rw import RW

RNG = np.random.default_rng(0)
THETA = RNG.normal(size=(3, 5, 4))
"""Step, iteration, weight: where the weight stands when each gradient arrives."""
GRAD = RNG.normal(size=(3, 5, 4))
END = RNG.normal(size=(3, 4))
"""The weight when each step ends."""


def module(values) -> nn.Module:
    net = nn.Module()
    net.w = nn.Parameter(torch.tensor(values, dtype=torch.float64))
    return net


def play(method, steps: int = 3):
    """Show a method the walk; returns its penalties and the gradients it added."""
    penalties, added, net = [], [], module(THETA[0, 0])
    for step in range(steps):
        ctx = SimpleNamespace(module=net, step=SimpleNamespace(index=step))
        method.begin_step(ctx)
        for i in range(THETA.shape[1]):
            net.w.data = torch.tensor(THETA[step, i])
            net.w.grad = torch.tensor(GRAD[step, i])
            penalties.append(float(method.after_backward(ctx).get("penalty", 0.0)))
            added.append(net.w.grad.numpy() - GRAD[step, i])
        net.w.data = torch.tensor(END[step])
        method.end_step(ctx)
    return np.array(penalties).reshape(steps, -1), np.array(added).reshape(steps, -1, 4)


def start_of(step: int) -> np.ndarray:
    return THETA[0, 0] if step == 0 else END[step - 1]


def squash(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / (values.max() - values.min() + 1e-8)


def expected_penalties(importance: dict[int, np.ndarray], weight: float):
    penalties, added = np.zeros((3, 5)), np.zeros((3, 5, 4))
    for step, value in importance.items():
        for i in range(5):
            distance = THETA[step, i] - start_of(step)
            penalties[step, i] = weight * sum(value * distance**2)
            added[step, i] = 2 * weight * value * distance
    return penalties, added


def fisher_after(steps: int, alpha: float) -> np.ndarray:
    fisher = np.ones(4)
    for grad in GRAD[:steps].reshape(-1, 4):
        fisher = alpha * grad**2 + (1 - alpha) * fisher
    return fisher


@pytest.mark.parametrize("normalise", [True, False])
def test_ewc_pulls_by_the_running_fisher(normalise):
    method = EWC(weight=3.0, alpha=0.7, normalise=normalise)
    penalties, added = play(method)
    scale = squash if normalise else lambda values: values
    expected = expected_penalties({s: scale(fisher_after(s, 0.7)) for s in (1, 2)}, 3.0)
    np.testing.assert_allclose(penalties, expected[0], rtol=1e-12)
    np.testing.assert_allclose(added, expected[1], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(method.state_dict()["fisher/w"], fisher_after(3, 0.7), rtol=1e-12)


def pi_scores() -> list[np.ndarray]:
    total, found = np.zeros(4), []
    for step in range(3):
        delta = np.zeros(4)
        for i in range(1, 5):
            delta += GRAD[step, i] * (THETA[step, i - 1] - THETA[step, i])
        total = total + np.maximum(delta / ((END[step] - start_of(step)) ** 2 + 1e-20), 0)
        found.append(total)
    return found


def test_pi_adds_up_scores_over_steps():
    method = PI(weight=2.0)
    penalties, added = play(method)
    scores = pi_scores()
    expected = expected_penalties({1: squash(scores[0]), 2: squash(scores[1])}, 2.0)
    np.testing.assert_allclose(penalties, expected[0], rtol=1e-12)
    np.testing.assert_allclose(added, expected[1], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(method.state_dict()["score/w"], scores[2], rtol=1e-12)


def rw_scores(period: int, alpha: float) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    fisher = np.ones(4)
    for step in range(3):
        path, previous = np.zeros(4), None
        for i in range(5):
            if i % period == 0:
                if previous is not None:
                    moved = THETA[step, i] - previous
                    path += GRAD[step, i] * -moved / (0.5 * fisher * moved**2 + 1e-8)
                previous = THETA[step, i]
            fisher = alpha * GRAD[step, i] ** 2 + (1 - alpha) * fisher
        score = np.maximum(path, 0)
        found.append(0.5 * (score + found[-1]) if found else score)
    return found


@pytest.mark.parametrize("period", [1, 2])
def test_rw_adds_fisher_and_averaged_score_each_normalised(period):
    method = RW(weight=2.0, alpha=0.9, period=period)
    penalties, added = play(method)
    scores = rw_scores(period, 0.9)
    importance = {s: squash(fisher_after(s, 0.9)) + squash(scores[s - 1]) for s in (1, 2)}
    expected = expected_penalties(importance, 2.0)
    np.testing.assert_allclose(penalties, expected[0], rtol=1e-12)
    np.testing.assert_allclose(added, expected[1], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(method.state_dict()["score/w"], scores[2], rtol=1e-12)


@pytest.mark.parametrize("cls", [EWC, PI, RW])
def test_added_gradient_is_that_of_the_penalty(cls):
    method, net = cls(weight=5.0), module([1.0, 2.0, -3.0, 0.5])
    ctx = SimpleNamespace(module=net, step=SimpleNamespace(index=0))
    method.begin_step(ctx)
    for values in GRAD[0]:
        net.w.grad = torch.tensor(values)
        net.w.data += torch.tensor(values) * -0.1
        method.after_backward(ctx)
    method.end_step(ctx)
    old = net.w.detach().clone()
    ctx.step.index = 1
    method.begin_step(ctx)
    net.w.data += torch.tensor([0.1, -0.2, 0.3, -0.4])
    net.w.grad = torch.zeros(4, dtype=torch.float64)
    pull = method.stats["pull"]["w"]
    penalty = 5.0 * (pull * (net.w - old).square()).sum()
    (by_autograd,) = torch.autograd.grad(penalty, net.w)
    logged = method.after_backward(ctx)["penalty"]
    torch.testing.assert_close(net.w.grad, by_autograd)
    torch.testing.assert_close(logged, penalty.detach())
    assert logged > 0


@pytest.mark.parametrize("cls", [EWC, PI, RW])
def test_weight_without_gradient_is_left_out(cls):
    method, net = cls(), module(THETA[0, 0])
    net.frozen = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)
    for step in range(2):
        ctx = SimpleNamespace(module=net, step=SimpleNamespace(index=step))
        method.begin_step(ctx)
        net.w.grad = torch.tensor(GRAD[step, 0])
        method.after_backward(ctx)
        method.end_step(ctx)
    assert net.frozen.grad is None
    assert torch.equal(net.frozen, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("cls", [EWC, PI, RW])
def test_new_weight_has_no_penalty_and_old_ones_keep_theirs(cls):
    method, net = cls(), module(THETA[0, 0])
    ctx = SimpleNamespace(module=net, step=SimpleNamespace(index=0))
    method.begin_step(ctx)
    for values in GRAD[0]:
        net.w.grad = torch.tensor(values)
        net.w.data -= 0.1 * net.w.grad
        method.after_backward(ctx)
    method.end_step(ctx)
    net.new = nn.Parameter(torch.ones(2, dtype=torch.float64))
    ctx.step.index = 1
    method.begin_step(ctx)
    assert set(method.stats["pull"]) == {"w"}
    net.new.grad, net.w.grad = torch.ones(2, dtype=torch.float64), torch.tensor(GRAD[1, 0])
    net.new.data += 1
    assert float(method.after_backward(ctx)["penalty"]) == 0
    assert torch.equal(net.new.grad, torch.ones(2, dtype=torch.float64))


def test_state_between_steps_holds_only_what_the_next_step_needs():
    for cls, parts in ((EWC, {"fisher"}), (PI, {"score"}), (RW, {"fisher", "score"})):
        method = cls()
        play(method, 1)
        assert {key.partition("/")[0] for key in method.state_dict() if "/" in key} == parts


def test_statistics_of_half_precision_weights_are_float32():
    net = module(THETA[0, 0])
    net.w.data = net.w.data.bfloat16()
    ctx = SimpleNamespace(module=net, step=SimpleNamespace(index=0))
    method = RW(period=1)
    method.begin_step(ctx)
    net.w.grad = torch.ones(4, dtype=torch.bfloat16)
    method.after_backward(ctx)
    floats = [value for key, value in method.state_dict().items() if "/" in key]
    assert floats
    assert all(value.dtype == torch.float32 for value in floats)
    assert net.w.grad.dtype == torch.bfloat16
