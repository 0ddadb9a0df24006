"""What a deployed model's features were, kept without images: how they are sampled, and what they say later.

An extension asks on stored vectors what it cannot ask on old images: does the class stay that the deployed model
predicted there? Its encoder may have moved, so the vectors are moved first as the features of the new images moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from everseg.data.batches.transforms import normalise, resize_transform
from everseg.labels import LabelSpace
from everseg.models.heads import GrowingHead, Trunk
from everseg.models.model import SegmentationModel
from everseg.runs.input_form import InputForm
from everseg.runs.model_folder import Registry
from everseg.runs.sketch import Sketch, most

_PIXELS = 2048
"""Most cells of an image that the movement of the features is measured at."""
_RIDGE = 1e-2
"""Weight of the squares of the movement's linear part, relative to the mean variance of the features: with few new
images the movement tends to a plain shift, and to none."""


@dataclass(frozen=True)
class Stays:
    """What became of the stored vectors of one class."""

    vectors: int
    kept: int
    """How many of them the extended model gives to the same class."""


def can_sketch(model: SegmentationModel, branch: str) -> bool:
    """Whether a branch's classifiers see one cell of the decoder's map at a time."""
    head = model.head(branch)
    plain = (
        type(head) is GrowingHead
        and not head.future
        and not any(isinstance(one, Trunk) for one in head.classifiers)
    )
    return plain and not model.reads_extra and all(_is_pointwise(one) for one in head.classifiers)


def _is_pointwise(layer: torch.nn.Module) -> bool:
    if isinstance(layer, torch.nn.ConvTranspose2d):
        return layer.kernel_size == layer.stride
    return isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (1, 1)


@torch.no_grad()
def sampled(
    model: SegmentationModel,
    branch: str,
    ids: list[int],
    images: Iterable[Tensor],
    first: Sketch | None = None,
) -> Sketch:
    """Sample the features of some images, evenly over the cells of each class that the model predicts.

    Args:
        model: in eval mode.
        ids: lasting id of each output of the branch.
        images: (B, 3, H, W), normalised, on the model's device.
        first: vectors of earlier steps, as this model has them now. They keep half of the places of a class that the
            images show, and all that the images leave free.
    """
    found: dict[int, list[Tensor]] = {}
    limit = 0
    for image in images:
        vectors = cells(model, branch, image)
        said = predicted(model, branch, vectors)
        limit = most(vectors.shape[1], len(ids))
        for c in said.unique().tolist():
            mine = vectors[said == c]
            # Evenly spread cells of this batch; they are thinned again below.
            chosen = (
                torch.linspace(0, len(mine) - 1, min(len(mine), limit), device=mine.device).round().long()
            )
            found.setdefault(ids[c], []).append(mine[chosen].to(torch.float16).cpu())
    kept = {} if first is None else {int(i): first.features[first.ids == i] for i in first.ids.unique()}
    limit = limit or (0 if first is None else first.most(len(ids)))
    rows, names = list[Tensor](), list[int]()
    for number in sorted({*found, *kept}):
        new = torch.cat(found[number]) if number in found else None
        old = kept.get(number)
        if new is not None and old is not None:
            old = _thinned(old, max(limit // 2, limit - len(new)))
            new = _thinned(new, limit - len(old))
        parts = [_thinned(part, limit) for part in (old, new) if part is not None and len(part)]
        for part in parts:
            part = part[part.isfinite().all(1)]
            rows.append(part)
            names += [number] * len(part)
    width = rows[0].shape[1] if rows else 0
    return Sketch(
        torch.cat(rows) if rows else torch.zeros(0, width, dtype=torch.float16),
        torch.tensor(names, dtype=torch.int32),
    )


def _thinned(vectors: Tensor, number: int) -> Tensor:
    """Evenly spread ones of some vectors."""
    if len(vectors) <= number:
        return vectors
    return vectors[torch.linspace(0, len(vectors) - 1, number).round().long()] if number > 0 else vectors[:0]


@torch.no_grad()
def cells(model: SegmentationModel, branch: str, image: Tensor) -> Tensor:
    """What a branch's classifiers see of normalised images (B, 3, H, W): (B h w, D) float32."""
    features = model(image, (branch,))[branch].features["decoder"].float()
    return features.permute(0, 2, 3, 1).flatten(0, 2)


@torch.no_grad()
def predicted(model: SegmentationModel, branch: str, vectors: Tensor) -> Tensor:
    """The class that a branch's classifiers give to vectors (n, D): (n,) train ids."""
    head = model.head(branch)
    weight = next(head.parameters())
    given = vectors.to(weight.device, weight.dtype)[:, :, None, None]
    logits = torch.cat([head(part).logits[:, :, 0, 0] for part in given.split(8192)])
    return logits.argmax(1)


