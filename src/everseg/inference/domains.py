"""Testing without domain labels: the branch of every image is chosen by what the images of the domains look like."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
from everseg.labels import IGNORED, SYNTHETIC_OTHER, LabelSpace, spelling
from everseg.models.branch_choice import infer_branch
from everseg.models.model import SegmentationModel
from everseg.progress import Progress
from everseg.runs.input_form import InputForm, Windows
from everseg.scenarios.steps import Source

OTHER = "other"
"""Name of the column that counts predictions of classes missing from the image's label space."""


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
    metrics: Collection[str] = (),
) -> tuple[Evaluation, dict[str, Any], dict[str, dict[str, int]]]:
    """Evaluate every image through the branch whose statistics fit it best (`models.branch_choice`).

    Args:
        classes: branch -> names of its outputs in order. All branches are candidates.
        spaces: name of a source -> label space in which its images are scored.
        metrics: further scores, as the setting `metrics` names them.

    Returns:
        The counts, the scores, and name -> branch -> number of images sent through it. If some branch knows a class
        that a label space does not have, the counts of that space get a last row and column "other". The scores count
        such a prediction as wrong, but do not list "other" as a class.

    Raises:
        ConfigError: the branches have no statistics to choose by.
    """
    known = {spelling(name) for names in classes.values() for name in names}
    wider = {
        name: space if known <= set(map(spelling, space.names)) else _with_other(space)
        for name, space in spaces.items()
    }
    tables = {
        name: {branch: _table(outputs, space).to(accelerator.device) for branch, outputs in classes.items()}
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
        metrics=metrics,
        keep=0,
    )
    result.branches = {name: name for name in result.counts}
    return result, _scores(result, wider), chooser.taken()


class _Chooser:
    """Predicts every image through the branch that fits it best, and counts how often each branch was chosen."""

    def __init__(
        self,
        model: SegmentationModel,
        tables: Mapping[str, Mapping[str, torch.Tensor]],
        accelerator: Accelerator,
        windows: Windows | None,
    ) -> None:
        """Store the model and the tables: name of a source -> branch -> table of train ids (see `_table`)."""
        self.model, self.tables, self.accelerator, self.windows = model, tables, accelerator, windows
        self.counts = {name: dict.fromkeys(branches, 0) for name, branches in tables.items()}

    def __call__(self, source: Source, image: torch.Tensor) -> torch.Tensor:
        tables, counts = self.tables[source.name], self.counts[source.name]
        chosen = self._chosen(image, tuple(tables))
        ids = torch.empty(
            len(image), *image.shape[2:], dtype=next(iter(tables.values())).dtype, device=image.device
        )
        # One forward pass per branch, with all images of the batch that chose it.
        for branch in dict.fromkeys(chosen):
            rows = [i for i, one in enumerate(chosen) if one == branch]
            found = through(self.model, branch, image[rows], self.accelerator, self.windows)
            ids[rows] = tables[branch][found.int()]
            counts[branch] += len(rows)
        return ids

    def _chosen(self, image: torch.Tensor, branches: tuple[str, ...]) -> list[str]:
        if self.windows is None:
            return infer_branch(self.model, image, branches)
        return [
            infer_sliding_branch(self.model, lambda part: part, one, self.windows, branches) for one in image
        ]

    def taken(self) -> dict[str, dict[str, int]]:
        """Return name of a source -> branch -> number of images sent through it, over all processes."""
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
    """Compute the scores by name, without "other" in their lists of classes.

    No pixel is labelled "other", so it enters no mean.
    """
    scores = scores_of(result, spaces)
    for name, entry in scores.items():
        if SYNTHETIC_OTHER in spaces[name].order:
            _without_last(entry)
            for key in ("classes", "new_classes"):
                entry[key].pop()
    return scores


def _without_last(entry: Mapping[str, Any]) -> None:
    """Remove the last class from all lists of classes, in place."""
    for key, value in entry.items():
        if key == "per_image":
            _without_last(value)
        elif key.startswith("class_"):
            for each in [value] if isinstance(value, list) else value.values():
                each.pop()


def _table(predicted: Sequence[str], space: LabelSpace) -> torch.Tensor:
    """Map train ids of a branch to train ids of the label space; classes unknown there get the last id ("other")."""
    other = space.num_classes - 1
    # a class of the data may also be called "other"; it must not be confused with the synthetic column
    position = {
        spelling(name): i
        for i, (name, raw) in enumerate(zip(space.names, space.order, strict=True))
        if raw != SYNTHETIC_OTHER
    }
    return torch.from_numpy(
        np.array(
            [position.get(spelling(name), other) for name in predicted],
            np.uint8 if other < IGNORED else np.int32,
        )
    )
