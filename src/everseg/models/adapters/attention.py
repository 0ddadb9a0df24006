"""Attention of other libraries' networks, computed step by step instead of in one fast kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def plain_attention(network: nn.Module) -> Iterator[None]:
    """Let a network of transformers or timm compute attention as products and a softmax.

    Only so does transformers return the attention itself. And PyTorch's exporter needs it: it takes the fast kernels
    apart late, and then finds their results to lie in memory in another order than the network took them for.
    """
    # Parts of one network share their configuration's object, or have one of their own (the encoder of a UPerNet).
    configs = {id(module.config): module.config for module in network.modules() if hasattr(module, "config")}
    changes: list[tuple[Any, str, Any]] = [
        (config, "_attn_implementation", "eager")
        for config in configs.values()
        if getattr(config, "_attn_implementation", None)
    ]
    changes += [
        (module, "fused_attn", False) for module in network.modules() if getattr(module, "fused_attn", False)
    ]
    usual = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in usual:
            setattr(owner, name, value)
