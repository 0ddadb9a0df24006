"""Turns views of splits into batches (floor 2).

The order is a pure function of (seed, step, epoch, branch), the augmentation of (seed, step, epoch, sample id), and
every process takes its slice of one global order: workers, ranks and restarts never change which pixels are seen.
"""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from everseg.config import DataConfig
from everseg.data.base import Split
from everseg.data.parallel import keep_memory
from everseg.data.transforms import (
    center_transform,
    flip_and_shift,
    normalise,
    resize_transform,
    sample_rng,
    train_transform,
    whole_transform,
)
from everseg.errors import DataError, EversegError
from everseg.types import Batch


@dataclass(frozen=True)
class View:
    """Some samples of a split, with the table raw id -> train id and the branch they are seen through."""

    split: Split
    indices: np.ndarray
    lut: np.ndarray
    branch: str = "default"


@dataclass
class Loaded:
    """A batch of one branch as the workers made it: bytes, not yet normalised."""

    image: Tensor
    """(B, 3, H, W) uint8."""
    label: Tensor
    """(B, H, W) uint8 train ids."""
    ids: tuple[str, ...]
    branch: str = "default"

    def pin_memory(self) -> Loaded:
        """The same in page-locked memory; torch's loader asks for it where batches go to a GPU."""
        return replace(self, image=self.image.pin_memory(), label=self.label.pin_memory())

    def on(self, device: torch.device, normalisation: Literal["imagenet", "unit"]) -> Batch:
        """The batch on a device, as models and losses take it."""
        image = normalise(self.image.to(device, non_blocking=True), normalisation)
        return Batch(image, self.label.to(device, non_blocking=True).long(), self.branch, self.ids)


def epoch_order(seed: int, step: int, epoch: int, count: int, branch: int = 0) -> np.ndarray:
    """Permutation of the `count` samples of the step's branch number `branch`; a pure function of its arguments."""
    key = f"order:{seed}:{step}:{epoch}" + (f":{branch}" if branch else "")
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return np.random.RandomState(int.from_bytes(digest, "big")).permutation(count)


