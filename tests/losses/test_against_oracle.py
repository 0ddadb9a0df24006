"""Every loss against the slow oracle, its gradient against finite differences, and the hard inputs."""

from __future__ import annotations

from functools import partial

import loss_oracle as oracle
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from everseg import losses

C, K = 5, 3
WITH_LABEL = {
    "cross_entropy": {},
    "unbiased_cross_entropy": {"num_old": K},
    "replayed_cross_entropy": {"num_old": K},
    "binary_cross_entropy": {},
    "binary_cross_entropy new": {"first": 1},
    "binary_cross_entropy rare": {"pos_weight": 35.0},
    "binary_cross_entropy dkd": {"pos_weight": 2.0, "first": 1, "unlabelled": "negative"},
    "focal": {},
}
WITH_TEACHER = {
    "distillation": {},
    "distillation alpha": {"alpha": 2.5},
    "unbiased_distillation": {},
    "unbiased_distillation alpha": {"alpha": 2.5},
    "icarl_distillation": {},
    "icarl_distillation foreground": {"first": 1},
    "kl_divergence": {},
    "kl_divergence probabilities": {"form": "probabilities"},
}
WITH_BOTH = {"icarl": {}, "icarl background": {"background_from_label": True}, "moved_distillation": {}}
WITH_VOID = {"replayed_cross_entropy void": {"num_old": K, "void": "background"}}
"""Losses with a label in which ignored pixels count."""
ALONE = {"binary_negatives": {}, "binary_negatives one": {"first": 1, "last": 2}}
LEAVES_OUT = [name for name, options in WITH_LABEL.items() if "unlabelled" not in options]
ALL = [*WITH_LABEL, *WITH_VOID, *WITH_TEACHER, *WITH_BOTH, *ALONE]


