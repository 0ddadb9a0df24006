"""Optimiser, learning rate, and state under parameter names."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from everseg.config.fields import TrainConfig
from everseg.engine.optim import (
    check_param_groups,
    learning_rate,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    set_learning_rate,
    warmup_length,
)
from everseg.errors import CheckpointError


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def groups(model: nn.Module) -> list[dict]:
    return [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr_scale": 10.0}]


def take(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 1) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.ones(5, 3)).square().sum().backward()
        optimizer.step()


def test_poly_falls_to_zero_and_stays_there():
    train = TrainConfig(schedule="poly", power=0.9)
    assert learning_rate(train, 0.01, 0, 6) == 0.01
    assert learning_rate(train, 0.01, 1, 6) == pytest.approx(0.00848666, rel=1e-6)
    assert learning_rate(train, 0.01, 5, 6) == pytest.approx(0.00199372, rel=1e-5)
    assert learning_rate(train, 0.01, 6, 6) == 0
    assert learning_rate(train, 0.01, 9, 6) == 0


def test_step_schedule_drops_every_step_size_iterations():
    train = TrainConfig(schedule="step", step_size=2, step_factor=0.5)
    assert [learning_rate(train, 8.0, i, 6) for i in range(6)] == [8, 8, 4, 4, 2, 2]


def test_constant_schedule_is_constant():
    assert {learning_rate(TrainConfig(schedule="constant"), 0.3, i, 4) for i in range(6)} == {0.3}


def test_learning_rate_scale_belongs_to_the_group():
    model = net()
    optimizer = make_optimizer(groups(model), TrainConfig(), lr=0.1)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 1.0]
    set_learning_rate(optimizer, 0.02)
    assert [g["lr"] for g in optimizer.param_groups] == [0.02, pytest.approx(0.2)]


def test_first_update_is_nesterov_with_weight_decay():
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = make_optimizer([{"params": [weight]}], TrainConfig(momentum=0.9, weight_decay=0.1), lr=0.5)
    weight.grad = torch.tensor([1.0])
    optimizer.step()
    decayed = 1.0 + 0.1 * 2.0
    assert weight.item() == pytest.approx(2.0 - 0.5 * (decayed + 0.9 * decayed))


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="no weight"):
        make_optimizer([{"params": []}], TrainConfig(), lr=0.1)


def test_groups_that_cover_the_model_pass_also_as_generators():
    model = net()
    check_param_groups(
        model, [{"params": list(model[0].parameters())}, {"params": list(model[1].parameters())}]
    )


def test_all_faults_of_groups_are_named_at_once():
    model = net()
    model[0].bias.requires_grad_(False)
    given = [
        {"params": [model[0].bias, model[1].weight]},
        {"params": [model[1].weight, nn.Parameter(torch.ones(7))]},
    ]
    with pytest.raises(ValueError, match="exactly once") as caught:
        check_param_groups(model, given)
    for part in (
        "in no group: 0.weight, 1.bias",
        "several groups: 1.weight",
        "in a group: 0.bias",
        "model: (unnamed, shape (7,))",
    ):
        assert part in str(caught.value)


OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    lambda p: torch.optim.SGD(p, lr=0.1),
    lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    lambda p: torch.optim.AdamW(p, lr=0.01),
    lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    lambda p: torch.optim.Adafactor(p, lr=0.01),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_state_survives_files_and_continues_bit_equal(make):
    model, other = net(), net()
    optimizer, again = make(groups(model)), make(groups(other))
    take(model, optimizer, 3)
    set_learning_rate(optimizer, 0.007)
    tensors, document = optimizer_state(optimizer, model)
    tensors = {name: value.clone() for name, value in tensors.items()}
    other.load_state_dict(model.state_dict())
    load_optimizer_state(again, other, tensors, json.loads(json.dumps(document)))
    take(model, optimizer, 3)
    take(other, again, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.007


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_state_takes_the_layout_of_its_weight(kind):
    """Fused updates walk both in the memory's order; files hold contiguous tensors."""

    def begin():
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        train = TrainConfig(optimizer=kind, lr=0.01)
        return model, make_optimizer([{"params": [*model.parameters()]}], train, lr=0.01)

    def go_on(model, optimizer):
        for number in range(3):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(number)
            model(torch.randn(2, 3, 6, 6, generator=generator)).square().sum().backward()
            optimizer.step()

    (model, optimizer), (other, again) = begin(), begin()
    go_on(model, optimizer)
    tensors, document = optimizer_state(optimizer, model)
    tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    other.load_state_dict({name: value.contiguous() for name, value in model.state_dict().items()})
    load_optimizer_state(again, other, tensors, document)
    go_on(model, optimizer)
    go_on(other, again)
    assert torch.equal(model.weight, other.weight)
    entry = "momentum_buffer" if kind == "sgd" else "exp_avg"
    assert (
        again.state[other.weight][entry].stride()
        == other.weight.stride()
        != other.weight.contiguous().stride()
    )


