"""Choose the branch of an image whose domain is not known.

Where each branch has batch norms of its own, their running statistics say what its images look like. Otherwise the
statistics of pooled features say it, which are measured at the end of each branch's training and stored with the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from everseg.errors import ConfigError
from everseg.models.blocks import BranchDict
from everseg.models.domain_statistics import mahalanobis, pool
from everseg.models.model import SegmentationModel


def infer_branch(model: SegmentationModel, image: Tensor, branches: Sequence[str] | None = None) -> list[str]:
    """Choose a branch for every image: the one whose statistics the image fits best.

    Args:
        model: a model whose encoder has batch norms per branch, or that holds `domain_statistics` of its branches.
        image: (B, 3, H, W) float, normalised.
        branches: the candidates; None = all.

    Returns:
        One branch per image; of equal ones the earliest.

    Raises:
        ConfigError: unknown branch, or branches without statistics.
    """
    names = model.branches if branches is None else tuple(branches)
    return [names[i] for i in branch_distances(model, image, names).argmin(dim=1).tolist()]


@torch.no_grad()
def branch_distances(
    model: SegmentationModel, image: Tensor, branches: Sequence[str] | None = None
) -> Tensor:
    """Measure the distance of every image from the images that each branch was trained on.

    Batch norms per branch: each branch is run in eval mode. At each of its own norms, the mean and variance per channel
    of one image's input are compared with the running mean and variance, as two Gaussians:
    KL(image || branch) = (ln(v_b / v_i) + (v_i + (m_i - m_b)^2) / v_b - 1) / 2, the norm's eps added to both variances.
    Only the encoder's norms count: behind an encoder that all branches share, what the decoders' norms see in eval
    mode is not what they saw in training.

    Else: the first branch is run in eval mode, and the image's features are compared with the statistics of each
    branch; see `mahalanobis`.

    Args:
        model: as for `infer_branch`; comes back in the mode it was in.
        image: (B, 3, H, W) float, normalised.
        branches: the T branches compared; None = all.

    Returns:
        (B, T) float, >= 0: the mean over channels of a norm, then over norms; or the mean over features. Its absolute
        size means nothing; compare the branches of one image.

    Raises:
        ConfigError: unknown branch, or branches without statistics.
    """
    names = model.branches if branches is None else tuple(branches)
    for name in names:
        model.head(name)  # raises for an unknown branch
    norms = {name: _own_norms(model, name) for name in names}
    if not names or not all(norms.values()):
        return _feature_distances(model, image, names)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    # Only the encoder is run. Each norm belongs to one branch, so a hook on it knows whose distance it measures.
    with _evaluating(model), _watching(norms, found):
        model.encoder(image, names)
    return torch.stack([torch.stack(found[name]).mean(dim=0) for name in names], dim=1)


def needs_statistics(model: SegmentationModel) -> bool:
    """Whether a choice between the branches needs `domain_statistics`: they have no batch norms of their own."""
    return not all(_own_norms(model, name) for name in model.branches)


def can_choose(model: SegmentationModel) -> bool:
    """Whether there are several branches, and what a choice between all of them needs."""
    known = model.branches if not needs_statistics(model) else model.domain_statistics
    return len(model.branches) > 1 and all(branch in known for branch in model.branches)


@torch.no_grad()
def features_of(model: SegmentationModel, image: Tensor) -> Tensor:
    """The features that a choice compares, (B, C, H, W) -> (B, D) float64 on the CPU.

    They are means and deviations of the encoder's finest map. What one domain differs in from another (light, colour,
    texture) is seen there, and what the images show is not yet. Where the encoder has parts per branch it is run
    through the first one, which later steps leave as it is: all branches are compared by the same features.

    Args:
        model: comes back in the mode it was in.
        image: (B, C, H, W) float, normalised.
    """
    first = model.branches[0]
    with _evaluating(model):
        maps = model.encoder(image, (first,))[first] if model.is_by_branch else model.encode(image)
    return pool(maps[next(iter(maps))])


def _feature_distances(model: SegmentationModel, image: Tensor, names: Sequence[str]) -> Tensor:
    known = model.domain_statistics
    missing = [name for name in names if name not in known]
    if missing or not names:
        raise ConfigError(
            "the branch cannot be found from the image: the model has no batch norms of its own for each branch, and "
            f"no statistics of features are stored for {', '.join(missing) or 'it'}; name the branch (--domain). A run "
            "over domains stores them, and so does an export with the training images at hand: export again with this "
            "everseg, and extend that bundle"
        )
    features = features_of(model, image)
    if features.shape[1] != len(known[names[0]].mean):
        raise ConfigError(
            f"the branch cannot be found from the image: the stored statistics are of {len(known[names[0]].mean)} "
            f"features, and the encoder gives {features.shape[1]}; name the branch (--domain)"
        )
    return mahalanobis(features, {name: known[name] for name in names})


def _own_norms(model: SegmentationModel, branch: str) -> list[_NormBase]:
    """The batch norms of the encoder that only this branch owns."""
    owned = [m[branch] for m in model.encoder.modules() if isinstance(m, BranchDict) and branch in m]
    norms = [m for entry in owned for m in entry.modules() if isinstance(m, _NormBase)]
    return [norm for norm in norms if norm.running_mean is not None]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _watching(norms: dict[str, list[_NormBase]], found: dict[str, list[Tensor]]) -> Iterator[None]:
    """Note the distance at every norm that runs."""

    def note(branch: str, norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        found[branch].append(_distance(cast(_NormBase, norm), inputs[0]))

    handles = [
        norm.register_forward_pre_hook(partial(note, branch)) for branch in norms for norm in norms[branch]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _distance(norm: _NormBase, input: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,): mean over channels of the divergence of an image's values from the running statistics."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    x = input if input.dtype == torch.float64 else input.float()
    # A map of one cell has variance 0: the eps on both sides keeps the logarithm finite.
    variance, mean = torch.var_mean(x, dim=(2, 3), correction=0)  # (B, C) each
    variance, expected = variance + norm.eps, norm.running_var.to(x.dtype) + norm.eps
    gap = (mean - norm.running_mean.to(x.dtype)).square()
    return ((expected / variance).log() + (variance + gap) / expected - 1).mean(dim=1) / 2
