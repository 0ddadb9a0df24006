"""Testing without domain labels: the path of every image is chosen from the model's statistics (floor 5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from everseg.config import RunConfig
from everseg.data.base import Dataset
from everseg.engine.evaluate import Evaluation, evaluate, scores_of, through
from everseg.engine.progress import Progress
from everseg.engine.runtime import all_reduce_sum
from everseg.labels import SYNTHETIC_OTHER, LabelSpace
from everseg.models.inference import infer_branch
from everseg.models.model import SegmentationModel
from everseg.scenarios.steps import Source

OTHER = "other"
"""Name of the column for predicted classes that the image's own label space does not have."""


def evaluate_inferred(
    model: SegmentationModel,
    classes: Mapping[str, Sequence[str]],
    spaces: Mapping[str, LabelSpace],
    sources: Sequence[Source],
    datasets: Mapping[str, Dataset],
    config: RunConfig,
    accelerator: Accelerator,
    progress: Progress,
) -> tuple[Evaluation, dict[str, Any], dict[str, dict[str, int]]]:
    """Send every image through the path whose batch-norm statistics it fits best.

    Args:
        classes: path -> names of its outputs in order; all paths are candidates.
        spaces: name of a source -> label space of its table, in which its images are scored.

    Returns:
        The counts, with a last row and column "other" where some path knows a class that the label space does not
        have; the scores, where such a prediction is wrong but "other" is no class; and name -> path -> number of
        images that took it.

    Raises:
        ConfigError: the paths have no batch-norm statistics of their own.
    """
    device = accelerator.device
    branches = tuple(classes)
    known = {name for names in classes.values() for name in names}
    wider = {
        name: space if known <= set(space.names) else _with_other(space) for name, space in spaces.items()
    }
    tables = {
        name: {branch: _table(classes[branch], space.names).to(device) for branch in branches}
        for name, space in wider.items()
    }
    taken = {source.name: Counter[str]() for source in sources}

    def predict(source: Source, image: torch.Tensor) -> torch.Tensor:
        paths = infer_branch(model, image, branches)
        taken[source.name].update(paths)
        ids = torch.empty(len(image), *image.shape[2:], dtype=torch.int64, device=device)
        for branch in set(paths):
            rows = torch.tensor([i for i, path in enumerate(paths) if path == branch], device=device)
            found = through(model, branch, image[rows], accelerator)
            ids[rows] = tables[source.name][branch][found.long()]
        return ids

    result = evaluate(
        model,
        sources,
        datasets,
        config,
        accelerator,
        progress,
        title="testing, paths chosen per image",
        predict=predict,
        outputs={source.name: len(wider[source.name].names) for source in sources},
        keep=0,
    )
    result.branches = {name: name for name in result.counts}
    reduce = all_reduce_sum(accelerator)
    chosen: dict[str, dict[str, int]] = {}
    for name, counter in taken.items():
        counted = reduce(torch.tensor([counter[branch] for branch in branches], device=device))
        chosen[name] = dict(zip(branches, counted.tolist(), strict=True))
    return result, _scores(result, wider), chosen


def _with_other(space: LabelSpace) -> LabelSpace:
    groups = (*space.groups[:-1], (*space.groups[-1], SYNTHETIC_OTHER))
    return replace(space, groups=groups, names=(*space.names, OTHER))


def _scores(result: Evaluation, spaces: Mapping[str, LabelSpace]) -> dict[str, Any]:
    """Scores by name, "other" left out of their lists of classes; never true, it enters no mean."""
    scores = scores_of(result, spaces)
    for name, entry in scores.items():
        if SYNTHETIC_OTHER in spaces[name].order:
            for key in ("classes", "new_classes", "class_iou", "class_accuracy"):
                entry[key].pop()
    return scores


def _table(predicted: Sequence[str], names: Sequence[str]) -> torch.Tensor:
    """Train id of a path -> train id of the label space, the last one for classes that it does not have."""
    other = len(names) - 1
    position = {name: i for i, name in enumerate(names)}
    return torch.from_numpy(np.array([position.get(name, other) for name in predicted], np.int64))