def test_momentum_is_defined_after_a_skipped_first_update_and_for_late_gradients():
    """As unfused: a loss scaler may skip the first update, and a weight's first gradient may come later."""
    torch.manual_seed(0)
    gradients = [torch.randn(3), torch.randn(3), torch.randn(3)]
    results = []
    for fused in (True, False):
        early, late = (nn.Parameter(torch.ones(3)) for _ in range(2))
        if fused:
            optimizer = make_optimizer([{"params": [early, late]}], TrainConfig(lr=0.1), lr=0.1)
            early.grad, optimizer.found_inf = torch.full((3,), torch.inf), torch.ones(())
            optimizer.step()
            del optimizer.found_inf
        else:
            optimizer = torch.optim.SGD([early, late], 0.1, 0.9, weight_decay=1e-4, nesterov=True)
        for number, gradient in enumerate(gradients):
            early.grad = gradient.clone()
            late.grad = gradient.clone() if number else None
            optimizer.step()
        results.append((early.detach(), late.detach()))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


def test_momentum_is_stored_under_the_weight_name():
    model = net()
    optimizer = make_optimizer(groups(model), TrainConfig(), lr=0.1)
    take(model, optimizer)
    tensors, document = optimizer_state(optimizer, model)
    assert set(tensors) == {f"momentum_buffer/{name}" for name, _ in model.named_parameters()}
    assert document["groups"][1]["params"] == ["1.weight", "1.bias"]


def test_state_of_other_weights_is_refused_and_nothing_changes():
    model = net()
    optimizer = make_optimizer(groups(model), TrainConfig(), lr=0.1)
    take(model, optimizer)
    tensors, document = optimizer_state(optimizer, model)
    bigger = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    fresh = make_optimizer([*groups(bigger), {"params": bigger[2].parameters()}], TrainConfig(), lr=0.1)
    with pytest.raises(CheckpointError, match=r"in the model: 2\.bias, 2\.weight"):
        load_optimizer_state(fresh, bigger, tensors, document)
    assert all(not state["momentum_buffer"].any() for state in fresh.state.values())


def test_state_of_another_optimiser_or_shape_is_refused():
    model = net()
    optimizer = make_optimizer(groups(model), TrainConfig(), lr=0.1)
    take(model, optimizer)
    tensors, document = optimizer_state(optimizer, model)
    with pytest.raises(CheckpointError, match="SGD"):
        load_optimizer_state(torch.optim.Adam(groups(model)), model, tensors, document)
    tensors["momentum_buffer/0.weight"] = torch.ones(1, 1)
    with pytest.raises(CheckpointError, match=r"momentum_buffer/0\.weight"):
        load_optimizer_state(optimizer, model, tensors, document)


def test_adamw_shrinks_the_weight_apart_from_the_gradient_and_adam_adds_to_it():
    """The first update of both is lr times the gradient's sign: 0.5 here."""
    for kind, wanted in (("adamw", 2.0 * (1 - 0.5 * 0.1) - 0.5), ("adam", 2.0 - 0.5)):
        weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        train = TrainConfig(optimizer=kind, weight_decay=0.1)
        optimizer = make_optimizer([{"params": [weight]}], train, lr=0.5)
        weight.grad = torch.tensor([3.0], dtype=torch.float64)
        optimizer.step()
        assert weight.item() == pytest.approx(wanted, rel=1e-7)


