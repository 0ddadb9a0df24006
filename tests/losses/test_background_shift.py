"""MBS's losses against loops over pixels and cells, their gradients, and their edges."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch.testing import assert_close

from everseg import losses

K, C = 3, 5


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(v - max(values)) for v in values]
    return [p / sum(powers) for p in powers]


def tensors(small: tuple[int, int] = (5, 4), size: tuple[int, int] = (20, 9)):
    torch.manual_seed(1)
    logits = 2 * torch.randn(2, K, *small, dtype=torch.float64)
    logits[1, 0] -= 2  # both answers, also where a whole image has one
    label = torch.randint(0, C, (2, *size))
    label[torch.rand(label.shape) < 0.5] = 0
    label[torch.rand(label.shape) < 0.1] = 255
    return logits, label


@pytest.mark.parametrize("band", [1, 7, None])
@pytest.mark.parametrize("small", [(5, 4), (20, 9), (1, 1)])
def test_doubted_background_is_what_the_teacher_rather_takes_for_another_class(small, band):
    logits, label = tensors(small)
    full = losses.upsample(logits, label.shape[1:]).permute(0, 2, 3, 1).tolist()
    expected = label.clone()
    for b, row, column in product(range(2), range(20), range(9)):
        share = softmax(full[b][row][column])[0]
        if label[b, row, column] == 0 and share < 0.5:
            expected[b, row, column] = 255
    found = losses.without_doubted(logits, label, num_classes=C, band=band)
    assert found.equal(expected)
    assert found.ne(label).any()
    assert not label[found == 0].any()


def test_nothing_is_doubted_where_the_teacher_knows_the_background_alone():
    label = torch.zeros(1, 4, 4, dtype=torch.long)
    assert losses.without_doubted(torch.randn(1, 1, 2, 2), label, num_classes=3).equal(label)


def test_doubt_in_a_space_of_many_classes_is_the_wide_ignored_id():
    logits = torch.tensor([0.0, 5.0]).view(1, 2, 1, 1)
    label = torch.zeros(1, 1, 1, dtype=torch.long)
    assert losses.without_doubted(logits, label, num_classes=300).item() == 65535


def test_weights_of_cells_follow_their_labels():
    logits, _ = tensors((2, 3))
    label = torch.tensor([[[0, 1, 2], [3, 4, 255]], [[0, 0, 0], [255, 2, 4]]])
    weight = losses.old_share(logits, label, num_classes=C)
    for b, row, column in product(range(2), range(2), range(3)):
        kind = int(label[b, row, column])
        share = softmax(logits[b, :, row, column].tolist())[0]
        assert_close(weight[b, row, column].item(), {0: share, 1: 1.0, 2: 1.0}.get(kind, 0.0))


def test_distance_is_a_mean_over_the_cells_that_have_a_weight():
    torch.manual_seed(2)
    ours, theirs = torch.randn(2, 2, 7, 3, 4, dtype=torch.float64).unbind()
    weight = torch.rand(2, 3, 4, dtype=torch.float64) * (torch.rand(2, 3, 4) < 0.6)
    x = ours.clone().requires_grad_()
    value = losses.weighted_feature_distance(x, theirs.requires_grad_(), weight)
    cells = [at for at in product(range(2), range(3), range(4)) if weight[at] > 0]
    by_hand = sum(
        float(weight[b, r, c]) * math.dist(ours[b, :, r, c].tolist(), theirs[b, :, r, c].tolist()) ** 2
        for b, r, c in cells
    )
    assert 0 < len(cells) < 24
    assert_close(value.item(), by_hand / len(cells) / 7)
    value.backward()
    assert theirs.grad is None
    assert_close(x.grad, (2 * weight[:, None] * (ours - theirs) / len(cells) / 7).detach())


def test_no_cell_with_a_weight_is_zero_and_not_nan():
    x = torch.randn(1, 4, 2, 2, requires_grad=True)
    value = losses.weighted_feature_distance(x, torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2))
    value.backward()
    assert value == 0
    assert not x.grad.any()


def test_orthogonality_pair_by_pair():
    torch.manual_seed(3)
    tokens = torch.randn(2, C, 6, dtype=torch.float64)
    sizes = []
    for b, new, other in product(range(2), range(K, C), range(C)):
        if new != other:
            left, right = tokens[b, new].tolist(), tokens[b, other].tolist()
            dot = sum(p * q for p, q in zip(left, right, strict=True))
            sizes.append(abs(dot) / math.hypot(*left) / math.hypot(*right))
    expected = sum(sizes) / len(sizes) * (C - K) / C
    x = tokens.clone().requires_grad_()
    value = losses.token_orthogonality(x, K)
    assert_close(value.item(), expected)
    value.backward()
    assert not x.grad[:, :K].any()  # old tokens are not pushed
    moved = tokens.clone()
    moved[0, K, 2] += 1e-6
    # Against finite differences in the first place of each pair only: the other token is held.
    held = torch.nn.functional.normalize(tokens, dim=2)
    first = torch.nn.functional.normalize(moved, dim=2)
    pair = (first[0, K] @ held[0].T).abs().sum() - (first[0, K] @ held[0, K]).abs()
    before = (held[0, K] @ held[0].T).abs().sum() - 1
    slope = float(pair - before) / 1e-6 / len(sizes) * (C - K) / C
    assert_close(x.grad[0, K, 2].item(), slope, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("num_old", [0, 1, C])
def test_orthogonality_of_all_of_one_and_of_no_new_class(num_old):
    torch.manual_seed(4)
    tokens = torch.randn(1, C, 4, requires_grad=True)
    value = losses.token_orthogonality(tokens, num_old)
    value.backward()
    assert tokens.grad.isfinite().all()
    assert (value > 0) == (num_old < C)


def test_orthogonal_and_empty_tokens_give_zero():
    assert losses.token_orthogonality(torch.eye(4)[None], 2) == 0
    zeros = torch.zeros(1, 3, 4, requires_grad=True)
    value = losses.token_orthogonality(zeros, 1)
    value.backward()
    assert value == 0
    assert zeros.grad.isfinite().all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: losses.old_share(
            torch.zeros(1, 2, 2, 2), torch.zeros(1, 4, 4, dtype=torch.long), num_classes=3
        ),
        lambda: losses.weighted_feature_distance(
            torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 3), torch.zeros(1, 2, 2)
        ),
        lambda: losses.weighted_feature_distance(
            torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 3)
        ),
        lambda: losses.token_orthogonality(torch.zeros(2, 3), 1),
        lambda: losses.token_orthogonality(torch.zeros(1, 2, 3), 3),
        lambda: losses.replayed_cross_entropy(
            torch.zeros(1, 3, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long), num_old=3
        ),
        lambda: losses.replayed_cross_entropy(
            torch.zeros(1, 3, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long), num_old=1, void="kept"
        ),
    ],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(ValueError, match=r"got|num_old|void|features have shape"):
        call()