def case(name, *, seed=0, classes=C, num_old=K, shape=(2, 3, 4), scale=3.0, dtype=torch.float64):
    """Give (loss of logits, the same as per-pixel oracle, logits) on random tensors, some pixels ignored."""
    rng = np.random.default_rng(seed)
    batch, height, width = shape
    x = scale * rng.standard_normal((batch, classes, height, width))
    known = classes if name.startswith("kl_") else num_old
    t = scale * rng.standard_normal((batch, known, height, width))
    y = rng.integers(0, classes + 1, (batch, height, width))
    y[y == classes] = 255
    key = name.split()[0]
    kwargs = dict((WITH_LABEL | WITH_VOID | WITH_TEACHER | WITH_BOTH | ALONE)[name])
    if "num_old" in kwargs:
        kwargs["num_old"] = num_old
    labelled = name in WITH_LABEL | WITH_VOID
    others = () if name in ALONE else (y,) if labelled else (t,) if name in WITH_TEACHER else (y, t)
    tensors = [torch.from_numpy(o) for o in others]
    tensors = [o.to(dtype) if o.is_floating_point() else o for o in tensors]
    loss = lambda logits, **more: getattr(losses, key)(logits, *tensors, **kwargs, **more)  # noqa: E731
    slow = partial(oracle.per_pixel, getattr(oracle, key), x, *others, **kwargs)
    return loss, slow, torch.from_numpy(x).to(dtype)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_equals_the_pixel_by_pixel_oracle(name, data):
    classes = data.draw(st.integers(2, 7))
    loss, slow, logits = case(
        name,
        seed=data.draw(st.integers(0, 10**6)),
        classes=classes,
        num_old=data.draw(st.integers(1, classes - 1)),
        shape=tuple(data.draw(st.integers(1, 3)) for _ in range(3)),
        scale=data.draw(st.sampled_from([0.1, 3.0, 50.0])),
    )
    expected = torch.from_numpy(slow())
    assert_close(loss(logits, reduction="none"), expected, rtol=1e-11, atol=1e-11)
    assert_close(loss(logits, reduction="sum"), expected.sum(), rtol=1e-11, atol=1e-11)
    assert_close(loss(logits), expected.mean(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", WITH_LABEL)
def test_over_valid_divides_by_the_pixels_that_are_not_ignored(name):
    loss, slow, logits = case(name, seed=3)
    rng = np.random.default_rng(3)  # the same draws as in `case`
    rng.standard_normal((2, C, 3, 4)), rng.standard_normal((2, K, 3, 4))
    valid = int((rng.integers(0, C + 1, (2, 3, 4)) != C).sum())
    assert 0 < valid < 24
    assert loss(logits, over="valid").item() == pytest.approx(slow().sum() / valid, rel=1e-12)


@pytest.mark.parametrize("over", ["all", "valid"])
@pytest.mark.parametrize(
    ("name", "options"), [("cross_entropy", {}), ("unbiased_cross_entropy", {"num_old": K})]
)
def test_class_weights_multiply_and_normalise_only_the_valid_mean(name, options, over):
    rng = np.random.default_rng(1)
    x, weight = rng.standard_normal((2, C, 3, 4)), np.array([0.5, 2.0, 0.25, 0.0, 3.0])
    y = rng.integers(0, C, (2, 3, 4))
    y[0, 0] = 255
    slow = oracle.per_pixel(getattr(oracle, name), x, y, weight=weight, **options)
    seen = np.where(y < K, 0, y) if options else y  # the unbiased form weighs what the label stands for
    divisor = y.size if over == "all" else weight[seen[y != 255]].sum()
    fast = getattr(losses, name)(
        torch.from_numpy(x), torch.from_numpy(y), weight=torch.from_numpy(weight), over=over, **options
    )
    assert fast.item() == pytest.approx(slow.sum() / divisor, rel=1e-12)


@pytest.mark.parametrize("name", ["cross_entropy", "unbiased_cross_entropy", "binary_cross_entropy"])
@pytest.mark.parametrize("over", ["all", "valid"])
def test_class_weights_of_one_change_nothing(name, over):
    logits = 30 * torch.randn(2, C, 3, 4, dtype=torch.float64)
    label = torch.randint(0, C, (2, 3, 4))
    label[0, 0] = 255
    loss = partial(getattr(losses, name), logits, label, over=over, **WITH_LABEL[name])
    assert_close(loss(weight=torch.ones(C)), loss(), rtol=1e-15, atol=0)


def test_weights_of_the_unbiased_form_follow_the_merged_classes():
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    y = torch.tensor([[[0, 1], [2, 255]]])
    weight = torch.tensor([2.0, 100.0, 5.0, 7.0], dtype=torch.float64)
    plain = losses.unbiased_cross_entropy(x, y, num_old=2, reduction="none")
    weighted = losses.unbiased_cross_entropy(x, y, num_old=2, weight=weight, reduction="none")
    assert_close(weighted, plain * torch.tensor([[[2.0, 2.0], [5.0, 1.0]]], dtype=torch.float64))
    mean = losses.unbiased_cross_entropy(x, y, num_old=2, weight=weight, over="valid")
    assert_close(mean, weighted.sum() / (2 + 2 + 5))


@pytest.mark.parametrize("name", ALL)
def test_gradient_and_second_gradient(name):
    loss, _, logits = case(name, shape=(1, 2, 2), scale=1.5)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(loss, (logits,))
    assert torch.autograd.gradgradcheck(loss, (logits,))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_ten_thousand_give_finite_losses_and_gradients(name, dtype):
    loss, slow, logits = case(name, seed=5, dtype=dtype)
    logits = (logits.sign() * 1e4).requires_grad_()
    value = loss(logits)
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()
    expected = oracle.per_pixel(
        getattr(oracle, name.split()[0]), logits.detach().numpy(), *slow.args[2:], **slow.keywords
    )
    assert value.item() == pytest.approx(expected.mean(), rel=1e-5, abs=1e-3)


@pytest.mark.parametrize("over", ["all", "valid"])
@pytest.mark.parametrize("name", LEAVES_OUT)
def test_all_ignored_batch_gives_zero_and_zero_gradient(name, over):
    logits = torch.randn(2, C, 3, 3, requires_grad=True)
    label = torch.full((2, 3, 3), 255)
    value = getattr(losses, name.split()[0])(logits, label, over=over, **WITH_LABEL[name])
    value.backward()
    assert value.item() == 0.0
    assert logits.grad.abs().max().item() == 0.0


def test_ignored_pixels_as_negatives_are_pixels_of_an_old_class():
    logits = torch.randn(1, C, 2, 2)
    loss = partial(losses.binary_cross_entropy, logits, first=K, unlabelled="negative")
    ignored, old = (loss(torch.full((1, 2, 2), y)) for y in (255, 1))
    assert ignored > 0
    assert_close(ignored, old)


def test_all_ignored_batch_with_class_weights_is_zero():
    logits = torch.randn(1, C, 2, 2, requires_grad=True)
    value = losses.cross_entropy(logits, torch.full((1, 2, 2), 255), weight=torch.ones(C), over="valid")
    value.backward()
    assert value.item() == 0.0
    assert logits.grad.abs().max().item() == 0.0


@pytest.mark.parametrize("background_from_label", [False, True])
def test_icarl_trains_ignored_pixels_as_no_new_class(background_from_label):
    logits, teacher = torch.randn(1, C, 2, 2), torch.randn(1, K, 2, 2)
    kwargs = {"background_from_label": background_from_label}
    ignored = losses.icarl(logits, torch.full((1, 2, 2), 255), teacher, **kwargs)
    old = losses.icarl(logits, torch.full((1, 2, 2), 1), teacher, **kwargs)
    assert ignored > 0
    assert_close(ignored, old)


@pytest.mark.parametrize("name", LEAVES_OUT)
def test_one_valid_pixel_is_that_pixel(name):
    logits = torch.randn(1, C, 4, 5, dtype=torch.float64)
    label = torch.full((1, 4, 5), 255)
    label[0, 2, 3] = 4
    loss = partial(getattr(losses, name.split()[0]), **WITH_LABEL[name])
    pixel = loss(logits[:, :, 2:3, 3:4], label[:, 2:3, 3:4])
    assert_close(loss(logits, label, over="valid"), pixel)
    assert_close(loss(logits, label, over="all"), pixel / 20)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(name, dtype):
    loss, _, logits = case(name, dtype=torch.float32)
    half = logits.to(dtype).requires_grad_()
    rounded = half.detach().float().requires_grad_()
    value, expected = loss(half), loss(rounded)
    value.backward()
    expected.backward()
    assert value.dtype == torch.float32
    assert_close(value, expected, rtol=0, atol=0)
    assert half.grad.dtype == dtype
    assert_close(half.grad, rounded.grad.to(dtype), rtol=0, atol=0)
    assert_close(value, loss(logits), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ALL)
def test_autocast_does_not_lower_the_precision(name):
    loss, _, logits = case(name, dtype=torch.float32)
    expected = loss(logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(logits)
    assert_close(value, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_no_gradient_reaches_the_teacher(name):
    logits = torch.randn(1, C, 2, 2, requires_grad=True)
    teacher = torch.randn(1, C if name.startswith("kl_") else K, 2, 2, requires_grad=True)
    getattr(losses, name.split()[0])(logits, teacher, **WITH_TEACHER[name]).backward()
    assert teacher.grad is None
    assert logits.grad is not None


@pytest.mark.parametrize("name", ["distillation", "unbiased_distillation", "kl_divergence"])
def test_mask_multiplies_and_normalises_only_the_valid_mean(name):
    logits = torch.randn(1, C, 1, 4)
    teacher = torch.randn(1, C if name == "kl_divergence" else K, 1, 4)
    mask = torch.tensor([[[True, False, True, False]]])
    loss = partial(getattr(losses, name), logits, teacher)
    pixels = loss(reduction="none").flatten()
    assert_close(loss(mask=mask), (pixels[0] + pixels[2]) / 4)
    assert_close(loss(mask=mask, over="valid"), (pixels[0] + pixels[2]) / 2)
    assert_close(loss(mask=mask, reduction="sum"), pixels[0] + pixels[2])
    assert loss(mask=torch.zeros_like(mask), over="valid").item() == 0.0


def test_kl_divergence_is_zero_at_the_teacher_and_positive_elsewhere():
    teacher = 5 * torch.randn(2, C, 3, 4, dtype=torch.float64)
    same = (teacher + torch.randn(2, 1, 3, 4)).requires_grad_()  # softmax does not see a constant
    value = losses.kl_divergence(same, teacher)
    (gradient,) = torch.autograd.grad(value, same)
    assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-15)
    assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)
    other = losses.kl_divergence(torch.randn_like(teacher), teacher, reduction="none")
    assert (other > 0).all()


def test_kl_divergence_equals_torch_and_with_probabilities_torch_fed_wrongly():
    logits, teacher = torch.randn(2, 2, C, 3, 4, dtype=torch.float64)
    kl = partial(torch.nn.KLDivLoss(reduction="sum"), target=teacher.softmax(1))
    right, wrong = kl(logits.log_softmax(1)) / logits.numel(), kl(logits.softmax(1)) / logits.numel()
    assert_close(losses.kl_divergence(logits, teacher), right)
    assert_close(losses.kl_divergence(logits, teacher, form="probabilities"), wrong)
    assert wrong < 0 < right


def test_kl_divergence_of_a_teacher_sure_of_one_class_is_finite():
    teacher = torch.tensor([1e4, 0.0, -1e4]).view(1, 3, 1, 1)  # softmax is exactly 1, 0, 0
    logits = torch.tensor([0.0, 0.0, 2000.0]).view(1, 3, 1, 1).requires_grad_()
    value = losses.kl_divergence(logits, teacher)
    value.backward()
    assert_close(value.item(), 2000.0 / 3)
    assert_close(logits.grad.flatten(), torch.tensor([-1.0, 0.0, 1.0]) / 3)


def test_integer_labels_of_any_width_are_accepted():
    logits = torch.randn(1, C, 2, 2)
    label = torch.tensor([[[0, 4], [255, 2]]])
    for loss in (losses.cross_entropy, losses.binary_cross_entropy):
        expected = loss(logits, label)
        for dtype in (torch.uint8, torch.int16, torch.int32):
            assert_close(loss(logits, label.to(dtype)), expected, rtol=0, atol=0)


def test_inputs_are_left_unchanged():
    logits, label, teacher = (
        torch.randn(1, C, 2, 2),
        torch.tensor([[[0, 255], [4, 1]]]),
        torch.randn(1, K, 2, 2),
    )
    before = [t.clone() for t in (logits, label, teacher)]
    losses.unbiased_cross_entropy(logits, label, num_old=K)
    losses.binary_cross_entropy(logits, label)
    losses.icarl(logits, label, teacher)
    losses.unbiased_distillation(logits, teacher, alpha=2.0)
    for now, then in zip((logits, label, teacher), before, strict=True):
        assert torch.equal(now, then)
