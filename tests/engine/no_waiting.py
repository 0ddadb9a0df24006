"""A mode that refuses every operation for which the host would wait for a GPU."""

from __future__ import annotations

from typing import NoReturn

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoWaiting(TorchDispatchMode):
    """Raise where an operation reads values of a tensor."""

    READS = (
        "aten::_local_scalar_dense",
        "aten::nonzero",
        "aten::equal",
        "aten::masked_select",
        "aten::_unique2",
    )

    def __enter__(self) -> NoWaiting:
        self.patch = pytest.MonkeyPatch()
        for name in ("tolist", "numpy"):  # these pass the dispatcher by
            self.patch.setattr(torch.Tensor, name, _refuse)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self.patch.undo()
        super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.name().split(".")[0] not in self.READS, f"{function.name()} waits for the device"
        return function(*args, **(kwargs or {}))


def _refuse(*_: object) -> NoReturn:
    raise AssertionError("reading a tensor waits for the device")
