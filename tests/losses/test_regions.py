"""Losses of regions against the same losses of logits at every pixel."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from everseg import losses
from everseg.losses import regions as ours


def case(seed: int = 0, number: int = 4, outputs: int = 5, size=(9, 7)):
    """Logits of regions, a map with pixels of no region, labels with ignored pixels, and the logits of every pixel."""
    torch.manual_seed(seed)
    logits = 3 * torch.randn(2, number, outputs, dtype=torch.float64)
    regions = torch.randint(0, number + 1, (2, *size))
    regions[regions == number] = 255
    label = torch.randint(0, outputs, (2, *size))
    label[torch.rand(label.shape) < 0.2] = 255
    return logits.requires_grad_(), regions, label


def everywhere(logits: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W), pixel by pixel."""
    images = []
    for values, places in zip(logits, regions, strict=True):
        rows = [[values[int(n)] if int(n) < len(values) else 0 * values[0] for n in row] for row in places]
        images.append(torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1))
    return torch.stack(images)


@pytest.mark.parametrize("seed", [0, 1])
def test_cross_entropy_is_that_of_every_pixel(seed):
    logits, regions, label = case(seed)
    found = ours.region_binary_cross_entropy(logits, regions, label)
    wanted = losses.binary_cross_entropy(everywhere(logits, regions), label, over="valid")
    assert_close(found, wanted, rtol=1e-13, atol=0)
    a, b = (torch.autograd.grad(value, logits)[0] for value in (found, wanted))
    assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_cross_entropy_of_nothing_is_nothing():
    logits, regions, label = case()
    value = ours.region_binary_cross_entropy(logits, regions, torch.full_like(label, 255))
    value.backward()
    assert value.item() == 0
    assert not logits.grad.any()
    none = ours.region_binary_cross_entropy(logits, torch.full_like(regions, 255), label)
    assert none.item() == pytest.approx(5 * 0.6931471805599453)  # five sigmoids of 0


@pytest.mark.parametrize("num_open", [1, 2])
def test_completed_labels_are_those_of_every_pixel(num_open):
    logits, regions, label = case(3)
    given = {"num_classes": 6, "threshold": 0.8, "num_open": num_open}
    found = ours.completed_by_regions(logits, regions, label, **given)
    wanted = losses.completed_labels(everywhere(logits.detach(), regions), label, **given)
    assert found.equal(wanted)
    assert not found.equal(label)


def test_clusters_are_kept_apart_as_maps_of_pixels_would_be():
    logits, regions, _ = case(4, outputs=3)
    found = ours.cluster_separation(logits, regions)
    maps = torch.nn.functional.normalize(everywhere(logits, regions).flatten(2), dim=2)
    wanted = torch.stack(
        [
            -torch.stack([(m[u] * m[v].detach()).sum() for v in range(3)]).log_softmax(0)[u]
            for m in maps
            for u in range(3)
        ]
    ).mean()
    assert_close(found, wanted, rtol=1e-12, atol=0)
    a, b = (torch.autograd.grad(value, logits)[0] for value in (found, wanted))
    assert_close(a, b, rtol=1e-10, atol=1e-14)
    flat = torch.zeros(1, 2, 3, requires_grad=True)
    ours.cluster_separation(flat, torch.zeros(1, 2, 2).long()).backward()
    assert flat.grad.isfinite().all()


def test_pixels_without_region_are_background():
    logits, regions, _ = case(5)
    found = ours.region_ids(logits, regions)
    wanted = everywhere(logits.detach(), regions).argmax(1)
    assert found.tolist() == torch.where(regions == 255, 0, wanted).tolist()


def test_shapes_that_do_not_fit_are_refused():
    logits, regions, label = case()
    with pytest.raises(ValueError, match="regions"):
        ours.region_binary_cross_entropy(logits[0], regions, label)
    with pytest.raises(ValueError, match="whole numbers"):
        ours.cluster_separation(logits, regions[:1])
    with pytest.raises(ValueError, match="open"):
        ours.completed_by_regions(logits, regions, label, num_classes=6, threshold=0.5, num_open=0)
