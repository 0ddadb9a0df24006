"""Reductions over processes, and seeds that every process derives in the same way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from accelerate import Accelerator


def derive_seed(*parts: int | str) -> int:
    """Mix parts into a 31-bit seed. The same parts give the same seed in every process."""
    # Python's own hash() of a text differs from process to process.
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF


def all_reduce_max(value: int, accelerator: Accelerator) -> int:
    """Return the largest value over all processes."""
    if accelerator.num_processes == 1:
        return value
    tensor = torch.tensor(value, device=accelerator.device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return int(tensor)


def all_reduce_sum(accelerator: Accelerator) -> Callable[[torch.Tensor], torch.Tensor]:
    """Make a function that returns the sum of a tensor over all processes."""

    def reduce(tensor: torch.Tensor) -> torch.Tensor:
        if accelerator.num_processes > 1:
            tensor = tensor.clone()  # all_reduce writes into its argument
            torch.distributed.all_reduce(tensor)
        return tensor

    return reduce
