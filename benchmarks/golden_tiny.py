"""The small network and data of the golden runs `train_*` of the sigmoid, frozen and analytic methods.

Two convolutions stand in for the ResNet; behind them is DeepLabV3's head. Torchvision's form of it, which the authors
took, is everseg's: a 1x1 convolution over joined branches is the sum of one over each. Only names and the places of the
weights differ, which `parts_of` says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.golden_replay import BRANCH, Comparison, difference
from everseg.data.batches.transforms import normalise
from everseg.labels import IGNORED, LabelSpace
from everseg.models.deeplab import DeepLabV3
from everseg.models.model import SegmentationModel
from everseg.scenarios.steps import Source, Step

WIDTH = 6
"""Channels of each branch of the head, and of what it gives."""
RATES = (6, 12, 18)
BODY_MOMENTUM = 0.01
"""Of the body's norms; all others have torch's 0.1."""
Rename = Callable[[str], str]
"""Their name of a tensor of the classifiers -> ours."""


class Body(nn.Module):
    """conv3x3 - norm - ReLU twice, 3 -> 8 -> 12 channels; each divides the size by `stride`."""

    out_channels = 12

    def __init__(self, stride: int = 2, momentum: float = BODY_MOMENTUM) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8, momentum=momentum)
        self.conv2 = nn.Conv2d(8, 12, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(12, momentum=momentum)

    def forward(self, image: Tensor, **wanted: Any) -> dict[str, Tensor]:
        """Give both maps, after their ReLU."""
        first = self.bn1(self.conv1(image)).relu()
        return {"layer1": first, "layer2": self.bn2(self.conv2(first)).relu()}


def tiny_network(stride: int = 2, **head: Any) -> SegmentationModel:
    """Build the network, in float64 and without outputs.

    Args:
        stride: of each of the body's convolutions.
        head: further arguments of `DeepLabV3`.
    """
    body = Body(stride)
    decoder = DeepLabV3(
        body.out_channels, hidden=WIDTH, out_channels=WIDTH, rates=RATES, norm="bn", pool_size=None, **head
    )
    return SegmentationModel(body, decoder, {"name": "golden", "options": {}}).double()


class Part(NamedTuple):
    """Where a part of one of their tensors stands in one of ours."""

    name: str
    """Of our tensor."""
    inside: tuple[int, int] | None = None
    """First and one past the last channel in ours; None = all of it."""


def parts_of(key: str, rename: Rename = lambda key: key) -> tuple[list[Part], int]:
    """Say where one of their tensors stands.

    Args:
        key: their name, with or without "classifier." in front.
        rename: for names that are neither the body's nor the head's.

    Returns:
        Parts, and the dimension along which theirs joins them.
    """
    key = key.removeprefix("module.")
    if key.startswith("backbone."):
        return [Part("encoder." + key.removeprefix("backbone."))], 0
    short = key.removeprefix("classifier.")
    if found := re.fullmatch(r"aspp\.convs\.([0-3])\.0\.weight", short):
        return [Part(f"decoder.aspp.{found[1]}.weight")], 0
    if found := re.fullmatch(r"aspp\.convs\.([0-3])\.1\.(\w+)", short):
        # They have a norm behind each branch, we one over all four.
        first = WIDTH * int(found[1])
        return [Part(f"decoder.aspp_norm.{found[2]}", (first, first + WIDTH))], 0
    if short == "aspp.convs.4.1.weight":
        return [Part("decoder.pool_conv.weight")], 0
    if found := re.fullmatch(r"aspp\.convs\.4\.2\.(\w+)", short):
        return [Part(f"decoder.pool_norm.{found[1]}")], 0
    if short == "aspp.project.0.weight":
        return [Part("decoder.reduce.weight"), Part("decoder.pool_reduce.weight")], 1
    if found := re.fullmatch(r"aspp\.project\.1\.(\w+)", short):
        return [Part(f"decoder.norm.{found[1]}")], 0
    return [Part(rename(short))], 0


def _view(tensors: Mapping[str, Tensor | None], part: Part) -> Tensor | None:
    whole = tensors[part.name]
    return whole if whole is None or part.inside is None else whole[slice(*part.inside)]


def as_theirs(tensors: Mapping[str, Tensor | None], key: str, rename: Rename) -> Tensor | None:
    """One of their tensors, made of ours (weights, buffers or gradients); None where a part is None."""
    parts, along = parts_of(key, rename)
    found = [_view(tensors, part) for part in parts]
    given = [one for one in found if one is not None]
    return torch.cat(given, along) if len(given) == len(found) else None


@torch.no_grad()
def set_weights(model: SegmentationModel, given: Mapping[str, np.ndarray], rename: Rename) -> None:
    """Give weights and statistics their values.

    Args:
        given: their name -> value.
    """
    state = model.state_dict()
    for key, value in given.items():
        parts, along = parts_of(key, rename)
        views = [_view(state, part) for part in parts]
        sizes = [view.shape[along] if view is not None and view.dim() else 1 for view in views]
        for view, piece in zip(views, torch.from_numpy(value).split(sizes, along), strict=True):
            assert view is not None
            view.copy_(piece)


@dataclass
class TinyRun:
    """One file, and what the comparison with it has found so far.

    Images, labels and steps follow from the file; nothing but its name is needed.
    """

    folder: Path
    stem: str

    def __post_init__(self) -> None:
        with np.load(self.folder / f"{self.stem}.npz") as file:
            self.golden = {name: file[name] for name in file.files}
        self.meta: dict[str, Any] = json.loads(str(self.golden["meta"]))
        groups = json.loads(str(self.golden["tasks"]))
        self.groups: list[tuple[int, ...]] = [tuple(groups[str(k)]) for k in range(len(groups))]
        self.found: dict[str, Comparison] = {}
        self.raw = torch.from_numpy(self.golden["data/labels"]).long()
        images = torch.from_numpy(self.golden["data/images"]).permute(0, 3, 1, 2)
        self.images = normalise(images, "imagenet", None).double()
        self.num_train = int(self.golden["data/n_train"])

    @property
    def classes(self) -> tuple[int, ...]:
        """Raw ids of all tasks in order: a class's place is its train id."""
        return tuple(c for group in self.groups for c in group)

    def seen(self, step: int) -> tuple[int, ...]:
        """Raw ids of the classes known after a step, background included."""
        return tuple(c for group in self.groups[: step + 1] for c in group)

    def table(self, labelled: Iterable[int], other: int = 0) -> np.ndarray:
        """A table raw id -> train id: the given classes keep theirs, 255 stays ignored, the rest becomes `other`."""
        table = np.full(256, other, np.uint8)
        table[IGNORED] = IGNORED
        for raw in labelled:
            table[raw] = self.classes.index(raw)
        return table

    def labels(self, which: np.ndarray, labelled: Iterable[int], other: int = 0) -> Tensor:
        """Train ids (B, H, W) of some images; see `table`."""
        return torch.from_numpy(self.table(labelled, other)).long()[self.raw[torch.from_numpy(which)]]

    def step(self, index: int, protocol: str = "") -> Step:
        """A step as the engine would have it: its classes, and the images that its first epoch reads."""
        spaces = LabelSpace(tuple(self.groups[: index + 1]), tuple(f"class {c}" for c in self.seen(index)))
        table = self.table(self.groups[index])
        source = Source(BRANCH, "golden", "train", tuple(range(self.num_train)), bytes(table))
        chosen = protocol or ("overlapped" if self.meta.get("overlap", True) else "disjoint")
        return Step(
            index, (source,), (), {BRANCH: spaces}, {BRANCH: len(self.groups[index])}, protocol=chosen
        )

    def stored(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays whose name begins so, by the rest of their name."""
        return {k.removeprefix(prefix): v for k, v in self.golden.items() if k.startswith(prefix)}

    def compare(self, quantity: str, ours: Any, theirs: Any, scale: Any = None) -> None:
        """Count one comparison; the default scale is theirs, element by element."""
        entry = self.found.setdefault(quantity, Comparison())
        entry.count += np.size(theirs)
        ours = ours.detach().double().numpy() if isinstance(ours, Tensor) else ours
        entry.largest = max(entry.largest, difference(ours, theirs, scale))

    def whole(self, quantity: str, ours: Any, theirs: np.ndarray) -> None:
        """Compare two arrays, relative to the largest value of theirs."""
        self.compare(quantity, ours, theirs, np.abs(theirs).max(initial=0.0) or 1.0)

    def same(self, quantity: str, ours: Any, theirs: np.ndarray) -> None:
        """Compare two arrays of integers: the share of elements that differ."""
        ours = ours.numpy() if isinstance(ours, Tensor) else np.asarray(ours)
        entry = self.found.setdefault(quantity, Comparison())
        entry.count += np.size(theirs)
        share = float((ours != theirs).mean()) if ours.shape == theirs.shape else np.inf
        entry.largest = max(entry.largest, share)

    def compare_weights(self, quantity: str, model: SegmentationModel, prefix: str, rename: Rename) -> None:
        """Compare every weight and statistic that the file holds under a prefix."""
        state = model.state_dict()
        for key, value in self.stored(prefix).items():
            self.whole(quantity, as_theirs(state, key, rename), value)

    def compare_gradients(self, model: SegmentationModel, at: str, iteration: int, rename: Rename) -> None:
        """Compare the norm of every gradient: relative to itself where it counts, and to the whole gradient's norm.

        A gradient that is zero but for rounding (below 1e-10 of the whole) has no digits of its own.
        """
        theirs = self.golden[f"{at}gradnorm"][iteration]
        whole = float(np.linalg.norm(theirs[theirs >= 0]))
        # A weight that was trained in an earlier step keeps its last gradient.
        grads = {name: w.grad if w.requires_grad else None for name, w in model.named_parameters()}
        for key, norm in zip(self.golden[f"{at}names"].tolist(), theirs.tolist(), strict=True):
            ours = as_theirs(grads, key, rename)
            value = -1.0 if ours is None else float(ours.norm())
            self.compare("gradient norms, of the total", value, norm, whole)
            if norm > 1e-10 * whole:
                self.compare("gradient norms", value, norm)

    def confusion(self, predict: Callable[[Tensor, int], Tensor], step: int, *, current: bool) -> np.ndarray:
        """Count the test images as the SSUL family's code does; rows truth.

        Args:
            predict: a normalised image (1, 3, H, W) and its number -> train ids (1, H, W).
            current: only images with a class of the step, where every other class counts as background; else all
                images, where classes not seen yet are left out.
        """
        number = len(self.seen(step))
        counts = np.zeros((number, number))
        for index in range(self.num_train, len(self.raw)):
            which = np.array([index])
            if current:
                own = set(self.groups[step]) - {0}
                if not own & set(self.raw[index].unique().tolist()):
                    continue
                truth = self.labels(which, self.groups[step])
            else:
                truth = self.labels(which, self.seen(step), other=IGNORED)
            found = predict(self.images[index][None], index)
            valid = truth != IGNORED
            place = truth[valid] * number + found[valid]
            counts += torch.bincount(place, minlength=number**2).view(number, number).numpy()
        return counts
