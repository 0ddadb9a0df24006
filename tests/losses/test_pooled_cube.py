"""RCIL's pooled cube distillation: values by hand, a slow oracle cell by cell, and inputs at the edge."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from everseg.losses import pooled_cube_distillation
from everseg.losses.pooled_cube import neighbour_distance, new_into_background, window_distance

SIZES = [(3, 8, 8), (4, 9, 7), (2, 5, 6), (3, 5, 6)]
"""Channels, height and width of the maps; the last one is the logits'."""


def maps(seed: int, logits: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [*SIZES[:-1], (logits, *SIZES[-1][1:])]
    return [torch.randn(2, *size, generator=generator, dtype=torch.float64) for size in sizes]


def oracle(
    student: list[np.ndarray],
    teacher: list[np.ndarray],
    spatial: tuple[float, float],
    channel: tuple[float, float],
) -> tuple[float, float]:
    """Both terms from sums over explicit cells of a padded array."""
    spaces, channels = [], []
    for number, (a, b) in enumerate(zip(student, teacher, strict=True)):
        known = b.shape[1]
        a = a.copy()
        a[:, 0] += a[:, known:].sum(1)
        d = b**2 - a[:, :known] ** 2
        last = number == len(student) - 1
        of_sizes = []
        for k in (4, 8, 12, 16, 20, 24):
            padded = np.pad(d, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
            cells = [
                padded[:, :, i : i + k, j : j + k].sum((2, 3)) / k**2
                for i in range(padded.shape[2] - k + 1)
                for j in range(padded.shape[3] - k + 1)
            ]
            of_sizes.append(
                np.mean([math.sqrt(sum((c[n] ** 2).sum() for c in cells)) for n in range(len(d))])
            )
        spaces.append(spatial[int(last)] * np.mean(of_sizes))
        if not last:
            padded = np.pad(d, ((0, 0), (1, 1), (0, 0), (0, 0)))
            means = np.stack([padded[:, c : c + 3].sum(1) / 3 for c in range(known)])
            norms = [math.sqrt((means[:, n] ** 2).sum()) for n in range(len(d))]
            channels.append(channel[int(number == len(student) - 2)] * np.mean(norms))
    return float(np.mean(spaces)), float(np.mean(channels))


@pytest.mark.parametrize("logits", [3, 5])
def test_both_terms_agree_with_the_oracle(logits):
    student, teacher = maps(1, logits), maps(2)
    found = pooled_cube_distillation(student, teacher, spatial=(0.3, 0.7), channel=(2.0, 0.5))
    wanted = oracle([x.numpy() for x in student], [x.numpy() for x in teacher], (0.3, 0.7), (2.0, 0.5))
    assert_close(torch.stack(list(found)), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)


def test_one_cell_is_spread_over_every_window_that_holds_it():
    """A single 4 in a map of 3 x 3: each k gives k x k windows with 4 / k**2, cut to the (3 + 1) ** 2 windows."""
    difference = torch.zeros(1, 1, 3, 3)
    difference[0, 0, 1, 1] = 4.0
    # With k = 4 and padding 2 every one of the 16 windows holds the middle; so does every window of larger k.
    wanted = sum(4 / k**2 * math.sqrt(16) for k in (4, 8, 12, 16, 20, 24)) / 6
    assert window_distance(difference).item() == pytest.approx(wanted)


def test_outer_channels_are_averaged_over_three_too():
    difference = torch.tensor([3.0, 0.0, 0.0, 6.0]).view(1, 4, 1, 1)
    assert neighbour_distance(difference).item() == pytest.approx(math.sqrt(1 + 1 + 4 + 4))


def test_norms_are_of_images_and_not_of_the_batch():
    one = torch.randn(1, 3, 6, 6)
    both = torch.cat([one, one])
    for distance in (window_distance, neighbour_distance):
        assert distance(both).item() == pytest.approx(distance(one).item())


def test_new_logits_are_added_to_the_background():
    logits = torch.arange(1.0, 6.0).view(1, 5, 1, 1)
    assert new_into_background(logits, 3).flatten().tolist() == [1 + 4 + 5, 2, 3]
    assert new_into_background(logits, 5) is logits


def test_each_factor_weighs_its_own_maps():
    student, teacher = maps(1), maps(2)
    off = pooled_cube_distillation(student, teacher, spatial=(0.0, 0.0), channel=(0.0, 0.0))
    assert [value.item() for value in off] == [0.0, 0.0]
    student[-1].requires_grad_()
    only = pooled_cube_distillation(student, teacher, spatial=(0.0, 1.0), channel=(1.0, 1.0))
    assert only.spatial.item() == pytest.approx(
        window_distance(teacher[-1] ** 2 - student[-1] ** 2).item() / 4
    )
    assert not only.channel.requires_grad  # no channel term of the logits
    before = pooled_cube_distillation(student, teacher, channel=(0.0, 1.0)).channel
    assert before.item() == pytest.approx(neighbour_distance(teacher[-2] ** 2 - student[-2] ** 2).item() / 3)


def test_gradient_is_that_of_the_value_and_the_teacher_gets_none():
    student, teacher = [x.requires_grad_() for x in maps(1, 4)], [x.requires_grad_() for x in maps(2)]
    assert torch.autograd.gradcheck(lambda *x: sum(pooled_cube_distillation(x, teacher)), student)
    sum(pooled_cube_distillation(student, teacher)).backward()
    assert all(x.grad is None for x in teacher)


def test_equal_maps_give_zero_with_a_finite_gradient():
    """A step may begin with a student that equals its teacher: the norm's derivative must not be nan there."""
    student = [x.requires_grad_() for x in maps(1)]
    value = sum(pooled_cube_distillation(student, maps(1)))
    value.backward()
    assert value.item() == 0
    assert all(x.grad.isfinite().all() for x in student)


def test_half_precision_is_squared_in_float32():
    big = [torch.full((1, 2, 4, 4), 300.0, dtype=torch.float16) for _ in range(2)]
    found = pooled_cube_distillation(big, [torch.zeros_like(x) for x in big])
    assert all(value.dtype == torch.float32 and value.isfinite() for value in found)


def test_single_cells_and_single_channels_work():
    found = pooled_cube_distillation([torch.ones(1, 1, 1, 1)] * 2, [torch.zeros(1, 1, 1, 1)] * 2)
    assert found.channel.item() == pytest.approx(1 / 3)
    assert found.spatial.item() == pytest.approx(sum(2 / k**2 for k in (4, 8, 12, 16, 20, 24)) / 6)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([torch.ones(1, 2, 4, 4)], [torch.ones(1, 2, 4, 4)], "one stage and"),
        ([torch.ones(1, 2, 4, 4)] * 2, [torch.ones(1, 2, 4, 4)] * 3, "same number of maps"),
        ([torch.ones(1, 2, 4, 4)] * 2, [torch.ones(1, 3, 4, 4)] * 2, "as many channels"),
        ([torch.ones(1, 2, 4, 4)] * 2, [torch.ones(2, 2, 4, 4)] * 2, "same images"),
        ([torch.ones(1, 2, 4, 4)] * 2, [torch.ones(1, 2, 4, 5)] * 2, "same images"),
        ([torch.ones(0, 2, 4, 4)] * 2, [torch.ones(0, 2, 4, 4)] * 2, "expected maps"),
        ([torch.ones(2, 4)] * 2, [torch.ones(2, 4)] * 2, "expected maps"),
    ],
)
def test_maps_that_do_not_fit_are_refused(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        pooled_cube_distillation(student, teacher)
