"""A network cut into shards over the processes while it is trained: FSDP2, through Accelerate's plugin.

Import it where it is needed: what it needs of torch takes a second to read.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from everseg.distributed import all_reduce_sum
from everseg.engine.optim import SHAPED
from everseg.errors import ConfigError
from everseg.models.adapters.encoders import LibraryEncoder
from everseg.models.model import SegmentationModel


def cut(model: SegmentationModel, accelerator: Accelerator, *, keep: nn.Module | None = None) -> None:
    """Cut a network into shards in place: its weights become DTensors, which are gathered while a part is run.

    Every block of a library's encoder is gathered by itself, everything else together. Buffers stay whole, and so do
    weights without dimensions or elements, which FSDP2 does not take.

    Args:
        model: the same in all processes.
        keep: part of it whose weights stay whole in every process.
    """
    whole = nn.ParameterList(w for w in model.parameters() if not w.ndim or not w.numel())
    for weight in model.parameters():
        weight.data = weight.data.contiguous()  # FSDP2 knows no other layout
    for part in (whole, keep):
        if part is not None:  # what is left out is not moved to the device, either
            part.to(accelerator.device)
    encoder = model.encoder
    blocks = encoder.blocks() if isinstance(encoder, LibraryEncoder) else []
    kinds = {type(encoder.get_submodule(f"body.{name}")).__name__ for name in blocks}
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        # Autocast decides on the precision, as it does without shards: weights and sums of gradients stay float32.
        mixed_precision_policy=MixedPrecisionPolicy(),
        auto_wrap_policy="transformer_based_wrap" if kinds else "no_wrap",
        transformer_cls_names_to_wrap=sorted(kinds) or None,
        ignored_modules=[part for part in (whole, keep) if part is not None],
    )
    # Given the plugin itself, Accelerate (1.10 to 1.15) takes it on GPUs, and on CPUs leaves it aside without a word.
    # Its function that cuts a network works on both.
    accelerator.state.fsdp_plugin = plugin
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 1.10 tells with bf16 that it turns float32 into float32
        fsdp2_prepare_model(accelerator, model)
    # What is trained outside the blocks stays gathered from the forward to the backward pass: a loss may read it.
    trained = any(weight.requires_grad for weight in model.parameters())
    model.set_reshard_after_forward(not trained, recurse=False)  # type: ignore[operator]
    register_fsdp_forward_method(model, "encode")
    # Logits are cut to the image's size, so they are views. Nothing of everseg changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")


class Part(nn.Module):
    """What this process holds of a network that is cut: plain tensors, which share their memory with the shards.

    They have the names of the whole weights. Optimiser, guard and moving average work with them.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._cut = (module,)  # a tuple, so that the weights of the cut network are not found in this module
        self.shards: dict[str, nn.Parameter] = dict(module.named_parameters(remove_duplicate=False))
        """Name -> weight of the cut network; one that has two names stands under both."""
        self.weights: dict[str, nn.Parameter] = {}
        known: dict[int, nn.Parameter] = {}  # by identity: tensors compare by value
        for name, shard in self.shards.items():
            if id(shard) not in known:
                known[id(shard)] = nn.Parameter(_local(shard.detach()), requires_grad=shard.requires_grad)
            self.weights[name] = known[id(shard)]

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        seen = set[int]()
        for name, weight in self.weights.items():
            if id(weight) not in seen:
                seen.add(id(weight))
                yield name, weight

    def state_dict(self, *_: Any, **__: Any) -> Any:
        return {name: _local(value) for name, value in self._cut[0].state_dict().items()}

    def take_gradients(self) -> None:
        """Give the plain tensors the gradients of the shards, in the same memory."""
        for name, shard in self.shards.items():
            self.weights[name].grad = None if shard.grad is None else _local(shard.grad)


