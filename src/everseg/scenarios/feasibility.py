"""What the plan of a run makes impossible, or pointless: said before step 0 trains, all of it at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from everseg.data.batches.loader import shared_size
from everseg.labels import IGNORED
from everseg.scenarios.steps import Source, Step
from everseg.scenarios.summary import pixels_of

Trial = Callable[[Step], str]
"""Why the network cannot train a step whose processes see one image at a time; "" if it can."""


def impossible(
    steps: Sequence[Step], *, batch: int, processes: int = 1, trial: Trial = lambda step: ""
) -> list[str]:
    """Say what would stop a run sooner or later.

    Args:
        steps: those still to be trained.
        batch: images per iteration over all processes.
        processes: that share each batch.
        trial: tries a step on the network; asked for steps whose processes get one image each.

    Returns:
        A sentence for every step with more outputs than labels can tell apart, without training images, with fewer
        images than processes, or with so few that a batch norm would see a single value.
    """
    problems = []
    for step in steps:
        for branch, space in step.spaces.items():
            if step.grows.get(branch) and space.num_classes > IGNORED:
                problems.append(
                    f"step {step.index}: {_branch(branch, step)}has {space.num_classes} outputs, and labels tell at "
                    f"most {IGNORED} apart ({IGNORED} marks ignored pixels); teach fewer classes, or in several domains"
                )
        shares = []
        for branch, images in _images(step.train).items():
            where = f"step {step.index}: {_branch(branch, step)}"
            if images == 0:
                problems.append(
                    f"{where}has no training images; leave it out, or look at its classes and lists"
                )
            elif images < processes:
                problems.append(
                    f"{where}has {images} training images, fewer than the {processes} processes that share each batch; "
                    "use fewer processes"
                )
            else:
                shares.append(shared_size(images, batch, processes) // processes)
        # Two images and more give every norm at least two values, however small the maps are.
        if shares and min(shares) == 1 and (why := trial(step)):
            problems.append(f"step {step.index}: {why}")
    if batch < processes:
        problems.append(f"train.batch: {batch} images for {processes} processes; give each at least one")
    return problems


def doubtful(steps: Sequence[Step], counts: Mapping[str, np.ndarray]) -> list[str]:
    """Say which classes are taught and never tested, so that no score can show whether they were learnt.

    Args:
        steps: of the run.
        counts: (N, 256) pixels per raw id of every image, under "<data set>/<split>" or "<split>".
    """
    notes = []
    for step in steps:
        seen: dict[str, Counter[int]] = {}
        for source in step.test:
            of_ids = pixels_of(source, counts).sum(axis=0)
            pixels = seen.setdefault(source.branch, Counter())
            for raw, train_id in enumerate(source.lut):
                pixels[train_id] += int(of_ids[raw])
        for branch in step.trained_branches:
            if branch not in seen:
                continue
            space = step.spaces[branch]
            taught = range(step.num_old(branch), space.num_classes)
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
    """The branch for a message, where there is more than one."""
    return f"branch '{branch}' " if len(step.spaces) > 1 else ""
