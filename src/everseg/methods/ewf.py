"""Endpoints weight fusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from everseg.methods.base import Fuse
from everseg.methods.mib import MiB


@dataclass(kw_only=True)
class EWF(MiB):
    """MiB with frozen old classifiers, whose weights are fused with the old ones after each step.

    The fusion works with any method: `method.fuse=all method.freeze_heads=old` beside another method's name.

    Source: Xiao et al., "Endpoints Weight Fusion for Class Incremental Semantic Segmentation", CVPR 2023.
    """

    fuse: Fuse = "all"
    """After each later step, move its weights back towards those from before it: none, all, or "changed", only those
    that changed most."""
    freeze_heads: Literal["none", "old", "all"] = "old"
    """Classifiers that are not trained from step `freeze_from` on: none, those of earlier steps, or all."""
