"""Reading and writing the original projects' checkpoints."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["mdil", "mib"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'everseg.interop' has no attribute '{name}'")
    return importlib.import_module(f"everseg.interop.{name}")
