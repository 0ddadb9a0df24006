"""Arg-max by bands is the arg-max of the resized logits; the plain way is the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from everseg.losses import argmax, upsample
from everseg.losses.argmax import Strip, argmax_of_sum, predict_ids

SIZES = [
    ((4, 5), (64, 80)),  # whole strides
    ((65, 37), (300, 77)),  # uneven
    ((30, 40), (30, 40)),  # as they are
    ((9, 40), (70, 40)),  # one axis only
    ((9, 40), (9, 77)),
    ((40, 30), (11, 7)),  # smaller
    ((1, 1), (13, 1)),
]


def check_equals(ids: torch.Tensor, logits: torch.Tensor) -> None:
    """The ids (B, H, W) are the arg-max of full logits, but where the two largest agree up to their last digits."""
    best = logits.max(1).values
    chosen = logits.gather(1, ids.long()[:, None])[:, 0]
    assert ids.dtype == torch.uint8
    assert ((best - chosen) <= 16 * torch.finfo(logits.dtype).eps * logits.abs().amax()).all()
    assert (ids != logits.argmax(1)).float().mean() < 1e-3


@pytest.fixture(params=["cpu", "elsewhere"])
def way(request, monkeypatch) -> str:
    """The CPU's form, or that of other devices, here on the CPU."""
    if request.param == "elsewhere":
        monkeypatch.setattr(argmax, "_on_the_cpu", argmax._elsewhere)
    return request.param


@pytest.mark.parametrize(("small", "size"), SIZES)
@pytest.mark.parametrize("classes", [1, 3, 21, 151, 255])
def test_equals_the_argmax_of_resized_logits(way, small, size, classes, monkeypatch):
    monkeypatch.setattr(argmax, "_BAND_PIXELS", 7 * size[1])  # bands of 7 rows: several, and a rest
    monkeypatch.setattr(argmax, "_BAND_BYTES", 4 * classes * 7 * size[1])
    logits = torch.randn(2, classes, *small)
    check_equals(predict_ids(logits, size), upsample(logits, size))


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_bands_do_not_change_the_result(threads, monkeypatch):
    logits, size = torch.randn(1, 21, 17, 23), (131, 97)
    expected = predict_ids(logits, size)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for pixels in (1, 5 * 97, 2**20):
            monkeypatch.setattr(argmax, "_BAND_PIXELS", pixels)
            assert torch.equal(predict_ids(logits, size), expected)
    finally:
        torch.set_num_threads(before)


def test_of_equal_logits_the_first_class_wins(way):
    logits = torch.tensor([1.0, 2.0, 2.0, 0.0]).view(1, 4, 1, 1).expand(1, 4, 3, 3)
    assert predict_ids(logits, (3, 3)).unique().tolist() == [1]
    assert predict_ids(logits, (12, 12)).unique().tolist() == [1]
    assert predict_ids(torch.zeros(1, 5, 2, 2), (9, 9)).unique().tolist() == [0]
    assert predict_ids(torch.full((1, 3, 2, 2), -1e30), (9, 9)).unique().tolist() == [0]


def test_half_precision_is_compared_in_full_and_double_stays(way):
    logits = torch.randn(1, 5, 6, 6)
    half = logits.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(predict_ids(half, (48, 48)), predict_ids(half.float(), (48, 48)))
    double = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64).view(1, 2, 1, 1)
    assert predict_ids(double, (4, 4)).unique().tolist() == [1]


def test_takes_logits_with_a_gradient_and_under_inference_mode():
    logits = torch.randn(1, 3, 4, 4)
    expected = predict_ids(logits, (16, 16))
    assert torch.equal(predict_ids(logits.requires_grad_(), (16, 16)), expected)
    with torch.inference_mode():
        assert torch.equal(predict_ids(logits + 0, (16, 16)), expected)


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 65535, 1, 1), (1, 0, 2, 2)])
def test_wrong_shapes_raise(shape):
    with pytest.raises(ValueError, match=r"\(B, C, h, w\).*65534 classes"):
        predict_ids(torch.zeros(shape), (4, 4))


def test_windows_are_summed_where_they_overlap(way):
    """Three windows side by side, and a strip below that overlaps the first by two rows."""
    torch.manual_seed(1)
    upper, lower = torch.randn(3, 4, 3, 3), torch.randn(3, 4, 6, 6)
    lefts = (0, 4, 7)
    strips = [Strip(upper, 0, lefts, 6, 6), Strip(lower, 4, lefts, 6, 6)]
    total = torch.zeros(4, 10, 13)
    for strip in strips:
        for left, one in zip(lefts, F.interpolate(strip.logits, (6, 6), mode="bilinear"), strict=True):
            total[:, strip.top : strip.top + 6, left : left + 6] += one
    out = torch.empty(10, 13, dtype=torch.uint8)
    argmax_of_sum(strips[:1], 0, out[:4])
    argmax_of_sum(strips, 4, out[4:6])
    argmax_of_sum(strips[1:], 6, out[6:])
    np.testing.assert_array_equal(out.numpy(), total.argmax(0).numpy())


def test_nothing_is_read_back_off_the_cpu():
    """Tensors of the meta device have no values: any read, as any wait for a GPU, raises."""
    logits = torch.randn(2, 21, 8, 8, device="meta")
    ids = predict_ids(logits, (128, 128))
    assert (ids.device.type, ids.shape, ids.dtype) == ("meta", (2, 128, 128), torch.uint8)
