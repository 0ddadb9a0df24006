"""A mode that refuses every operation for which the host would wait for a GPU."""

from __future__ import annotations

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

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.name().split(".")[0] not in self.READS, f"{function.name()} waits for the device"
        return function(*args, **(kwargs or {}))
