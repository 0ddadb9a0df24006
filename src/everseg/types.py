"""The values that travel between loader, model, method and engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of ImageNet's channels, red first, for values in [0, 1]."""
LossTerms = dict[str, Tensor]
"""Name of a loss term -> scalar, its weight already applied."""


@dataclass
class Batch:
    """What a method sees of the data in one iteration."""

    image: Tensor
    """(B, 3, H, W) float, normalised."""
    label: Tensor
    """(B, H, W) int64 train ids of `branch`; 255 = ignored."""
    branch: str
    """The per-domain path whose label space `label` is in."""
    ids: tuple[str, ...] = ()
    """Names of the samples, for messages."""


class SegOutput(NamedTuple):
    """What a model returns for one branch."""

    logits: Tensor
    """(B, C, h, w) at the head's stride; C = classes the branch knows, in output order."""
    features: dict[str, Tensor]
    """Tap name -> (B, C_i, H_i, W_i), in the arithmetic of the network; every model has the taps `encoder` and
    `decoder`."""
