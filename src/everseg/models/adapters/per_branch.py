"""Parts per branch inside an encoder of another library: its norms, and adapters beside its layers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from everseg.errors import ConfigError, first_line
from everseg.models.blocks import BranchDict, is_norm

RANK = 8
"""Usual rank of an adapter beside a projection. LoRA's authors found 4 to 8 enough."""
ADAPTER = "adapter"
"""Name of the adapters inside the layer that they stand beside: LAYER.adapter.BRANCH."""
_TRIAL = "trial"
_BRANCH: ContextVar[str | None] = ContextVar("everseg_branch", default=None)


@contextlib.contextmanager
def through_branch(name: str) -> Iterator[None]:
    """Let the parts of this branch run.

    The layers of a library call one another, and none of them hands our branch on. So the encoder sets it around one
    pass. Nobody else reads or sets it.
    """
    token = _BRANCH.set(name)
    try:
        yield
    finally:
        _BRANCH.reset(token)


class BranchLayer(BranchDict):
    """A layer for each branch, called like the one layer of the library whose place it takes."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the branch's own layer."""
        return self[cast(str, _BRANCH.get())](*inputs, **named)


class LowRank(nn.Module):
    """An adapter beside a projection: two narrow projections in a row, without biases (LoRA with alpha = rank).

    The second starts at zero, so a new adapter adds nothing.

    Args:
        inputs: channels of the projection's input.
        outputs: of its output.
        rank: width between the two, at most these.
        stride: of a 1x1 convolution; None = a linear layer.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, stride: tuple[int, ...] | None) -> None:
        super().__init__()
        rank = min(rank, inputs, outputs)
        self.down: nn.Linear | nn.Conv2d
        self.up: nn.Linear | nn.Conv2d
        if stride is None:
            self.down, self.up = (
                nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
            )  # fmt: skip
        else:
            self.down = nn.Conv2d(inputs, rank, 1, stride=cast(tuple[int, int], stride), bias=False)
            self.up = nn.Conv2d(rank, outputs, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Map the layer's input to what is added to its output."""
        return self.up(self.down(input))


def own_parts(body: nn.Module, run: Callable[[], list[Tensor]], *, adapters: bool, rank: int = RANK) -> None:
    """Give an encoder of a library parts per branch, in place. It has no branch yet and cannot run before it has.

    Norms are known by their type (`is_norm`); each becomes a `BranchLayer`. With `adapters` each branch also gets

    * a 1x1 convolution beside every larger convolution, with its groups, as MDIL's (Rebuffi et al., CVPR 2018), where
      both look at the same centre: not beside patch embeddings;
    * a `LowRank` beside every linear layer, and in networks of grouped convolutions beside 1x1 convolutions: their
      larger ones mix few channels or none.

    Adapters start at zero. Layers that the library runs by other means than a call get none: it would do nothing.

    Args:
        body: the network. Weights that it does not use are buffers already.
        run: runs it on an image and gives its maps.
        rank: of the adapters beside projections, at least 1.

    Raises:
        ConfigError: no norms, or no layers for adapters, are found; or the network gives other maps with parts of its
            own than before.
    """
    if type(rank) is not int or rank < 1:
        raise ConfigError(f"model.options: rank needs a whole number of at least 1, got {rank!r}")
    norms = [module for module in body.modules() if is_norm(module) and module.state_dict()]
    if not norms:
        raise ConfigError(
            "model.options: per_branch: no norms are found in this encoder (batch, layer, group, instance and RMS "
            "norms are known), so a branch cannot have its own; choose 'head' or 'decoder'"
        )
    layers = _beside_which(body) if adapters else []
    called: set[int] = set()
    with _noting(layers, called):
        before = run()
    layers = [layer for layer in layers if id(layer) in called]
    if adapters and not layers:
        raise ConfigError(
            "model.options: per_branch 'adapter': this encoder runs no convolution or linear layer that an adapter can "
            "stand beside; choose 'norm'"
        )
    owners = {id(norm): BranchLayer(partial(copy.deepcopy, norm)) for norm in norms}
    for parent in list(body.modules()):
        for (
            name,
            child,
        ) in parent._modules.items():  # not `named_children`, which names a module used twice once
            if id(child) in owners:
                parent._modules[name] = owners[id(child)]
    added = list(owners.values())
    for layer in layers:
        owner = BranchLayer(_adapter_of(layer, rank))
        layer.add_module(ADAPTER, owner)
        layer.register_forward_hook(_add_adapter)
        added.append(owner)
    _try(added, before, run)


