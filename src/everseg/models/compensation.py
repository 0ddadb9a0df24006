"""RCIL's representation compensation: a new convolution beside an old one, merged into it before each later step.

In the paper the two are "branches"; here a branch is what a domain owns, so they are the old and the new convolution.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from everseg.models.blocks import Restructured, eval_affine
from everseg.models.model import SegmentationModel

ONLY_OLD, ONLY_NEW = 0.33, 0.66
"""Ends of the thirds of [0, 1): a draw below the first takes the old output, below the second the new, else both."""
MERGE, MERGE_EXACTLY = "merge-compensation", "merge-compensation-exactly"
"""The structural changes: with the merged norm kept as an identity norm, as in the authors' code, or without it."""
NEW = "_new"
"""Ending of the names of what stands beside an old part: "conv2_new", "aspp_new.0"."""


class Unit(NamedTuple):
    """Names of convolutions in a module whose concatenated outputs one norm follows."""

    convolutions: tuple[str, ...]
    norm: str

    @property
    def new(self) -> Unit:
        """The names of the new convolutions and their norm."""
        return Unit(tuple(_new(name) for name in self.convolutions), _new(self.norm))

    @property
    def parts(self) -> list[str]:
        """The attributes of the module that hold all of it."""
        return list(dict.fromkeys(name.partition(".")[0] for name in (*self.convolutions, self.norm)))


def _new(name: str) -> str:
    root, dot, rest = name.partition(".")
    return f"{root}{NEW}{dot}{rest}"


def uniform(channels: int, like: Tensor) -> Tensor:
    """Draw a number in [0, 1) per channel, float32, from torch's global generator."""
    return torch.rand(channels, dtype=torch.float32, device=like.device)


def combine(old: Tensor, new: Tensor, draws: Tensor | None = None) -> Tensor:
    """Mean of two outputs (B, C, H, W); with `draws` (C,) in [0, 1): below 0.33 old, below 0.66 new, else the mean."""
    if draws is None:
        return (old + new) / 2
    share = torch.where(draws < ONLY_OLD, 1.0, torch.where(draws < ONLY_NEW, 0.0, 0.5)).to(old)  # (C,)
    share = share.view(1, -1, 1, 1)
    return old * share + new * (1 - share)


