"""Images and masks: readers, class index, transforms, batches, checks and downloads; `everseg data` in Python.

The verbs are imported when first used, so that a reader of images does not import what checks them.
"""

from __future__ import annotations

from typing import Any

from everseg import lazy_attribute

_LAZY = {
    "init": "everseg.data.verbs:init",
    "check": "everseg.data.verbs:check",
    "download": "everseg.data.verbs:download",
    "prepare": "everseg.data.verbs:prepare",
    "saliency": "everseg.data.verbs:saliency",
    "weights": "everseg.data.verbs:weights",
}
__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    return lazy_attribute(__name__, _LAZY, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
