"""A decoder that only brings an encoder's maps to one grid: the cells that a mask transformer runs over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from everseg.errors import ConfigError
from everseg.models.open_sizes import cut


class PatchDecoder(nn.Module):
    """Project an encoder's maps, each behind a layer norm over its channels, to one width, and add them on one grid.

    The grid is the coarsest tap's with a stride of at most `stride` pixels (else the finest tap's). Finer maps are
    averaged over its cells, coarser ones enlarged bilinearly. Of taps of one stride, as a plain transformer has, only
    the last is used: Segmenter's own case.

    Args:
        taps: name -> (channels, stride), finest first, every stride a multiple of the one before.
        hidden: channels of the result; None = those of the last tap.
        stride: of the grid, in pixels. Its cells pay attention to each other, so half the stride takes 16 times the
            work.

    Raises:
        ConfigError: a dimension that cannot be.
    """

    def __init__(
        self, taps: Mapping[str, tuple[int, int]], *, hidden: int | None = None, stride: int = 16
    ) -> None:
        super().__init__()
        used = dict(list(taps.items())[-1:]) if plain(taps) else dict(taps)
        strides = [own for _, own in used.values()]
        if (hidden is not None and hidden < 1) or stride < 1:
            raise ConfigError("model.options: hidden and stride need positive numbers")
        self.grid = max([own for own in strides if own <= stride] or [strides[0]])
        if any(max(own, self.grid) % min(own, self.grid) for own in strides):
            raise ConfigError(
                f"model.options: the taps' strides {strides} are not multiples of each other; choose other taps"
            )
        self.strides = dict(zip(used, strides, strict=True))
        self.out_channels = hidden or list(used.values())[-1][0]
        self.norms = nn.ModuleDict({name: nn.LayerNorm(channels) for name, (channels, _) in used.items()})
        self.project = nn.ModuleDict(
            {name: nn.Linear(channels, self.out_channels) for name, (channels, _) in used.items()}
        )

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Map the taps (B, C_i, h_i, w_i) to (B, hidden, h, w)."""
        own = next(name for name, stride in self.strides.items() if stride == self.grid)
        total = None
        for name, stride in self.strides.items():
            cells = self.norms[name](features[name].movedim(1, 3))
            map = self.project[name](cells).movedim(3, 1)
            if stride < self.grid:
                # A last window that reaches beyond the map averages what there is.
                ratio = self.grid // stride
                map = F.avg_pool2d(map, ratio, ceil_mode=True, count_include_pad=False)
            elif stride > self.grid:
                ratio = stride // self.grid
                size = (map.shape[2] * ratio, map.shape[3] * ratio)
                map = cut(F.interpolate(map, size, mode="bilinear", align_corners=False), features[own])
            total = map if total is None else total + map
        return cast(Tensor, total)


def plain(taps: Mapping[str, tuple[int, int]]) -> bool:
    """Whether all taps have one stride, as those of a plain transformer."""
    return len({stride for _, stride in taps.values()}) == 1
