"""Read weight files of other projects without running code from them: safetensors, and what `torch.save` writes.

A file of `torch.save` is read in two parts. A process of its own, which can neither open files nor reach the network
and whose memory and time are bounded, finds out what the file holds and where (`tensor_layout`). Here that layout is
checked again, and the bytes of the tensors are read from the places that it names.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from everseg.errors import CheckpointError, ConfigError
from everseg.files import MB, UnreadableError, json_of, open_regular, size_text
from everseg.models.tensor_layout import BIG, MAX_MEMORY, MAX_SECONDS, Given, check_sum
from everseg.models.tensor_pickle import (
    ALONE,
    FLOATING,
    ITEMSIZE,
    MAX_SIZE,
    NUMPY_NUMBERS,
    Refusal,
    Storage,
    View,
    bytes_of,
    damaged,
    inside,
    most_viewed,
)

_PATIENCE = 2.0 * MAX_SECONDS
"""Seconds that the reading process has; its time on a processor is bounded as well."""
_MOST_LAYOUT = 256 * MB
"""Most bytes of a layout; those of large real files have a few MB."""
_NEEDED = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
"""What Python may need of the environment to start."""
_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); from everseg.models.tensor_layout import main; main()"
)


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a weight file without running code from it: .safetensors, or else what `torch.save` wrote.

    Tensors lie on the CPU, whatever device they were saved from; those that shared memory share it again. Python
    attributes of tensors and parameters are dropped, as they are no weights.

    Returns:
        The dictionary in the file: tensors (bool, all integers, float16, bfloat16, float32, float64), numbers, text
        and containers of them, equal to what `torch.load` gives.

    Raises:
        ConfigError: no such file.
        CheckpointError: damaged; holds names that could run code, or tensors of other kinds (complex, quantised,
            float8, sparse); claims more than its bytes can hold; takes too much memory or time to be read; or holds no
            dictionary.
    """
    if not path.is_file():
        raise ConfigError(f"model.weights: no file '{path}'")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"'{path}' is damaged or not a safetensors file: {error}") from None
    try:
        with open_regular(path) as file:
            given = Given(file.fileno())
            loaded = _Reader(given, _layout(file)).content()
    except Refusal as refusal:
        raise CheckpointError(f"'{path}' cannot be read safely: {refusal}") from None
    except MemoryError:
        raise CheckpointError(f"'{path}' does not fit into this machine's memory") from None
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror or error}") from None
    except UnreadableError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error}") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"'{path}' holds no dictionary of weights, but a {type(loaded).__name__}; {ALONE}"
        )
    return loaded


# ---------------------------------------------------------------- the other process


def _layout(file: BinaryIO) -> Any:
    """Have another process find the layout of an open file.

    Raises:
        Refusal: it says why there is none, or ends in another way.
        OSError: it cannot be started.
    """
    if not sys.executable:
        raise OSError("the Python program that is to read it was not found")
    root = str(Path(__file__).resolve().parents[2])
    # -I, -S: nothing of the environment, the current folder or installed packages takes part.
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _PROGRAM, root],
        stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=Path(root).anchor,
        env={name: os.environ[name] for name in _NEEDED if name in os.environ},
    ) as reading:  # fmt: skip
        late = threading.Timer(_PATIENCE, reading.kill)
        late.start()
        try:
            assert reading.stdout is not None
            answer = reading.stdout.read(_MOST_LAYOUT + 1)
        finally:
            late.cancel()
            reading.kill()  # it has ended, or has more to say than is wanted, or this process is interrupted
        code = reading.wait()
    if len(answer) > _MOST_LAYOUT:
        raise Refusal(f"its description of the tensors is larger than {size_text(_MOST_LAYOUT)}")
    try:
        layout = json_of(answer)
    except UnreadableError:
        raise Refusal(_ending(code)) from None
    if isinstance(layout, dict) and isinstance(layout.get("refused"), str):
        raise Refusal(layout["refused"])
    return layout


def _ending(code: int) -> str:
    """Say why a process that read a file gave no layout."""
    if code == BIG:
        return f"to find its tensors takes more than {size_text(MAX_MEMORY)} of memory; {ALONE}"
    if code in (-9, -24):  # killed when its time was over; SIGXCPU
        return (
            f"to find its tensors takes more than {MAX_SECONDS} s, or the machine had no memory left; {ALONE}"
        )
    return f"the process that looked for its tensors ended without an answer ({code}); nothing of it was taken; {ALONE}"


# ---------------------------------------------------------------- tensors


