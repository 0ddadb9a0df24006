"""Which images of the memory a batch holds, and where in the batch: pure functions of seed, step and iteration."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from itertools import pairwise

import numpy as np


def memory_places(seed: int, step: int, iteration: int, size: int, share: float) -> list[int]:
    """Draw the places of a batch that images of the memory take.

    One place is drawn at random from each stretch of neighbours of about equal length. So every part of a batch, such
    as that of a process, has its share of the memory within one image, and exactly where the stretches end at its
    border. Which images of the step a batch loses is as random as if all places were drawn at once, because the order
    of an epoch is random.

    Args:
        seed: of the run.
        step: number that seeds the step's random draws.
        iteration: of the step.
        size: images of the batch over all processes.
        share: of the places; their number is rounded down.

    Returns:
        Ascending places, from 0 to `size` - 1.

    >>> [len(memory_places(0, 1, i, 4, 0.5)) for i in range(3)]
    [2, 2, 2]
    """
    number = int(size * share + 1e-9)  # 0.29 * 100 is 28.999999999999996
    bounds = [size * i // number for i in range(number + 1)] if number else []
    rng = _stream("places", seed, step, iteration)
    return [rng.randint(low, high) for low, high in pairwise(bounds)]


def memory_draws(
    seed: int, step: int, first: int, count: int, held: int, branch: int = 0
) -> list[tuple[int, int]]:
    """Say which images of the memory are shown: the entries `first` to `first` + `count` - 1 of the step's stream.

    The stream goes through the memory again and again, each time in a new order.

    Args:
        seed: of the run.
        step: number that seeds the step's random draws.
        first: number of images of the memory shown before in the step.
        count: number of images to show.
        held: images of the memory.
        branch: number of the branch among the step's.

    Returns:
        For each: how often the memory was gone through before, which seeds its augmentation, and its number in the
        memory.
    """
    drawn = []
    for entry in range(first, first + count):
        epoch, place = divmod(entry, held)
        order = _order(seed, step, epoch, held, branch)
        drawn.append((epoch, int(order[place])))
    return drawn


@lru_cache(maxsize=2)  # the draws of a pass follow each other, and one batch may reach into the next pass
def _order(seed: int, step: int, epoch: int, held: int, branch: int) -> np.ndarray:
    return _stream("order", seed, step, epoch, branch).permutation(held)


def _stream(*parts: int | str) -> np.random.RandomState:
    # numpy has frozen the stream of RandomState, so a later version draws the same.
    digest = hashlib.blake2b(":".join(map(str, ("memory", *parts))).encode(), digest_size=4).digest()
    return np.random.RandomState(int.from_bytes(digest, "big"))
