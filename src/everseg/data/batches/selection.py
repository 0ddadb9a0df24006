"""Choose which images a memory keeps: pure functions of lists of classes and a random stream.

A pool is the list of all candidates: first the images that the memory holds, then those of the step that ends. The
functions return positions in the pool. No function looks at a pixel, and none draws from a global stream.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np


@dataclass(frozen=True)
class Candidate:
    """An image that a memory may keep."""

    id: str
    dataset: str
    """Key of its data set in the run."""
    split: str
    classes: tuple[int, ...]
    """Train ids of the classes that it shows, ascending, without background and ignored pixels. They come from its
    labels, and from the pseudo-labels that complete them where the run makes some."""
    pixels: tuple[int, ...]
    """Number of pixels of each of `classes`."""
    labelled: tuple[int, ...]
    """The classes that its labels alone show."""
    steps: tuple[int, ...]
    """Steps whose annotations it has, ascending."""
    branch: str = "default"
    stored_for: int | None = None
    """The class that the memory holds it for; None = it is offered for the first time."""


def round_robin(
    shows: Sequence[Collection[int]], classes: Sequence[int], size: int, rng: np.random.RandomState
) -> dict[int, list[int]]:
    """Let the classes take images in turn: each takes the first image left that shows it.

    Args:
        shows: classes of every image of the pool.
        classes: the classes that take images.
        size: number of images to take.
        rng: shuffles the pool, then the classes. The order of the turns stays the same in every round.

    Returns:
        Class -> positions in the pool in the order of taking; classes ascending. Fewer than `size` if no image is left
        that shows one of the classes.

    Source: Cha et al. (SSUL), NeurIPS 2021, and its code; DKD's is the same. Theirs loops for ever where too few images
    show the classes.

    >>> round_robin([{1}, {1, 2}, {2}], [1, 2], 2, np.random.RandomState(0))
    {1: [1], 2: [2]}
    """
    # Lists, because the authors shuffle lists: an array of the same length would be shuffled in the same way, but an
    # object array of collections would not.
    left = list(range(len(shows)))
    rng.shuffle(left)
    turns = list(classes)
    rng.shuffle(turns)
    taken: dict[int, list[int]] = {number: [] for number in sorted(turns)}
    count, found = 0, True
    while found and count < size:
        found = False
        for number in turns:
            if count == size:
                break
            position = next((one for one in left if number in shows[one]), None)
            if position is not None:
                left.remove(position)
                taken[number].append(position)
                count, found = count + 1, True
    return taken


def reservoir(
    shows: Sequence[Collection[int]],
    stored_for: Sequence[int],
    classes: Sequence[int],
    size: int,
    shuffle: np.random.RandomState,
    draw: random.Random,
) -> dict[int, list[int]]:
    """Offer new images to a memory one after the other, so that every class keeps about as many members.

    An image is offered for the one of its classes that has the fewest members, the lowest of several. While the memory
    is not full it is added. Then it is added only if that class has fewer than size / number of classes (rounded down),
    and in its place a random member of the largest class leaves (the lowest of several).

    Args:
        shows: classes of every image of the pool.
        stored_for: classes for which the first images of the pool are held, in the order of storing.
        classes: all classes known; others in `shows` do not count.
        size: largest number of members.
        shuffle: shuffles the images that are offered.
        draw: draws the members that leave.

    Returns:
        Class -> positions in the pool in the order of storing; classes ascending.

    Source: Kwak et al. (MiB-AugM), and its code.
    """
    members: dict[int, list[int]] = {number: [] for number in sorted(classes)}
    for position, number in enumerate(stored_for):
        members[number].append(position)
    held, limit = len(stored_for), size // max(1, len(members))
    offered = list(range(held, len(shows)))

    def largest() -> int:
        return min(members, key=lambda number: (-len(members[number]), number))

    while held > size:  # it was kept with a larger size
        members[largest()].remove(draw.choice(members[largest()]))
        held -= 1
    shuffle.shuffle(offered)
    for position in offered:
        own = [number for number in members if number in shows[position]]
        if not own or size == 0:
            continue
        rarest = min(own, key=lambda number: (len(members[number]), number))
        if held < size:
            held += 1
        elif len(members[rarest]) < limit:
            members[largest()].remove(draw.choice(members[largest()]))
        else:
            continue
        members[rarest].append(position)
    return members


def uniform(held: int, before: int, now: int, size: int, rng: np.random.RandomState) -> list[int]:
    """Choose images so that every image ever offered is kept with the same probability.

    Args:
        held: number of images in the memory, which come first in the pool. They are such a choice already.
        before: number of images offered in earlier steps, at least `held`.
        now: number of images offered now.
        size: number of images to keep.
        rng: draws how many of the new images are kept, then which old ones, then which new ones.

    Returns:
        Positions in the pool, ascending.
    """
    kept = min(size, held + now)
    new = (
        int(rng.hypergeometric(now, before, min(kept, before + now))) if now and before else kept * (now > 0)
    )
    new = min(max(new, kept - held), now)
    old = rng.permutation(held)[: kept - new]
    return sorted([*old.tolist(), *(held + rng.permutation(now)[:new]).tolist()])


def flat(taken: Mapping[int, Sequence[int]]) -> list[int]:
    """Write the images of all classes one after the other: the order in which a memory stores them."""
    return list(chain.from_iterable(taken.values()))
