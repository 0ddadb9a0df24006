"""BARM's losses against sums by hand, with extreme inputs and masks without cells."""

from __future__ import annotations

import math

import loss_oracle as oracle
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from everseg.losses import (
    adapted_logits,
    icarl_distillation,
    label_cells,
    masked_feature_distance,
    residual_margin,
    residual_negatives,
)
from everseg.losses.readout import with_residual

EXACT = {"rtol": 1e-12, "atol": 1e-14}


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape) * 3


def some_cells(seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).random((2, 3, 4)) < 0.4


# ---------------------------------------------------------------- the background while it is learnt


def background_by_hand(b: float, residuals: list[float]) -> float:
    for value in residuals[:-1]:
        b += value if value < 0 else 0.0
    return b + residuals[-1]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_background_is_lowered_by_earlier_residuals_and_moved_by_the_newest(number):
    logits, residual = drawn(2, 5, 2, 3), drawn(2, number, 2, 3, seed=1)
    found = adapted_logits(torch.from_numpy(logits), torch.from_numpy(residual), 3).numpy()
    for b, i, j in np.ndindex(2, 2, 3):
        wanted = [background_by_hand(logits[b, 0, i, j], residual[b, :, i, j].tolist()), *logits[b, 1:, i, j]]
        np.testing.assert_allclose(found[b, :, i, j], wanted, rtol=1e-14)


def test_gradients_reach_the_newest_residual_and_the_new_classes_alone():
    logits = torch.from_numpy(drawn(2, 5, 2, 3)).requires_grad_()
    residual = torch.from_numpy(drawn(2, 3, 2, 3, seed=1)).requires_grad_()
    cotangent = torch.from_numpy(drawn(2, 5, 2, 3, seed=2))
    (adapted_logits(logits, residual, 3) * cotangent).sum().backward()
    assert (logits.grad[:, :3] == 0).all()
    assert torch.equal(logits.grad[:, 3:], cotangent[:, 3:])
    assert (residual.grad[:, :2] == 0).all()
    assert torch.equal(residual.grad[:, 2], cotangent[:, 0])


def test_both_rules_agree_where_the_newest_residual_is_negative():
    logits, residual = torch.from_numpy(drawn(2, 5, 2, 3)), torch.from_numpy(drawn(2, 3, 2, 3, seed=1))
    learnt, finished = adapted_logits(logits, residual, 3), with_residual(logits, residual)
    below = residual[:, -1] < 0
    assert below.any()
    assert not below.all()
    assert_close(learnt[:, 0][below], finished[:, 0][below], **EXACT)
    assert (learnt[:, 0][~below] > finished[:, 0][~below]).all()
    assert torch.equal(learnt[:, 1:], finished[:, 1:])


def test_residuals_that_do_not_fit_are_refused():
    logits = torch.zeros(2, 5, 2, 3)
    for residual in (
        torch.zeros(2, 0, 2, 3),
        torch.zeros(2, 1, 3, 2),
        torch.zeros(1, 1, 2, 3),
        torch.zeros(2, 2, 3),
    ):
        with pytest.raises(ValueError, match="adapted_logits"):
            adapted_logits(logits, residual, 3)
    for num_old in (0, 6):
        with pytest.raises(ValueError, match=f"num_old.*{num_old}"):
            adapted_logits(logits, torch.zeros(2, 1, 2, 3), num_old)


# ---------------------------------------------------------------- which cells count


def test_a_cell_has_the_label_of_its_first_pixel():
    label = torch.full((1, 4, 6), 255)
    label[0, ::2, ::3] = torch.tensor([[0, 1], [2, 3]])
    background, new = label_cells(label, (2, 2), 2, 4)
    assert background.tolist() == [[[True, False], [False, False]]]
    assert new.tolist() == [[[False, False], [True, True]]]


@pytest.mark.parametrize(("height", "width"), [(5, 7), (2, 3), (3, 4), (1, 1)])
def test_labels_of_any_size_give_cells_of_any_size(height, width):
    label = torch.from_numpy(np.random.default_rng(0).choice([0, 1, 2, 3, 255], (2, 9, 11)))
    background, new = label_cells(label, (height, width), 2, 4)
    for b, i, j in np.ndindex(2, height, width):
        at = int(label[b, i * 9 // height, j * 11 // width])
        assert (bool(background[b, i, j]), bool(new[b, i, j])) == (at == 0, at in (2, 3))


def test_ignored_is_another_number_where_there_are_256_classes():
    background, new = label_cells(torch.tensor([[[0, 255, 65535]]]), (1, 3), 255, 256)
    assert background.tolist() == [[[True, False, False]]]
    assert new.tolist() == [[[False, True, False]]]


# ---------------------------------------------------------------- the two terms of the residual


def test_both_terms_equal_the_sums_by_hand_and_their_gradients_the_differences():
    residual, mask = drawn(2, 3, 4), some_cells()
    inside = residual[mask].tolist()
    margin = sum(max(0.0, 1 - 2 * oracle.sigmoid(v)) for v in inside) / len(inside)
    negatives = sum(oracle.bce(v, 0.0) for v in inside) / (len(inside) + 1e-8)
    x, m = torch.from_numpy(residual).requires_grad_(), torch.from_numpy(mask)
    for loss, expected in ((residual_margin, margin), (residual_negatives, negatives)):
        assert_close(loss(x, m), torch.tensor(expected, dtype=torch.float64), **EXACT)
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, m), (x,))
        [gradient] = torch.autograd.grad(loss(x, m), x)
        assert (gradient[~m] == 0).all()


