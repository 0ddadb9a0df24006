"""torchvision's segmentation networks, layer by layer, so that their weights load strictly (floor 2).

Written from the papers and the names in the state dicts; torchvision itself is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from everseg.models.model import SegmentationModel
from everseg.models.parts import BatchNorm
from everseg.models.resnet import ResNet

RATES = (12, 24, 36)
"""Dilations at output stride 8 (the paper's; everseg's own DeepLabV3 follows MiB's code)."""


class _Stack(nn.Sequential):
    """A decoder of layers in a row, named by their number."""

    def __init__(self, out_channels: int, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.out_channels = out_channels

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Map the tap "encoder" (B, C, h, w) to (B, out_channels, h, w)."""
        return super().forward(features["encoder"])


class _Pooled(nn.Sequential):
    """The mean of the whole map, through a convolution, at every cell."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, hidden, h, w)."""
        return super().forward(input).expand(-1, -1, *input.shape[2:])


class _Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: side by side, concatenated, projected."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        dilated = [_layers(channels, hidden, 3, rate) for rate in RATES]
        pooled = _Pooled(nn.AdaptiveAvgPool2d(1), *_layers(channels, hidden, 1))
        self.convs = nn.ModuleList([_layers(channels, hidden, 1), *dilated, pooled])
        self.project = nn.Sequential(*_layers(5 * hidden, hidden, 1), nn.Dropout(0.5))

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, hidden, h, w)."""
        return self.project(torch.cat([conv(input) for conv in self.convs], dim=1))


def _layers(channels: int, out: int, size: int, dilation: int = 1) -> nn.Sequential:
    padding = dilation if size == 3 else 0
    conv = nn.Conv2d(channels, out, size, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(conv, BatchNorm(out), nn.ReLU())


def torchvision_deeplabv3(
    *,
    blocks: Sequence[int] = (3, 4, 6, 3),
    stem: int = 64,
    widths: Sequence[int] = (64, 128, 256, 512),
    outputs: Sequence[int] | None = None,
    hidden: int = 256,
) -> SegmentationModel:
    """Build torchvision's DeepLabV3 on a ResNet of bottlenecks at output stride 8; no outputs until it is grown.

    Args:
        blocks: of each stage; 3, 4, 6, 3 for ResNet-50 and 3, 4, 23, 3 for ResNet-101.
        stem: as for `ResNet`; so are `widths` and `outputs`.
        hidden: channels of the pyramid and of the map before the classifiers.

    Source: Chen et al., "Rethinking Atrous Convolution" (2017), as torchvision builds it.
    """
    encoder, options = _encoder(blocks, stem, widths, outputs)
    decoder = _Stack(hidden, _Pyramid(encoder.out_channels, hidden), *_layers(hidden, hidden, 3))
    return SegmentationModel(
        encoder, decoder, {"name": "torchvision-deeplabv3", "options": {**options, "hidden": hidden}}
    )


def torchvision_fcn(
    *,
    blocks: Sequence[int] = (3, 4, 6, 3),
    stem: int = 64,
    widths: Sequence[int] = (64, 128, 256, 512),
    outputs: Sequence[int] | None = None,
    hidden: int = 512,
) -> SegmentationModel:
    """Build torchvision's FCN on a ResNet of bottlenecks at output stride 8; options as for its DeepLabV3.

    Source: Long et al., "Fully Convolutional Networks", CVPR 2015, as torchvision builds it.
    """
    encoder, options = _encoder(blocks, stem, widths, outputs)
    decoder = _Stack(hidden, *_layers(encoder.out_channels, hidden, 3), nn.Dropout(0.1))
    return SegmentationModel(
        encoder, decoder, {"name": "torchvision-fcn", "options": {**options, "hidden": hidden}}
    )


def _encoder(
    blocks: Sequence[int], stem: int, widths: Sequence[int], outputs: Sequence[int] | None
) -> tuple[ResNet, dict[str, Any]]:
    encoder = ResNet(
        blocks, stem=stem, widths=widths, outputs=outputs, output_stride=8, norm="bn", late_dilation=True
    )
    options = {
        "blocks": list(blocks), "stem": stem, "widths": list(widths),
        "outputs": None if outputs is None else list(outputs),
    }  # fmt: skip
    return encoder, options
