"""STAR: what is kept of every class's features, features made from it, and losses on features.

Features f are (B, D, h, w), a label at their size is (B, h, w). A feature has a direction f / |f| and a norm |f|. Of
each class are kept the prototype p (the normalised sum of its directions), how directions spread around it, and mean
and deviation of the norms. From these, features of the class are drawn in later steps, which have no images of it.

Source: Chen et al. (STAR), "Saving 100x Storage: Prototype Replay for Reconstructing Training Sample Distribution in
Class-Incremental Semantic Segmentation", NeurIPS 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from everseg.losses.pixelwise import full_precision
from everseg.losses.prototypes import ByClass


@dataclass(frozen=True)
class Moments:
    """Sums over the pixels of each of C classes, float64. Those of several batches or processes add up."""

    packed: Tensor
    """(C, 2 D + 3): sums of directions, of their squares, of norms, of squared norms, and the number of pixels."""

    @classmethod
    def of(cls, features: Tensor, label: Tensor, num_classes: int) -> Moments:
        """Sum over one batch.

        Args:
            features: (B, D, h, w); no gradient flows.
            label: (B, h, w) integers; what is outside [0, C), such as 255, is left out.
            num_classes: C.

        Raises:
            ValueError: sizes that do not fit.
        """
        features = features.detach().double()
        norms = features.norm(dim=1, keepdim=True)
        directions = F.normalize(features, dim=1)
        sorted_ = ByClass(directions, label, num_classes)
        values = torch.cat([directions, directions.square(), norms, norms.square()], dim=1).flatten(2)
        return cls(torch.cat([sorted_.sums(values), sorted_.count[:, None].double()], dim=1))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.packed + other.packed)

    @property
    def count(self) -> Tensor:
        """(C,) pixels of each class."""
        return self.packed[:, -1]

    def prototypes(self) -> Tensor:
        """Normalised sums of directions, (C, D); 0 for classes without a pixel."""
        return F.normalize(self._sums, dim=1)

    def norms(self) -> tuple[Tensor, Tensor]:
        """Mean (C,) and unbiased deviation (C,) of the norms; 0 where there are too few pixels."""
        total, squares = self.packed[:, -3], self.packed[:, -2]
        mean = total / self.count.clamp(min=1)
        variance = (squares - self.count * mean.square()) / (self.count - 1).clamp(min=1)
        return mean, variance.clamp(min=0).sqrt()

    def noise(self, prototypes: Tensor) -> Tensor:
        """Root mean square distance of directions from prototypes (C, D), dimension by dimension, (C, D)."""
        # sum (u - p)^2 = sum u^2 - 2 p sum u + n p^2, so that one pass over the images serves.
        depth = self._sums.shape[1]
        squares, count = self.packed[:, depth : 2 * depth], self.count[:, None]
        total = squares - 2 * prototypes * self._sums + count * prototypes.square()
        return (total / count.clamp(min=1)).clamp(min=0).sqrt()

    @property
    def _sums(self) -> Tensor:
        return self.packed[:, : (self.packed.shape[1] - 3) // 2]


def drawn_features(of: Tensor, prototypes: Tensor, noise: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Draw features of old classes: (p + e noise) * (e' deviation + mean), with e, e' normal in every dimension.

    Args:
        of: (n,) integers, the class of each.
        prototypes: (K, D).
        noise: (K, D), spread of the directions.
        mean: (K,), of the norms.
        deviation: (K,), of the norms.

    Returns:
        (1, D, n, 1).

    >>> drawn_features(torch.tensor([0, 0]), torch.eye(1), torch.zeros(1, 1), torch.ones(1), torch.zeros(1)).flatten()
    tensor([1., 1.])
    """
    rows = prototypes[of]  # (n, D)
    directions = rows + torch.randn_like(rows) * noise[of]
    norms = torch.randn_like(rows) * deviation[of, None] + mean[of, None]
    return (directions * norms).t()[None, :, :, None]