def test_the_margin_pushes_up_in_the_background_until_zero_and_the_other_term_down():
    x = torch.tensor([[[-3.0, -1e-3, 2.0]]], requires_grad=True)
    everywhere = torch.ones(1, 1, 3, dtype=torch.bool)
    [up] = torch.autograd.grad(residual_margin(x, everywhere), x)
    [down] = torch.autograd.grad(residual_negatives(x, everywhere), x)
    assert (up < 0).tolist() == [[[True, True, False]]]
    assert (down > 0).all()


@pytest.mark.parametrize("value", [1e4, -1e4, math.inf, -math.inf])
def test_extreme_residuals_have_their_limits(value):
    x = torch.tensor([[[value]]])
    one = torch.ones(1, 1, 1, dtype=torch.bool)
    assert float(residual_margin(x, one)) == (1.0 if value < 0 else 0.0)
    assert float(residual_negatives(x, one)) == pytest.approx(max(value, 0.0))


def test_without_cells_the_terms_and_their_gradients_are_zero_whatever_lies_outside():
    none = torch.zeros(1, 1, 2, dtype=torch.bool)
    for value in (3.0, 1e30, math.inf):
        x = torch.full((1, 1, 2), value, requires_grad=True)
        for loss in (residual_margin, residual_negatives):
            found = loss(x, none)
            [gradient] = torch.autograd.grad(found, x)
            assert (found.item(), gradient.abs().sum().item()) == (0.0, 0.0)
    assert math.isnan(residual_margin(x, none, empty=math.nan).item())


def test_half_precision_is_computed_in_float32():
    x, m = torch.from_numpy(drawn(2, 3, 4)).bfloat16(), torch.from_numpy(some_cells())
    for loss in (residual_margin, residual_negatives):
        assert loss(x, m).dtype == torch.float32
        assert_close(loss(x, m), loss(x.float(), m))


def test_masks_of_another_shape_are_refused():
    for loss in (residual_margin, residual_negatives):
        for residual in (torch.zeros(2, 1, 3, 4), torch.zeros(2, 4, 3)):
            with pytest.raises(ValueError, match=loss.__name__):
                loss(residual, torch.from_numpy(some_cells()))


# ---------------------------------------------------------------- what is kept of the older heads


def test_features_equal_the_sum_by_hand_and_nothing_flows_into_the_teacher():
    f, g, mask = drawn(2, 5, 3, 4), drawn(2, 5, 3, 4, seed=1), some_cells()
    expected = 0.0
    for b, d, i, j in np.ndindex(*f.shape):
        expected += (f[b, d, i, j] - g[b, d, i, j]) ** 2 * float(mask[b, i, j])
    x, y, m = (
        torch.from_numpy(f).requires_grad_(),
        torch.from_numpy(g).requires_grad_(),
        torch.from_numpy(mask),
    )
    found = masked_feature_distance(x, y, m)
    assert_close(found, torch.tensor(expected / f.size, dtype=torch.float64), **EXACT)
    assert torch.autograd.gradcheck(lambda x: masked_feature_distance(x, y, m), (x,))
    found.backward()
    assert y.grad is None
    assert (x.grad.permute(0, 2, 3, 1)[~m] == 0).all()


def test_features_outside_the_mask_do_not_count_whatever_they_are():
    x = torch.tensor([[[[1.0, math.inf]]]], requires_grad=True)
    y = torch.tensor([[[[0.0, math.nan]]]])
    found = masked_feature_distance(x, y, torch.tensor([[[True, False]]]))
    found.backward()
    assert found.item() == 0.5
    assert x.grad.tolist() == [[[[1.0, 0.0]]]]
    none = masked_feature_distance(x, y, torch.zeros(1, 1, 2, dtype=torch.bool))
    assert none.item() == 0


def test_features_of_either_precision_are_compared_in_the_wider_one():
    x, y = torch.from_numpy(drawn(1, 2, 3, 4)).bfloat16(), torch.from_numpy(drawn(1, 2, 3, 4, seed=1))
    m = torch.from_numpy(some_cells()[:1])
    assert masked_feature_distance(x, y, m).dtype == torch.float64
    assert masked_feature_distance(x, x, m).dtype == torch.float32
    with pytest.raises(ValueError, match="masked_feature_distance"):
        masked_feature_distance(x, x, m[:, :2])


def test_the_sigmoids_of_older_heads_are_distilled_by_channels_whatever_their_order():
    """BARM's sum over heads and channels of mean BCE(z, sigmoid(z_old)) is one term over the joined channels."""
    z, t = drawn(2, 4, 3, 4), drawn(2, 4, 3, 4, seed=1)
    expected = 0.0
    for c in range(4):
        cells = [
            oracle.bce(v, oracle.sigmoid(w)) for v, w in zip(z[:, c].ravel(), t[:, c].ravel(), strict=True)
        ]
        expected += sum(cells) / len(cells)
    x = torch.from_numpy(z).requires_grad_()
    teacher = torch.from_numpy(t)
    assert_close(icarl_distillation(x, teacher), torch.tensor(expected, dtype=torch.float64), **EXACT)
    assert torch.autograd.gradcheck(lambda x: icarl_distillation(x, teacher), (x,))
    order = [2, 0, 3, 1]
    assert_close(icarl_distillation(x[:, order], teacher[:, order]), icarl_distillation(x, teacher), **EXACT)
