"""The values that loader, model, method and engine pass to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's channels, red first, for values in [0, 1]."""
LossTerms = dict[str, Tensor]
"""Name of a loss term -> scalar, with its weight already applied."""


@dataclass
class Batch:
    """The data that a method gets in one iteration."""

    image: Tensor
    """(B, 3, H, W) float, normalised."""
    label: Tensor
    """(B, H, W) int64 train ids of `branch`; 255 = ignored."""
    branch: str
    """The branch of the model whose label space `label` uses."""
    ids: tuple[str, ...] = ()
    """Names of the samples, for messages."""


class SegOutput(NamedTuple):
    """What a model returns for one branch."""

    logits: Tensor
    """(B, C, h, w) at the head's stride. C = the classes that the branch knows, in output order."""
    features: dict[str, Tensor]
    """Tap name -> (B, C_i, H_i, W_i), in the precision the network computes in. Every model has the taps `encoder` and
    `decoder`."""
