"""Building blocks of models: per-branch modules, growing classifiers, norms and their activations (floor 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from everseg.errors import ConfigError

NormKind = Literal["bn", "abn", "iabn"]
LEAKY_SLOPE = 0.01
NORM_EPS = 1e-5
IABN_EPS, IABN_SLOPE = torch.tensor([NORM_EPS, LEAKY_SLOPE], dtype=torch.float32).tolist()
"""In-place ABN's constants are float32 in its C++ code, whatever the tensors are; seen only in float64 models."""
NORM_TYPES = (_NormBase, nn.GroupNorm, nn.LayerNorm)
"""Every module whose affine weights count as norm weights."""

M = TypeVar("M", bound=nn.Module)


class BranchDict(nn.ModuleDict):
    """Modules owned by branches: one entry per branch, by the branch's name."""

    def add(
        self, name: str, module: nn.Module | Callable[[], nn.Module], init_from: str | None = None
    ) -> nn.Module:
        """Give a new branch its own module.

        Args:
            name: the branch; no dot, and no name that `nn.ModuleDict` itself uses.
            module: the module, or a function that makes it.
            init_from: branch whose weights are copied; buffers (running statistics) stay fresh.

        Returns:
            The module added.

        Raises:
            ConfigError: bad or known name, unknown `init_from`, or the two modules do not fit.
        """
        if name in self:
            raise ConfigError(f"branch '{name}' exists already")
        if not name or "." in name or hasattr(self, name):
            raise ConfigError(f"branch '{name}': not a usable name; choose another one, without dots")
        if init_from is not None and init_from not in self:
            raise ConfigError(f"branch '{name}': no branch '{init_from}' to start from")
        made = module if isinstance(module, nn.Module) else module()
        if init_from is not None:
            copy_weights(self[init_from], made, f"branch '{name}' from '{init_from}'")
        self[name] = made
        return made


def copy_weights(source: nn.Module, target: nn.Module, what: str) -> None:
    """Copy the parameters, not the buffers.

    Raises:
        ConfigError: names or shapes differ; nothing is copied then.
    """
    old, new = dict(source.named_parameters()), dict(target.named_parameters())
    if {name: p.shape for name, p in old.items()} != {name: p.shape for name, p in new.items()}:
        raise ConfigError(f"{what}: the weights cannot be copied, their names or shapes differ")
    with torch.no_grad():
        for name, weight in new.items():
            weight.copy_(old[name])


class GrowingHead(nn.Module):
    """A classifier that grows: one 1x1 convolution with bias per growth, their outputs concatenated.

    Old convolutions keep their names and shapes, so the logits of old classes are bit-equal after a growth.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.classifiers = nn.ModuleList()

    def grow(self, num_classes: int) -> None:
        """Append outputs for `num_classes` >= 1 more classes, with PyTorch's default initialisation."""
        if num_classes < 1:
            raise ValueError(f"a head grows by at least one class, not by {num_classes}")
        new = nn.Conv2d(self.in_channels, num_classes, 1)
        if len(self.classifiers):
            first = cast(nn.Conv2d, self.classifiers[0]).weight
            new.to(first.device, first.dtype)
        self.classifiers.append(new)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of classes added by each growth."""
        return tuple(cast(nn.Conv2d, c).out_channels for c in self.classifiers)

    @property
    def num_classes(self) -> int:
        return sum(self.sizes)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to logits (B, num_classes, h, w)."""
        return torch.cat([classifier(features) for classifier in self.classifiers], dim=1)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that says what to do when a training batch has one value per channel."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, H, W).

        Raises:
            ConfigError: training with B * H * W = 1. (In-place ABN silently stores a non-finite variance there.)
        """
        _check_values(self, input)
        return super().forward(input)


class AbsBatchNorm(BatchNorm):
    """In-place ABN's batch norm: gamma = |weight| + eps.

    The gradient of a weight is the gradient of gamma times -1 where the weight is negative, else +1 (also at 0,
    where `abs` would give 0). Source: behaviour of inplace-abn 1.0.11-1.1.0; not done in place here.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, H, W); errors as `BatchNorm`."""
        return _with_weight(self, absolute_gamma(self.weight, self.eps), super().forward, input)


class SyncAbsBatchNorm(nn.SyncBatchNorm):
    """`AbsBatchNorm` with statistics over all processes."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, H, W)."""
        return _with_weight(self, absolute_gamma(self.weight, self.eps), super().forward, input)


