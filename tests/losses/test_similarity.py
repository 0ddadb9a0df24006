"""REMINDER's parts against loops over pixels, and at their edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from everseg import losses


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize(
    ("small", "size"), [((4, 3), (16, 10)), ((5, 5), (5, 5)), ((1, 1), (6, 7)), ((9, 8), (4, 3))]
)
@pytest.mark.parametrize("first", [0, 2, 4])
def test_class_sums_are_those_of_the_resized_features(align, small, size, first, monkeypatch):
    monkeypatch.setattr("everseg.losses.similarity._BAND_BYTES", 400)  # several bands
    torch.manual_seed(0)
    features = torch.randn(2, 3, *small, dtype=torch.float64)
    label = torch.randint(0, 4, (2, *size))
    label[:, 0] = 255
    sums, pixels = losses.class_sums(features, label, 4, first=first, align_corners=align)
    full = F.interpolate(features, size, mode="bilinear", align_corners=align)
    for c in range(4):
        here = label == c if c >= first else torch.zeros_like(label, dtype=torch.bool)
        assert pixels[c] == here.sum()
        assert_close(sums[c], full.movedim(1, 3)[here].sum(dim=0))


def test_class_similarity_agrees_with_a_loop():
    rng = np.random.default_rng(0)
    new, old = rng.normal(size=(3, 4)), rng.normal(size=(5, 4))
    old[2] = 0
    for delta in (0.0, 0.9, 1.0, 1.05):
        found = losses.class_similarity(torch.from_numpy(new), torch.from_numpy(old), delta=delta)
        for i, p in enumerate(new):
            powers = [
                math.exp(float(p @ q) / (np.linalg.norm(p) * np.linalg.norm(q)) if q.any() else 0.0)
                for q in old
            ]
            shares = [power / sum(powers) for power in powers]
            assert found[i].tolist() == pytest.approx([s if s >= delta / 5 else 0.0 for s in shares])


def test_similarity_distillation_agrees_with_a_loop():
    torch.manual_seed(0)
    x, t = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(2, 3, 3, 4, dtype=torch.float64)
    label = torch.randint(0, 5, (2, 3, 4))
    label[0, 0, 0] = 255
    similarity = torch.rand(5, 3, dtype=torch.float64)
    found = losses.similarity_distillation(
        x, label, t, similarity=similarity, temperature=2.0, reduction="none"
    )
    values = []
    for b, row, column in np.ndindex(2, 3, 4):
        y = int(label[b, row, column])
        if not 3 <= y < 255:
            assert found[b, row, column] == 0
            continue
        q = np.exp(t[b, :, row, column].numpy() / 2)
        p = np.exp(x[b, :3, row, column].numpy() / 2)
        target = q / q.sum() * similarity[y].numpy() + 1e-7
        values.append(-4 * float((target * np.log(p / p.sum())).sum()))
        assert found[b, row, column].item() == pytest.approx(values[-1])
    mean = losses.similarity_distillation(x, label, t, similarity=similarity, temperature=2.0)
    assert mean.item() == pytest.approx(np.mean(values))


def test_without_a_new_pixel_it_is_zero_or_what_is_asked_for():
    x = torch.zeros(1, 3, 2, 2, requires_grad=True)
    label = torch.tensor([[[0, 1], [255, 0]]])
    options = {"similarity": torch.ones(3, 2)}
    value = losses.similarity_distillation(x, label, x[:, :2], **options)
    value.backward()
    assert value.item() == 0
    assert x.grad.abs().max() == 0
    assert losses.similarity_distillation(x, label, x[:, :2], empty=math.nan, **options).isnan()


def test_bad_input_is_named():
    x, label = torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2).long()
    with pytest.raises(ValueError, match=r"expected similarities \(3, 2\)"):
        losses.similarity_distillation(x, label, x[:, :2], similarity=torch.ones(2, 2))
    with pytest.raises(ValueError, match="temperature"):
        losses.similarity_distillation(x, label, x[:, :2], similarity=torch.ones(3, 2), temperature=0)
    with pytest.raises(ValueError, match="expected prototypes"):
        losses.class_similarity(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="expected features"):
        losses.class_sums(x, label[0], 3)