def epoch_length(counts: Collection[int], batch: int) -> int:
    """Iterations of an epoch in which the branches take turns until the shortest has no whole batch left.

    Args:
        counts: number of samples of each branch, at least one.
        batch: images per iteration.

    Returns:
        Branches * whole batches of the shortest; a branch shorter than one batch makes one smaller batch.

    Source: for several branches MDIL's multi-task training (iterations = shortest loader).

    >>> epoch_length([11], 4), epoch_length([11, 9, 30], 4), epoch_length([3], 8)
    (2, 6, 1)
    """
    return len(counts) * max(1, min(counts) // batch)


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

    def branches(self) -> dict[str, np.ndarray]:
        """Positions of each branch's samples; branches in the order in which they first stand in the views."""
        parts: dict[str, list[np.ndarray]] = {}
        for view, start, stop in zip(self.views, self.starts[:-1], self.starts[1:], strict=True):
            parts.setdefault(view.branch, []).append(np.arange(start, stop))
        return {branch: np.concatenate(positions) for branch, positions in parts.items()}

    def __getitem__(self, key: tuple[int | None, int]) -> Any:
        epoch, position = key
        which = int(np.searchsorted(self.starts, position, side="right")) - 1
        view = self.views[which]
        index = int(view.indices[position - self.starts[which]])
        try:
            return self._sample(view, index, epoch)
        except EversegError as error:  # travels to the main process as a value: no worker traceback
            return error

    def _sample(self, view: View, index: int, epoch: int | None) -> tuple[np.ndarray, np.ndarray, str, str]:
        sample_id = view.split.id(index)
        image, label = view.split.read(index)
        if image.dtype != np.uint8 or label.dtype != np.uint8:
            raise DataError(
                f"{sample_id}: images and masks must be uint8, got {image.dtype} and {label.dtype}"
            )
        if epoch is None:
            image, label = self._plain(image, label)
            return image, view.lut.take(label), sample_id, view.branch
        data, rng = self.data, sample_rng(self.seed, self.step, epoch, sample_id)
        if data.transform == "resize":
            image, label = resize_transform(image, label, size=data.size)
            image, label = flip_and_shift(
                image, view.lut.take(label), flip=data.flip, shift=data.shift, fill=data.shift_fill, rng=rng
            )
            return image, label, sample_id, view.branch
        image, label = train_transform(
            image, label, crop=data.crop, scale=data.scale, flip=data.flip, rng=rng, table=view.lut
        )
        return image, label, sample_id, view.branch

    def _plain(self, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        data = self.data
        if data.evaluation == "crop":
            return center_transform(image, label, crop=data.crop)
        if data.evaluation == "resize":
            return resize_transform(image, label, size=data.size)
        return whole_transform(image, label)


def _collate(samples: list[Any]) -> Loaded | EversegError:
    for sample in samples:
        if isinstance(sample, EversegError):
            return sample
    images, labels, ids, branches = zip(*samples, strict=True)
    shapes = {label.shape for label in labels}
    if len(shapes) > 1:
        return DataError(
            f"images of one batch differ in size: {dict(zip(ids, map(np.shape, labels), strict=True))}"
        )
    return Loaded(_stacked(images), _stacked(labels), ids, branches[0])


def _stacked(arrays: Sequence[np.ndarray]) -> Tensor:
    """One tensor of all; torch's own function makes it in a worker in the memory it shares with the main process."""
    return default_collate([torch.from_numpy(array) for array in arrays])


Keys = list[tuple[int | None, int]]
"""What `_Samples` is asked for to make a batch."""


class _Plan(Sampler[Keys]):
    """The keys of each batch, made when the loader asks for it: nothing grows with the number of batches."""

    def __init__(self, batches: Callable[[], Iterator[Keys]], length: int) -> None:
        self._batches, self._length = batches, length

    def __iter__(self) -> Iterator[Keys]:
        return self._batches()

    def __len__(self) -> int:
        return self._length


LOOK_EVERY = 2
"""Seconds after which a waiting loader looks whether its processes still live."""
PATIENCE = 300
"""Seconds without a batch after which a loader process counts as hung."""


def _loader(samples: _Samples, plan: _Plan, workers: int, pin: bool) -> Iterator[Loaded]:
    loader = DataLoader(
        samples,
        batch_sampler=plan,
        num_workers=min(workers, len(plan)),
        collate_fn=_collate,
        pin_memory=pin,
        timeout=LOOK_EVERY if workers else 0,
        worker_init_fn=_begin_worker,
    )
    with _deaths_told_where_batches_are_asked_for():
        iterator = iter(loader)
    while True:
        try:
            loaded = _next(iterator)
        except StopIteration:
            return
        except (RuntimeError, ConnectionError, EOFError) as error:  # a killed worker's pipe may break first
            if isinstance(error, RuntimeError) and "DataLoader" not in str(error):
                raise
            raise DataError(
                f"a loader process stopped or hung ({str(error).splitlines()[0]}); "
                "run again with data.workers=0, or with fewer workers if memory is short"
            ) from error
        if isinstance(loaded, EversegError):
            raise loaded
        yield loaded


def _next(iterator: Iterator[Any]) -> Any:
    """The next batch; every LOOK_EVERY seconds of waiting torch looks whether its processes still live."""
    start = time.monotonic()
    while True:
        try:
            return next(iterator)
        except RuntimeError as error:
            if "timed out" not in str(error) or time.monotonic() - start > PATIENCE:
                raise


@contextmanager
def _deaths_told_where_batches_are_asked_for() -> Iterator[None]:
    """Keep torch from answering the death of a worker with an error at whatever point the main process has reached.

    Its first loader with processes installs a SIGCHLD handler that raises, be it in the middle of an update or of a
    save. Looking while waiting for a batch (`LOOK_EVERY`) finds every death too.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _begin_worker(number: int) -> None:
    keep_memory()


class Timed(Iterator[Loaded]):
    """Batches, with the time spent waiting for them in `seconds`; whoever reads it sets it back to 0."""

    def __init__(self, batches: Iterator[Loaded]) -> None:
        self._batches = batches
        self.seconds = 0.0

    def __next__(self) -> Loaded:
        start = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.seconds += time.perf_counter() - start


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

    With T branches in the views, in the order in which they first stand there, iteration i is a batch of branch
    i % T; every `epoch_length` iterations all branches start again in a new order.

    Args:
        batch: images per iteration over all processes.

    Raises:
        DataError: a sample cannot be read; fewer images than processes.
    """
    samples = _Samples(views, data, seed, step)
    branches = samples.branches()
    counts = [len(positions) for positions in branches.values()]
    sizes = [_shared_size(count, batch, world) for count in counts]
    for branch, count, size in zip(branches, counts, sizes, strict=True):
        if size == 0:
            where = f" of branch {branch!r}" if len(counts) > 1 else ""
            raise DataError(
                f"step {step} has {count} images{where}, fewer than the {world} processes that share each batch"
            )
    per_branch = epoch_length(counts, batch) // len(counts)

    def plan() -> Iterator[Keys]:
        orders: list[np.ndarray] = []
        order_epoch = -1
        for iteration in range(start, stop):
            turn, which = divmod(iteration, len(counts))
            epoch, slot = divmod(turn, per_branch)
            if epoch != order_epoch:
                orders = [
                    positions[epoch_order(seed, step, epoch, len(positions), number)]
                    for number, positions in enumerate(branches.values())
                ]
                order_epoch = epoch
            size = sizes[which]
            chosen = orders[which][slot * size : (slot + 1) * size]
            mine = chosen[rank * size // world : (rank + 1) * size // world]
            yield [(epoch, position) for position in mine.tolist()]

    length = max(0, stop - start)
    return _loader(samples, _Plan(plan, length), data.workers, pin) if length else iter(())


def plain_batches(
    views: Sequence[View],
    data: DataConfig,
    *,
    batch: int,
    rank: int = 0,
    world: int = 1,
    pin: bool = False,
) -> Iterator[Loaded]:
    """Every sample exactly once over all processes, without augmentation, one branch after the other.

    Batches never mix branches; where images may differ in size (evaluation "whole", "sliding") they hold one image.
    """
    samples = _Samples(views, data, 0, 0)
    size = 1 if data.evaluation in ("whole", "sliding") else batch
    shares = [positions[rank::world] for positions in samples.branches().values()]

    def plan() -> Iterator[Keys]:
        for mine in shares:
            for i in range(0, len(mine), size):
                yield [(None, position) for position in mine[i : i + size].tolist()]

    length = sum(-(-len(mine) // size) for mine in shares)
    return _loader(samples, _Plan(plan, length), data.workers, pin) if length else iter(())


def normalised_batches(
    views: Sequence[View],
    data: DataConfig,
    device: torch.device,
    *,
    batch: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[Loaded, Batch]]:
    """The batches of `plain_batches`, each as it was read and as the model takes it."""
    pin = device.type == "cuda"
    for loaded in plain_batches(views, data, batch=batch, rank=rank, world=world, pin=pin):
        yield loaded, loaded.on(device, data.normalisation)


def _shared_size(count: int, batch: int, world: int) -> int:
    """Images of a batch: as many as there are up to `batch`, in equal shares."""
    size = min(batch, count)
    return size - size % world
