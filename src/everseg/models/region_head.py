"""A head whose outputs belong to regions of the image, which a map beside the image gives (MicroSeg)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everseg.errors import ConfigError
from everseg.models.blocks import Classifier, NormKind, build_activation, build_norm
from everseg.models.heads import BACKGROUND, GrowingHead, Head, HeadOutput, Trunk
from everseg.types import REGIONS

PROPOSALS = "proposals"
"""Name of the map of regions in `data.extra`: 0 to N - 1 is the region of a pixel, all else means none."""
_DEPTH = 3
"""Convolutions in front of a region's classifier."""
_EMPTY = 1e-7
"""Added to the number of cells that are pooled, as in MicroSeg's code: an empty region gives a vector of zeros."""


class RegionBlock(nn.Module):
    """A 3x3 convolution, norm and activation of one vector per region: only the kernel's centre acts."""

    folds = ((("conv",), "norm"),)

    def __init__(self, in_channels: int, channels: int, norm: NormKind) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm = build_norm(norm, channels)
        self.act = build_activation(norm)

    def forward(self, vectors: Tensor) -> Tensor:
        """Map (P, in_channels, 1, 1) to (P, channels, 1, 1)."""
        return self.act(self.norm(self.conv(vectors)))


class RegionPart(Trunk):
    """A classifier behind a trunk for every cell, and one behind three convolutions for the vector of each region."""

    def __init__(
        self, in_channels: int, hidden: int, classifier: Classifier, of_regions: Classifier, norm: NormKind
    ) -> None:
        super().__init__(in_channels, hidden, classifier, norm)
        widths = [in_channels, *[hidden] * _DEPTH]
        self.blocks = nn.Sequential(*[RegionBlock(a, b, norm) for a, b in pairwise(widths)])
        self.of_regions = of_regions

    def classify_regions(self, vectors: Tensor) -> Tensor:
        """Map the regions' vectors (P, in_channels, 1, 1) to logits (P, outputs)."""
        return self.of_regions(self.blocks(vectors)).flatten(1)

    @property
    def dense(self) -> list[nn.Module]:
        """The modules that see cells."""
        return [self.conv, self.norm, self.classifier]

    @property
    def regional(self) -> list[nn.Module]:
        """The modules that see regions."""
        return [self.blocks, self.of_regions]


class RegionHead(GrowingHead):
    """Classifiers of cells, and beside each one a classifier of regions.

    The regions' logits are taps, as maps of N rows and one column: "regions" (B, C, N, 1) those of the classes, and
    "regions.NAME" (B, n, N, 1) those of an auxiliary output. N is `Head.regions` of the first growth. The tap
    "proposals" is the map of regions as it was given. `everseg.types.of_regions` reads the taps.

    Source: Zhang et al. (MicroSeg), NeurIPS 2022, and its code.
    """

    reads_extra = (PROPOSALS,)

    def make_part(self, number: int, head: Head) -> nn.Module:
        """Make a `RegionPart` of `number` outputs.

        Raises:
            ConfigError: the head has no width.
        """
        if head.hidden is None:
            raise ConfigError("head: a head of regions needs `hidden`, the width of its convolutions")
        make = self.make_classifier
        return RegionPart(
            self.in_channels, head.hidden, make(head.hidden, number), make(head.hidden, number), self.norm
        )

    def forward(self, features: Tensor, extra: Mapping[str, Tensor] | None = None) -> HeadOutput:
        """Map the decoder's map and the map of regions, (B, H, W) in `extra`, to both kinds of outputs."""
        found = super().forward(features)
        regions = (extra or {})[PROPOSALS]
        number = self.growths[0].head.regions
        vectors = pooled_over_regions(features, regions, number).flatten(0, 1)[
            ..., None, None
        ]  # (B * N, D, 1, 1)

        def classified(part: nn.Module) -> Tensor:
            values = cast(RegionPart, part).classify_regions(vectors)  # (B * N, outputs)
            return values.unflatten(0, (len(features), number)).transpose(1, 2)[
                ..., None
            ]  # (B, outputs, N, 1)

        others = {name: classified(part) for name, part in self.others.items()}
        background = [others.pop(BACKGROUND)] if BACKGROUND in others else []
        logits = torch.cat([*background, *map(classified, self.classifiers)], dim=1)
        taps = {REGIONS: logits, PROPOSALS: regions} | {f"{REGIONS}.{k}": v for k, v in others.items()}
        return HeadOutput(found.logits, found.auxiliary, found.features | taps)


def pooled_over_regions(features: Tensor, regions: Tensor, number: int) -> Tensor:
    """Average a map over every region: (B, D, h, w) to (B, N, D).

    The regions are brought to the map's size by their nearest pixels. A region that has no cell gives zeros.

    Args:
        features: (B, D, h, w); half precision is pooled in float32.
        regions: (B, H, W) integers; values outside 0..N-1 belong to no region.
        number: N.

    Source: Zhang et al. (MicroSeg), NeurIPS 2022, and its code.

    >>> pooled_over_regions(torch.tensor([[[[1.0, 3.0, 8.0]]]]), torch.tensor([[[0, 0, 255]]]), 2).tolist()
    [[[2.0], [0.0]]]
    """
    known = torch.where((regions >= 0) & (regions < number), regions, number)
    # Half precision can hold neither numbers of regions above 256 nor counts of cells.
    with torch.autocast(features.device.type, enabled=False):
        maps = features if features.dtype == torch.float64 else features.float()
        small = F.interpolate(known[:, None].to(maps.dtype), maps.shape[2:], mode="nearest")
        # `one_hot` would wait for the device to look at the numbers.
        every = torch.arange(number, device=maps.device)
        cells = (small[:, 0].long().flatten(1)[..., None] == every).to(maps)  # (B, h * w, N)
        sums = torch.einsum("bpn,bdp->bnd", cells, maps.flatten(2))
        return sums / (cells.sum(dim=1)[..., None] + _EMPTY)
