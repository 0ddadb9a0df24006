"""ResNet encoders with dilation, parameters named as in torchvision (floor 2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from everseg.errors import ConfigError
from everseg.models.parts import NormKind, build_activation, build_norm

STRIDES = {
    # output stride, stem pools -> stride and dilation of the four stages
    (16, True): ((1, 2, 2, 1), (1, 1, 1, 2)),
    (8, True): ((1, 2, 1, 1), (1, 1, 2, 4)),
    (16, False): ((1, 2, 2, 2), (1, 1, 1, 1)),
    (8, False): ((1, 2, 2, 1), (1, 1, 1, 2)),
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(
        self, channels: int, width: int, out: int, *, stride: int, dilation: int, norm: NormKind
    ) -> None:
        super().__init__()
        self.conv1 = _conv3(channels, width, stride, dilation)
        self.bn1 = build_norm(norm, width)
        self.conv2 = _conv3(width, out, 1, dilation)
        self.bn2 = build_norm(norm, out)
        self.act = build_activation(norm)
        self.last_act = build_activation(norm, after_sum=True)
        self.downsample = _shortcut(channels, out, stride, norm)

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, out, H / stride, W / stride)."""
        x = self.act(self.bn1(self.conv1(input)))
        x = self.bn2(self.conv2(x))
        return self.last_act(x + (input if self.downsample is None else self.downsample(input)))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the 3x3 one carries stride and dilation."""

    def __init__(
        self, channels: int, width: int, out: int, *, stride: int, dilation: int, norm: NormKind
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = build_norm(norm, width)
        self.conv2 = _conv3(width, width, stride, dilation)
        self.bn2 = build_norm(norm, width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = build_norm(norm, out)
        self.act = build_activation(norm)
        self.last_act = build_activation(norm, after_sum=True)
        self.downsample = _shortcut(channels, out, stride, norm)

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, out, H / stride, W / stride)."""
        x = self.act(self.bn1(self.conv1(input)))
        x = self.act(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.last_act(x + (input if self.downsample is None else self.downsample(input)))


def _conv3(channels: int, out: int, stride: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)


def _shortcut(channels: int, out: int, stride: int, norm: NormKind) -> nn.Sequential | None:
    if stride == 1 and channels == out:
        return None
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), build_norm(norm, out))


class ResNet(nn.Module):
    """ResNet without classifier; the maps of its four stages, each after its last activation.

    Differs from torchvision's dilated ResNet, and agrees with MiB's code, in that *all* blocks of a dilated stage
    are dilated, the first one included.

    Args:
        blocks: blocks of each of the four stages.
        bottleneck: bottleneck or basic blocks.
        stem: channels of the 7x7 stem.
        widths: inner channels of the stages' blocks.
        outputs: output channels of the stages; default 4 * widths for bottlenecks, else widths.
        output_stride: input pixels per cell of the last map, 16 or 8, reached by dilation.
        norm: "bn", "abn" or "iabn".
        stem_pool: 3x3 max pooling after the stem (stride 4 in all); without it, small images keep more detail.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (3, 4, 6, 3),
        *,
        bottleneck: bool = True,
        stem: int = 64,
        widths: Sequence[int] = (64, 128, 256, 512),
        outputs: Sequence[int] | None = None,
        output_stride: int = 16,
        norm: NormKind = "abn",
        stem_pool: bool = True,
    ) -> None:
        super().__init__()
        outputs = [w * 4 if bottleneck else w for w in widths] if outputs is None else outputs
        if not len(blocks) == len(widths) == len(outputs) == 4 or min(*blocks, *widths, *outputs, stem) < 1:
            raise ConfigError("model.options: blocks, widths and outputs need four positive numbers each")
        if (output_stride, stem_pool) not in STRIDES:
            raise ConfigError(f"model.output_stride: must be 16 or 8, not {output_stride}")
        self.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = build_norm(norm, stem)
        self.act = build_activation(norm)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if stem_pool else nn.Identity()
        block = Bottleneck if bottleneck else BasicBlock
        channels = stem
        strides, dilations = STRIDES[output_stride, stem_pool]
        for k in range(4):
            stage = []
            for i in range(blocks[k]):
                stride = strides[k] if i == 0 else 1
                stage.append(
                    block(channels, widths[k], outputs[k], stride=stride, dilation=dilations[k], norm=norm)
                )
                channels = outputs[k]
            self.add_module(f"layer{k + 1}", nn.Sequential(*stage))
        self.out_channels = channels

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Map (B, 3, H, W) to the stages' maps "layer1" ... "layer4", finest first."""
        x = self.pool(self.act(self.bn1(self.conv1(image))))
        features = {}
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = features[name] = getattr(self, name)(x)
        return features
