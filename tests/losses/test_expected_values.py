"""Losses against values derived by hand, and what must hold between them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from everseg import losses

LOG2, LOG3 = math.log(2), math.log(3)


def pixel(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


def label(value: int) -> Tensor:
    return torch.tensor([[[value]]])


def close(value: Tensor, expected: float) -> None:
    assert_close(value, torch.tensor(expected, dtype=value.dtype), rtol=1e-12, atol=1e-12)


def test_cross_entropy_of_equal_logits_is_the_log_of_the_class_count():
    close(losses.cross_entropy(pixel(7, 7, 7), label(1)), LOG3)


def test_cross_entropy_of_known_odds():
    close(losses.cross_entropy(pixel(LOG3, 0), label(0)), math.log(4 / 3))
    close(losses.cross_entropy(pixel(LOG3, 0), label(1)), math.log(4))


def test_unbiased_background_pixel_may_be_any_old_class():
    logits = pixel(0, LOG2, 0, 0)  # probabilities 1/5, 2/5, 1/5, 1/5
    close(losses.unbiased_cross_entropy(logits, label(0), num_old=2), -math.log(3 / 5))
    close(losses.unbiased_cross_entropy(logits, label(1), num_old=2), -math.log(3 / 5))
    close(losses.unbiased_cross_entropy(logits, label(3), num_old=2), -math.log(1 / 5))
    close(losses.unbiased_cross_entropy(logits, label(0), num_old=3), -math.log(4 / 5))


def test_unbiased_cross_entropy_is_plain_when_only_background_is_old():
    logits = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    labels = torch.randint(0, 4, (2, 3, 3))
    assert_close(
        losses.unbiased_cross_entropy(logits, labels, num_old=1), losses.cross_entropy(logits, labels)
    )


def test_unbiased_cross_entropy_does_not_tell_old_classes_apart():
    logits = torch.randn(1, 5, 2, 2, dtype=torch.float64)
    labels = torch.tensor([[[0, 3], [4, 255]]])
    swapped = logits[:, [2, 0, 1, 3, 4]]
    assert_close(
        losses.unbiased_cross_entropy(swapped, labels, num_old=3),
        losses.unbiased_cross_entropy(logits, labels, num_old=3),
    )


def test_binary_cross_entropy_sums_over_classes():
    # sigmoids 3/4, 1/2, 1/4
    logits = pixel(LOG3, 0, -LOG3)
    close(losses.binary_cross_entropy(logits, label(0)), -math.log(3 / 4 * 1 / 2 * 3 / 4))
    close(losses.binary_cross_entropy(logits, label(2)), -math.log(1 / 4 * 1 / 2 * 1 / 4))


def test_binary_cross_entropy_is_exact_where_softplus_turns_linear():
    for x in (19.0, 21.0, 37.0, 60.0):
        close(losses.binary_cross_entropy(pixel(x, -100), label(1)), x + 100 + math.log1p(math.exp(-x)))


def test_icarl_takes_old_classes_from_the_teacher_and_new_ones_from_the_label():
    logits, teacher = pixel(0, 0, LOG3), pixel(LOG3, -LOG3)  # teacher 3/4, 1/4
    old = 2 * LOG2  # a half of anything against p = 1/2
    close(losses.icarl(logits, label(2), teacher), old - math.log(3 / 4))
    close(losses.icarl(logits, label(0), teacher), old - math.log(1 / 4))


def test_icarl_background_option_takes_channel_zero_from_the_label():
    logits, teacher = pixel(LOG3, 0, 0), pixel(0, 0)
    rest = 2 * LOG2
    close(losses.icarl(logits, label(0), teacher, background_from_label=True), rest - math.log(3 / 4))
    close(losses.icarl(logits, label(2), teacher, background_from_label=True), rest - math.log(1 / 4))
    mixed = -(math.log(3 / 4) + math.log(1 / 4)) / 2
    close(losses.icarl(logits, label(0), teacher), rest + mixed)


def test_icarl_distillation_is_old_class_count_times_the_mean():
    logits, teacher = pixel(LOG3, LOG3, 50), pixel(1e3, -1e3)  # targets 1, 0
    close(losses.icarl_distillation(logits, teacher), -math.log(3 / 4) - math.log(1 / 4))


def test_focal_of_known_odds():
    logits = pixel(LOG3, 0)
    close(losses.focal(logits, label(1)), (3 / 4) ** 2 * math.log(4))
    close(losses.focal(logits, label(0), alpha=0.25, gamma=3.0), 0.25 * (1 / 4) ** 3 * math.log(4 / 3))
    close(losses.focal(logits, label(0), gamma=0.0), math.log(4 / 3))


def test_distillation_of_known_odds():
    teacher, logits = pixel(LOG3, 0), pixel(0, 0, 99)  # the new class takes no part
    close(losses.distillation(logits, teacher), LOG2 / 2)
    logits = pixel(0, LOG3, -5)
    close(losses.distillation(logits, teacher), (3 / 4 * math.log(4) + 1 / 4 * math.log(4 / 3)) / 2)


def test_alpha_sharpens_the_teacher():
    teacher, logits = pixel(LOG3, 0), pixel(0, LOG3, 0)  # alpha 2: 9/10, 1/10
    expected = (9 / 10 * math.log(4) + 1 / 10 * math.log(4 / 3)) / 2
    close(losses.distillation(logits, teacher, alpha=2.0), expected)


def test_old_background_covers_new_classes():
    old = torch.tensor([[2.0, 0.0]]).view(1, 2, 1, 1)  # background, cat
    for new in ([2.0, 0.0, -1e9], [-1e9, 0.0, 2.0]):  # background mass kept / moved to the new class
        logits = torch.tensor([new]).view(1, 3, 1, 1)
        assert_close(losses.unbiased_distillation(logits, old), torch.tensor(0.1827), atol=1e-4, rtol=0)


def test_unbiased_distillation_of_known_odds():
    logits = pixel(0, LOG2, 0, LOG2)  # 1/6, 2/6, 1/6, 2/6; old background covers 4/6
    teacher = pixel(LOG3, 0)
    close(
        losses.unbiased_distillation(logits, teacher),
        -(3 / 4 * math.log(4 / 6) + 1 / 4 * math.log(2 / 6)) / 2,
    )


def test_background_split_among_new_classes_keeps_the_unbiased_distillation():
    """MiB's initialisation: n new classes with the background's weights and all n + 1 biases lowered by log(n + 1)."""
    teacher = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    background = teacher[:, :1] - LOG3
    logits = torch.cat([background, teacher[:, 1:], background, background], dim=1)
    own = losses.distillation(teacher, teacher)
    assert_close(losses.unbiased_distillation(logits, teacher), own)
    labels = torch.zeros(2, 3, 3, dtype=torch.long)
    split = losses.unbiased_cross_entropy(logits, labels, num_old=4)
    p_new = 2 / 3 * teacher.softmax(1)[:, 0]
    assert_close(split, -torch.log1p(-p_new).mean())


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_distilling_the_teacher_itself_is_the_minimum(alpha):
    teacher = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    student = (alpha * teacher).requires_grad_()
    value = losses.distillation(student, teacher, alpha=alpha)
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.abs().max() < 1e-15
    entropy = -(q := (alpha * teacher).softmax(1)).mul(q.log()).sum(1).mean() / 4
    assert_close(value, entropy)
    for _ in range(20):
        assert losses.distillation(student + 0.3 * torch.randn_like(student), teacher, alpha=alpha) > value


def test_distillation_ignores_a_constant_shift_of_either_side():
    logits, teacher = (
        torch.randn(1, 5, 2, 2, dtype=torch.float64),
        torch.randn(1, 3, 2, 2, dtype=torch.float64),
    )
    for loss in (losses.distillation, losses.unbiased_distillation):
        assert_close(loss(logits + 7, teacher - 3), loss(logits, teacher))


def test_feature_distillation_is_the_mean_square_without_gradient_of_the_teacher():
    features = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0], [3.0, 8.0]], requires_grad=True)
    value = losses.feature_distillation(features, teacher)
    value.backward()
    assert value.item() == 5.0  # (4 + 16) / 4
    assert teacher.grad is None
    assert_close(features.grad, torch.tensor([[0.0, 1.0], [0.0, -2.0]]))
    assert losses.feature_distillation(features, teacher, reduction="sum").item() == 20.0
    double = features.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: losses.feature_distillation(f, teacher), (double,))


def test_feature_distillation_of_half_precision_is_float32():
    value = losses.feature_distillation(torch.full((3,), 300.0).half(), torch.zeros(3).half())
    assert value.dtype == torch.float32
    assert value.item() == 90000.0  # more than float16 can hold


@pytest.mark.parametrize("size", [(5, 7), (8, 8), (4, 4), (3, 16)])
def test_upsample_is_bilinear_with_half_pixel_centres(size):
    logits = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    out = losses.upsample(logits, size)
    for i in range(size[0]):
        for j in range(size[1]):
            y = max((i + 0.5) * 4 / size[0] - 0.5, 0.0)
            x = max((j + 0.5) * 4 / size[1] - 0.5, 0.0)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, 3), min(x0 + 1, 3)
            top = logits[0, :, y0, x0] * (1 - x + x0) + logits[0, :, y0, x1] * (x - x0)
            bottom = logits[0, :, y1, x0] * (1 - x + x0) + logits[0, :, y1, x1] * (x - x0)
            assert_close(out[0, :, i, j], top * (1 - y + y0) + bottom * (y - y0))


def test_upsample_computes_half_precision_in_float32_and_keeps_float64():
    half = torch.tensor([1.0, 1.0078125]).bfloat16().view(1, 1, 1, 2)
    out = losses.upsample(half, (1, 4))
    assert out.dtype == torch.float32
    assert out[0, 0, 0, 1].item() == 1.001953125  # a quarter of the way: lost in bfloat16
    assert losses.upsample(half, (1, 2)).dtype == torch.float32
    assert losses.upsample(half.double(), (1, 4)).dtype == torch.float64


def test_class_weights_multiply_each_class_in_sigmoid_and_distillation_terms():
    logits = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64).view(1, 3, 1, 1)
    label = torch.tensor([2]).view(1, 1, 1)
    weight = torch.tensor([2.0, 0.0, 3.0], dtype=torch.float64)
    softplus = [math.log1p(math.exp(x)) for x in (0.5, -1.0, 2.0)]
    expected = 2 * softplus[0] + 3 * (softplus[2] - 2.0)
    assert_close(losses.binary_cross_entropy(logits, label, weight=weight).item(), expected)
    teacher = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 2, 1, 1)
    q = math.e / (math.e + 1)
    p = math.exp(0.5) / (math.exp(0.5) + math.exp(-1.0))
    only_first = losses.distillation(logits, teacher, weight=torch.tensor([1.0, 0.0]))
    assert_close(only_first.item(), -q * math.log(p) / 2)
    whole = math.exp(0.5) + math.exp(-1.0) + math.exp(2.0)
    background = (math.exp(0.5) + math.exp(2.0)) / whole
    unbiased = losses.unbiased_distillation(logits, teacher, weight=torch.tensor([1.0, 0.0]))
    assert_close(unbiased.item(), -q * math.log(background) / 2)
