"""Measuring what the images of domains look like: how many images, and over processes."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from everseg.data.batches.samples import View
from everseg.engine import domain_measures
from everseg.models.domain_statistics import MOST_IMAGES


@pytest.mark.parametrize("shares", [(5, 3), (8, 0), (0, 8)])
def test_processes_find_the_statistics_of_all_images(shares, monkeypatch):
    features = torch.randn(sum(shares), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = features.split(list(shares))
    barrier, given, found = threading.Barrier(2), [None, None], [None, None]

    def exchanged(rank, value, combined):
        given[rank] = value
        barrier.wait()
        result = combined(given)
        barrier.wait()
        return result

    monkeypatch.setattr(
        domain_measures,
        "all_reduce_sum",
        lambda one: lambda value: exchanged(one.rank, value, lambda two: two[0] + two[1]),
    )
    monkeypatch.setattr(domain_measures, "all_reduce_max", lambda value, one: exchanged(one.rank, value, max))

    def process(rank):
        one = SimpleNamespace(rank=rank, num_processes=2, device=torch.device("cpu"))
        found[rank] = domain_measures._statistics([parts[rank]] if len(parts[rank]) else [], one)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for one in found:
        assert one.count == 8
        np.testing.assert_allclose(one.mean, features.mean(0))
        np.testing.assert_allclose(one.covariance, np.cov(features.numpy().T, bias=True))


def test_of_many_images_some_are_measured_at_even_distances():
    def view(first: int, count: int, branch: str = "day") -> View:
        return View(None, np.arange(first, first + count), np.zeros(1), branch)

    few = [view(0, 3), view(10, 4, "dusk"), view(50, 5)]
    assert domain_measures._some(few, "day") == [few[0], few[2]]
    many = domain_measures._some([view(0, MOST_IMAGES), view(5000, 1), view(7000, MOST_IMAGES + 1)], "day")
    kept = np.concatenate([one.indices for one in many])
    assert len(kept) == len(set(kept.tolist())) == MOST_IMAGES
    every = np.concatenate([np.arange(MOST_IMAGES), [5000], np.arange(7000, 7001 + MOST_IMAGES)])
    assert kept.tolist() == every[np.arange(MOST_IMAGES) * len(every) // MOST_IMAGES].tolist()
