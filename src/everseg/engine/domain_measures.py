"""What the images of a step's domains look like to the trained model, for choosing a branch later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator

from everseg.config.fields import DataConfig
from everseg.data.batches.loader import normalised_batches
from everseg.data.batches.samples import SampleKey, View
from everseg.distributed import all_reduce_max, all_reduce_sum
from everseg.models.branch_choice import features_of, needs_statistics
from everseg.models.domain_statistics import MOST_IMAGES, DomainStatistics, statistics_of
from everseg.models.model import SegmentationModel


def measure_domains(
    model: SegmentationModel,
    views: Sequence[View],
    data: DataConfig,
    accelerator: Accelerator,
    *,
    batch: int,
    note: Callable[[Mapping[SampleKey, str]], None],
) -> None:
    """Measure the images of each branch and put the result into the model, joined with what it holds of the branch.

    Models whose branches have batch norms of their own are left as they are: these hold what a choice needs. Images are
    seen as tests see them, at most `MOST_IMAGES` of a branch, at even distances in the order of the data set.

    Args:
        model: trained, its weights the same in all processes.
        views: the step's training images, without those of the memory.
        batch: images at once.
        note: takes the samples that could not be read.
    """
    if not needs_statistics(model):
        return
    chosen = [
        part for branch in dict.fromkeys(view.branch for view in views) for part in _some(views, branch)
    ]
    found: dict[str, list[torch.Tensor]] = {view.branch: [] for view in chosen}
    batches = normalised_batches(
        chosen, data, accelerator.device, batch=batch, rank=accelerator.process_index, world=accelerator.num_processes,
        replace=data.skip_bad,
    )  # fmt: skip
    for loaded, seen in batches:
        note(loaded.bad)
        found[seen.branch].append(features_of(model, seen.image))
    for branch, features in found.items():
        now, before = _statistics(features, accelerator), model.domain_statistics.get(branch)
        model.domain_statistics[branch] = now if before is None else before.joined(now)


def _statistics(own: list[torch.Tensor], accelerator: Accelerator) -> DomainStatistics:
    """Statistics of the features in all processes; one process may have none."""
    reduce = all_reduce_sum(accelerator)

    def over_processes(value: torch.Tensor) -> torch.Tensor:
        return reduce(value.to(accelerator.device)).cpu() if accelerator.num_processes > 1 else value

    width = all_reduce_max(own[0].shape[1] if own else 0, accelerator)
    features = torch.cat(own) if own else torch.zeros(0, width, dtype=torch.float64)
    return statistics_of(features, over_processes)


def _some(views: Sequence[View], branch: str) -> list[View]:
    """At most `MOST_IMAGES` of a branch's images."""
    own = [view for view in views if view.branch == branch]
    count = sum(len(view.indices) for view in own)
    if count <= MOST_IMAGES:
        return own
    kept = np.arange(MOST_IMAGES) * count // MOST_IMAGES
    found, start = [], 0
    for view in own:
        stop = start + len(view.indices)
        inside = kept[(kept >= start) & (kept < stop)] - start
        if len(inside):
            found.append(replace(view, indices=view.indices[inside]))
        start = stop
    return found
