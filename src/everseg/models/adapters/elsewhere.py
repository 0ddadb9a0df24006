"""Entries of a library's configuration that make it fetch a part, or run code that is not its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PARTS = (
    "backbone", "use_pretrained_backbone", "use_timm_backbone", "auto_map", "quantization_config", "trust_remote_code",
    "custom_pipelines", "pretrained", "checkpoint",
)  # fmt: skip
KERNELS = (None, "eager", "sdpa")
"""Implementations of a part that the library brings itself; others are fetched."""


def from_elsewhere(config: Any) -> list[str]:
    """Keys of a configuration, and of all that lies in it, by which something comes from elsewhere."""
    if isinstance(config, list | tuple):
        return [key for item in config for key in from_elsewhere(item)]
    if not isinstance(config, Mapping):
        return []
    found = [key for key in PARTS if config.get(key)]
    found += [
        str(key) for key in config if str(key).endswith("_implementation") and config[key] not in KERNELS
    ]
    return found + [key for value in config.values() for key in from_elsewhere(value)]
