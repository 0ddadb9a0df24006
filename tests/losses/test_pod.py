"""Local POD against loops over cells, and at its edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from everseg import losses


def oracle(student, teacher, *, scales=(1, 2, 4), square=True, cells="both", pool="mean", channels="sum"):
    """Everything that is kept of each map, cell by cell, in lists; then the distance."""
    student, teacher = student.numpy(), teacher.numpy()
    old = teacher.shape[1]
    if student.shape[1] > old:
        kept = student[:, :old].copy()
        if channels == "sum":
            for channel in range(old, student.shape[1]):
                kept[:, 0] += student[:, channel]
        student = kept
    reduce = np.mean if pool == "mean" else np.sum
    distances = []
    for image in range(len(student)):
        held = []
        for source in (student[image], teacher[image]):
            values = source**2 if square else source
            numbers = []
            height, width = values.shape[1:]
            for scale in scales:
                tall, wide = (width if cells == "width" else height) // scale, width // scale
                for i, j in np.ndindex(scale, scale):
                    cell = values[:, i * tall : (i + 1) * tall, j * wide : (j + 1) * wide]
                    numbers += reduce(cell, axis=2).ravel().tolist() + reduce(cell, axis=1).ravel().tolist()
            held.append(np.array(numbers))
        distances.append(np.sqrt(((held[0] - held[1]) ** 2).sum()))
    return float(np.mean(distances))


CASES = [
    ((8, 8), {}),
    ((9, 7), {"cells": "width"}),
    ((9, 7), {}),
    ((6, 10), {}),
    ((4, 4), {"scales": (1,)}),
    ((11, 13), {"scales": (1, 3, 5, 6)}),
    ((8, 12), {"scales": (1,), "pool": "sum"}),
    ((8, 8), {"pool": "sum"}),
    ((6, 6), {"square": False}),
    ((33, 32), {"cells": "width"}),
]


@pytest.mark.parametrize(("size", "options"), CASES)
@pytest.mark.parametrize("new", [0, 2])
@pytest.mark.parametrize("channels", ["sum", "trim"])
def test_value_and_gradient_agree_with_a_loop_over_cells(size, options, new, channels):
    torch.manual_seed(0)
    student = torch.randn(2, 3 + new, *size, dtype=torch.float64)
    teacher = torch.randn(2, 3, *size, dtype=torch.float64)
    options = options | {"channels": channels}
    x = student.clone().requires_grad_()
    found = losses.local_pod(x, teacher, **options)
    found.backward()
    assert found.item() == pytest.approx(oracle(student, teacher, **options), rel=1e-12)
    for place in [(0, 0, 0, 0), (1, 2, 3, 2), (1, 2 + new, 1, 3)]:  # a difference quotient at a few places
        moved = []
        for step in (1e-6, -1e-6):
            other = student.clone()
            other[place] += step
            moved.append(oracle(other, teacher, **options))
        assert x.grad[place].item() == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-5, abs=1e-8)


def test_equal_maps_have_distance_and_gradient_zero():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    distance = losses.local_pod(x, x.detach())
    distance.backward()
    assert distance.item() == 0
    assert x.grad.abs().max() == 0


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 5), (3, 2)])
def test_scales_finer_than_a_small_map_are_left_out(size):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 3, *size, dtype=torch.float64)
    fitting = tuple(scale for scale in (1, 2, 4) if scale <= min(size))
    assert losses.local_pod(student, teacher).item() == pytest.approx(
        oracle(student, teacher, scales=fitting)
    )


def test_half_precision_is_compared_in_single():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 3, 8, 8).bfloat16()
    found = losses.local_pod(student, teacher)
    assert found.dtype == torch.float32
    assert_close(found, losses.local_pod(student.float(), teacher.float()))


def test_bad_input_is_named():
    x = torch.zeros(1, 3, 4, 6)
    with pytest.raises(ValueError, match="as high as wide, got 4 x 6; use 'both'"):
        losses.local_pod(x, x, cells="width")
    with pytest.raises(ValueError, match="expected maps"):
        losses.local_pod(x, torch.zeros(1, 4, 4, 6))
    with pytest.raises(ValueError, match="expected maps"):
        losses.local_pod(x, torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="expected maps"):
        losses.local_pod(x[0], x[0])
    with pytest.raises(ValueError, match="none of the scales"):
        losses.local_pod(x, x, scales=(5, 8))
    with pytest.raises(ValueError, match="none of the scales"):
        losses.local_pod(x, x, scales=())
    with pytest.raises(ValueError, match="at least 1"):
        losses.local_pod(x, x, scales=(0, 1))
    with pytest.raises(ValueError, match="unknown cells"):
        losses.local_pod(x, x, cells="height")
