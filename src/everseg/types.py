"""The values that loader, model, method and engine pass to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from math import isfinite
from types import MappingProxyType
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
Taps = tuple[str, ...]
"""What is asked for: kinds of taps, or the names of single ones ("layer3.pre"), which the network must have."""


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
    memory: Tensor | None = None
    """(B,) bool: which images come from the memory of earlier steps; None where the step has no memory."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Name of a further map of the data set (`data.extra`), such as "saliency" -> (B, H, W) int64: its values as the
    files hold them; 255 (65,535 in maps of 16 bits) where the crop reaches beyond the image."""

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
        held = {each.name: getattr(self, each.name) for each in fields(self) if each.init}
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
    auxiliary: Mapping[str, Tensor] = MappingProxyType({})
    """Name -> (B, n, h, w): logits of outputs that are no class, such as "unknown"."""


REGIONS = "regions"
"""Name of the tap with the regions' logits (B, C, N, 1), where a network classifies regions of the image; with ".NAME"
behind it those of an auxiliary output. Also the name of the kind of head that gives them."""


def of_regions(output: SegOutput) -> SegOutput:
    """The outputs of the N regions of an image, as maps of N rows and one column."""
    start = f"{REGIONS}."
    others = {k.removeprefix(start): v for k, v in output.features.items() if k.startswith(start)}
    return SegOutput(output.features[REGIONS], output.features, others)


@dataclass(frozen=True)
class Readout:
    """How a model's outputs become one value per class, whose largest one is the class of a pixel.

    `everseg.losses.readout` computes it. The default is the arg-max of the logits, which is that of a softmax, and of
    sigmoids after resizing.
    """

    activation: Literal["none", "sigmoid"] = "none"
    """What the logits pass through."""
    before: bool = False
    """Whether they pass through it at their own resolution, before they are resized to the image's."""
    merge: tuple[str, ...] = ()
    """Auxiliary outputs that mean background. The logits of each are summed over its channels, pass through the
    activation, and are added to the background's value."""
    residual: str = ""
    """Auxiliary output that lowers the background's logit by its negative parts, at the logits' resolution: b + sum_k
    min(r_k, 0). "" = none."""
    threshold: float | None = None
    """The background's value, instead of that of its own output: what the other classes must exceed."""
    regions: str = ""
    """Tap that holds a map of regions, (B, H, W): a pixel has the class of its region, and is background where it is in
    none; see `REGIONS`. "" = every pixel for itself."""

    def problems(self) -> list[str]:
        """Say what is wrong with it."""
        found = []
        if self.regions and (self.before or self.residual):
            found.append("regions are not resized: they exclude before and residual")
        if self.threshold is not None and (self.merge or self.residual):
            found.append("a threshold excludes merge and residual")
        if self.threshold is not None and self.activation == "sigmoid" and not 0 < self.threshold < 1:
            found.append("a threshold on probabilities lies between 0 and 1")
        return found

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON value: what differs from the default."""
        found = {entry.name: (getattr(self, entry.name), entry.default) for entry in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, (value, default) in found.items()
            if value != default
        }

    @classmethod
    def of_json(cls, stored: Any) -> tuple[Readout, list[str]]:
        """Read it back.

        Returns:
            The readout and a list of problems. If there are problems, it must not be used.
        """
        good: dict[str, Callable[[Any], bool]] = {
            "activation": lambda value: value in ("none", "sigmoid"),
            "before": lambda value: isinstance(value, bool),
            "merge": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
            "residual": lambda value: isinstance(value, str),
            "regions": lambda value: isinstance(value, str),
            "threshold": lambda value: type(value) in (int, float) and isfinite(value),
        }
        if not isinstance(stored, Mapping):
            return cls(), ["readout: expected settings by name"]
        wrong = [key for key, value in stored.items() if key not in good or not good[key](value)]
        if wrong:
            return cls(), [f"readout: no usable {', '.join(map(str, wrong))}"]
        settings: dict[str, Any] = {**stored}
        if "merge" in settings:
            settings["merge"] = tuple(settings["merge"])
        found = cls(**settings)
        return found, [f"readout: {problem}" for problem in found.problems()]
