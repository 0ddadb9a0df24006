from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from everseg.errors import ConfigError
from everseg.models.blocks import (
    BranchDict,
    SyncAbsBatchNorm,
    build_activation,
    build_norm,
    check_norm,
    replicate_to,
    sliding_mean,
    synchronise_norms,
    window_means,
)

KINDS = ["bn", "abn", "iabn"]


def _path() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))


@pytest.mark.parametrize("init", ["weights", "all"])
def test_a_new_branch_copies_weights_and_running_statistics_only_where_told(init):
    branches = BranchDict(_path, init=init).double()
    old = branches.add("a").double()
    old(torch.randn(4, 2, 5, 5, dtype=torch.float64) + 7)
    with torch.no_grad():
        old[0].weight.fill_(0.1)  # no float32 number
        old[1].weight.copy_(torch.tensor([1.0, 2, 3]))
    new = branches.add("b", init_from="a")
    assert torch.equal(new[0].weight, old[0].weight)
    assert torch.equal(new[1].weight, old[1].weight)
    assert new[0].weight is not old[0].weight
    assert old[1].running_mean.abs().min() > 0
    fresh = (torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64), torch.tensor(0))
    kept = (old[1].running_mean, old[1].running_var, torch.tensor(1))
    for value, expected in zip(new[1].buffers(), kept if init == "all" else fresh, strict=True):
        assert torch.equal(value, expected)
    assert new[1].running_mean is not old[1].running_mean
    assert list(branches) == ["a", "b"]
    assert not torch.equal(branches.add("c")[0].weight, old[0].weight)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "add", "make", "a"])
def test_unusable_branch_names_are_refused(name):
    branches = BranchDict(nn.Identity)
    branches.add("a")
    with pytest.raises(ConfigError, match="branch"):
        branches.add(name)
    with pytest.raises(ConfigError, match="no branch 'c'"):
        branches.add("b", init_from="c")
    assert list(branches) == ["a"]


def test_iabn_scales_by_the_absolute_weight_plus_eps():
    norm = build_norm("iabn", 3).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([-2.0, 0.0, 3.0]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    x = torch.randn(4, 3, 5, 2, dtype=torch.float64)
    a = x.numpy()
    mean, var = a.mean((0, 2, 3), keepdims=True), a.var((0, 2, 3), keepdims=True)
    gamma, beta = np.array([2 + 1e-5, 1e-5, 3 + 1e-5]), np.array([0, 1.0, -1])
    expected = (a - mean) / np.sqrt(var + 1e-5) * gamma.reshape(1, 3, 1, 1) + beta.reshape(1, 3, 1, 1)
    assert_close(norm(x), torch.from_numpy(expected), rtol=1e-9, atol=1e-9)
    assert_close(norm.running_mean, torch.from_numpy(0.1 * mean.ravel()))
    unbiased = a.var((0, 2, 3), ddof=1)
    assert_close(norm.running_var, torch.from_numpy(0.9 + 0.1 * unbiased))


def test_iabn_weight_gradient_flips_for_negative_weights_only():
    x, cotangent = torch.randn(4, 3, 5, 2), torch.randn(4, 3, 5, 2)
    plain, iabn = nn.BatchNorm2d(3), build_norm("iabn", 3)
    with torch.no_grad():
        iabn.weight.copy_(torch.tensor([-2.0, 0.0, 3.0]))
    plain(x).backward(cotangent)
    iabn(x).backward(cotangent)
    assert_close(iabn.weight.grad, plain.weight.grad * torch.tensor([-1.0, 1.0, 1.0]))
    assert "weight" not in iabn.__dict__
    assert isinstance(iabn.weight, nn.Parameter)


@pytest.mark.parametrize("kind", KINDS)
def test_one_value_per_channel_stops_training_but_not_evaluation(kind):
    norm = build_norm(kind, 3)
    with pytest.raises(ConfigError, match="two images"):
        norm(torch.randn(1, 3, 1, 1))
    assert torch.equal(norm.running_var, torch.ones(3))
    assert norm.eval()(torch.randn(1, 3, 1, 1)).isfinite().all()


def test_activations_of_the_norms():
    x = torch.tensor([-2.0, 3.0])
    assert build_activation("bn")(x.clone()).tolist() == [0, 3]
    for kind in ("abn", "iabn"):
        assert_close(build_activation(kind)(x.clone()), torch.tensor([-0.02, 3.0]))
    with pytest.raises(ConfigError, match=r"model\.norm"):
        check_norm("gn")


@pytest.mark.parametrize("kind", KINDS)
def test_synchronised_norms_keep_weights_names_and_results(kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(build_norm(kind, 4), build_activation(kind)))
    with torch.no_grad():
        model[1][0].weight.copy_(torch.tensor([-1.5, 0.0, 0.5, 2.0]))
    model(torch.randn(4, 3, 9, 9) * 3)
    model.eval()
    model[1][0].weight.requires_grad_(False)
    x, expected = torch.randn(2, 3, 9, 9), copy.deepcopy(model)
    converted = synchronise_norms(model)
    assert converted is model
    assert isinstance(model[1][0], nn.SyncBatchNorm)
    assert isinstance(model[1][0], SyncAbsBatchNorm) == (kind == "iabn")
    assert not model[1][0].weight.requires_grad
    assert list(model.state_dict()) == list(expected.state_dict())
    assert torch.equal(model(x), expected(x))
    norm = model[1][0]
    assert synchronise_norms(model)[1][0] is norm


def test_synchronised_iabn_trains_with_the_absolute_gamma(monkeypatch):
    """The synchronised kernel needs CUDA; here the plain one stands in for it and must see gamma, not the weight."""
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", nn.BatchNorm2d.forward)
    plain = nn.Sequential(build_norm("iabn", 3))
    with torch.no_grad():
        plain[0].weight.copy_(torch.tensor([-2.0, 0.0, 3.0]))
    converted = synchronise_norms(copy.deepcopy(plain))
    monkeypatch.setattr(converted[0], "_check_input_dim", lambda input: None)
    x, cotangent = torch.randn(4, 3, 5, 2), torch.randn(4, 3, 5, 2)
    outputs = [model(x) for model in (plain, converted)]
    for output in outputs:
        output.backward(cotangent)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(plain[0].weight.grad, converted[0].weight.grad)
    assert torch.equal(plain[0].running_var, converted[0].running_var)


@pytest.mark.parametrize(("window", "height", "width"), [(3, 5, 7), (4, 5, 7), (4, 3, 9), (32, 4, 6)])
def test_sliding_mean_with_replicated_border_equals_a_loop(window, height, width):
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    kh, kw = min(window, height), min(window, width)
    expected = torch.empty_like(x)
    for i in range(height):
        for j in range(width):
            # the window whose own cell is (i, j), pushed back inside the map
            top = min(max(i - (kh - 1) // 2, 0), height - kh)
            left = min(max(j - (kw - 1) // 2, 0), width - kw)
            expected[:, :, i, j] = x[:, :, top : top + kh, left : left + kw].mean((2, 3))
    assert_close(replicate_to(sliding_mean(x, window), height, width), expected)


@pytest.mark.parametrize(
    ("height", "width", "window"), [(3, 5, 4), (9, 9, 4), (7, 12, 7), (1, 1, 4), (2, 40, 5)]
)
def test_window_means_are_the_sliding_mean_replicated(height: int, width: int, window: int) -> None:
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    expected = replicate_to(sliding_mean(x, window), height, width)
    torch.testing.assert_close(window_means(x, window), expected)
