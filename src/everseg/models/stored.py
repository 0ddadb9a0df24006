"""Build a network that a file describes: without the network of computers, and within the size of its weights.

A description may come from somebody else. It may name parts that a library would fetch, or widths that take all memory
long before the weights are found not to fit.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.utils._python_dispatch import TorchDispatchMode

from everseg.errors import CheckpointError

# ---------------------------------------------------------------- no network

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_REFUSED = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")
_inside = 0
_lock = threading.Lock()
_hooked = False


class NetworkRefusedError(OSError):
    """Something tried to reach another machine while a stored model was built."""


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _inside and event in _REFUSED:
        raise NetworkRefusedError(f"a stored model may fetch nothing ({event})")


@contextlib.contextmanager
def no_network() -> Iterator[None]:
    """Refuse every connection that Python code of this process tries to make, whichever library it is.

    The libraries' own switches are set too: then they say at once that they are offline, and try nothing again.
    """
    global _inside, _hooked
    with _lock:
        if not _hooked:
            sys.addaudithook(
                _watch
            )  # it cannot be taken away; outside of this function it lets everything pass
            _hooked = True
        _inside += 1
    constants = getattr(sys.modules.get("huggingface_hub"), "constants", None)
    was = {name: os.environ.get(name) for name in _OFFLINE}
    hub = getattr(constants, "HF_HUB_OFFLINE", None)
    try:
        os.environ.update(dict.fromkeys(_OFFLINE, "1"))
        if constants is not None:
            constants.HF_HUB_OFFLINE = True
        yield
    finally:
        for name, value in was.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if constants is not None and hub is not None:
            constants.HF_HUB_OFFLINE = hub
        elif constants is None and (late := getattr(sys.modules.get("huggingface_hub"), "constants", None)):
            # Imported in between, it has read the switch that was set for a moment.
            late.HF_HUB_OFFLINE = (was["HF_HUB_OFFLINE"] or "").upper() in ("1", "ON", "YES", "TRUE")
        with _lock:
            _inside -= 1


# ---------------------------------------------------------------- sizes

SPARE = 2**24
"""Elements beyond those of the weights that one tensor may have while a model is built: 64 MB.

They are for the trial image of an encoder and its maps, tables of positions, and masks."""


@dataclass(frozen=True)
class Sizes:
    """How much there is of a model's weights."""

    tensors: int
    elements: int

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Sizes:
        """Count weights that are at hand."""
        return cls(len(state), sum(value.numel() for value in state.values()))

    def check(self, options: Any, key: str = "options") -> None:
        """Refuse whole numbers that no size of such a model has: a library may count up to them before it makes a part.

        Raises:
            TooLargeError: with the key.
        """
        if isinstance(options, Mapping):
            for name, value in options.items():
                self.check(value, f"{key}.{str(name)[:60]}")
        elif isinstance(options, list | tuple):
            for place, value in enumerate(options):
                self.check(value, f"{key}[{place}]")
        elif type(options) is int and abs(options) > max(self.elements, 2**16):
            raise TooLargeError(f"{key}: {str(options)[:20]} is far more than its weights hold")


class TooLargeError(CheckpointError):
    """A description asks for more than its weights are."""


@contextlib.contextmanager
def within(sizes: Sizes) -> Iterator[None]:
    """Stop a model that is built as soon as it is larger than its weights, before memory for the excess is touched.

    Raises:
        TooLargeError: more parameters and buffers than there are tensors, or more elements, or one tensor much larger
            than all weights together, or far more operations than it takes to make them.
    """
    # Some are registered twice: folded norms replace others, and an encoder's unused weights become buffers.
    most_tensors, most_elements = 4 * sizes.tensors + 256, 4 * sizes.elements + 2**20
    largest = sizes.elements + SPARE
    found = [0, 0]

    def count(module: nn.Module, name: str, value: Tensor | None) -> None:
        if value is not None:
            found[0] += 1
            found[1] += value.numel()
            if found[0] > most_tensors or found[1] > most_elements:
                raise TooLargeError(
                    f"it describes more than its weights hold: {sizes.tensors} tensors of {sizes.elements} numbers"
                )

    hooks = [
        torch_modules.register_module_parameter_registration_hook(count),
        torch_modules.register_module_buffer_registration_hook(count),
    ]
    try:
        with _Bound(largest, 20_000 + 200 * sizes.tensors):
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Bound(TorchDispatchMode):
    """Refuses each operation whose result has more elements than `most`, where its arguments tell before it is made.

    Args:
        most: elements.
        operations: number of them. To draw the weights of a layer takes a few.
    """

    def __init__(self, most: int, operations: int) -> None:
        super().__init__()
        self.most, self.left = most, operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Walking through a tensor first makes one view of each of its items.
        walked = func.overloadpacket is torch.ops.aten.unbind
        self.left -= args[0].shape[args[1] if len(args) > 1 else kwargs.get("dim", 0)] if walked else 1
        if self.left < 0:
            raise TooLargeError("it describes more parts than its weights hold")
        self._check(self._asked(func, args, kwargs))
        shapes = [value.shape for value in args if isinstance(value, Tensor)]
        if len(shapes) > 1:
            with contextlib.suppress(
                RuntimeError
            ):  # shapes of a product of matrices, say, are no pair to broadcast
                self._check(math.prod(torch.broadcast_shapes(*shapes)))
        result = func(*args, **kwargs)
        # Views take no memory, but what is made of them does.
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self._check(value.numel())
        return result

    @staticmethod
    def _asked(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """Number of elements that a factory of tensors is asked for; 0 for other operations."""
        for place, argument in enumerate(func._schema.arguments):
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            if argument.name in ("size", "new_size") and isinstance(given, list | tuple):
                return math.prod(max(0, int(side)) for side in given)
            if argument.name in ("steps", "n") and isinstance(given, int):
                return given
        return 0

    def _check(self, elements: int) -> None:
        if elements > self.most:
            raise TooLargeError(
                f"it describes a tensor of {elements} numbers, far more than its weights hold"
            )
