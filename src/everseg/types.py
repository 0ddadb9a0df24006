"""The values that loader, model, method and engine pass to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's channels, red first, for values in [0, 1]."""
LossTerms = dict[str, Tensor]
"""Name of a loss term -> scalar, with its weight already applied."""
Tap = Literal["before_activation", "attention"]
"""Feature maps that a model gives only where they are asked for: each stage's before its last activation
("layer1.pre"), and the attention maps of a transformer's blocks ("attention1"). A network without has none."""
Taps = tuple[Tap, ...]


@dataclass
class Batch:
    """The data that a method gets in one iteration."""

    image: Tensor
    """(B, 3, H, W) float, normalised."""
    label: Tensor
    """(B, H, W) int64 train ids of `branch`; 255 = ignored (65,535 where the branch has more than 255
    outputs, `everseg.labels.ignored_id`)."""
    branch: str
    """The branch of the model whose label space `label` uses."""
    ids: tuple[str, ...] = ()
    """Names of the samples, for messages."""

    def split(self, count: int) -> list[Batch]:
        """Cut the batch into `count` parts of consecutive images, the same cut as that of a batch over processes.

        Everything that the batch holds for each image is cut: tensors whose first dimension is the batch's, tuples of
        that length, and mappings of such tensors.

        Returns:
            Parts whose sizes differ by at most one image; a batch of fewer images gives parts of one image each.
        """
        size = len(self.image)
        count = min(count, size)
        bounds = [size * i // count for i in range(count + 1)]
        held = {field.name: getattr(self, field.name) for field in fields(self) if field.init}
        return [
            replace(self, **{name: _cut(value, size, slice(*pair)) for name, value in held.items()})
            for pair in pairwise(bounds)
        ]


def _cut(value: Any, size: int, part: slice) -> Any:
    if isinstance(value, Mapping):
        return {key: _cut(inner, size, part) for key, inner in value.items()}
    per_image = isinstance(value, Tensor | tuple) and len(value) == size
    return value[part] if per_image else value


class SegOutput(NamedTuple):
    """What a model returns for one branch."""

    logits: Tensor
    """(B, C, h, w) at the head's stride. C = the classes that the branch knows, in output order."""
    features: dict[str, Tensor]
    """Tap name -> (B, C_i, H_i, W_i), in the precision the network computes in. Every model has the taps `encoder` and
    `decoder`. Attention maps, where asked for, are (B, heads, h, w, h', w')."""
