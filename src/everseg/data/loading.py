"""Turns views of splits into batches (floor 2).

The order is a pure function of (seed, step, epoch), the augmentation of (seed, step, epoch, sample id), and every
process takes its slice of one global order: workers, ranks and restarts never change which pixels are seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from everseg.config import DataConfig
from everseg.data.base import Split
from everseg.data.transforms import center_transform, sample_rng, train_transform, whole_transform
from everseg.errors import DataError, EversegError


@dataclass(frozen=True)
class View:
    """Some samples of a split, with the table raw id -> train id they are seen through."""

    split: Split
    indices: np.ndarray
    lut: np.ndarray


@dataclass
class Loaded:
    """A batch as the workers made it: bytes, not yet normalised."""

    image: Tensor
    """(B, 3, H, W) uint8."""
    label: Tensor
    """(B, H, W) uint8 train ids."""
    ids: tuple[str, ...]


def epoch_order(seed: int, step: int, epoch: int, count: int) -> np.ndarray:
    """Permutation of `count` samples; a pure function of its arguments."""
    digest = hashlib.blake2b(f"order:{seed}:{step}:{epoch}".encode(), digest_size=4).digest()
    return np.random.RandomState(int.from_bytes(digest, "big")).permutation(count)


def batches_per_epoch(count: int, batch: int) -> int:
    """Whole batches in an epoch; a list shorter than one batch makes one smaller batch."""
    return max(1, count // batch)


class _Samples(Dataset):
    """Map-style access by (epoch, position); epoch None means no augmentation."""

    def __init__(self, views: Sequence[View], data: DataConfig, seed: int, step: int) -> None:
        self.views = views
        self.data = data
        self.seed = seed
        self.step = step
        self.starts = np.cumsum([0, *(len(view.indices) for view in views)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, key: tuple[int | None, int]) -> Any:
        epoch, position = key
        which = int(np.searchsorted(self.starts, position, side="right")) - 1
        view = self.views[which]
        index = int(view.indices[position - self.starts[which]])
        try:
            return self._sample(view, index, epoch)
        except EversegError as error:  # travels to the main process as a value: no worker traceback
            return error

    def _sample(self, view: View, index: int, epoch: int | None) -> tuple[np.ndarray, np.ndarray, str]:
        sample_id = view.split.id(index)
        image, label = view.split.read(index)
        if image.dtype != np.uint8 or label.dtype != np.uint8:
            raise DataError(
                f"{sample_id}: images and masks must be uint8, got {image.dtype} and {label.dtype}"
            )
        data = self.data
        if epoch is not None:
            rng = sample_rng(self.seed, self.step, epoch, sample_id)
            image, label = train_transform(
                image, label, crop=data.crop, scale=data.scale, flip=data.flip, rng=rng
            )
        elif data.evaluation == "crop":
            image, label = center_transform(image, label, crop=data.crop)
        else:
            image, label = whole_transform(image, label)
        return image, view.lut[label], sample_id


def _collate(samples: list[Any]) -> Loaded | EversegError:
    for sample in samples:
        if isinstance(sample, EversegError):
            return sample
    images, labels, ids = zip(*samples, strict=True)
    shapes = {label.shape for label in labels}
    if len(shapes) > 1:
        return DataError(
            f"images of one batch differ in size: {dict(zip(ids, map(np.shape, labels), strict=True))}"
        )
    return Loaded(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels)), ids)


def _loader(
    samples: _Samples, batches: list[list[tuple[int | None, int]]], workers: int, pin: bool
) -> Iterator[Loaded]:
    loader = DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=min(workers, len(batches)),
        collate_fn=_collate,
        pin_memory=pin,
        timeout=300 if workers else 0,
    )
    iterator = iter(loader)
    while True:
        try:
            loaded = next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            raise DataError(
                f"a loader process stopped or hung ({str(error).splitlines()[0]}); "
                "run again with data.workers=0, or with fewer workers if memory is short"
            ) from error
        if isinstance(loaded, EversegError):
            raise loaded
        yield loaded


def train_batches(
    views: Sequence[View],
    data: DataConfig,
    *,
    seed: int,
    step: int,
    batch: int,
    start: int,
    stop: int,
    rank: int = 0,
    world: int = 1,
    pin: bool = False,
) -> Iterator[Loaded]:
    """Augmented batches of iterations start..stop-1 of a step, this process's share of each.

    Args:
        batch: images per iteration over all processes.

    Raises:
        DataError: a sample cannot be read; fewer images than processes.
    """
    samples = _Samples(views, data, seed, step)
    count = len(samples)
    size = min(batch, count)
    if size % world:
        size -= size % world
    if size == 0:
        raise DataError(
            f"step {step} has {count} images, fewer than the {world} processes that share each batch"
        )
    per_epoch = batches_per_epoch(count, batch)
    plan: list[list[tuple[int | None, int]]] = []
    order, order_epoch = np.empty(0, int), -1
    for iteration in range(start, stop):
        epoch, slot = divmod(iteration, per_epoch)
        if epoch != order_epoch:
            order, order_epoch = epoch_order(seed, step, epoch, count), epoch
        chosen = order[slot * size : (slot + 1) * size][rank * size // world : (rank + 1) * size // world]
        plan.append([(epoch, int(position)) for position in chosen])
    return _loader(samples, plan, data.workers, pin) if plan else iter(())


def plain_batches(
    views: Sequence[View],
    data: DataConfig,
    *,
    batch: int,
    rank: int = 0,
    world: int = 1,
    pin: bool = False,
) -> Iterator[Loaded]:
    """Every sample exactly once over all processes, without augmentation; batches of one where sizes may differ."""
    samples = _Samples(views, data, 0, 0)
    size = batch if data.evaluation == "crop" else 1
    mine = range(rank, len(samples), world)
    plan: list[list[tuple[int | None, int]]] = [
        [(None, position) for position in mine[i : i + size]] for i in range(0, len(mine), size)
    ]
    return _loader(samples, plan, data.workers, pin) if plan else iter(())