def _try(owners: Collection[BranchLayer], before: list[Tensor], run: Callable[[], list[Tensor]]) -> None:
    """Check that a branch whose parts are as the library made them gives the library's maps."""
    why = "its maps are others"
    try:
        with torch.random.fork_rng(devices=[]), through_branch(_TRIAL):
            for owner in owners:
                owner.add(_TRIAL)
            after = run()
        # A network that is only planned (on the device "meta") has maps without values.
        planned = any(map.is_meta for map in after)
        same = len(after) == len(before) and (planned or all(map(torch.equal, before, after)))
    except Exception as error:  # the library may look into a layer whose place was taken, and raise anything
        same, why = False, first_line(error)
    finally:
        for owner in owners:
            if _TRIAL in owner:
                del owner[_TRIAL]
    if not same:
        raise ConfigError(
            f"model.options: per_branch: this encoder does not work with norms of each branch's own ({why}); choose "
            "'head' or 'decoder'"
        )


def merge(body: nn.Module, branch: str) -> None:
    """Make it the plain network of one branch, in place: its norms alone, its adapters added to the layers' weights."""
    for parent in list(body.modules()):
        if isinstance(owner := parent._modules.get(ADAPTER), BranchLayer):
            _add_to_weight(cast(nn.Linear | nn.Conv2d, parent), owner[branch])
            del parent._modules[ADAPTER]
            for key, hook in list(parent._forward_hooks.items()):
                if hook is _add_adapter:
                    del parent._forward_hooks[key]
        for name, child in list(parent._modules.items()):
            if isinstance(child, BranchLayer):
                parent._modules[name] = child[branch]


@torch.no_grad()
def _add_to_weight(layer: nn.Linear | nn.Conv2d, adapter: nn.Module) -> None:
    weight = layer.weight.double()  # rounded once, at the end
    if isinstance(adapter, LowRank):
        down, up = adapter.down.weight.double(), adapter.up.weight.double()
        weight += (up.flatten(1) @ down.flatten(1)).view_as(weight)
    else:  # 1x1: the kernel's centre
        rows, columns = weight.shape[2:]
        weight[:, :, rows // 2, columns // 2] += cast(Tensor, adapter.weight).double()[:, :, 0, 0]
    layer.weight.copy_(weight)


def _add_adapter(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + cast(BranchLayer, layer._modules[ADAPTER])(inputs[0])


def _beside_which(body: nn.Module) -> list[nn.Module]:
    """The layers that adapters can stand beside, and be merged into."""
    # Exactly these types: a subclass may do something else with its weights, such as standardise them.
    every = [module for module in body.modules() if type(module) in (nn.Linear, nn.Conv2d)]
    grouped = any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in every)
    return [
        module
        for module in every
        if isinstance(module.weight, nn.Parameter)
        and (isinstance(module, nn.Linear) or (grouped if _is_projection(module) else _is_centred(module)))
    ]


def _is_projection(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (
        isinstance(layer, nn.Conv2d) and tuple(layer.kernel_size) == (1, 1) and layer.groups == 1
    )


def _is_centred(layer: nn.Module) -> bool:
    """Whether the kernel's middle lies on the cell that a 1x1 convolution of the same stride reads."""
    assert isinstance(layer, nn.Conv2d)
    if max(layer.kernel_size) == 1 or isinstance(layer.padding, str):
        return False
    sides = zip(layer.kernel_size, layer.padding, layer.dilation, strict=True)
    return all(kernel % 2 == 1 and padding == dilation * (kernel // 2) for kernel, padding, dilation in sides)


def _adapter_of(layer: nn.Module, rank: int) -> Callable[[], nn.Module]:
    if isinstance(layer, nn.Linear):
        return partial(LowRank, layer.in_features, layer.out_features, rank, None)
    assert isinstance(layer, nn.Conv2d)
    channels = layer.in_channels, layer.out_channels
    if _is_projection(layer):
        return partial(LowRank, *channels, rank, layer.stride)
    return partial(_parallel, *channels, stride=layer.stride, groups=layer.groups)


class _Depthwise(nn.Conv2d):
    """A depthwise 1x1 convolution, as the product that it is: its kernels take three times as long on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        rows, columns = self.stride
        return input[:, :, ::rows, ::columns] * self.weight.view(1, -1, 1, 1)


def _parallel(inputs: int, outputs: int, groups: int, **options: Any) -> nn.Conv2d:
    kind = _Depthwise if groups == inputs == outputs else nn.Conv2d
    made = kind(inputs, outputs, 1, groups=groups, bias=False, **options)
    nn.init.zeros_(made.weight)
    return made


@contextlib.contextmanager
def _noting(layers: Collection[nn.Module], called: set[int]) -> Iterator[None]:
    """Note which layers are called, by identity."""
    hooks = [layer.register_forward_pre_hook(lambda layer, _: called.add(id(layer))) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
