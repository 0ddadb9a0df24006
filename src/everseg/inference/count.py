"""Integer confusion counts of a model over test images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from everseg import registry
from everseg.config.fields import DataConfig, ModelConfig, RunConfig
from everseg.data.base import Dataset
from everseg.data.batches.loader import View, plain_batches
from everseg.data.batches.transforms import normalise
from everseg.distributed import all_reduce_sum
from everseg.inference.windows import sliding_ids
from everseg.labels import LabelSpace
from everseg.losses.argmax import predict_ids
from everseg.metrics import ConfusionMatrix, step_scores
from everseg.models.model import SegmentationModel
from everseg.progress import Progress
from everseg.runs.input_form import InputForm, Windows
from everseg.runs.run_folder import RunFolder
from everseg.scenarios.steps import Source

Predict = Callable[[Source, Tensor], Tensor]
"""Images of a source, (B, 3, H, W) normalised -> (B, H, W) integer train ids on the same device."""


@dataclass
class Evaluation:
    """What one pass over test images gives, by the name of the results (`Source.name`)."""

    branches: dict[str, str]
    """Name -> branch the images went through."""
    counts: dict[str, np.ndarray] = field(default_factory=dict)
    """Name -> (C, C) int64, rows = truth."""
    images: dict[str, np.ndarray] = field(default_factory=dict)
    """Name -> (N, 3, C) uint32: per image, in their order, the true pixels of each class, the predicted ones, both."""
    samples: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = field(default_factory=dict)
    """Name -> a few (image uint8 (H, W, 3), label, prediction) for pictures."""


def views_of(sources: Sequence[Source], datasets: Mapping[str, Dataset]) -> list[View]:
    """Bind the sources of a step to the splits of their data sets."""
    return [
        View(
            datasets[s.dataset].splits[s.split],
            np.asarray(s.indices, np.int64),
            np.frombuffer(s.lut, np.uint8),
            s.branch,
            s.dataset,
        )
        for s in sources
    ]


def through(
    model: SegmentationModel,
    branch: str,
    image: Tensor,
    accelerator: Accelerator,
    windows: Windows | None = None,
) -> Tensor:
    """Send normalised images (B, 3, H, W) through one branch; (B, H, W) uint8 train ids of its arg-max classes.

    Args:
        windows: what each image is seen through; None = all at once.
    """

    def see(part: Tensor) -> Tensor:
        with accelerator.autocast():
            return model(part, (branch,))[branch].logits

    if windows is None:
        return predict_ids(see(image), image.shape[-2:])
    return torch.stack([sliding_ids(see, one, windows) for one in image])


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
    keep: int = 4,
    between: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Count predictions against labels; every sample exactly once over all processes.

    Args:
        data: how images are brought to the network.
        batch: images at once.
        predict: what the model says of the images; default: through their source's own branch.
        outputs: name of a source -> number of classes told apart; default those of its branch.
        keep: how many samples under each name to keep for pictures.
        between: called after every batch; may raise to stop.

    Raises:
        DataError: a sample cannot be read.
    """
    model.to(accelerator.device).eval()
    device, windows = accelerator.device, InputForm.of_config(data).windows(batch)
    predict = predict or (lambda source, image: through(model, source.branch, image, accelerator, windows))
    outputs = outputs or {s.name: model.head(s.branch).num_classes for s in sources}
    matrices = {name: ConfusionMatrix(number) for name, number in outputs.items()}
    reduce = all_reduce_sum(accelerator)
    result = Evaluation({s.name: s.branch for s in sources})
    each: dict[str, list[Tensor]] = {name: [] for name in outputs}
    progress.begin(title, sum(len(s.indices) for s in sources))
    done = 0
    for source, view in zip(sources, views_of(sources, datasets), strict=True):
        samples = result.samples.setdefault(source.name, [])
        seen: list[Tensor] = []
        batches = plain_batches(
            [view],
            data,
            batch=batch,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            pin=device.type == "cuda",
        )
        for loaded in batches:
            image = normalise(loaded.image.to(device, non_blocking=True), data.normalisation)
            prediction = predict(source, image)
            # bytes against bytes: nothing is copied into a wider type, and on a GPU nothing is waited for
            for one, truth in zip(prediction, loaded.label.to(device, non_blocking=True), strict=True):
                matrix = ConfusionMatrix(outputs[source.name])
                matrix.update(one, truth)
                matrices[source.name].merge(matrix)
                seen.append(matrix.sums)
            if len(samples) < keep:
                picture = loaded.image[0].permute(1, 2, 0).numpy()
                samples.append((picture, loaded.label[0].numpy(), prediction[0].cpu().numpy()))
            done += len(loaded.ids) * accelerator.num_processes
            progress.update(done)
            between()
        each[source.name].append(_of_all(seen, len(source.indices), outputs[source.name], accelerator))
    progress.end()
    for name, matrix in matrices.items():
        result.counts[name] = reduce(matrix.counts.to(accelerator.device)).cpu().numpy()
        result.images[name] = torch.cat(each[name]).cpu().numpy().astype(np.uint32)
    return result


def _of_all(seen: Sequence[Tensor], number: int, classes: int, accelerator: Accelerator) -> Tensor:
    """Put together the sums of a source's images from those that each process saw.

    Args:
        seen: per image of this process (3, classes): the true pixels, the predicted ones and those both.
        number: images of the source, in all processes.

    Returns:
        (number, 3, classes) int64 pixels, images in their order, the same in every process.
    """
    table = torch.zeros(number, 3, classes, dtype=torch.int64, device=accelerator.device)
    if seen:
        table[accelerator.process_index :: accelerator.num_processes] = torch.stack(list(seen)).to(
            table.device
        )
    return all_reduce_sum(accelerator)(table)


def scores_of(result: Evaluation, spaces: Mapping[str, LabelSpace]) -> dict[str, Any]:
    """Scores by name of the results, derived from the counts alone."""
    scores = {}
    for name, counts in result.counts.items():
        space = spaces[result.branches[name]]
        scores[name] = {
            **step_scores(counts, [len(group) for group in space.groups], space.background),
            "branch": result.branches[name],
            "classes": list(space.names),
            "new_classes": list(space.names[-len(space.groups[-1]) :]),
        }
    return scores


def user_builder(model: ModelConfig) -> Any:
    """The user's own architecture; None for built-in ones, which are rebuilt from their description."""
    return None if model.name in registry.BUILTIN["model"] else registry.resolve("model", model.name)


def score_step(
    config: RunConfig,
    datasets: Mapping[str, Dataset],
    sources: Sequence[Source],
    folder: RunFolder,
    index: int,
    accelerator: Accelerator,
    progress: Progress,
    between: Callable[[], None] = lambda: None,
) -> tuple[Evaluation, dict[str, Any]]:
    """Evaluate a finished step as it lies on disk: during a run and afterwards the same function, the same number.

    Args:
        between: called after every batch; may raise to stop.

    Returns:
        The counts with some samples, and the scores by name.
    """
    model, spaces, _, _ = folder.load_final(index, user_builder(config.model))
    title = f"step {index}: testing on {'/'.join(sorted({s.split for s in sources}))}"
    result = evaluate(
        model,
        sources,
        datasets,
        config.data,
        accelerator,
        progress,
        batch=config.train.eval_batch,
        title=title,
        between=between,
    )
    return result, scores_of(result, spaces)
