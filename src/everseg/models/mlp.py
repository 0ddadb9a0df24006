"""SegFormer's all-MLP decoder over the taps of any encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everseg.errors import ConfigError
from everseg.models.blocks import NormKind, build_activation, build_norm
from everseg.models.open_sizes import cut


class MLPDecoder(nn.Module):
    """The light all-MLP head without classifier.

    With taps F_i (C_i channels, stride s_i, s_1 the finest):
    out = act(norm(sum_i up_i(W_i V_i F_i))), where V_i maps C_i to `hidden` channels cell by cell, up_i
    enlarges s_i / s_1 times, bilinearly, and the W_i side by side are the published fusing layer over the maps joined.
    W_i stands before up_i: both are linear, so the sum is the same and costs a third. The published V_i have a bias,
    which the norm takes away again.

    Maps are enlarged by the ratio of the strides and then cut to the finest one's size, so that cells stay where they
    are. The published code resizes every map to the finest one's size instead, which moves the cells where the image's
    sides are no multiple of the stride.

    Args:
        taps: name -> (channels, stride), finest first, every stride a multiple of the first.
        hidden: channels of the projections and of the result (published: 256 for MiT-B0 and B1, 768 for larger).
        norm: "bn", "abn" or "iabn".
        dropout: probability that a channel of the result is zeroed in training (published: 0.1).

    Raises:
        ConfigError: a dimension that cannot be.

    Source: Xie et al., "SegFormer", NeurIPS 2021, eq. 4.
    """

    def __init__(
        self,
        taps: Mapping[str, tuple[int, int]],
        *,
        hidden: int = 256,
        norm: NormKind = "bn",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if hidden < 1 or not 0 <= dropout < 1:
            raise ConfigError("model.options: hidden needs a positive number, dropout a probability below 1")
        strides = [stride for _, stride in taps.values()]
        if any(stride % strides[0] for stride in strides):
            raise ConfigError(
                f"model.options: the taps' strides {strides} are not multiples of the first; choose others with taps"
            )
        self.taps = tuple(taps)
        self.ratios = [stride // strides[0] for stride in strides]
        self.out_channels = hidden
        self.project = nn.ModuleList(
            [nn.Conv2d(channels, hidden, 1, bias=False) for channels, _ in taps.values()]
        )
        self.fuse = nn.ModuleList([nn.Conv2d(hidden, hidden, 1, bias=False) for _ in taps])
        self.norm = build_norm(norm, hidden)
        self.act = build_activation(norm)
        self.dropout = nn.Dropout2d(dropout)
        with torch.no_grad():
            # PyTorch draws weights in a range of 1 / sqrt(inputs). The W_i together are one layer with len(taps) times
            # as many inputs, so each is scaled down to what that layer would have drawn.
            for conv in self.fuse:
                cast(nn.Conv2d, conv).weight.div_(len(taps) ** 0.5)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Map the taps (B, C_i, h_i, w_i) to (B, hidden, h_1, w_1), after the activation."""
        total = self._share(0, features)  # (B, hidden, h_1, w_1): the finest map sets the size
        for index in range(1, len(self.taps)):
            total = total + cut(self._share(index, features), total)
        return self.dropout(self.act(self.norm(total)))

    def _share(self, index: int, features: Mapping[str, Tensor]) -> Tensor:
        """What one tap adds: (B, hidden, h, w) at the finest stride, h >= h_1 and w >= w_1."""
        fused = self.fuse[index](self.project[index](features[self.taps[index]]))  # (B, hidden, h_i, w_i)
        ratio = self.ratios[index]
        if ratio == 1:
            return fused
        size = (fused.shape[2] * ratio, fused.shape[3] * ratio)
        return F.interpolate(fused, size, mode="bilinear", align_corners=False)
