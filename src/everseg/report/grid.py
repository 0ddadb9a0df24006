"""The qualitative grid: test images through every step's model, chosen by a rule the report states (floor 6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from everseg.config.fields import RunConfig
from everseg.data.base import Dataset
from everseg.data.batches.loader import normalised_batches
from everseg.distributed import derive_seed
from everseg.inference.count import views_of
from everseg.labels import IGNORED
from everseg.losses.argmax import predict_ids
from everseg.metrics import ConfusionMatrix, mean_iou
from everseg.runs.folder import RunFolder
from everseg.scenarios.steps import Source

KINDS = ("worst", "median", "best", "random")


@dataclass
class Looked:
    """One test image through the models of the steps."""

    name: str
    """Of the results it belongs to: the domain or branch."""
    id: str
    image: np.ndarray
    """(H, W, 3) uint8, as the model saw it."""
    label: np.ndarray
    """(H, W) train ids, 255 = ignored."""
    predictions: dict[int, np.ndarray] = field(default_factory=dict)
    """Step -> (H, W) train ids; a step that did not know the image's path is missing."""
    score: float | None = None
    """Mean IoU, over this image alone, of the classes that were known before the last step."""
    kind: str = ""


def drawn(sources: Sequence[Source], images: int, seed: int) -> list[Source]:
    """At most so many images of all sources together, shared out evenly, drawn with the seed, in their order."""
    each = max(1, images // max(1, len(sources)))
    result = []
    for source in sources:
        count = min(each, len(source.indices))
        stream = np.random.default_rng(derive_seed(seed, "report", source.name, source.split))
        chosen = np.sort(stream.choice(len(source.indices), count, replace=False)).tolist()
        result.append(replace(source, indices=tuple(source.indices[i] for i in chosen)))
    return [source for source in result if source.indices]


def look(
    folder: RunFolder,
    config: RunConfig,
    sources: Sequence[Source],
    datasets: Mapping[str, Dataset],
    steps: Sequence[int],
    *,
    builder: Any = None,
    shown: Callable[[int], None] = lambda done: None,
) -> list[Looked]:
    """Send the images of the sources through the model of each step.

    Args:
        steps: finished steps, ascending.
        builder: the user's own architecture, if the run has one.
        shown: told how many images are done, over all steps.

    Raises:
        EversegError: a model or an image that cannot be read.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = config.data.model_copy(update={"workers": 0})
    half = config.train.precision == "bf16"
    found: dict[tuple[str, int], Looked] = {}
    done = 0
    for step in steps:
        model = folder.load_final(step, builder)[0].to(device).eval()
        known = folder.spaces(step)
        for source in sources:
            position = 0
            if source.branch not in known or (
                folder.is_fresh(step) and source.name not in folder.paths(step)
            ):
                continue
            for loaded, batch in normalised_batches(
                views_of([source], datasets), data, device, batch=config.train.eval_batch
            ):
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
                    logits = model(batch.image, (source.branch,))[source.branch].logits
                ids = (
                    predict_ids(logits.float(), (batch.image.shape[-2], batch.image.shape[-1])).cpu().numpy()
                )
                for one in range(len(loaded.ids)):
                    entry = found.setdefault(
                        (source.name, position),
                        Looked(
                            source.name,
                            loaded.ids[one],
                            loaded.image[one].permute(1, 2, 0).numpy().copy(),
                            loaded.label[one].numpy().copy(),
                        ),
                    )
                    entry.predictions[step] = ids[one]
                    position += 1
                    done += 1
                    shown(done)
    return list(found.values())


def choose(
    looked: Sequence[Looked],
    old: Mapping[str, Sequence[int]],
    classes: Mapping[str, int],
    each: int,
    seed: int,
) -> list[Looked]:
    """Of each name the worst, median and best images by the score after the last step, and some drawn.

    Args:
        old: name -> train ids that the score is the mean over; those without a true pixel in an image are left out.
        classes: name -> number of classes.
        each: images per kind and name.
        seed: of the draw.

    Returns:
        The chosen ones with `score` and `kind`, in the order of KINDS; images without any of the classes are no
        candidates, and none is chosen twice.
    """
    chosen = []
    for name in dict.fromkeys(one.name for one in looked):
        mine = [one for one in looked if one.name == name and one.predictions]
        for one in mine:
            one.score = image_score(one, old[name], classes[name])
        ranked = sorted(
            (one for one in mine if one.score is not None), key=lambda one: (one.score or 0.0, one.id)
        )
        middle = (len(ranked) - each) // 2
        picks = {
            "worst": ranked[:each],
            "median": ranked[max(middle, 0) :][:each],
            "best": ranked[::-1][:each],
        }
        taken: list[Looked] = []
        for kind, ones in picks.items():
            for one in ones:
                if not any(one is other for other in taken):
                    one.kind = kind
                    taken.append(one)
        rest = [one for one in ranked if not any(one is other for other in taken)]
        stream = np.random.default_rng(derive_seed(seed, "report", name))
        for position in sorted(stream.choice(len(rest), min(each, len(rest)), replace=False).tolist()):
            rest[position].kind = "random"
            taken.append(rest[position])
        chosen += taken
    return chosen


def image_score(one: Looked, classes: Sequence[int], number: int) -> float | None:
    """Mean IoU of some classes in one image after its last step, as a fraction; None if none has a true pixel."""
    matrix = ConfusionMatrix(number)
    last = one.predictions[max(one.predictions)]
    matrix.update(torch.from_numpy(last)[None], torch.from_numpy(one.label)[None])
    value = mean_iou(matrix.counts, classes)
    return None if np.isnan(value) else value


CHANGES = ("right", "forgotten", "learnt", "wrong", "ignored")
CHANGE_COLOURS = ((226, 230, 234), (213, 94, 0), (0, 114, 178), (110, 116, 124), (255, 255, 255))


def change(one: Looked) -> np.ndarray:
    """What became of every pixel over the steps, (H, W) uint8, positions in CHANGES.

    forgotten: right after some earlier step, wrong after the last; learnt: right only after the last; wrong: after
    every step; ignored: not labelled. With one step alone a pixel is right or wrong.
    """
    *earlier, last = sorted(one.predictions)
    right = one.predictions[last] == one.label
    was = right if not earlier else np.any([one.predictions[step] == one.label for step in earlier], axis=0)
    result = np.full(one.label.shape, CHANGES.index("wrong"), np.uint8)
    result[was & right] = CHANGES.index("right")
    result[was & ~right] = CHANGES.index("forgotten")
    result[~was & right] = CHANGES.index("learnt")
    result[one.label == IGNORED] = CHANGES.index("ignored")
    return result
