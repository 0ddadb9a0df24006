"""Batch norms folded into the convolutions before them, for models that are not trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from everseg.models.adapters.encoders import LibraryEncoder
from everseg.models.blocks import eval_affine
from everseg.models.compensation import compensated
from everseg.models.model import SegmentationModel, frozen_copy

Convolution = nn.Conv2d | nn.ConvTranspose2d


def folded_copy(model: SegmentationModel) -> SegmentationModel:
    """Copy a model for inference: the same function in eval mode, to rounding, with fewer passes over the maps.

    A module's attribute `folds` lists which norms directly follow which of its convolutions: pairs of (names of the
    convolutions, name of the norm). The outputs of several convolutions are concatenated where the norm has as many
    channels as all together, and added where it has as many as each. Norms that branches own stay as they are, as their
    convolution is shared. Where a new convolution stands beside an old one (RCIL), one takes the place of both.

    Args:
        model: in any mode, on any device; left as it is.

    Returns:
        A model in eval mode without gradients. Do not store it as a checkpoint: its weights have other values, and its
        folded norms are gone.
    """
    copy = frozen_copy(model)
    with torch.no_grad():
        for module in [*copy.modules()]:
            for names, norm in getattr(module, "folds", ()):
                _fold(module, names, norm)
        for module in compensated(copy):
            module.unite()
    return copy


def united(model: SegmentationModel, branch: str | None = None) -> SegmentationModel:
    """Give what to run for inference: a folded copy where new convolutions stand beside old ones, else the model.

    Both convolutions of such a network cost twice the time of one.

    Args:
        branch: the only one that will be run. Of another library's encoder with parts per branch the copy holds this
            branch's alone, adapters merged into the weights beside them.
    """
    if branch is not None and isinstance(model.encoder, LibraryEncoder) and model.encoder.by_branch:
        copy = frozen_copy(model)
        copy.encoder = model.encoder.merged(branch).eval().requires_grad_(False)
        return copy
    return folded_copy(model) if compensated(model) else model


def _fold(module: nn.Module, names: Sequence[str], norm_name: str) -> None:
    if getattr(module, norm_name.partition(".")[0]) is None:
        return  # a part that this module was made without
    norm = module.get_submodule(norm_name)
    # A `BranchDict` of norms stays: one convolution cannot hold the scales of several branches.
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
        return
    convolutions = cast(list[Convolution], [module.get_submodule(name) for name in names])
    sizes = [convolution.out_channels for convolution in convolutions]
    scale, shift = eval_affine(norm)
    # Outputs side by side: each convolution gets its slice. Outputs added: each gets the whole scale, and the shift
    # goes to one of them only, since it must be added once.
    if sum(sizes) == len(scale):
        scales, shifts = scale.split(sizes), list(shift.split(sizes))
    else:
        scales, shifts = (scale,) * len(sizes), [shift, *(torch.zeros_like(shift) for _ in sizes[1:])]
    for convolution, factor, offset in zip(convolutions, scales, shifts, strict=True):
        _scale(convolution, factor, offset)
    parent, _, name = norm_name.rpartition(".")
    setattr(module.get_submodule(parent), name, nn.Identity())


def _scale(convolution: Convolution, factor: Tensor, offset: Tensor) -> None:
    """Give a convolution's output a factor and an offset per channel."""
    weight = convolution.weight
    # The weights' dimension of output channels.
    outputs = 1 if isinstance(convolution, nn.ConvTranspose2d) else 0
    shape = [1] * weight.dim()
    shape[outputs] = -1
    # In float64 until the end: the weights are rounded once.
    bias = offset if convolution.bias is None else convolution.bias.double() * factor + offset
    convolution.weight = nn.Parameter((weight.double() * factor.view(shape)).to(weight), requires_grad=False)
    convolution.bias = nn.Parameter(bias.to(weight), requires_grad=False)