def adamw_by_hand(
    weight: float, gradients: list[float], lr: float, decay: float, one: float, two: float
) -> float:
    """Loshchilov and Hutter, ICLR 2019, algorithm 2, with PyTorch's decay of lr * decay."""
    mean = square = 0.0
    for number, gradient in enumerate(gradients, 1):
        mean = one * mean + (1 - one) * gradient
        square = two * square + (1 - two) * gradient * gradient
        step = (mean / (1 - one**number)) / ((square / (1 - two**number)) ** 0.5 + 1e-8)
        weight = weight - lr * decay * weight - lr * step
    return weight


def test_adamw_follows_its_formula():
    gradients = [0.3, -1.5, 0.7, 2.0]
    weight = nn.Parameter(torch.tensor([1.3], dtype=torch.float64))
    train = TrainConfig(optimizer="adamw", betas=(0.8, 0.95), weight_decay=0.05)
    optimizer = make_optimizer([{"params": [weight]}], train, lr=0.02)
    for gradient in gradients:
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    assert weight.item() == pytest.approx(adamw_by_hand(1.3, gradients, 0.02, 0.05, 0.8, 0.95), rel=1e-12)


def of_torch(*schedulers, steps: int) -> list[float]:
    """Learning rates of torch's own schedulers, chained: their factors multiply."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.4)
    chain = torch.optim.lr_scheduler.ChainedScheduler([make(optimizer) for make in schedulers])
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        chain.step()
    return found


def test_a_linear_warm_up_times_poly_is_that_of_torch():
    train = TrainConfig(schedule="poly", power=0.9, warmup=5, warmup_from=0.1)
    wanted = of_torch(
        lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=5),
        lambda o: torch.optim.lr_scheduler.PolynomialLR(o, total_iters=20, power=0.9),
        steps=20,
    )
    assert [learning_rate(train, 0.4, i, 20) for i in range(20)] == pytest.approx(wanted, rel=1e-9)


def test_a_warm_up_has_a_power_and_ends_exactly():
    train = TrainConfig(schedule="constant", warmup=4, warmup_from=0.2, warmup_power=2.0)
    found = [learning_rate(train, 10.0, i, 9) for i in range(6)]
    assert found == pytest.approx([2.0, 2.0 + 8 / 16, 2.0 + 8 / 4, 2.0 + 8 * 9 / 16, 10.0, 10.0])
    assert found[4:] == [10.0, 10.0]


def test_a_warm_up_may_be_a_share_of_the_step():
    """SSUL's rule by hand: i < W = T / 10 has (1 - i / T) ** 0.9 * (0.001 (1 - i / W) + i / W), W not rounded."""
    train = TrainConfig(schedule="poly", power=0.9, warmup_share=0.1, warmup_from=0.001)
    for total in (40, 15, 6):
        length = total / 10
        wanted = []
        for i in range(total):
            rise = 0.001 * (1 - i / length) + i / length if i < length else 1.0
            wanted.append(0.05 * (1 - i / total) ** 0.9 * rise)
        assert [learning_rate(train, 0.05, i, total) for i in range(total)] == pytest.approx(wanted)
        assert wanted[0] == pytest.approx(0.05 * 0.001)


def test_no_group_falls_below_the_least_rate():
    train = TrainConfig(min_lr=1e-6)
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": [weights[0]]}, {"params": [weights[1]], "lr_scale": 1e-4}]
    optimizer = make_optimizer(groups, train, lr=0.05)
    set_learning_rate(optimizer, 0.05)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 5e-6])
    set_learning_rate(optimizer, 0.001)
    assert [group["lr"] for group in optimizer.param_groups] == [0.001, 1e-6]
    plain = make_optimizer(groups, TrainConfig(), lr=0.05)
    assert "min_lr" not in plain.param_groups[0]


def test_by_epoch_the_warm_up_lasts_epochs_and_rises_every_iteration():
    train = TrainConfig(schedule="step", schedule_by="epoch", step_size=2, warmup=1, warmup_from=0.0)
    assert warmup_length(train, 24, 4) == 4
    found = [learning_rate(train, 1.0, i, 24, 4) for i in range(24)]
    assert found[:4] == pytest.approx([0, 0.25, 0.5, 0.75])
    # three epochs of 4 iterations count from 0: the first drop comes with epoch 2
    assert found[4:] == pytest.approx([1.0] * 4 + [0.1] * 8 + [0.01] * 8)
