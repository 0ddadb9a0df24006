"""DKD's decomposed distillation against numpy, and what its two parts mean."""

from __future__ import annotations

import loss_oracle as oracle
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from everseg.losses import decomposed_distillation, decomposed_logits


def drawn(*, classes=3, depth=5, seed=0):
    rng = np.random.default_rng(seed)
    features = np.abs(rng.standard_normal((2, depth, 2, 3)))
    return features, rng.standard_normal((classes, depth, 1, 1))


def by_hand(features, weight, keep):
    """One product at a time; `keep` says which weights take part."""
    batch, depth, height, width = features.shape
    out = np.zeros((batch, len(weight), height, width))
    for b, c, i, j, d in np.ndindex(batch, len(weight), height, width, depth):
        w = weight[c, d, 0, 0]
        out[b, c, i, j] += features[b, d, i, j] * w if keep(w) else 0.0
    return out


@pytest.mark.parametrize(("sign", "keep"), [("positive", lambda w: w > 0), ("negative", lambda w: w < 0)])
def test_loss_and_gradients_equal_the_sums_by_hand(sign, keep):
    (f, w), (g, v) = drawn(), drawn(seed=1)
    parts, targets = by_hand(f, w, keep), by_hand(g, v, keep)
    expected = np.zeros(3)
    for b, c, i, j in np.ndindex(*parts.shape):
        expected[c] += oracle.bce(parts[b, c, i, j], oracle.sigmoid(targets[b, c, i, j])) / 12
    x, y, s, t = (torch.from_numpy(a).requires_grad_() for a in (f, w, g, v))
    found = decomposed_distillation(x, y, s, t, sign)
    assert_close(found, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, y: decomposed_distillation(x, y, s, t, sign), (x, y))
    found.sum().backward()
    assert s.grad is None
    assert t.grad is None
    assert (y.grad[~keep(y.detach())] == 0).all()


def test_both_parts_are_the_logit_without_its_bias():
    f, w = (torch.from_numpy(a) for a in drawn())
    both = decomposed_logits(f, w, "positive") + decomposed_logits(f, w, "negative")
    assert_close(both, torch.nn.functional.conv2d(f, w))
    assert (decomposed_logits(f, w, "positive") >= 0).all()
    assert (decomposed_logits(f, w, "negative") <= 0).all()


def test_the_loss_is_least_at_the_teacher():
    f, w = (torch.from_numpy(a) for a in drawn())
    for sign in ("positive", "negative"):
        x, y = f.clone().requires_grad_(), w.clone().requires_grad_()
        decomposed_distillation(x, y, f, w, sign).sum().backward()
        assert x.grad.abs().max() < 1e-16
        assert y.grad.abs().max() < 1e-15


def test_half_precision_is_computed_in_float32_and_large_features_stay_finite():
    f, w = (torch.from_numpy(a) for a in drawn())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = decomposed_distillation((1e4 * f).bfloat16(), w.float(), f.bfloat16(), w.float(), "negative")
    assert value.dtype == torch.float32
    assert value.isfinite().all()


def test_shapes_that_do_not_fit_are_refused():
    f, w = (torch.from_numpy(a) for a in drawn())
    with pytest.raises(ValueError, match=r"2, 4, 2, 3.*3, 5"):
        decomposed_logits(f[:, :4], w, "positive")
    with pytest.raises(ValueError, match=r"2, 3, 2, 3.*2, 2, 2, 3"):
        decomposed_distillation(f, w, f, w[:2], "positive")
