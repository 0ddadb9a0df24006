"""What the images of a branch look like to the encoder: mean and covariance of their pooled features."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from everseg.errors import CheckpointError, some

MOST_FEATURES = 1024
"""Largest number of features. A wider map's neighbouring channels are averaged: a covariance has its square."""
MOST_IMAGES = 512
"""Largest number of images that a branch is measured on in a step. More change the choice little."""
SHRINKAGE = 0.5
"""Share of the covariances' diagonal in the covariance that distances are measured by. A few dozen images say little
about how hundreds of features go together. 0.1 chooses a little worse (docs/results/camvid-domains.md)."""
_KEYS = ("count", "mean", "covariance")


@dataclass(frozen=True)
class DomainStatistics:
    """Statistics of D features over the training images of a branch."""

    count: int
    """Number of images."""
    mean: Tensor
    """(D,) float64."""
    covariance: Tensor
    """(D, D) float64, divided by `count`."""

    def joined(self, other: DomainStatistics) -> DomainStatistics:
        """The statistics of both's images together."""
        count = self.count + other.count
        share = other.count / count
        gap = other.mean - self.mean
        covariance = (1 - share) * self.covariance + share * other.covariance
        between = share * (1 - share) * torch.outer(gap, gap)
        return DomainStatistics(count, self.mean + share * gap, covariance + between)


def statistics_of(features: Tensor, total: Callable[[Tensor], Tensor] = lambda own: own) -> DomainStatistics:
    """Statistics of the features of a branch's images.

    Args:
        features: (N, D) float64.
        total: sums a tensor over the processes that hold features; N may be 0 in some of them.
    """
    count = int(total(torch.tensor(len(features))))
    mean = total(features.sum(dim=0)) / count
    centred = features - mean
    return DomainStatistics(count, mean, total(centred.T @ centred) / count)


def pool(map: Tensor) -> Tensor:
    """Features of each image: the mean and the deviation of each of a map's channels.

    Means alone choose worse (docs/results/camvid-domains.md).

    Args:
        map: (B, C, H, W).

    Returns:
        (B, D) float64 on the CPU, D = 2 C and at most `MOST_FEATURES`.
    """
    variance, mean = torch.var_mean(map.detach().float(), dim=(2, 3), correction=0)
    each = torch.stack([mean, variance.sqrt()], dim=1).double().cpu()  # (B, 2, C)
    if each.shape[2] > MOST_FEATURES // 2:
        each = F.adaptive_avg_pool1d(each, MOST_FEATURES // 2)
    return each.flatten(1)


def mahalanobis(features: Tensor, domains: Mapping[str, DomainStatistics]) -> Tensor:
    """Squared distance of every image from every domain, per feature.

    All domains are measured by one covariance, the mean of theirs weighted by their images (as in Lee et al., NeurIPS
    2018), with a share of its diagonal. So a domain of few images, whose own covariance is hardly known, is no nearer
    and no farther than others.

    Args:
        features: (B, D) float64.

    Returns:
        (B, T) float64, >= 0.
    """
    every = list(domains.values())
    images = sum(one.count for one in every)
    within = torch.stack([one.count / images * one.covariance for one in every]).sum(dim=0)
    variances = within.diagonal().clamp(min=0)
    within = (1 - SHRINKAGE) * within + SHRINKAGE * torch.diag(variances)
    # A feature that never changes (a dead channel) must not divide by 0.
    within = within + torch.eye(len(within), dtype=within.dtype) * (1e-6 * variances.mean() + 1e-12)
    root = torch.linalg.cholesky(within)
    distances = [
        torch.linalg.solve_triangular(root, (features - one.mean).T, upper=False).square().mean(dim=0)
        for one in every
    ]
    return torch.stack(distances, dim=1)


# ---------------------------------------------------------------- stored


def to_tensors(domains: Mapping[str, DomainStatistics]) -> dict[str, Tensor]:
    """Name the statistics of all branches as tensors, for a file."""
    found: dict[str, Tensor] = {}
    for branch, one in domains.items():
        values = torch.tensor(one.count), one.mean, one.covariance
        found |= {f"{branch}.{key}": value for key, value in zip(_KEYS, values, strict=True)}
    return found


def of_tensors(
    tensors: Mapping[str, Tensor], branches: Collection[str], where: str
) -> dict[str, DomainStatistics]:
    """Read `to_tensors` back.

    Args:
        branches: those of the model.
        where: the file, for the message.

    Raises:
        CheckpointError: it holds anything else; the message lists the faults together.
    """
    problems: list[str] = []
    found: dict[str, DomainStatistics] = {}
    owners = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    for branch in owners:
        parts = {key: tensors.get(f"{branch}.{key}") for key in _KEYS}
        own = {name for name in tensors if name.rpartition(".")[0] == branch}
        if branch not in branches:
            problems.append(f"'{branch[:60]}': no branch of the model")
        elif own != {f"{branch}.{key}" for key in _KEYS}:
            problems.append(f"'{branch}': expected {', '.join(_KEYS)}")
        elif wrong := _wrong(*(value for value in parts.values() if value is not None)):
            problems.append(f"'{branch}': {wrong}")
        else:
            count, mean, covariance = (value for value in parts.values() if value is not None)
            found[branch] = DomainStatistics(int(count), mean, covariance)
    if len({len(one.mean) for one in found.values()}) > 1:
        problems.append("the branches have unequal numbers of features")
    if problems:
        raise CheckpointError(
            f"{where} is damaged: {some(problems, 8, between='; ')}; restore it or start again under another name"
        )
    return found


def _wrong(count: Tensor, mean: Tensor, covariance: Tensor) -> str:
    """Say what is wrong with the statistics of a branch; "" = nothing."""
    if count.dtype != torch.int64 or count.ndim or not 1 <= int(count) < 2**53:
        return "count: expected a whole number of images"
    if mean.dtype != torch.float64 or mean.ndim != 1 or not 1 <= len(mean) <= MOST_FEATURES:
        return f"mean: expected 1 to {MOST_FEATURES} numbers of 64 bits"
    if covariance.dtype != torch.float64 or covariance.shape != (len(mean), len(mean)):
        return f"covariance: expected {len(mean)} x {len(mean)} numbers of 64 bits"
    if not bool(mean.isfinite().all()) or not bool(covariance.isfinite().all()):
        return "values that are not finite"
    # Of real images it is symmetric, and no sum of features varies less than not at all, but for rounding.
    scale = float(covariance.abs().max()) + 1e-30
    if float((covariance - covariance.T).abs().max()) > 1e-9 * scale:
        return "covariance: not symmetric"
    rounding = 1e-9 * scale * len(mean) * torch.eye(len(mean), dtype=torch.float64)
    if int(torch.linalg.cholesky_ex(covariance + rounding).info):
        return "covariance: no covariance of anything"
    return ""