class Compensated(Restructured):
    """A module with units of an old and a new convolution, each with its norm; their outputs are combined.

    Eval mode takes the mean of both outputs. Training draws per unit, forward pass and channel: old output, new output
    or mean, a third each, the same for all images and cells. Nothing is re-scaled.

    A merge makes the old convolution compute alone what the mean of both computed in eval mode. From then on it is
    constant: no gradient, no decay, its norm in eval mode. The new convolution keeps its weights, so the module's
    function moves to a quarter of the old and three quarters of the new output.

    Attributes:
        units: () where the module has no new convolutions.
        merged: whether the old convolutions are constant.
        draw: makes the draws of a unit: (channels, a tensor on the device) -> (channels,) in [0, 1).

    Source: Zhang et al., "Representation Compensation Networks", CVPR 2022, section 3.2, as in the authors' code.
    """

    units: tuple[Unit, ...] = ()
    merged: bool = False
    draw: Callable[[int, Tensor], Tensor] = staticmethod(uniform)
    folds: tuple[tuple[tuple[str, ...], str], ...] = ()

    def compensate(self, *units: Unit) -> None:
        """Add a new convolution and norm beside each of these, with fresh weights; in a module just built."""
        self.units = units
        self.changes_known = (MERGE, MERGE_EXACTLY)
        self.folds = (*self.folds, *(unit.new for unit in units))
        for name in (part for unit in units for part in unit.parts):
            new = copy.deepcopy(getattr(self, name))
            for module in new.modules():
                if isinstance(module, nn.Conv2d):
                    module.reset_parameters()
            setattr(self, _new(name), new)

    def combined(self, old: Tensor, new: Tensor) -> Tensor:
        """Combine the outputs (B, C, H, W) of a unit's old and new convolutions."""
        return combine(old, new, self.draw(old.shape[1], old) if self.training else None)

    def restructure(self, name: str) -> None:
        """Merge every unit: `MERGE` or `MERGE_EXACTLY`."""
        for unit in self.units:
            self._merge(unit)
            norm = self.get_submodule(unit.norm)
            if name == MERGE_EXACTLY:
                setattr(self, unit.norm, nn.Identity())
            elif isinstance(norm, _BatchNorm):
                norm.reset_parameters()  # weight 1, bias 0, mean 0, variance 1
        self.merged = True

    @torch.no_grad()
    def _merge(self, unit: Unit) -> None:
        """Write the mean of both convolutions, each followed by its norm, into the old ones, which get a bias."""
        weights: dict[int, Tensor] = {}
        biases: dict[int, Tensor] = {}
        for convolutions, norm in (self._of(unit), self._of(unit.new)):
            sizes = [convolution.out_channels for convolution in convolutions]
            if isinstance(norm, _BatchNorm):
                factor, shift = eval_affine(norm)
            else:  # merged exactly before: the convolution's output goes on as it is
                factor = torch.ones(sum(sizes), dtype=torch.float64, device=convolutions[0].weight.device)
                shift = torch.zeros_like(factor)
            # In float64 until the end: the weights are rounded once. Each convolution gets its slice of the norm.
            slices = zip((factor / 2).split(sizes), (shift / 2).split(sizes), strict=True)
            for number, (convolution, (scale, offset)) in enumerate(zip(convolutions, slices, strict=True)):
                offset = offset if convolution.bias is None else offset + convolution.bias.double() * scale
                weight = convolution.weight.double() * scale.view(-1, 1, 1, 1)
                weights[number] = weights[number] + weight if number in weights else weight
                biases[number] = biases[number] + offset if number in biases else offset
        for number, convolution in enumerate(self._of(unit)[0]):
            convolution.weight.copy_(weights[number])
            convolution.bias = nn.Parameter(biases[number].to(convolution.weight))

    def _of(self, unit: Unit) -> tuple[list[nn.Conv2d], nn.Module]:
        convolutions = [cast(nn.Conv2d, self.get_submodule(name)) for name in unit.convolutions]
        return convolutions, self.get_submodule(unit.norm)

    @property
    def constant(self) -> list[nn.Module]:
        """The merged convolutions and their norms."""
        parts = [self._of(unit) for unit in self.units] if self.merged else []
        return [module for convolutions, norm in parts for module in (*convolutions, norm)]

    def freeze_changed(self) -> None:
        """Take the gradient from merged convolutions and their norms."""
        for module in self.constant:
            module.requires_grad_(False)

    def rest_changed(self) -> None:
        """Put the norms of merged convolutions into eval mode."""
        for module in self.constant:
            module.training = False

    @torch.no_grad()
    def unite(self) -> None:
        """Replace each unit by one convolution with the mean of both weights: for folded copies, which do not train."""
        for unit in self.units:
            (old, norm), (new, new_norm) = self._of(unit), self._of(unit.new)
            if not (isinstance(norm, nn.Identity) and isinstance(new_norm, nn.Identity)):
                continue
            for one, other in zip(old, new, strict=True):
                for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):  # weight and bias
                    ours.copy_((ours.double() + theirs.double()) / 2)
            for name in unit.parts:
                setattr(self, _new(name), None)
        self.units = tuple(unit for unit in self.units if getattr(self, _new(unit.norm)) is not None)


def compensated(model: nn.Module) -> list[Compensated]:
    """The model's modules that have new convolutions."""
    return [module for module in model.modules() if isinstance(module, Compensated) and module.units]


def forget_eps(model: SegmentationModel) -> None:
    """Set eps of the merged norms to nothing, as the authors' code does in memory after a merge.

    Their files do not hold it: a model read from disk has 1e-5 again, and so multiplies the merged convolution's output
    by sqrt(1 + 1e-5) with norm "iabn". So do models of ours, and those after `recall_eps`.
    """
    # They set 0, which PyTorch 2.11 refuses. Beside a variance of 1, and beside a weight, this is 0 to the bit.
    _set_eps(model, lambda new: torch.finfo(torch.float32).tiny)


def recall_eps(model: SegmentationModel) -> None:
    """Undo `forget_eps`: the merged norms compute what they would if the model were read from disk."""
    _set_eps(model, lambda new: new.eps)


def _set_eps(model: SegmentationModel, choose: Callable[[_BatchNorm], float]) -> None:
    for module in compensated(model):
        for unit in module.units if module.merged else ():
            old, new = module.get_submodule(unit.norm), module.get_submodule(unit.new.norm)
            if isinstance(old, _BatchNorm) and isinstance(new, _BatchNorm):
                old.eps = choose(new)


def new_beside_old(state: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Give what a file of pretrained weights lacks: the new parts start as copies of the old ones.

    Args:
        state: the file's weights.
        names: of the network's weights.
    """
    copies = {}
    for name in names:
        head, new, tail = name.rpartition(f"{NEW}.")
        if new and name not in state and f"{head}.{tail}" in state:
            copies[name] = state[f"{head}.{tail}"].clone()
    return state | copies