def absolute_gamma(weight: Tensor, eps: float = IABN_EPS) -> Tensor:
    """In-place ABN's scale |weight| + eps, with derivative +1 at weight 0."""
    return torch.where(weight < 0, -weight, weight) + eps


def _with_weight(
    norm: _BatchNorm, weight: Tensor, forward: Callable[[Tensor], Tensor], input: Tensor
) -> Tensor:
    """Run a norm's forward with another weight: an instance attribute comes before the registered parameter."""
    norm.__dict__["weight"] = weight
    try:
        return forward(input)
    finally:
        del norm.__dict__["weight"]


def _check_values(norm: _BatchNorm, input: Tensor) -> None:
    if norm.training and input.shape[0] * input.shape[2:].numel() == 1:
        raise ConfigError(
            f"batch norm cannot train on one value per channel (input {tuple(input.shape)}): give every process "
            "at least two images per iteration (train.batch)"
        )


def check_norm(kind: str) -> NormKind:
    """Return the kind of norm.

    Raises:
        ConfigError: unknown kind.
    """
    if kind not in get_args(NormKind):
        raise ConfigError(f"model.norm: unknown norm '{kind}'; choose one of {', '.join(get_args(NormKind))}")
    return cast(NormKind, kind)


def build_norm(kind: NormKind, channels: int) -> nn.BatchNorm2d:
    """Make the norm of a kind, without its activation: eps 1e-5, momentum 0.1, weight 1, bias 0."""
    return AbsBatchNorm(channels, IABN_EPS) if kind == "iabn" else BatchNorm(channels, NORM_EPS)


def build_activation(kind: NormKind, *, after_sum: bool = False) -> nn.Module:
    """Make an activation: ReLU for "bn", else leaky ReLU with slope 0.01.

    Args:
        kind: kind of norm.
        after_sum: it follows the sum at the end of a residual block instead of a norm, where In-place ABN's code
            has the slope in full precision.
    """
    if kind == "bn":
        return nn.ReLU(inplace=True)
    return nn.LeakyReLU(IABN_SLOPE if kind == "iabn" and not after_sum else LEAKY_SLOPE, inplace=True)


def synchronise_norms(model: M) -> M:
    """Replace every batch norm by its synchronised form, in place; parameters, buffers and names stay the same.

    Synchronised norms need CUDA to train; in eval mode they also run on CPU.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, AbsBatchNorm):
                setattr(parent, name, _synchronised(child))
            elif isinstance(child, _BatchNorm) and not isinstance(child, nn.SyncBatchNorm):
                setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
    return model


def _synchronised(norm: AbsBatchNorm) -> SyncAbsBatchNorm:
    new = SyncAbsBatchNorm(norm.num_features, norm.eps, norm.momentum)
    new.weight, new.bias = norm.weight, norm.bias
    new.running_mean, new.running_var = norm.running_mean, norm.running_var
    new.num_batches_tracked = norm.num_batches_tracked
    new.training = norm.training
    return new


def sliding_mean(input: Tensor, window: int) -> Tensor:
    """Average a window around every cell: (B, C, H, W) -> (B, C, H', W').

    The window is min(window, H) x min(window, W) with stride 1 and no padding: H' = H - min(window, H) + 1.
    """
    return F.avg_pool2d(input, (min(window, input.shape[2]), min(window, input.shape[3])), stride=1)


def replicate_to(input: Tensor, height: int, width: int) -> Tensor:
    """Replicate the border until the map has a size; the larger half goes right and to the bottom."""
    down, right = height - input.shape[2], width - input.shape[3]
    return F.pad(input, (right // 2, right - right // 2, down // 2, down - down // 2), mode="replicate")