class _Reader:
    """Makes what a layout describes. Nothing in it is believed: whoever wrote it may have been taken over."""

    def __init__(self, file: Given, layout: Any) -> None:
        self.file = file
        self.nodes: list[Any] = []
        self.viewed = 0
        if not isinstance(layout, dict) or sorted(layout) != ["content", "nodes", "storages"]:
            damaged("its layout")
        self.layout = layout
        places = layout["storages"]
        if type(places) is not list or not all(_naturals(place, 3) for place in places):
            damaged("its list of storages")
        if sum(size for _, size, _ in places) > file.size:
            damaged("its tensors need more bytes than it has")
        self.storages = [self._storage(number, *place) for number, place in enumerate(places)]

    def content(self) -> Any:
        if type(self.layout["nodes"]) is not list:
            damaged("its layout")
        try:
            for node in self.layout["nodes"]:
                self.nodes.append(self._node(*node))
            return self._value(self.layout["content"])
        except (TypeError, ValueError, IndexError, AttributeError, KeyError):
            return damaged("its layout")

    def _storage(self, number: int, place: int, size: int, stated: int) -> tuple[Storage, Tensor]:
        memory = _memory(size, torch.uint8)
        target = memory.numpy().data
        self.file.seek(min(place, self.file.size))
        self.file.fill(target)
        check_sum(target, stated, f"data/{number}")
        return Storage(number, None, size, size), memory

    def _value(self, value: Any) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) is not list or not value:
            damaged("its layout")
        letter, *given = value
        if letter == "r" and type(given[0]) is int and given[0] >= 0:
            return self.nodes[given[0]]
        if letter == "b":
            return bytes.fromhex(given[0])
        if letter == "t":
            return getattr(torch, given[0]) if given[0] in ITEMSIZE else damaged("its layout")
        if letter == "s" and _naturals(given[0]):
            return torch.Size(given[0])
        if letter == "n" and given[0] in NUMPY_NUMBERS:
            return np.frombuffer(bytes.fromhex(given[1]), np.dtype(given[0]))[0]
        if letter == "d":
            try:
                return torch.device(given[0])
            except RuntimeError:
                damaged("an unknown device")
        return damaged("its layout")

    def _node(self, letter: str, *given: Any) -> Any:
        if letter == "T":
            return self._tensor(*given)
        if letter == "D":
            kind, pairs, more = given
            made = {"plain": dict, "ordered": OrderedDict, "counter": Counter}[kind]()
            values = [self._value(value) for value in pairs]
            for key, value in zip(values[::2], values[1::2], strict=True):
                made[key] = value
            if more:
                if kind != "ordered" or list(more) != ["_metadata"]:
                    damaged("its layout")
                vars(made)["_metadata"] = self._value(more["_metadata"])
            return made
        return {"L": list, "U": tuple, "S": set}[letter](self._value(value) for value in given[0])

    def _tensor(
        self, number: Any, offset: Any, size: Any, stride: Any, dtype: Any, grad: Any, parameter: Any
    ) -> Tensor:
        if dtype not in ITEMSIZE or not (_naturals(size) and _naturals(stride) and _naturals([offset])):
            damaged("a tensor of unclear shape or type")
        if len(size) != len(stride) or len(size) > 64 or (grad and dtype not in FLOATING):
            damaged("a tensor of unclear shape or type")
        kind = getattr(torch, dtype)
        if number is None:
            tensor = _memory(0, kind)
        else:
            if type(number) is not int or not 0 <= number < len(self.storages):
                damaged("a tensor without storage")
            storage, memory = self.storages[number]
            view = View(storage, offset, tuple(size), tuple(stride), dtype)
            self.viewed += bytes_of(view)
            if not inside(view, storage.size) or self.viewed > most_viewed(self.file.size):
                damaged("a tensor that reaches beyond its storage")
            # set_ makes a view of the storage, as torch.load does: tensors of one storage share it.
            tensor = _memory(0, kind).set_(memory.untyped_storage(), offset, tuple(size), tuple(stride))
        return (
            nn.Parameter(tensor, requires_grad=grad is True)
            if parameter
            else tensor.requires_grad_(grad is True)
        )


def _memory(count: int, dtype: torch.dtype) -> Tensor:
    try:
        return torch.empty(count, dtype=dtype, device="cpu")
    except RuntimeError:  # PyTorch's word for too little memory
        raise MemoryError from None


def _naturals(numbers: Any, count: int | None = None) -> bool:
    """Whether it is a list of whole numbers from 0, and as many as `count` says."""
    return (
        type(numbers) is list
        and count in (None, len(numbers))
        and all(type(number) is int and 0 <= number < MAX_SIZE for number in numbers)
    )
