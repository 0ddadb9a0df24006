"""Testing without domain labels: the branch of every image is chosen from the model's statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from everseg.config.fields import DataConfig
from everseg.data.base import Dataset
from everseg.distributed import all_reduce_sum
from everseg.inference.count import Evaluation, evaluate, scores_of, through
from everseg.inference.windows import infer_sliding_branch
from everseg.labels import SYNTHETIC_OTHER, LabelSpace, spelling
from everseg.models.branch_choice import infer_branch
from everseg.models.model import SegmentationModel
from everseg.progress import Progress
from everseg.runs.input_form import InputForm, Windows
from everseg.scenarios.steps import Source

OTHER = "other"
"""Name of the column for predicted classes that the image's own label space does not have."""


def evaluate_inferred(
    model: SegmentationModel,
    classes: Mapping[str, Sequence[str]],
    spaces: Mapping[str, LabelSpace],
    sources: Sequence[Source],
    datasets: Mapping[str, Dataset],
    data: DataConfig,
    accelerator: Accelerator,
    progress: Progress,
    *,
    batch: int,
) -> tuple[Evaluation, dict[str, Any], dict[str, dict[str, int]]]:
    """Send every image through the branch whose batch-norm statistics it fits best.

    Args:
        classes: branch -> names of its outputs in order; all branches are candidates.
        spaces: name of a source -> label space of its table, in which its images are scored.

    Returns:
        The counts, with a last row and column "other" where some branch knows a class that the label space does not
        have; the scores, where such a prediction is wrong but "other" is no class; and name -> path -> number of
        images that took it.

    Raises:
        ConfigError: the branches have no batch-norm statistics of their own.
    """
    known = {spelling(name) for names in classes.values() for name in names}
    wider = {
        name: space if known <= set(map(spelling, space.names)) else _with_other(space)
        for name, space in spaces.items()
    }
    tables = {
        name: {path: _table(outputs, space).to(accelerator.device) for path, outputs in classes.items()}
        for name, space in wider.items()
    }
    windows = InputForm.of_config(data).windows(batch)
    chooser = _Chooser(model, tables, accelerator, windows)
    result = evaluate(
        model,
        sources,
        datasets,
        data,
        accelerator,
        progress,
        batch=batch,
        title="testing, branches chosen per image",
        predict=chooser,
        outputs={source.name: len(wider[source.name].names) for source in sources},
        keep=0,
    )
    result.branches = {name: name for name in result.counts}
    return result, _scores(result, wider), chooser.taken()


class _Chooser:
    """Predicts every image through the branch that it fits best, and remembers which that was."""

    def __init__(
        self,
        model: SegmentationModel,
        tables: Mapping[str, Mapping[str, torch.Tensor]],
        accelerator: Accelerator,
        windows: Windows | None,
    ) -> None:
        """Take name of a source -> path -> table of its train ids (see `_table`)."""
        self.model, self.tables, self.accelerator, self.windows = model, tables, accelerator, windows
        self.counts = {name: dict.fromkeys(paths, 0) for name, paths in tables.items()}

    def __call__(self, source: Source, image: torch.Tensor) -> torch.Tensor:
        tables, counts = self.tables[source.name], self.counts[source.name]
        paths = self._paths(image, tuple(tables))
        ids = torch.empty(len(image), *image.shape[2:], dtype=torch.uint8, device=image.device)
        for branch in dict.fromkeys(paths):
            rows = [i for i, path in enumerate(paths) if path == branch]
            found = through(self.model, branch, image[rows], self.accelerator, self.windows)
            ids[rows] = tables[branch][found.int()]
            counts[branch] += len(rows)
        return ids

    def _paths(self, image: torch.Tensor, branches: tuple[str, ...]) -> list[str]:
        if self.windows is None:
            return infer_branch(self.model, image, branches)
        return [
            infer_sliding_branch(self.model, lambda part: part, one, self.windows, branches) for one in image
        ]

    def taken(self) -> dict[str, dict[str, int]]:
        """Name of a source -> path -> number of images that took it, over all processes."""
        reduce = all_reduce_sum(self.accelerator)
        totals = {}
        for name, counts in self.counts.items():
            total = reduce(torch.tensor(list(counts.values()), device=self.accelerator.device))
            totals[name] = dict(zip(counts, total.tolist(), strict=True))
        return totals


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


def _table(predicted: Sequence[str], space: LabelSpace) -> torch.Tensor:
    """Train id of a branch -> train id of the label space, the last one for classes that it does not have."""
    other = space.num_classes - 1
    # a class of the data may be called "other" too, and is not the column that counts strange classes
    position = {
        spelling(name): i
        for i, (name, raw) in enumerate(zip(space.names, space.order, strict=True))
        if raw != SYNTHETIC_OTHER
    }
    return torch.from_numpy(np.array([position.get(spelling(name), other) for name in predicted], np.uint8))
