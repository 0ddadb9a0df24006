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
from everseg.data.loading import plain_batches
from everseg.data.transforms import normalise
from everseg.engine.evaluate import Evaluation, predict_ids, scores_of, views_of
from everseg.engine.progress import Progress
from everseg.engine.runtime import all_reduce_sum
from everseg.labels import SYNTHETIC_OTHER, LabelSpace
from everseg.metrics import ConfusionMatrix
from everseg.models.inference import infer_branch
from everseg.models.model import SegmentationModel
from everseg.scenarios.steps import Source

OTHER = "other"
"""Name of the column for predicted classes that the image's own label space does not have."""


@torch.no_grad()
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
    model.to(accelerator.device).eval()
    device, world = accelerator.device, accelerator.num_processes
    reduce = all_reduce_sum(accelerator)
    branches = tuple(classes)
    known = {name for names in classes.values() for name in names}
    wider = {
        name: space if known <= set(space.names) else _with_other(space) for name, space in spaces.items()
    }
    result = Evaluation({s.name: s.name for s in sources})
    chosen: dict[str, dict[str, int]] = {}
    progress.begin("testing, paths chosen per image", sum(len(s.indices) for s in sources))
    done = 0
    for source, view in zip(sources, views_of(sources, datasets), strict=True):
        names = wider[source.name].names
        tables = {branch: _table(classes[branch], names).to(device) for branch in branches}
        matrix, taken = ConfusionMatrix(len(names)), Counter[str]()
        batches = plain_batches(
            [view], config.data, batch=config.train.eval_batch, rank=accelerator.process_index, world=world
        )
        for loaded in batches:
            image = normalise(loaded.image.to(device), config.data.normalisation)
            label = loaded.label.to(device)
            paths = infer_branch(model, image, branches)
            for branch in set(paths):
                rows = torch.tensor([i for i, path in enumerate(paths) if path == branch], device=device)
                with accelerator.autocast():
                    logits = model(image[rows], (branch,))[branch].logits
                ids = predict_ids(logits, (label.shape[-2], label.shape[-1]))
                matrix.update(tables[branch][ids.long()], label[rows])
            taken.update(paths)
            done += len(paths) * world
            progress.update(done, {}, 0.0, 0.0)
        result.counts[source.name] = reduce(matrix.counts.to(device)).cpu().numpy()
        counted = reduce(torch.tensor([taken[branch] for branch in branches], device=device))
        chosen[source.name] = dict(zip(branches, counted.tolist(), strict=True))
    progress.end()
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
