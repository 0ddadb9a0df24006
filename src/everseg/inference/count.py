"""Evaluation of a model: integer confusion counts over test images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from everseg import registry
from everseg.config.fields import DataConfig, ModelConfig
from everseg.data.base import Dataset
from everseg.data.batches.extra import maps_of
from everseg.data.batches.loader import View, plain_batches
from everseg.data.channels import picture_of
from everseg.distributed import all_reduce_sum
from everseg.errors import ConfigError
from everseg.inference.windows import sliding_ids
from everseg.labels import LabelSpace
from everseg.losses.reading import read_ids
from everseg.losses.readout import merged_outputs, small_values
from everseg.metrics import (
    ConfusionMatrix,
    boundary_scores,
    boundary_sums,
    image_statistics,
    step_scores,
)
from everseg.models.model import SegmentationModel
from everseg.progress import Progress
from everseg.runs.input_form import InputForm, Windows
from everseg.runs.run_folder import RunFolder
from everseg.scenarios.steps import Source
from everseg.types import SegOutput

Predict = Callable[[Source, Tensor], Tensor]
"""Images of a source, (B, 3, H, W) normalised -> (B, H, W) integer train ids on the same device."""


@dataclass
class Evaluation:
    """Result of one pass over test images. The keys are the names of the results (`Source.name`)."""

    branches: dict[str, str]
    """Name -> branch that predicted the images."""
    counts: dict[str, np.ndarray] = field(default_factory=dict)
    """Name -> (C, C) int64, rows = truth."""
    images: dict[str, np.ndarray] = field(default_factory=dict)
    """Name -> (N, 3, C) uint32: for each image in order, pixels of each class that are true, predicted, and both."""
    boundary: dict[str, np.ndarray] = field(default_factory=dict)
    """Name -> (N, 3, C) uint32: for each image the counts of `metrics.boundary_sums`; {} unless asked for."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """Name -> the images' names, SPLIT/ID in order; {} unless scores per image are asked for."""
    samples: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = field(default_factory=dict)
    """Name -> a few (image uint8 (H, W, 3), label, prediction) for pictures."""


def views_of(
    sources: Sequence[Source], datasets: Mapping[str, Dataset], extra: Collection[str] | None = ()
) -> list[View]:
    """Bind the sources of a step to the splits of their data sets.

    Args:
        extra: further maps of the images (`data.extra`) that the views hold; None = all that the data sets name.
    """
    return [
        View(
            datasets[s.dataset].splits[s.split],
            np.asarray(s.indices, np.int64),
            padded_table(s),
            s.branch,
            s.dataset,
            maps_of(datasets[s.dataset], s.split, extra),
        )
        for s in sources
    ]


def padded_table(source: Source) -> np.ndarray:
    """Table of a source; where masks have 16 bits it is as long as any id, so that no id is outside of it."""
    table = source.table
    rest = 2**16 - len(table) if len(table) > 256 else 0
    return np.append(table, np.full(rest, source.ignored, table.dtype)) if rest else table


