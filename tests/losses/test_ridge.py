"""Ridge regression from sums: against least squares over all pixels, in any order and any parts, and its condition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from everseg.losses import ridge
from saying import must_say

DTYPE = torch.float64


def pixels(number: int, width: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.RandomState(seed)
    return torch.from_numpy(rng.randn(number, width)), torch.from_numpy(rng.randint(0, classes, number))


def sums(width: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(width, width, dtype=DTYPE), torch.zeros(width, classes, dtype=DTYPE)


def least_squares(
    x: np.ndarray, y: np.ndarray, classes: int, gamma: float, times: np.ndarray | None = None
) -> np.ndarray:
    """The ridge regression as least squares over the pixels and n rows more, by numpy's SVD."""
    times = np.ones(len(x)) if times is None else times
    root = np.sqrt(times)[:, None]
    rows = np.concatenate([root * x, np.sqrt(gamma) * np.eye(x.shape[1])])
    targets = np.concatenate([root * np.eye(classes)[y], np.zeros((x.shape[1], classes))])
    return np.linalg.lstsq(rows, targets, rcond=None)[0]


def relative(ours: torch.Tensor, theirs: np.ndarray) -> float:
    return float(np.abs(ours.numpy() - theirs).max() / np.abs(theirs).max())


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of the Gram matrix and of pixels that the sizes here are no multiples of."""
    monkeypatch.setattr(ridge, "_BLOCK", 4)
    monkeypatch.setattr(ridge, "_ROWS", 7)


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_give_the_least_squares_solution(small_blocks, weighted):
    x, y = pixels(50, 10, 3)
    times = torch.from_numpy(np.random.RandomState(1).rand(50)) if weighted else None
    gram, cross = sums(10, 3)
    ridge.add_pixels(gram, cross, x, y, of_pixel=times)
    expected = least_squares(x.numpy(), y.numpy(), 3, 0.7, None if times is None else times.numpy())
    assert relative(ridge.ridge_weights(gram, cross, 0.7), expected) < 1e-12


def test_the_expansion_is_that_of_its_definition(small_blocks):
    x, y = pixels(40, 5, 2)
    weight = torch.from_numpy(np.random.RandomState(2).randn(9, 5))
    phi = np.maximum(x.numpy() @ weight.numpy().T, 0)
    gram, cross = sums(9, 2)
    ridge.add_pixels(gram, cross, x, y, weight=weight)
    assert relative(ridge.ridge_weights(gram, cross, 0.1), least_squares(phi, y.numpy(), 2, 0.1)) < 1e-11


@pytest.mark.parametrize("seed", range(3))
def test_fifty_steps_in_any_order_over_several_processes_are_one_regression(seed):
    """Classes come one by one; each process adds its share of each batch, and the sums are added at the end."""
    rng = np.random.RandomState(seed)
    width, steps, world = 24, 50, 3
    batches = []
    for step in range(steps):
        x = torch.from_numpy(np.maximum(rng.randn(60, width), 0) * rng.uniform(0.1, 10))
        batches.append((x, torch.from_numpy(rng.choice([0, 1 + step // 2], 60))))
    classes = 1 + steps // 2
    everything = [np.concatenate([b[i].numpy() for b in batches]) for i in (0, 1)]
    expected = least_squares(*everything, classes, 1.0)
    shares = [sums(width, classes) for _ in range(world)]
    for number in rng.permutation(steps):
        x, y = batches[number]
        for rank in range(world):
            ridge.add_pixels(*shares[rank], x[rank::world], y[rank::world])
    gram, cross = (sum(parts) for parts in zip(*shares, strict=True))
    assert relative(ridge.ridge_weights(gram, cross, 1.0), expected) < 1e-8


def test_the_bound_holds_and_is_reached():
    x, y = pixels(50, 10, 3)
    gram, cross = sums(10, 3)
    ridge.add_pixels(gram, cross, x, y)
    whole = gram.triu() + gram.triu(1).T
    for gamma in (1e-3, 1.0, 1e3):
        assert np.linalg.cond(whole.numpy() + gamma * np.eye(10)) <= ridge.condition_bound(gram, gamma)
    gram, cross = sums(10, 3)
    ridge.add_pixels(gram, cross, x[:1], y[:1])  # one pixel: all of the trace is one eigenvalue
    whole = gram.triu() + gram.triu(1).T
    exact = np.linalg.cond(whole.numpy() + np.eye(10))
    assert exact == pytest.approx(ridge.condition_bound(gram, 1.0), rel=1e-9)


@pytest.mark.parametrize("gamma", [1e-1, 1e-4, 1e-7])
def test_the_error_stays_below_what_the_bound_says(gamma):
    """Features of very unequal size. Least squares by SVD loses only the root of the condition number."""
    rng = np.random.RandomState(3)
    x = rng.randn(200, 12) * 10.0 ** -np.arange(12)
    y = rng.randint(0, 3, 200)
    gram, cross = sums(12, 3)
    ridge.add_pixels(gram, cross, torch.from_numpy(x), torch.from_numpy(y))
    ours = ridge.ridge_weights(gram, cross, gamma)
    expected = least_squares(x, y, 3, gamma)
    bound = ridge.condition_bound(gram, gamma)
    assert relative(ours, expected) < 12 * np.finfo(np.float64).eps * bound


def recursion(batches, width: int, classes: int, gamma: float, dtype: torch.dtype) -> torch.Tensor:
    """The authors' form: the inverse is updated batch by batch."""
    inverse, weights = torch.eye(width, dtype=dtype) / gamma, torch.zeros(width, classes, dtype=dtype)
    for x, y in batches:
        x, target = x.to(dtype), torch.eye(classes, dtype=dtype)[y]
        gain = inverse @ x.T
        inverse = inverse - gain @ torch.linalg.solve(torch.eye(len(x), dtype=dtype) + x @ gain, x @ inverse)
        weights = weights + inverse @ x.T @ (target - x @ weights)
    return weights


