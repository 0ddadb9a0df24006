"""Which labels the images of a memory have in a later step, and what a memory makes impossible."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Literal

from everseg.config.fields import MemoryConfig
from everseg.scenarios.combine import united
from everseg.scenarios.steps import Source, Step

Labels = Literal["as_stored", "seen", "current"]
"""Labels of memory images: the classes annotated when they were stored, all classes taught so far, or the step's."""


def memory_source(
    steps: Sequence[Step], now: Step, annotated: Collection[int], dataset: str, split: str, labels: Labels
) -> Source:
    """Make the source of memory images in a step: its label table and branch; its images are for the caller to add.

    Args:
        steps: all steps of the run.
        now: the step that trains them.
        annotated: indices of the steps in which the images were annotated and stored.
        dataset: key of their data set.
        split: their split.
        labels: which classes are labelled. A pixel that no step involved labels as a class is what the label policy of
            the last of them made of it: background or ignored.

    Raises:
        ValueError: no step involved trains images of this data set and split.
    """
    chosen = {
        "as_stored": annotated,
        "seen": [step.index for step in steps if step.index <= now.index],
        "current": [now.index],
    }[labels]
    parts = [
        source
        for step in steps
        if step.index in chosen
        for source in step.train
        if (source.dataset, source.split) == (dataset, split)
    ]
    if not parts:
        raise ValueError(f"no step of {sorted(chosen)} trains images of {dataset}/{split}")
    return replace(united(parts, now.spaces[parts[-1].branch]), indices=())


def unfit_for_memory(steps: Sequence[Step], memory: MemoryConfig) -> list[str]:
    """List why a run with these steps cannot keep a memory, each as a sentence."""
    if not memory.size:
        return []
    branches = sorted({source.branch for step in steps for source in step.train})
    problems = []
    if len(branches) > 1:
        problems.append(
            f"scenario.memory: the steps train several branches ({', '.join(branches)}), and a batch is of one; let "
            "the domains share a branch (branch in scenario.steps), or leave the memory out"
        )
    elif memory.labels == "current" and len({source.dataset for step in steps for source in step.train}) > 1:
        problems.append(
            "scenario.memory.labels: 'current' is the label table of the step's own data set, and the memory holds "
            "images of several; take as_stored or seen"
        )
    if any(step.fresh for step in steps[1:]):
        problems.append(
            "scenario.memory: each step starts from scratch here, and the memory would train it on images "
            "of earlier ones; leave the memory out"
        )
    return problems