def through(
    model: SegmentationModel,
    branch: str,
    image: Tensor,
    accelerator: Accelerator,
    windows: Windows | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Predict normalised images (B, 3, H, W) with one branch, as the model's readout says. Return the train ids.

    Args:
        windows: the overlapping windows that each image is cut into; None = whole images.
        extra: further maps of the images, (B, H, W), for a network that reads some.

    Raises:
        ConfigError: the network reads further maps, and windows are asked for.
    """
    maps = {"extra": extra or {}} if model.reads_extra else {}

    def see(part: Tensor) -> SegOutput:
        with accelerator.autocast():
            return model(part, (branch,), **maps)[branch]

    if windows is None:
        return read_ids(see(image), model.readout, image.shape[-2:])
    if maps:
        raise ConfigError(
            f"data.evaluation=sliding: the network reads {', '.join(model.reads_extra)} of whole images; take whole "
            "or crop"
        )
    values, merged = (lambda part: small_values(see(part), model.readout)), merged_outputs(model.readout)
    return torch.stack([sliding_ids(values, one, windows, merged) for one in image])


@torch.no_grad()
def evaluate(
    model: SegmentationModel,
    sources: Sequence[Source],
    datasets: Mapping[str, Dataset],
    data: DataConfig,
    accelerator: Accelerator,
    progress: Progress,
    *,
    batch: int,
    title: str,
    predict: Predict | None = None,
    outputs: Mapping[str, int] | None = None,
    metrics: Collection[str] = (),
    keep: int = 4,
    between: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Count predictions against labels. Every sample is counted exactly once over all processes.

    Args:
        data: the settings that say how images are read and brought to the network.
        batch: number of images predicted at once.
        predict: the function that predicts images; default: with the branch of their source.
        outputs: name of a source -> number of classes to count; default the number of outputs of its branch.
        metrics: further scores, as the setting `metrics` names them.
        keep: number of samples to keep for pictures, for each name.
        between: called after every batch; may raise an exception to stop.

    Raises:
        DataError: a sample cannot be read.
    """
    model.to(accelerator.device).eval()
    device, windows = accelerator.device, InputForm.of_config(data).windows(batch)
    outputs = outputs or {s.name: model.head(s.branch).num_classes for s in sources}
    matrices = {s.name: ConfusionMatrix(outputs[s.name], s.ignored) for s in sources}
    reduce = all_reduce_sum(accelerator)
    result = Evaluation({s.name: s.branch for s in sources})
    each: dict[str, list[Tensor]] = {name: [] for name in outputs}
    lines: dict[str, list[Tensor]] = {name: [] for name in outputs}
    progress.begin(title, sum(len(s.indices) for s in sources))
    done = 0
    reads = model.reads_extra if predict is None else ()
    for source, view in zip(sources, views_of(sources, datasets, reads), strict=True):
        samples = result.samples.setdefault(source.name, [])
        seen: list[Tensor] = []
        outlined: list[Tensor] = []
        if "per-image" in metrics:
            result.names.setdefault(source.name, []).extend(
                f"{source.split}/{view.split.id(i)}" for i in source.indices
            )
        batches = plain_batches(
            [view],
            data,
            batch=batch,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            pin=device.type == "cuda",
        )
        for loaded in batches:
            image = loaded.normalised(device, data.normalisation)
            if predict is None:
                extra = {name: one.to(device, non_blocking=True) for name, one in loaded.extra.items()}
                prediction = through(model, source.branch, image, accelerator, windows, extra)
            else:
                prediction = predict(source, image)
            # compare bytes with bytes: no copy into a wider type, and no synchronisation with the GPU
            label = loaded.label.to(device, non_blocking=True)
            label = label if label.dtype == torch.uint8 else label.int()
            for one, truth in zip(prediction, label, strict=True):
                matrix = ConfusionMatrix(outputs[source.name], source.ignored)
                matrix.update(one, truth)
                matrices[source.name].merge(matrix)
                seen.append(matrix.sums)  # (3, C)
                if "boundary-iou" in metrics:
                    classes, ignored = outputs[source.name], source.ignored
                    outlined.append(boundary_sums(one, truth, classes, ignored=ignored))
            if len(samples) < keep:
                picture = picture_of(loaded.image[0].permute(1, 2, 0).numpy(), loaded.channels)
                truth = loaded.label[0].numpy()
                samples.append((picture, truth, prediction[0].cpu().numpy().astype(truth.dtype, copy=False)))
            done += len(loaded.ids) * accelerator.num_processes
            progress.update(done)
            between()
        number, classes = len(source.indices), outputs[source.name]
        each[source.name].append(_of_all(seen, number, classes, accelerator))
        if "boundary-iou" in metrics:
            lines[source.name].append(_of_all(outlined, number, classes, accelerator))
    progress.end()
    for name, matrix in matrices.items():
        result.counts[name] = reduce(matrix.counts.to(accelerator.device)).cpu().numpy()
        result.images[name] = torch.cat(each[name]).cpu().numpy().astype(np.uint32)
        if lines[name]:
            result.boundary[name] = torch.cat(lines[name]).cpu().numpy().astype(np.uint32)
    return result


def _of_all(seen: Sequence[Tensor], number: int, classes: int, accelerator: Accelerator) -> Tensor:
    """Gather the per-image sums of a source from all processes.

    Args:
        seen: (3, classes) for each image of this process: true pixels, predicted pixels, and pixels that are both.
            The same of boundary regions.
        number: number of images of the source, over all processes.

    Returns:
        (number, 3, classes) int64 pixel counts, images in order, the same in every process.
    """
    # Each process fills the rows of its own images; the others stay zero, so a sum over processes joins the tables.
    table = torch.zeros(number, 3, classes, dtype=torch.int64, device=accelerator.device)
    if seen:
        table[accelerator.process_index :: accelerator.num_processes] = torch.stack(list(seen)).to(
            table.device
        )
    return all_reduce_sum(accelerator)(table)


def scores_of(
    result: Evaluation, spaces: Mapping[str, LabelSpace], refined: Collection[str] = ()
) -> dict[str, Any]:
    """Compute the scores by name of the results, from the counts alone.

    Args:
        refined: branches that an extension trained without giving them a class: all their classes are old.
    """
    scores = {}
    for name, counts in result.counts.items():
        space = spaces[result.branches[name]]
        sizes = [len(group) for group in space.groups]
        scores[name] = {
            **step_scores(counts, sizes, space.background),
            **_further_scores(result, name, sizes, space.background),
            "branch": result.branches[name],
            "classes": list(space.names),
            "new_classes": list(space.names[-len(space.groups[-1]) :]),
        }
        if result.branches[name] in refined:
            entry = scores[name]
            for key, value in entry.items():
                if isinstance(value, Mapping) and "old" in value:
                    entry[key] = {**value, "old": value["all"], "new": None}
            entry |= {"harmonic_mean": None, "new_classes": []}
    return scores


def _further_scores(
    result: Evaluation, name: str, sizes: Sequence[int], background: int | None
) -> dict[str, Any]:
    """Compute the scores that were asked for in addition."""
    further: dict[str, Any] = {}
    if name in result.boundary:
        further |= boundary_scores(result.boundary[name].sum(0, dtype=np.int64), sizes, background)
    if name in result.names:
        further["per_image"] = image_statistics(result.images[name], result.names[name])
    return further


def user_builder(model: ModelConfig) -> Any:
    """Return the builder of a user-defined architecture, or None for a built-in one.

    Built-in architectures are rebuilt from their stored description.
    """
    return None if model.name in registry.BUILTIN["model"] else registry.resolve("model", model.name)


def score_step(
    folder: RunFolder,
    index: int,
    sources: Sequence[Source],
    datasets: Mapping[str, Dataset],
    data: DataConfig,
    accelerator: Accelerator,
    progress: Progress,
    *,
    batch: int,
    builder: Any = None,
    metrics: Collection[str] = (),
    between: Callable[[], None] = lambda: None,
) -> tuple[Evaluation, dict[str, Any]]:
    """Load a finished step from disk and evaluate it.

    Training and later rescoring (`everseg.engine.rescore`) call this same function, so they give the same numbers.

    Args:
        data: how images are brought to the network.
        batch: images at once.
        builder: builder of the user's architecture, if it is not a built-in one (`user_builder`).
        metrics: further scores, as the setting `metrics` names them.
        between: called after every batch; may raise an exception to stop.

    Returns:
        The counts with some samples, and the scores by name.
    """
    model, spaces, _, _ = folder.load_final(index, builder)
    title = f"step {index}: testing on {'/'.join(sorted({s.split for s in sources}))}"
    result = evaluate(
        model,
        sources,
        datasets,
        data,
        accelerator,
        progress,
        batch=batch,
        title=title,
        metrics=metrics,
        between=between,
    )
    refined: list[str] = []
    if folder.config().scenario.bundle is not None:
        before = folder.about(index - 1).spaces
        refined = [
            b for b, space in spaces.items() if b in before and len(before[b].names) == len(space.names)
        ]
    return result, scores_of(result, spaces, refined)
