"""Encoder features of the same pixels before and after a step, and how far the class centres moved (floor 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from everseg.distributed import derive_seed
from everseg.errors import CheckpointError, DataError
from everseg.labels import IGNORED, LabelSpace
from everseg.metrics import defined_mean
from everseg.models.model import SegmentationModel
from everseg.scenarios.steps import Source

_LEAST_PIXELS = 4
TAP = "encoder"
"""Whose features are compared: the encoder's last map."""

Batches = Callable[[Source], Iterable[tuple[Tensor, Tensor, Sequence[str]]]]
"""Source -> its batches: normalised images (B, 3, H, W), labels (B, H, W) on the CPU, names."""


@dataclass(frozen=True)
class Pixels:
    """The same P pixels as two models see them, sorted by domain and class, in random order within."""

    before: np.ndarray
    """(P, C) float32 features of the earlier model."""
    after: np.ndarray
    """(P, C) float32 features of the later model."""
    label: np.ndarray
    """(P,) int64, index into `classes`."""
    domain: np.ndarray
    """(P,) int64, index into `domains`."""
    classes: tuple[str, ...]
    domains: tuple[str, ...]

    def groups(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Domain, class and positions of its pixels, for every pair that has some."""
        for domain, label in np.unique(np.stack([self.domain, self.label], 1), axis=0).tolist():
            yield domain, label, np.flatnonzero((self.domain == domain) & (self.label == label))


@dataclass(frozen=True)
class Drift:
    """How one class moved in one domain; distances in units of the features."""

    domain: str
    class_name: str
    pixels: int
    distance: float
    """Euclidean, from the centre before to the centre after."""
    spread: float
    """Mean Euclidean distance of the pixels before to their centre before."""
    relative: float | None
    """distance / spread; None where the spread is 0."""
    cosine: float | None
    """Cosine similarity of the two centres; None where one is 0."""
    accuracy_before: float
    """Part of the pixels whose nearest centre (of the domain's classes, before) is their own class's, before."""
    accuracy_after: float
    """The same of the features after, still with the centres of before."""


def labels_at(label: Tensor, size: tuple[int, int]) -> Tensor:
    """Label of the pixel under the centre of every cell of a feature map (nearest neighbour).

    Args:
        label: (B, H, W).
        size: height and width of the map, h and w.

    Returns:
        (B, h, w) of the same type.
    """
    rows, columns = (
        (2 * torch.arange(n) + 1) * full // (2 * n) for n, full in zip(size, label.shape[-2:], strict=True)
    )
    return label[:, rows][:, :, columns]


class _Draw:
    """Keeps, of all pixels shown to it, the `limit` with the smallest keys; whatever their order."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.keys = np.empty(0)
        self.features: np.ndarray | None = None

    def add(self, keys: np.ndarray, cells: np.ndarray, maps: Tensor) -> None:
        """Show the cells (M,) of one image with their keys (M,), and where to read them: maps (2, C, h * w)."""
        best = np.argsort(keys)[: self.limit]
        if len(self.keys) == self.limit:
            best = best[keys[best] < self.keys[-1]]
        if not len(best):
            return
        found = maps[:, :, torch.from_numpy(cells[best]).to(maps.device)].permute(2, 0, 1).cpu().numpy()
        features = found if self.features is None else np.concatenate([self.features, found])
        merged = np.concatenate([self.keys, keys[best]])
        order = np.argsort(merged)[: self.limit]
        self.keys, self.features = merged[order], features[order]


@torch.no_grad()
def draw_pixels(
    models: tuple[SegmentationModel, SegmentationModel],
    sources: Sequence[Source],
    spaces: Mapping[str, LabelSpace],
    batches: Batches,
    *,
    limit: int,
    seed: int,
    shown: Callable[[int], None] = lambda _: None,
) -> Pixels:
    """Encoder features of the same labelled pixels in two models, each domain through its own branch.

    The draw is a function of the seed, the domain and the samples' names alone: every cell of a sample's feature
    map gets a random key, and the smallest keys of each class and domain are kept. Ignored pixels are left out.

    Args:
        models: before and after, in eval mode.
        sources: labelled images.
        spaces: branch -> label space of the sources' train ids.
        batches: reads a source.
        limit: most pixels per class and domain.
        seed: of the draw.
        shown: called with the number of images seen.

    Raises:
        DataError: fewer than four labelled pixels in all.
        CheckpointError: features that are not finite.
    """
    draws: dict[tuple[str, str], _Draw] = {}
    done = 0
    for source in sources:
        names = spaces[source.branch].names
        for image, label, ids in batches(source):
            both = [model(image, (source.branch,))[source.branch].features[TAP].float() for model in models]
            maps = torch.stack(both, 1)
            cells_of = labels_at(label, (maps.shape[-2], maps.shape[-1])).flatten(1).numpy()
            for pair, labels, sample in zip(maps.flatten(3), cells_of, ids, strict=True):
                keys = np.random.default_rng(derive_seed(seed, source.name, sample)).random(len(labels))
                for train_id in np.unique(labels[labels != IGNORED]).tolist():
                    cells = np.flatnonzero(labels == train_id)
                    draw = draws.setdefault((source.name, names[train_id]), _Draw(limit))
                    draw.add(keys[cells], cells, pair)
            done += len(ids)
            shown(done)
    domains = tuple(dict.fromkeys(source.name for source in sources))
    classes = tuple(dict.fromkeys(name for source in sources for name in spaces[source.branch].names))
    return _pixels(draws, domains, classes)


def _pixels(
    draws: Mapping[tuple[str, str], _Draw], domains: tuple[str, ...], classes: tuple[str, ...]
) -> Pixels:
    parts = sorted(
        ((domains.index(d), classes.index(c), draw.features) for (d, c), draw in draws.items()),
        key=lambda part: part[:2],
    )
    features = [part[2] for part in parts if part[2] is not None]
    total = sum(map(len, features))
    if total < _LEAST_PIXELS:
        raise DataError(
            f"the test images show {total} labelled pixels at the size of the encoder's map; "
            f"features need {_LEAST_PIXELS} at least"
        )
    both = np.concatenate(features)
    if not np.isfinite(both).all():
        raise CheckpointError("the model's features are not finite numbers; the training of a step diverged")
    counts = [len(part) for part in features]
    domain, label = (np.repeat(np.array([part[i] for part in parts], np.int64), counts) for i in (0, 1))
    return Pixels(both[:, 0], both[:, 1], label, domain, classes, domains)


def class_drift(pixels: Pixels) -> list[Drift]:
    """How far every class centre moved, and what that does to nearest-centre classification, per domain.

    A centre is the mean of a class's features in one domain; float64.
    """
    rows = []
    groups = list(pixels.groups())
    before, after = pixels.before.astype(np.float64), pixels.after.astype(np.float64)
    for domain in dict.fromkeys(group[0] for group in groups):
        mine = [(label, at) for d, label, at in groups if d == domain]
        centres = np.stack([before[at].mean(0) for _, at in mine])
        for number, (label, at) in enumerate(mine):
            old, new = centres[number], after[at].mean(0)
            distance = float(np.linalg.norm(new - old))
            spread = float(np.linalg.norm(before[at] - old, axis=1).mean())
            size = float(np.linalg.norm(old) * np.linalg.norm(new))
            rows.append(
                Drift(
                    domain=pixels.domains[domain],
                    class_name=pixels.classes[label],
                    pixels=len(at),
                    distance=distance,
                    spread=spread,
                    relative=distance / spread if spread else None,
                    cosine=float(old @ new) / size if size else None,
                    accuracy_before=float((_nearest(before[at], centres) == number).mean()),
                    accuracy_after=float((_nearest(after[at], centres) == number).mean()),
                )
            )
    return rows


def _nearest(features: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Index of the nearest centre, (n, C) and (K, C) -> (n,)."""
    return ((centres**2).sum(1) - 2 * features @ centres.T).argmin(1)


def mean_drift(rows: Sequence[Drift]) -> dict[str, float | None]:
    """Unweighted mean over classes of every number; None values are left out."""
    keys = ("distance", "spread", "relative", "cosine", "accuracy_before", "accuracy_after")
    return {key: defined_mean(getattr(row, key) for row in rows) for key in keys}
