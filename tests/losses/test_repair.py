"""STAR's statistics, drawn features and feature losses against numpy, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from everseg.losses.prototypes import label_at
from everseg.losses.repair import (
    Moments,
    class_shares,
    drawn_features,
    masked_feature_distillation,
    prototype_contrast,
)


def drawn(seed=0, *, batch=2, depth=4, height=3, width=5, classes=4):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((batch, depth, height, width))
    label = rng.integers(0, classes, (batch, height, width))
    label[0, 0, 0] = 255
    return features, label


def vectors(features, label, wanted):
    return np.array(
        [features[b, :, i, j] for b, i, j in np.ndindex(*label.shape) if label[b, i, j] == wanted]
    )


def test_moments_are_those_of_each_class_whatever_the_batches():
    (f, y), (g, z) = drawn(), drawn(1)
    moments = sum(
        (Moments.of(torch.from_numpy(a), torch.from_numpy(b), 5) for a, b in ((g, z), (f, y))),
        start=Moments(torch.zeros(5, 11, dtype=torch.float64)),
    )
    rows, (mean, deviation) = moments.prototypes(), moments.norms()
    others = torch.nn.functional.normalize(torch.randn(5, 4, dtype=torch.float64), dim=1)
    for c in range(4):
        every = np.concatenate([vectors(f, y, c), vectors(g, z, c)])
        norms = np.linalg.norm(every, axis=1)
        directions = every / norms[:, None]
        centre = directions.sum(axis=0) / np.linalg.norm(directions.sum(axis=0))
        assert moments.count[c] == len(every)
        assert_close(rows[c], torch.from_numpy(centre))
        assert mean[c].item() == pytest.approx(norms.mean(), rel=1e-12)
        assert deviation[c].item() == pytest.approx(norms.std(ddof=1), rel=1e-9)
        for at in (rows, others):
            expected = np.sqrt(((directions - at[c].numpy()) ** 2).mean(axis=0))
            assert_close(moments.noise(at)[c], torch.from_numpy(expected))
    for absent in (moments.count[4], mean[4], deviation[4], rows[4].norm(), moments.noise(rows)[4].norm()):
        assert absent == 0


def test_a_class_of_one_pixel_has_no_deviation_and_a_feature_of_zeros_no_direction():
    features = torch.zeros(1, 2, 1, 2)
    features[0, :, 0, 0] = torch.tensor([3.0, 4.0])
    moments = Moments.of(features, torch.tensor([[[0, 1]]]), 2)
    assert_close(moments.prototypes(), torch.tensor([[0.6, 0.8], [0.0, 0.0]], dtype=torch.float64))
    mean, deviation = moments.norms()
    assert mean.tolist() == [5.0, 0.0]
    assert deviation.tolist() == [0.0, 0.0]


def test_drawn_features_have_the_moments_they_are_made_from():
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.rand(2, 3, dtype=torch.float64), dim=1)
    noise, mean, deviation = (
        0.1 * torch.rand(2, 3, dtype=torch.float64),
        torch.tensor([5.0, 9.0]),
        torch.ones(2),
    )
    found = drawn_features(torch.ones(40000).long(), rows, noise, mean.double(), deviation.double())
    assert found.shape == (1, 3, 40000, 1)
    # the product of two independent normals: mean p m, variance (p^2 + s^2)(m^2 + v^2) - p^2 m^2
    expected = ((rows[1] ** 2 + noise[1] ** 2) * (81 + 1) - rows[1] ** 2 * 81).sqrt()
    assert_close(found[0, :, :, 0].mean(dim=1), 9 * rows[1], rtol=0, atol=0.05)
    assert_close(found[0, :, :, 0].std(dim=1), expected, rtol=0.03, atol=0)
    assert drawn_features(torch.zeros(0).long(), rows, noise, mean, deviation).shape == (1, 3, 0, 1)


def test_masked_distillation_by_hand_and_with_an_empty_mask():
    (f, _), (g, _) = drawn(), drawn(1)
    mask = np.random.default_rng(2).random((2, 3, 5)) * (np.random.default_rng(3).random((2, 3, 5)) > 0.5)
    total = sum(
        mask[b, i, j] * ((f[b, :, i, j] - g[b, :, i, j]) ** 2).sum() for b, i, j in np.ndindex(*mask.shape)
    )
    x, teacher = torch.from_numpy(f).requires_grad_(), torch.from_numpy(g).requires_grad_()
    found = masked_feature_distillation(x, teacher, torch.from_numpy(mask))
    assert found.item() == pytest.approx(total / mask.sum() / 4, rel=1e-12)
    found.backward()
    assert teacher.grad is None
    x.grad = None
    empty = masked_feature_distillation(x, teacher, torch.zeros(2, 3, 5))
    empty.backward()
    assert empty.item() == 0
    assert (x.grad == 0).all()


def test_contrast_by_hand_and_its_gradient():
    f, y = drawn()
    rng = np.random.default_rng(4)
    rows = rng.standard_normal((3, 4))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    masks = np.stack([(y == 1) * rng.random(y.shape), y == 2, y == 9], axis=1).astype(float)
    inverse = []
    for n in range(3):
        centre = np.zeros(4)
        for b, i, j in np.ndindex(*y.shape):
            centre += masks[b, n, i, j] * f[b, :, i, j] / np.linalg.norm(f[b, :, i, j])
        centre /= np.linalg.norm(centre) or 1.0
        inverse.append(1 / min(np.linalg.norm(centre - row) for row in rows))
    assert inverse[2] == pytest.approx(1)  # the batch holds none of the class
    x = torch.from_numpy(f).requires_grad_()
    found = prototype_contrast(x, torch.from_numpy(masks), torch.from_numpy(rows))
    assert found.item() == pytest.approx(np.mean(inverse), rel=1e-12)
    call = lambda x: prototype_contrast(x, torch.from_numpy(masks[:, :2]), torch.from_numpy(rows))  # noqa: E731
    assert torch.autograd.gradcheck(call, (x,))


def test_an_old_class_without_prototype_pushes_nothing():
    f, _ = drawn()
    x, rows = torch.from_numpy(f), torch.eye(4, dtype=torch.float64)[:2]
    masks = torch.ones(2, 1, 3, 5, dtype=torch.float64)
    more = torch.cat([rows, torch.zeros(1, 4)])
    assert torch.equal(prototype_contrast(x, masks, more), prototype_contrast(x, masks, rows))
    x.requires_grad_()
    none = prototype_contrast(x, masks, torch.zeros(2, 4))
    none.backward()
    assert none.item() == 0
    assert (x.grad == 0).all()


def test_contrast_of_a_centre_on_a_prototype_is_finite():
    rows = torch.eye(2)
    x = rows[0].view(1, 2, 1, 1).clone().requires_grad_()
    found = prototype_contrast(x, torch.ones(1, 1, 1, 1), rows)
    found.backward()
    assert found.isfinite()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("size", [(10, 8), (7, 13), (1, 1), (3, 20), (40, 6)])
def test_class_shares_are_torchs_resized_masks(size):
    label = torch.randint(0, 4, (2, 20, 16))
    label[0, :4] = 255
    masks = torch.stack([label == c for c in (1, 2, 3)], dim=1).double()
    expected = torch.nn.functional.interpolate(masks, size, mode="bilinear")
    assert_close(class_shares(label, size, 1, 4), expected, rtol=1e-12, atol=1e-12)
    assert class_shares(label, size, 4, 4).shape == (2, 0, *size)


def test_centred_labels_are_those_in_the_middle_of_each_cell():
    label = torch.arange(160).expand(1, 160, 160)
    assert label_at(label, (10, 10), centred=True)[0, 0].tolist() == list(range(8, 160, 16))
    assert label_at(label, (10, 10))[0, 0].tolist() == list(range(0, 160, 16))


def test_shapes_that_do_not_fit_are_refused():
    x = torch.zeros(2, 4, 3, 5)
    with pytest.raises(ValueError, match=r"2, 4, 3, 5.*2, 3, 3, 5"):
        masked_feature_distillation(x, x[:, :3], torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"2, 1, 3, 5"):
        masked_feature_distillation(x, x, torch.zeros(2, 1, 3, 5))
    with pytest.raises(ValueError, match=r"3, 5\)"):
        prototype_contrast(x, torch.zeros(2, 1, 3, 5), torch.zeros(3, 5))
