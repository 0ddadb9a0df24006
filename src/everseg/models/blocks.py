"""Building blocks of models: per-branch modules, growing classifiers, norms and their activations."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
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
NORM_TYPES = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
"""PyTorch's norms; see `is_norm`."""
_NORM_NAME = re.compile(r"(Batch|Layer|Group|Instance|Simple|R[Mm][Ss])Norm")
"""In the names of the classes of other libraries' own norms, such as timm's RmsNorm."""

PRE = ".pre"
"""Ending of the name of a tap before its stage's last activation, such as "layer1.pre" beside "layer1"."""
ATTENTION = "attention"
"""Beginning of the name of a transformer block's attention map: "attention1", "attention2", ..."""


def is_stage(tap: str) -> bool:
    """Whether a tap of an encoder is the map of one of its stages."""
    return tap not in ("encoder", "decoder") and not tap.endswith(PRE) and not tap.startswith(ATTENTION)


PerBranch = Literal["head", "decoder", "norm", "adapter"]
"""What each branch owns, every choice including the ones before it: its classifiers; its decoder; the encoder's batch
norms; 1x1 convolutions beside the encoder's convolutions."""
Classifier = nn.Conv2d | nn.ConvTranspose2d
MakeClassifier = Callable[[int, int], Classifier]

M = TypeVar("M", bound=nn.Module)


def check_in_channels(found: object) -> int:
    """Return the number of an image's channels, or raise a ConfigError."""
    if type(found) is not int or not 1 <= found <= 4096:
        raise ConfigError(f"model.options: in_channels needs a whole number of at least 1, got {found!r}")
    return found


def is_norm(module: nn.Module) -> bool:
    """Whether the weights of a module count as norm weights: PyTorch's norms, and those that libraries define."""
    if isinstance(module, NORM_TYPES):
        return True
    # A library's own norm has weights per channel and no layers with weights inside.
    weights = dict(module.named_parameters())
    return bool(_NORM_NAME.search(type(module).__name__)) and not any("." in name for name in weights)


class BranchDict(nn.ModuleDict):
    """Modules owned by branches: one entry per branch, by the branch's name, all made by one factory.

    Args:
        make: makes the module of a new branch.
        init: what an entry that starts from another branch copies: its "weights" (running statistics stay fresh)
            or "all" (buffers too).

    Attributes:
        pretrained: weights and statistics of an entry that starts from no other branch; None = those of `make`.
    """

    def __init__(self, make: Callable[[], nn.Module], init: Literal["weights", "all"] = "weights") -> None:
        super().__init__()
        self.make = make
        self.init = init
        self.pretrained: dict[str, Tensor] | None = None

    def makes_norms(self) -> bool:
        """Whether an entry is a norm."""
        with torch.device("meta"):  # draws no random numbers
            return is_norm(self.make())

    def check(self, name: str) -> None:
        """Stop unless a new branch may have this name: no dot, and no name that `nn.ModuleDict` itself uses.

        Raises:
            ConfigError: bad or known name.
        """
        if name in self:
            raise ConfigError(f"branch '{name}' exists already")
        if not name or "." in name or hasattr(self, name):
            raise ConfigError(f"branch '{name}': not a usable name; choose another one, without dots")

    def add(self, name: str, init_from: str | None = None) -> nn.Module:
        """Make a new branch its own module.

        Args:
            name: the branch.
            init_from: branch whose entry is copied.

        Returns:
            The module added.

        Raises:
            ConfigError: bad or known name, or unknown `init_from`.
        """
        self.check(name)
        if init_from is not None and init_from not in self:
            raise ConfigError(f"branch '{name}': no branch '{init_from}' to start from")
        # Made afresh even where it is copied over below, so the random numbers drawn are the same either way.
        made = self.make()
        if init_from is not None:
            origin = self[init_from]
            like = next(origin.parameters(), None)
            if like is not None:
                made.to(like.device, like.dtype)  # before the copy, which must not round
            # Of "weights", the fresh entry's own buffers are put back over the copied ones: a new domain begins with
            # its own statistics.
            kept = dict(made.named_buffers()) if self.init == "weights" else {}
            made.load_state_dict({**origin.state_dict(), **kept}, strict=True)
        elif self.pretrained is not None:
            made.load_state_dict(self.pretrained, strict=True)
        self[name] = made
        return made


class Restructured(nn.Module):
    """A module whose structure may change between steps; see `SegmentationModel.restructure`."""

    changes_known: tuple[str, ...] = ()
    """Names of the changes that it takes part in."""

    def restructure(self, name: str) -> None:
        """Make the change: first with the weights at hand, and again on fresh weights when a model is rebuilt."""
        raise NotImplementedError

    def freeze_changed(self) -> None:
        """Take the gradient from weights that the change has settled; called at the end of every `freeze`."""

    def rest_changed(self) -> None:
        """Put norms that the change has settled into eval mode; called at the end of every `train`."""


