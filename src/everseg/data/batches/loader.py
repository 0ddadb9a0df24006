"""Turn views of splits into batches, and decide which image is seen when.

The order is a pure function of (seed, step, epoch, branch), and the augmentation of (seed, step, epoch, sample id).
Every process takes its slice of one global order. So workers, ranks and restarts never change which pixels are seen.
"""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from everseg.config.fields import DataConfig
from everseg.data.batches.memory import memory_draws, memory_places
from everseg.data.batches.parallel import keep_memory
from everseg.data.batches.samples import Keys, Loaded, Samples, View, collate
from everseg.display import counted
from everseg.errors import DataError, EversegError
from everseg.types import Batch


def epoch_order(seed: int, step: int, epoch: int, count: int, branch: int = 0) -> np.ndarray:
    """Permutation of the `count` samples of the step's branch number `branch`; a pure function of its arguments."""
    key = f"order:{seed}:{step}:{epoch}" + (f":{branch}" if branch else "")
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    # numpy has frozen the stream of RandomState. The stream of `default_rng` may change between versions, and runs
    # would change with it.
    return np.random.RandomState(int.from_bytes(digest, "big")).permutation(count)


def epoch_length(counts: Collection[int], batch: int) -> int:
    """Iterations of an epoch, in which the branches take turns until the shortest has no whole batch left.

    Args:
        counts: number of samples of each branch, at least one.
        batch: images per iteration.

    Returns:
        Number of branches * whole batches of the shortest. A branch shorter than one batch makes one smaller batch.

    Source, for several branches: MDIL's multi-task training (iterations = shortest loader).

    >>> epoch_length([11], 4), epoch_length([11, 9, 30], 4), epoch_length([3], 8)
    (2, 6, 1)
    """
    return len(counts) * max(1, min(counts) // batch)


class _Plan(Sampler[Keys]):
    """Makes the keys of each batch when the loader asks for them, so that memory does not grow with their number."""

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
_NOT_YET = "DataLoader timed out after"
"""How torch says that no batch came within LOOK_EVERY."""


def _loader(samples: Samples, plan: _Plan, workers: int, pin: bool) -> Iterator[Loaded]:
    loader = DataLoader(
        samples,
        batch_sampler=plan,
        num_workers=min(workers, len(plan)),
        collate_fn=collate,
        pin_memory=pin,
        timeout=LOOK_EVERY if workers else 0,
        worker_init_fn=_begin_worker,
    )
    with _deaths_told_where_batches_are_asked_for():
        iterator = iter(loader)  # starts the worker processes, and installs torch's signal handler
    while True:
        try:
            loaded = _next(iterator)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if not (workers and _is_of_the_loader(error)):
                raise
            what = str(error).partition("\n")[0] or type(error).__name__
            raise DataError(
                f"a loader process stopped or hung ({what}); "
                "run again with data.workers=0, or with fewer workers if memory is short"
            ) from error
        if isinstance(loaded, EversegError):
            raise loaded  # a worker returned it as a value: a raised error would arrive with a traceback as its text
        yield loaded


def _next(iterator: Iterator[Any]) -> Any:
    """Wait for the next batch. Every LOOK_EVERY seconds torch checks whether its worker processes are still alive."""
    start = time.monotonic()
    while True:
        try:
            return next(iterator)
        except RuntimeError as error:
            if not str(error).startswith(_NOT_YET) or time.monotonic() - start > PATIENCE:
                raise


def _is_of_the_loader(error: Exception) -> bool:
    """Whether an error comes from a loader process itself, not from the samples it reads.

    torch's message starts with "DataLoader ..." if a process died or hangs, with "Too many open files" if it can send
    nothing any more, and with "Caught ..." if an error was raised inside one. If a pipe breaks before torch notices any
    of these, the error is of another type.
    """
    text = str(error)
    return (
        text.startswith(("DataLoader ", "Too many open files"))
        if isinstance(error, RuntimeError)
        else not text.startswith("Caught ")
    )


@contextmanager
def _deaths_told_where_batches_are_asked_for() -> Iterator[None]:
    """Restore the SIGCHLD handler, so that a worker's death does not raise at an arbitrary point of the main process.

    torch's first loader with processes installs a SIGCHLD handler that raises, even in the middle of an update or a
    save. The check while waiting for a batch (`LOOK_EVERY`) finds deaths too. It misses only a death in the middle of a
    message whose pipe another process keeps open. A handler that a loader in the user's code installed is kept.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if before is not None:  # a handler that was not installed from Python cannot be restored
            signal.signal(signal.SIGCHLD, before)


def _begin_worker(number: int) -> None:
    keep_memory()


T = TypeVar("T")


class Timed(Iterator[T]):
    """Iterates over batches and adds up the waiting time in `seconds`. The reader of `seconds` resets it to 0."""

    def __init__(self, batches: Iterator[T]) -> None:
        self._batches = batches
        self.seconds = 0.0

    def __next__(self) -> T:
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
    memory_share: float | None = None,
) -> Iterator[Loaded]:
    """Make this process's share of the augmented batches of iterations start..stop-1 of a step.

    With T branches, in the order of their first appearance in the views, iteration i is a batch of branch i % T. Every
    `epoch_length` iterations all branches start again in a new order.

    Args:
        views: the images of the step, and those of the memory (`View.memory`).
        batch: images per iteration, over all processes.
        memory_share: share of each batch in which images of the memory take the place of the step's; rounded down to
            whole images. An epoch has as many iterations as without memory. None: images of the memory are further
            images of the step.

    Raises:
        DataError: a sample cannot be read and `data.skip_bad` does not allow a replacement, or there are fewer images
            than processes.
    """
    samples = Samples(views, data, seed, step, replace=data.skip_bad)
    branches = samples.branches(None if memory_share is None else False)
    held = samples.branches(True) if memory_share is not None else {}
    counts = [len(positions) for positions in branches.values()]
    sizes = [shared_size(count, batch, world) for count in counts]
    for branch, count, size in zip(branches, counts, sizes, strict=True):
        if size == 0:
            where = f" of branch {branch!r}" if len(counts) > 1 else ""
            raise DataError(
                f"step {step} has {counted(count, 'image')}{where}, fewer than the {world} processes that share "
                "each batch"
            )
    names = list(branches)
    per_branch = epoch_length(counts, batch) // len(counts)  # batches of each branch in an epoch

    # Everything below follows from the iteration number. So a run that resumes at iteration `start` makes the same
    # batches as an uninterrupted run, without going through the earlier ones.
    def plan() -> Iterator[Keys]:
        orders: list[np.ndarray] = []
        order_epoch = -1
        for iteration in range(start, stop):
            turn, which = divmod(iteration, len(counts))  # whose turn it is
            epoch, slot = divmod(turn, per_branch)  # the epoch, and the number of the batch within it
            if epoch != order_epoch:
                orders = [
                    positions[epoch_order(seed, step, epoch, len(positions), number)]
                    for number, positions in enumerate(branches.values())
                ]
                order_epoch = epoch
            size = sizes[which]
            # Every process knows the whole batch and takes its part. So a batch has the same images for any number of
            # processes.
            chosen = orders[which][slot * size : (slot + 1) * size]
            keys: Keys = [(epoch, position) for position in chosen.tolist()]
            memory = held.get(names[which])
            if memory_share is not None and memory is not None:
                places = memory_places(seed, step, iteration, size, memory_share)
                # Their own count of epochs: the memory is gone through again and again, whatever the step's images do.
                drawn = memory_draws(seed, step, turn * len(places), len(places), len(memory), which)
                for place, (memory_epoch, number) in zip(places, drawn, strict=True):
                    keys[place] = (memory_epoch, int(memory[number]))
            yield keys[rank * size // world : (rank + 1) * size // world]

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
    replace: int = 0,
) -> Iterator[Loaded]:
    """Make batches of every sample exactly once over all processes, unaugmented, one branch after the other.

    Batches never mix branches. If images may differ in size (evaluation "whole", "sliding"), a batch has one image.

    Args:
        replace: as in `Samples`; 0 when results are measured.
    """
    samples = Samples(views, data, 0, 0, replace=replace)
    size = 1 if data.evaluation in ("whole", "sliding") else batch
    shares = [positions[rank::world] for positions in samples.branches().values()]

    def plan() -> Iterator[Keys]:
        for mine in shares:
            for i in range(0, len(mine), size):
                yield [(None, position) for position in mine[i : i + size].tolist()]

    length = sum(-(-len(mine) // size) for mine in shares)
    return _loader(samples, _Plan(plan, length), data.workers, pin) if length else iter(())


@dataclass(frozen=True)
class PassOrder:
    """Which image is seen when in a pass over a step's images: batches that never mix branches, one after the other.

    The order is a pure function of its fields, and every process takes its slice of each batch. So a pass continues at
    any batch, and workers, ranks and restarts never change which pixels are seen.
    """

    branches: tuple[np.ndarray, ...]
    """Positions of each branch's samples."""
    batch: int
    """Images at once, over all processes."""
    seed: int
    step: int
    crops: bool = True
    """Training crops, in a random order; or images as tests see them, in the order of the data set."""
    every_image: bool = True
    """The last batch of a branch may be smaller; or it is dropped, unless it is the branch's only one."""
    epochs: int = 1

    @property
    def per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return sum(map(self._batches_of, map(len, self.branches)))

    def __len__(self) -> int:
        return self.epochs * self.per_epoch

    def _batches_of(self, count: int) -> int:
        return -(-count // self.batch) if self.every_image else max(1, count // self.batch)

    def epoch(self, number: int) -> list[np.ndarray]:
        """Positions of the images of each batch of an epoch."""
        found = []
        for which, positions in enumerate(self.branches):
            if self.crops:
                positions = positions[epoch_order(self.seed, self.step, number, len(positions), which)]
            found += [
                positions[slot * self.batch : (slot + 1) * self.batch]
                for slot in range(self._batches_of(len(positions)))
            ]
        return found

    def keys(self, start: int, stop: int, rank: int = 0, world: int = 1) -> Iterator[Keys]:
        """Keys of this process's share of batches start..stop-1; a share may be empty."""
        chunks: list[np.ndarray] = []
        held = -1
        for iteration in range(start, stop):
            epoch, slot = divmod(iteration, self.per_epoch)
            if epoch != held:
                chunks, held = self.epoch(epoch), epoch
            chosen = chunks[slot]
            mine = chosen[rank * len(chosen) // world : (rank + 1) * len(chosen) // world]
            yield [(epoch if self.crops else None, position) for position in mine.tolist()]


def pass_order(
    views: Sequence[View],
    data: DataConfig,
    *,
    seed: int,
    step: int,
    batch: int,
    world: int = 1,
    crops: bool = True,
    every_image: bool = True,
    epochs: int = 1,
) -> PassOrder:
    """Plan a pass over every image of a step. If images may differ in size, each process gets one at a time."""
    branches = tuple(Samples(views, data, seed, step).branches().values())
    single = not crops and data.evaluation in ("whole", "sliding")
    return PassOrder(branches, world if single else batch, seed, step, crops, every_image, epochs)


def pass_batches(
    views: Sequence[View],
    data: DataConfig,
    order: PassOrder,
    *,
    start: int,
    rank: int = 0,
    world: int = 1,
    pin: bool = False,
    stop: int | None = None,
) -> Iterator[Loaded | None]:
    """Make this process's share of the batches from number `start` on, up to `stop`; None where its share is empty.

    Raises:
        DataError: a sample cannot be read and `data.skip_bad` does not allow a replacement.
    """
    stop = len(order) if stop is None else stop
    samples = Samples(views, data, order.seed, order.step, replace=data.skip_bad)

    def shares() -> Iterator[Keys]:
        return order.keys(start, stop, rank, world)

    length = sum(1 for keys in shares() if keys)
    plan = _Plan(lambda: (keys for keys in shares() if keys), length)
    loaded = _loader(samples, plan, data.workers, pin) if length else iter(())
    for keys in shares():
        yield next(loaded) if keys else None


def normalised_batches(
    views: Sequence[View],
    data: DataConfig,
    device: torch.device,
    *,
    batch: int,
    rank: int = 0,
    world: int = 1,
    replace: int = 0,
) -> Iterator[tuple[Loaded, Batch]]:
    """Make the batches of `plain_batches`, each both as read and as the model takes it."""
    pin = device.type == "cuda"
    batches = plain_batches(views, data, batch=batch, rank=rank, world=world, pin=pin, replace=replace)
    for loaded in batches:
        yield loaded, loaded.on(device, data.normalisation)


def shared_size(count: int, batch: int, world: int) -> int:
    """Batch size over all processes: at most `batch` or the image count, in equal shares; 0 = less than one each."""
    size = min(batch, count)
    return size - size % world
