"""Checks of a run's plan before step 0 trains. They report everything impossible or pointless at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from everseg.data.batches.loader import shared_size
from everseg.display import counted
from everseg.labels import IGNORED_WIDE
from everseg.scenarios.steps import Source, Step
from everseg.scenarios.summary import pixels_of

Trial = Callable[[Step], str]
"""Function of a step: why the network cannot train it with one image at a time; "" if it can."""


def impossible(
    steps: Sequence[Step],
    *,
    batch: int,
    processes: int = 1,
    parts: int = 1,
    trial: Trial = lambda step: "",
) -> list[str]:
    """List the problems that would stop a run sooner or later.

    Args:
        steps: the steps that are still to be trained.
        batch: images per iteration over all processes.
        processes: number of processes that share each batch.
        parts: number of parts that each process cuts its share into.
        trial: tries a step on the network. It is called only for steps that run a single image at a time.

    Returns:
        One sentence per problem. A step is a problem if it has more outputs than a label can number, no training
        images, fewer images than processes, or so few images that a batch norm would see a single value.
    """
    problems = []
    for step in steps:
        for branch, space in step.spaces.items():
            if step.grows.get(branch) and space.num_classes >= IGNORED_WIDE:
                problems.append(
                    f"step {step.index}: {_branch(branch, step)}has {space.num_classes} outputs, and labels tell at "
                    f"most {IGNORED_WIDE - 1} apart ({IGNORED_WIDE} marks ignored pixels); teach fewer classes, or in "
                    "several domains"
                )
        shares, few = [], ""
        for branch, images in _images(step.train).items():
            where = f"step {step.index}: {_branch(branch, step)}"
            if images == 0:
                problems.append(
                    f"{where}has no training images; leave it out, or look at its classes and lists"
                )
            elif images < processes:
                problems.append(
                    f"{where}has {counted(images, 'training image')}, fewer than the {processes} processes that "
                    "share each batch; "
                    "use fewer processes"
                )
            else:
                share = shared_size(images, batch, processes) // processes
                shares.append(share // min(parts, share) if share else 0)  # 0: `batch` is told below
                if images < 2 * processes:
                    several = f"s for {processes} processes" if processes > 1 else ""
                    few = (
                        f"{_branch(branch, step) or 'the step '}has {images} training image{several}, which no setting "
                        "changes: add images of its classes, teach them with others in one step, "
                        f"{'use fewer processes, ' if processes > 1 else ''}or crop them larger (data.crop)"
                    )
        # With two or more images every norm sees at least two values, even on feature maps of one pixel.
        if shares and min(shares) == 1 and (why := trial(step)):
            problems.append(
                f"step {step.index}: {why}; {few or 'raise train.batch, or lower train.accumulate'}"
            )
    if batch < processes:
        problems.append(f"train.batch: {batch} images for {processes} processes; give each at least one")
    return problems


def doubtful(steps: Sequence[Step], counts: Mapping[str, np.ndarray]) -> list[str]:
    """List the classes that are taught but shown by no test image. No score can tell whether they were learnt.

    Args:
        steps: the steps of the run.
        counts: "<data set>/<split>" or "<split>" -> (N, 256) pixels per raw id of every image.
    """
    notes = []
    for step in steps:
        seen: dict[str, Counter[int]] = {}
        for source in step.test:
            of_ids = pixels_of(source, counts).sum(axis=0)  # (256,) pixels per raw id
            pixels = seen.setdefault(source.branch, Counter())
            for raw, train_id in enumerate(source.lut):
                pixels[train_id] += int(of_ids[raw])
        for branch in step.trained_branches:
            if branch not in seen:
                continue
            space = step.spaces[branch]
            taught = range(step.num_old(branch), space.num_classes)
            # Negative raw ids stand for artificial outputs, such as void, which no mask shows.
            untested = [space.names[c] for c in taught if space.order[c] >= 0 and not seen[branch][c]]
            if untested:
                notes.append(
                    f"step {step.index}: {_branch(branch, step)}no test image shows {', '.join(untested)}: "
                    f"{'their' if len(untested) > 1 else 'its'} IoU stays undefined and counts in no mean"
                )
    return notes


def _images(sources: Sequence[Source]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for source in sources:
        counts[source.branch] = counts.get(source.branch, 0) + len(source.indices)
    return counts


def _branch(branch: str, step: Step) -> str:
    """Name the branch for a message; "" if there is only one."""
    return f"branch '{branch}' " if len(step.spaces) > 1 else ""