def test_sums_are_the_authors_recursion_and_lose_less():
    rng = np.random.RandomState(4)
    batches = [
        (torch.from_numpy(np.maximum(rng.randn(40, 30), 0)), torch.from_numpy(rng.randint(0, 4, 40)))
        for _ in range(60)
    ]
    expected = least_squares(*(np.concatenate([b[i].numpy() for b in batches]) for i in (0, 1)), 4, 0.01)
    gram, cross = sums(30, 4)
    for x, y in batches:
        ridge.add_pixels(gram, cross, x, y)
    ours = relative(ridge.ridge_weights(gram, cross, 0.01), expected)
    theirs = relative(recursion(batches, 30, 4, 0.01, DTYPE), expected)
    assert theirs < 1e-7
    assert ours < 1e-11
    assert ours < theirs


def test_products_in_single_precision_cost_single_precision():
    x, y = pixels(3000, 20, 3)
    gram, cross = sums(20, 3)
    ridge.add_pixels(gram, cross, x, y, exact=False)
    expected = least_squares(x.numpy(), y.numpy(), 3, 1.0)
    error = relative(ridge.ridge_weights(gram, cross, 1.0), expected)
    assert 1e-12 < error < 1e-4


def test_nothing_to_add_and_classes_without_a_pixel_are_fine():
    gram, cross = sums(6, 3)
    ridge.add_pixels(gram, cross, torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))
    assert float(gram.abs().sum()) == 0
    assert torch.equal(ridge.ridge_weights(gram, cross, 1.0), torch.zeros(6, 3, dtype=DTYPE))
    x, y = pixels(20, 6, 2)
    ridge.add_pixels(gram, cross, x, y)
    weights = ridge.ridge_weights(gram, cross, 1.0)
    assert float(weights[:, 2].abs().sum()) == 0
    assert float(weights[:, :2].abs().min()) > 0


def test_a_matrix_that_rounding_has_made_indefinite_is_told():
    gram, cross = sums(3, 2)
    ridge.add_pixels(gram, cross, torch.ones(5, 3), torch.zeros(5))
    gram[0, 0] -= 1e-3  # as storing in single precision may do to large sums
    with pytest.raises(ValueError, match="gamma") as told:
        ridge.ridge_weights(gram, cross, 1e-9)
    must_say(told.value, "1e-09", "1.5e+10")


@pytest.mark.parametrize("size", [0, 1, 2, 7])
def test_packing_keeps_what_counts(size):
    gram = torch.arange(size * size, dtype=DTYPE).view(size, size)
    packed = ridge.pack(gram)
    assert len(packed) == size * (size + 1) // 2
    assert torch.equal(ridge.unpack(packed), gram.triu())


def test_the_inverse_is_that_of_the_whole_matrix():
    x, y = pixels(50, 5, 3)
    gram, cross = sums(5, 3)
    ridge.add_pixels(gram, cross, x, y)
    expected = np.linalg.inv(x.numpy().T @ x.numpy() + 2 * np.eye(5))
    assert relative(ridge.ridge_inverse(gram, 2.0), expected) < 1e-12
