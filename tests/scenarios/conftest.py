"""A small data set of pixel counts whose scenarios can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from everseg.data.base import Dataset
from everseg.labels import RawLabels

LABELS = RawLabels({0: "background", 1: "cat", 2: "cow", 3: "dog", 4: "sheep"})
TRAIN = [
    {0: 9, 1: 3},  # 0: first step only
    {0: 5, 1: 2, 3: 5},  # 1: first and second
    {0: 5, 3: 7},  # 2: second only
    {0: 12},  # 3: background only
    {0: 1, 2: 6, 255: 5},  # 4: first only, with void
    {0: 2, 3: 4, 4: 6},  # 5: second and third
    {4: 12},  # 6: third only
    {0: 5, 1: 1, 4: 6},  # 7: first and third
]
VAL = [{0: 6, 1: 6}, {0: 6, 4: 6}, {0: 12}, {3: 12}, {2: 5, 3: 7}]
GROUPS = ((1, 2), (3,), (4,))


def counts_of(images):
    table = np.zeros((len(images), 256), np.int64)
    for row, image in enumerate(images):
        for raw, pixels in image.items():
            table[row, raw] = pixels
    return table


class FakeSplit:
    """Ids only: no test here decodes an image."""

    def __init__(self, name, length):
        self.name, self.length = name, length

    def __len__(self):
        return self.length

    def id(self, index):
        return f"{self.name}/{index:03d}"


@pytest.fixture
def fake_split():
    return FakeSplit


@pytest.fixture
def counts():
    return {"train": counts_of(TRAIN), "val": counts_of(VAL)}


@pytest.fixture
def dataset():
    splits = {"train": FakeSplit("train", len(TRAIN)), "val": FakeSplit("val", len(VAL))}
    return Dataset("farm", LABELS, splits)


@pytest.fixture
def groups():
    return GROUPS


@pytest.fixture
def random_counts():
    """60 images with 12 classes at random, some with background or void only."""
    rng = np.random.default_rng(3)
    table = np.zeros((60, 256), np.int64)
    table[:, :13] = rng.integers(1, 50, (60, 13)) * (rng.random((60, 13)) < 0.15)
    table[:, 0] += 100
    table[:, 255] = rng.integers(0, 3, 60)
    return table