class BranchDecoder(nn.Module):
    """A decoder per branch; a model takes it in place of one shared decoder.

    A new branch that starts from another one copies its decoder whole, running statistics included.

    Args:
        make: makes a branch's decoder; the decoder has an attribute `out_channels`.
    """

    by_branch = True

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        with torch.device("meta"):  # draws no random numbers; wrong dimensions fail here already
            self.out_channels = cast(int, make().out_channels)
        # "paths" stands in the names of checkpoints' tensors (decoder.paths.BRANCH...), so it keeps that name; the
        # entries are the branches' decoders.
        self.paths = BranchDict(make, init="all")

    def forward(self, features: Mapping[str, Tensor], branch: str) -> Tensor:
        """Map the taps of a branch to its decoder's map."""
        return self.paths[branch](features)


def through(module: nn.Module, input: Tensor, branch: str | None) -> Tensor:
    """Run a module, or the branch's own entry where each branch has one."""
    if isinstance(module, BranchDict):
        assert branch is not None
        return module[branch](input)
    return module(input)


def beside(output: Tensor, adapter: nn.Module | None, input: Tensor, branch: str | None) -> Tensor:
    """Add an adapter's output, computed from a layer's input, to the layer's output; no adapter adds nothing."""
    return output if adapter is None else output + through(adapter, input, branch)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm with an error that helps when a training batch has only one value per channel."""

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
    return torch.where(weight < 0, -weight, weight) + eps  # `abs` would have derivative 0 at 0


def _with_weight(
    norm: _BatchNorm, weight: Tensor, forward: Callable[[Tensor], Tensor], input: Tensor
) -> Tensor:
    """Run a norm's forward with another weight: an instance attribute comes before the registered parameter."""
    # The parameter itself is not replaced: it would lose its place in the optimiser and in the state dict.
    norm.__dict__["weight"] = weight
    try:
        return forward(input)
    finally:
        del norm.__dict__["weight"]


def eval_affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Factor and offset of each channel that a batch norm applies in eval mode, float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gamma: Tensor = norm.weight
    if isinstance(norm, (AbsBatchNorm, SyncAbsBatchNorm)):
        gamma = absolute_gamma(gamma, norm.eps)
    # gamma * (x - mean) / sqrt(var + eps) + beta = x * scale + (beta - mean * scale)
    scale = gamma.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _check_values(norm: _BatchNorm, input: Tensor) -> None:
    if norm.training and input.shape[0] * input.shape[2:].numel() == 1:
        raise ConfigError(
            f"batch norm cannot train on one value per channel (input {tuple(input.shape)}): give every process "
            "at least two images at a time, or larger ones"
        )


def check_norm(kind: str) -> NormKind:
    """Return the kind of norm.

    Raises:
        ConfigError: unknown kind.
    """
    if kind not in get_args(NormKind):
        raise ConfigError(f"model.norm: unknown norm '{kind}'; choose one of {', '.join(get_args(NormKind))}")
    return cast(NormKind, kind)


def check_per_branch(choice: str) -> PerBranch:
    """Return what each branch owns.

    Raises:
        ConfigError: unknown choice.
    """
    if choice not in get_args(PerBranch):
        raise ConfigError(
            f"model.options: per_branch '{choice}' is unknown; choose one of {', '.join(get_args(PerBranch))}"
        )
    return cast(PerBranch, choice)


def build_norm(kind: NormKind, channels: int) -> nn.BatchNorm2d:
    """Make the norm of a kind, without its activation: eps 1e-5, momentum 0.1, weight 1, bias 0."""
    # "abn" is plain batch norm here; only its activation differs from "bn".
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
    for parent in list(model.modules()):  # a list: the tree changes while it is walked
        for name, child in parent.named_children():
            if isinstance(child, AbsBatchNorm):  # PyTorch's own conversion would drop its absolute weights
                setattr(parent, name, _synchronised(child))
            elif isinstance(child, _BatchNorm) and not isinstance(child, nn.SyncBatchNorm):
                setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
    return model


def _synchronised(norm: AbsBatchNorm) -> SyncAbsBatchNorm:
    # The very same parameters and buffers: optimisers and checkpoints go on knowing them.
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


def window_means(input: Tensor, window: int) -> Tensor:
    """`replicate_to(sliding_mean(input, window), H, W)` as two matrix products: (B, C, H, W) -> (B, C, H, W).

    For exported graphs with open sizes: such a graph learns only when it runs how many cells a window holds.
    """
    rows, columns = (_averages(input, length, window) for length in input.shape[2:])
    return rows @ input @ columns.T


def _averages(like: Tensor, length: int, window: int) -> Tensor:
    """Weights (length, length): row i averages the window that belongs to cell i."""
    # `sliding_mean` gives length - size + 1 means, and `replicate_to` repeats the outer ones. So cell i has the window
    # that begins (size - 1) // 2 before it, moved inside where it would leave the map.
    cells = torch.arange(length, device=like.device)
    size = torch.full_like(cells, length).clamp(max=window)
    start = torch.minimum((cells - (size - 1) // 2).clamp(min=0), length - size)[:, None]
    inside = (cells >= start) & (cells < start + size[:, None])  # (length, length), a row per window
    return inside.to(like.dtype) / size[:, None].to(like.dtype)


def replicate_to(input: Tensor, height: int, width: int) -> Tensor:
    """Replicate the border until the map has a size; the larger half goes right and to the bottom."""
    # `F.pad` takes the last dimension first: left, right, top, bottom.
    down, right = height - input.shape[2], width - input.shape[3]
    return F.pad(input, (right // 2, right - right // 2, down // 2, down - down // 2), mode="replicate")