class Cut:
    """The network and the optimiser of a step, cut over the processes.

    PyTorch 2.13 has no fused SGD for DTensors. So the optimiser updates this process's part of every weight as a plain
    tensor, with the arithmetic that it has without shards.

    Args:
        model: whole, the same in all processes. It waits on the CPU meanwhile; `give_back` brings it up to date.
        optimizer: of the model's weights, with what it holds of them so far. It gets their parts instead.
    """

    def __init__(
        self, model: SegmentationModel, optimizer: torch.optim.Optimizer, accelerator: Accelerator
    ) -> None:
        self.model, self.optimizer, self.accelerator = model, optimizer, accelerator
        self._exchanges = True
        model.zero_grad()
        model.to("cpu")
        self.module = copy.deepcopy(model)
        cut(self.module, accelerator)
        self.part = Part(self.module)
        self._hand_over({id(weight): name for name, weight in model.named_parameters()})

    def _hand_over(self, names: Mapping[int, str]) -> None:
        """Give the optimiser this process's parts of its weights, and of what it holds of them."""
        held = dict(self.optimizer.state)
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            whole = group["params"]
            group["params"] = [self.part.weights[names[id(weight)]] for weight in whole]
            for weight, part in zip(whole, group["params"], strict=True):
                if weight in held:
                    self.optimizer.state[part] = {
                        key: self._mine(names[id(weight)], value) if key in SHAPED else value
                        for key, value in held[weight].items()
                    }

    def _mine(self, name: str, whole: Tensor) -> Tensor:
        """Take this process's part of a tensor of a weight's shape."""
        if not isinstance(self.part.shards[name], DTensor):
            return whole
        # As FSDP2 does: equal parts of the first dimension, so that the last processes may get less, or nothing.
        parts = whole.chunk(self.accelerator.num_processes)
        rank = self.accelerator.process_index
        return (parts[rank] if rank < len(parts) else whole[:0]).clone(memory_format=torch.contiguous_format)

    def mine(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take this process's part of a model's state."""
        return {n: self._mine(n, v) if n in self.part.shards else v for n, v in state.items()}

    def whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather a model's state, or what an optimiser holds of each weight ("exp_avg/NAME"), from all processes.

        All processes call it together.

        Returns:
            The whole tensors, on the CPU.
        """
        found = {}
        for key, value in parts.items():
            entry, _, name = key.partition("/")
            shard = self.part.shards.get(name if entry in SHAPED else key)
            found[key] = (_gathered(value, shard) if isinstance(shard, DTensor) else value).cpu()
        return found

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, as an optimiser does."""
        for shard in self.part.shards.values():
            shard.grad = None
        self.part.take_gradients()

    def step(self) -> None:
        """Update this process's parts.

        Raises:
            ConfigError: the losses have a gradient for weights that the method has kept from before the iterations.
        """
        if any(weight.grad is not None for weight in self.model.parameters()):
            raise ConfigError(
                "train.shard: the method uses weights of ctx.module that it took before the iterations, and those are "
                "not the ones that are trained; read them from ctx.module in every call, or leave train.shard out"
            )
        self.part.take_gradients()  # the method may have made some
        self.optimizer.step()

    def backward(self, loss: Tensor) -> None:
        """Leave the mean gradients over the processes, or outside an exchange (`alone`) those of this process."""
        self.accelerator.backward(loss)
        if self._exchanges:
            add = all_reduce_sum(self.accelerator)
            for shard in self.part.shards.values():
                if shard.grad is not None and not isinstance(shard, DTensor):
                    shard.grad = add(shard.grad) / self.accelerator.num_processes
        self.part.take_gradients()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Make a context whose backward passes add up gradients in each process, without an exchange."""
        self._exchange(False)
        try:
            yield
        finally:
            self._exchange(True)

    @staticmethod
    @contextlib.contextmanager
    def explained() -> Iterator[None]:
        """Turn PyTorch's error about shards among whole tensors into a sentence.

        Raises:
            ConfigError: the method computes with single weights.
        """
        try:
            yield
        except RuntimeError as error:
            if "DTensor" not in str(error):
                raise
            raise ConfigError(
                "train.shard: the method computes with single weights of the network, and each process holds a part "
                "of them only; leave train.shard out"
            ) from error

    def _exchange(self, on: bool) -> None:
        self._exchanges = on
        self.module.set_requires_gradient_sync(on)  # type: ignore[operator]

    @torch.no_grad()
    def give_back(self) -> SegmentationModel:
        """Bring the whole model up to date, on its device; running statistics are those of the first process."""
        state = self.part.state_dict()
        for name, value in state.items():
            if name not in self.part.shards:
                torch.distributed.broadcast(value, 0)
        target = self.model.state_dict()
        for name, value in state.items():
            target[name].copy_(self.whole({name: value})[name])
        self.model.to(self.accelerator.device)
        return self.model


def cut_teacher(teacher: SegmentationModel, accelerator: Accelerator) -> SegmentationModel:
    """Cut a copy of a frozen teacher, which waits on the CPU meanwhile.

    Its classifiers, which a loss may read, stay whole.
    """
    teacher.to("cpu")
    copied = copy.deepcopy(teacher)
    cut(copied, accelerator, keep=copied.heads)
    return copied


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gathered(part: Tensor, like: DTensor) -> Tensor:
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    ).full_tensor()