class Movement:
    """How the features moved from one model to another: f' = f + A f + b, fitted by ridge regression on some images."""

    def __init__(self, width: int) -> None:
        self.gram = torch.zeros(width + 1, width + 1, dtype=torch.float64)
        self.cross = torch.zeros(width + 1, width, dtype=torch.float64)
        self.moved = False

    def add(self, before: Tensor, after: Tensor) -> None:
        """Take in the vectors (n, D) of the same cells by both models."""
        step = max(1, len(before) // _PIXELS)
        x, y = before[::step].double().cpu(), after[::step].double().cpu()
        self.moved |= not torch.equal(x, y)
        x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
        self.gram += x.T @ x
        self.cross += x.T @ (y - x[:, :-1])

    def of(self, vectors: Tensor) -> Tensor:
        """Move vectors (n, D): float32; as they are, if nothing moved."""
        if not self.moved:
            return vectors.float()
        number = self.gram[-1, -1]
        mean = self.gram[-1, :-1] / number
        spread = (self.gram.diagonal()[:-1] / number - mean.square()).mean().clamp(min=1e-12)
        weight = torch.full((len(self.gram),), float(_RIDGE * spread * number), dtype=torch.float64)
        weight[-1] = 0  # the shift is free
        solved = torch.linalg.solve(self.gram + weight.diag(), self.cross)
        x = vectors.double()
        return (x + x @ solved[:-1] + solved[-1]).float()


def movement(
    before: SegmentationModel, after: SegmentationModel, branch: str, images: Iterable[Tensor]
) -> Movement | None:
    """Measure how the features of a branch moved on some normalised images; None without images."""
    found = None
    for image in images:
        x, y = (cells(m, branch, image) for m in (before, after))
        found = found or Movement(x.shape[1])
        found.add(x, y)
    return found


def what_stays(
    after: SegmentationModel, branch: str, old: LabelSpace, sketch: Sketch, moved: Movement
) -> dict[int, Stays]:
    """Ask the extended model's classifiers about stored vectors, moved as the new images' features moved.

    Args:
        old: the classes of the deployed model, under lasting ids.

    Returns:
        Train id -> what became of its vectors; without the background.
    """
    said = predicted(after, branch, moved.of(sketch.features)).cpu().numpy()
    stored = sketch.ids.numpy()
    found = {}
    for c, raw in enumerate(old.order):
        mine = stored == raw
        if c != old.background and raw >= 0 and mine.any():
            found[c] = Stays(int(mine.sum()), int((said[mine] == c).sum()))
    return found


def as_inputs(images: Iterable[np.ndarray], form: InputForm) -> Iterator[Tensor]:
    """Bring images (H, W, channels) to the network, one by one: (1, channels, h, w), normalised."""
    for image in images:
        if form.resized_to is None:
            pixels = np.array(image.transpose(2, 0, 1), order="C")
        else:
            pixels, _ = resize_transform(image, np.zeros(image.shape[:2], np.uint8), size=form.resized_to)
        yield normalise(torch.from_numpy(pixels)[None], form.normalisation, form.channels)


def renewed(
    model: SegmentationModel,
    spaces: Mapping[str, LabelSpace],
    registry: Registry,
    images: Mapping[str, Sequence[np.ndarray]],
    form: InputForm,
    *,
    before: SegmentationModel | None = None,
    old: Mapping[str, Sketch] | None = None,
) -> dict[str, Sketch]:
    """Sample what a finished model sees, for its bundle.

    Args:
        model: in eval mode, on the CPU.
        registry: lasting ids of its classes.
        images: branch -> new images that it predicts, (H, W, channels); {} if there are none.
        form: how images are brought to it.
        before: the deployed model that it was extended from.
        old: the samples of that model. They are moved as the features of the new images moved; without new images they
            go.

    Returns:
        Branch -> its samples, for branches whose classifiers can be asked.
    """
    found = {}
    shown = [image for each in images.values() for image in each]
    for branch, space in spaces.items():
        if not can_sketch(model, branch):
            continue
        first = (old or {}).get(branch)
        if first is not None and before is not None:
            moved = movement(before, model, branch, as_inputs(shown, form))
            first = (
                None if moved is None else replace(first, features=moved.of(first.features).to(torch.float16))
            )
        mine = as_inputs(images.get(branch, ()), form)
        one = sampled(model, branch, registry.ids(space), mine, first)
        if len(one.ids):
            found[branch] = one
    return found


def vector_draws(stays: Stays, number: int, seed: int) -> np.ndarray:
    """Shares of vectors that stay, when as many are drawn with replacement, (number,)."""
    rng = np.random.default_rng([seed, stays.vectors, stays.kept])
    return rng.binomial(stays.vectors, stays.kept / stays.vectors, number) / stays.vectors


def remapped(sketches: Mapping[str, Sketch], ids: Mapping[int, int]) -> dict[str, Sketch]:
    """Give vectors the ids of other classes; those of classes that are not named go.

    Args:
        ids: lasting id -> that of the class that it is now.
    """
    found = {}
    for branch, one in sketches.items():
        now = torch.tensor([ids.get(int(i), -1) for i in one.ids], dtype=torch.int32)
        order = torch.argsort(now, stable=True)
        order = order[now[order] >= 0]
        found[branch] = Sketch(one.features[order], now[order])
    return found
