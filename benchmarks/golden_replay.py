"""What the files of MiB's network share: images, generated weights, names of tensors, and how differences are counted.

`golden_runs` trains the stored runs again.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everseg.config.fields import TrainConfig
from everseg.interop import mib
from everseg.labels import LabelSpace
from everseg.models.model import SegmentationModel
from everseg.scenarios.steps import Source, Step
from everseg.types import Batch

BRANCH = "default"
BATCH = 2
GROWTH = {"tiny": (4, 2), "tiny3": (4, 1, 1), "wide": (4, 2)}
"""Outputs added per step of each task."""
SEEDS = (777, 782, 783, *range(100_000))
"""Seeds of the value generator that are tried, the known ones first."""
RATES = TrainConfig(lr=0.01, lr_next=0.001)


@dataclass
class Comparison:
    """How many values were compared, and their largest relative difference."""

    count: int = 0
    largest: float = 0.0


def difference(ours: Any, theirs: Any, scale: Any = None) -> float:
    """Largest |ours - theirs| / scale; the default scale is |theirs|, element by element. 0 / 0 counts as 0."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"shapes differ: {ours.shape} here, {theirs.shape} in the file")
    scale = np.abs(theirs) if scale is None else np.asarray(scale, np.float64)
    gap = np.abs(ours - theirs)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(gap == 0, 0.0, gap / scale)
    return float(np.where(np.isnan(relative), np.inf, relative).max(initial=0.0))


def steps_of(growth: Iterable[int]) -> list[Step]:
    """Steps of one branch that each add so many outputs (0: the same classes on other images)."""
    groups: list[tuple[int, ...]] = []
    steps = []
    for index, size in enumerate(growth):
        first = sum(len(group) for group in groups)
        groups += [tuple(range(first, first + size))] if size else []
        names = tuple(f"class {i}" for i in range(first + size))
        source = Source(BRANCH, "golden", "train", (), bytes(range(256)))
        steps.append(Step(index, (source,), (), {BRANCH: LabelSpace(tuple(groups), names)}, {BRANCH: size}))
    return steps


def step_batches(common: Any, task: str, step: int, order: np.ndarray) -> list[Batch]:
    at = f"{'tiny' if task == 'tiny3' and step == 0 else task}/step{step}/train/"
    if at + "image_seed_shape" in common.files:
        seed, *shape = common[at + "image_seed_shape"].tolist()
        images = 0.5 * generated_image(tuple(shape), seed)
    else:
        images = common[at + "images"]
    labels = common[at + "labels"]
    chunks = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    return [
        Batch(torch.from_numpy(images[c]).double(), torch.from_numpy(labels[c]).long(), BRANCH)
        for c in chunks
    ]


def generated_image(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The files' deterministic images: 64 levels in [-63/32, 63/32]."""
    levels = np.random.RandomState(seed).randint(0, 64, size=shape)
    return ((2 * levels - 63) / 32.0).astype(np.float32)


def generated_weight(name: str, shape: tuple[int, ...], seed: int, gain: float = 1.0) -> np.ndarray:
    """The files' deterministic weights and statistics: 16 levels, exact in float32; `gain` is of the kernels."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    rng = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()) & 0x7FFFFFFF)
    leaf = name.rsplit(".", 1)[-1]
    level = rng.randint(0, 16, size=shape)
    if len(shape) >= 2:
        bound = 2.0 ** np.round(np.log2(np.sqrt(6.0 / int(np.prod(shape[1:])))))
        value = (2 * level - 15) / 16.0 * bound * gain
    elif leaf == "running_var":
        value = 0.5 + level / 8.0
    elif leaf == "weight":  # of a norm, about one in eight negative
        value = 0.5 + level / 16.0
        value = np.where(rng.randint(0, 8, size=shape) == 0, -value, value)
    else:
        value = (2 * level - 15) / 64.0
    return np.asarray(value, np.float32)


def epoch_order(images: int, epoch: int = 0) -> np.ndarray:
    """The order of the images in an epoch: the files' loaders are seeded by the epoch's number."""
    return torch.randperm(images, generator=torch.Generator().manual_seed(epoch)).numpy()


def first_seed(stored: Mapping[str, np.ndarray]) -> int:
    """Seed of the generator that gave a first classifier its values, which the files do not name.

    Args:
        stored: "cls.0.weight" and "cls.0.bias" as the file holds them, under names with or without "module.".

    Raises:
        ValueError: no seed that is tried gives these values.
    """
    given = {name.removeprefix("module."): value for name, value in stored.items()}
    wanted = {name: given[name] for name in ("cls.0.bias", "cls.0.weight") if name in given}
    for seed in SEEDS if wanted else ():
        if all(np.array_equal(generated_weight(n, v.shape, seed), v) for n, v in wanted.items()):
            return seed
    raise ValueError(f"no seed below {SEEDS[-1]} generates the first classifier of the file")


def original_names(model: SegmentationModel, prefix: str = "module.") -> dict[str, str]:
    """Our name of a weight or buffer -> the original's; counters, which it does not have, are left out."""
    own = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    return dict(zip(own, mib.dump(model, prefix), strict=True))


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