def class_shares(label: Tensor, size: tuple[int, int] | torch.Size, first: int, last: int) -> Tensor:
    """Resize the masks of some classes bilinearly to the size of a feature map, without making them at full size.

    Shrinking reads the four pixels around each middle, as torch's `interpolate` does, and not all: so do the authors.

    Args:
        label: (B, H, W) integers.
        size: (h, w), corners not aligned.
        first: first class.
        last: one past the last.

    Returns:
        (B, last - first, h, w) float64, values in [0, 1].

    >>> class_shares(torch.tensor([[[0, 0, 0, 0], [0, 2, 1, 0], [0, 2, 2, 0], [0, 0, 0, 0]]]), (1, 1), 1, 3).flatten()
    tensor([0.2500, 0.7500], dtype=torch.float64)
    """
    (rows, above), (columns, left) = (
        _neighbours(large, small, label.device) for large, small in zip(label.shape[-2:], size, strict=True)
    )
    near = label[:, rows[:, :, None, None], columns]  # (B, 2, h, 2, w)
    masks = near[:, None] == torch.arange(first, last, device=label.device).view(-1, 1, 1, 1, 1)
    return torch.einsum("bnyixj,yi,xj->bnij", masks.double(), above, left)


def _neighbours(large: int, small: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The two pixels on both sides of each of `small` points of an axis, (2, small), and their weights."""
    at = ((torch.arange(small, dtype=torch.float64) + 0.5) * (large / small) - 0.5).clamp(min=0)
    before = at.floor().clamp(max=large - 1)
    share = at - before
    places = torch.stack([before, (before + 1).clamp(max=large - 1)]).long()
    return places.to(device), torch.stack([1 - share, share]).to(device)


def masked_feature_distillation(features: Tensor, teacher_features: Tensor, mask: Tensor) -> Tensor:
    """Squared difference of features where a mask is set: sum_m m |f - f_old|^2 / (D sum m).

    Args:
        features: (B, D, h, w).
        teacher_features: the same shape; no gradient flows.
        mask: (B, h, w), weights in [0, 1].

    Returns:
        Scalar >= 0. With an empty mask it is 0 with gradient 0, where the authors' code gives nan.

    Raises:
        ValueError: shapes that do not fit.
    """
    if features.shape != teacher_features.shape or mask.shape != features[:, 0].shape:
        raise ValueError(
            f"masked_feature_distillation: expected features of one shape and a mask (B, h, w), got "
            f"{tuple(features.shape)}, {tuple(teacher_features.shape)} and {tuple(mask.shape)}"
        )
    features = full_precision(features)
    gaps = (features - teacher_features.detach().to(features)).square() * mask[:, None]
    total = mask.sum() * features.shape[1]
    return gaps.sum() / torch.where(total > 0, total, torch.ones_like(total))


def prototype_contrast(features: Tensor, masks: Tensor, prototypes: Tensor) -> Tensor:
    """Push the centres of new classes away from old prototypes: mean of 1 / distance to the nearest one.

    The centre of a class in the batch is the normalised sum of its directions, weighted by its mask. A class that the
    batch does not hold has the centre 0, and so a distance of 1 without gradient.

    Args:
        features: (B, D, h, w).
        masks: (B, N, h, w), of each new class.
        prototypes: (K, D), of the old classes, of norm 1; a class without has 0, and pushes nothing.

    Returns:
        Scalar >= 0.

    Raises:
        ValueError: shapes that do not fit.
    """
    if masks.shape[::2] != features.shape[::2] or prototypes.shape[1] != features.shape[1]:
        raise ValueError(
            f"prototype_contrast: expected features (B, D, h, w), masks (B, N, h, w) and prototypes (K, D), got "
            f"{tuple(features.shape)}, {tuple(masks.shape)} and {tuple(prototypes.shape)}"
        )
    directions = F.normalize(full_precision(features), dim=1)
    centres = F.normalize(torch.einsum("bdhw,bnhw->nd", directions, masks.to(directions)), dim=1)
    # Differences and not products: near 0 the latter lose their digits.
    prototypes = prototypes.to(centres)
    distances = (centres[:, None] - prototypes[None]).norm(dim=2)  # (N, K)
    distances = distances.masked_fill(~prototypes.any(dim=1), torch.inf)
    return distances.amin(dim=1).clamp(min=1e-6).reciprocal().mean()
