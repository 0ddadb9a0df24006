"""everseg keeps a semantic-segmentation model learning: new classes, new domains, without the old data.

Public names are imported when first used, so that `import everseg` stays fast.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "run": "everseg.api:run",
    "load": "everseg.api:load",
    "evaluate": "everseg.api:evaluate",
    "predict": "everseg.inference.predict:predict",
    "sweep": "everseg.sweeps.sweep:sweep",
    "compare": "everseg.reports.compare.comparison:compare",
    "Run": "everseg.api:Run",
    "Method": "everseg.methods.base:Method",
    "LabelSpace": "everseg.labels:LabelSpace",
    "LabelPolicy": "everseg.labels:LabelPolicy",
    "losses": "everseg.losses",
    "metrics": "everseg.metrics",
    "scenarios": "everseg.scenarios",
    "interop": "everseg.interop",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'everseg' has no attribute '{name}'")
    module, _, attribute = _LAZY[name].partition(":")
    value = importlib.import_module(module)
    return getattr(value, attribute) if attribute else value


def __dir__() -> list[str]:
    return sorted(__all__)
