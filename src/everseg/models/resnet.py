"""ResNet encoders with dilation, parameters named as in torchvision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from everseg.errors import ConfigError
from everseg.models.blocks import (
    PRE,
    BranchDict,
    NormKind,
    PerBranch,
    beside,
    build_activation,
    build_norm,
    through,
)
from everseg.models.compensation import Compensated, Unit
from everseg.types import Taps

STRIDES = {
    # output stride, stem pools -> stride and dilation of the four stages
    (16, True): ((1, 2, 2, 1), (1, 1, 1, 2)),
    (8, True): ((1, 2, 1, 1), (1, 1, 2, 4)),
    (16, False): ((1, 2, 2, 2), (1, 1, 1, 1)),
    (8, False): ((1, 2, 2, 1), (1, 1, 1, 2)),
}


MakeNorm = Callable[[int], nn.Module]


class BasicBlock(Compensated):
    """Two 3x3 convolutions and a shortcut; with adapters, a branch's 1x1 convolution beside each of the two.

    With `compensation` a new 3x3 convolution stands beside each of the two.
    """

    folds = ((("conv1",), "bn1"), (("conv2",), "bn2"))
    conv1_new: nn.Module
    bn1_new: nn.Module
    conv2_new: nn.Module
    bn2_new: nn.Module

    def __init__(
        self, channels: int, width: int, out: int, *, stride: int, dilation: int, norm: NormKind,
        make_norm: MakeNorm, adapters: bool, compensation: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv1 = _conv3(channels, width, stride, dilation)
        self.adapter1 = _adapter(channels, width, stride) if adapters else None
        self.bn1 = make_norm(width)
        self.conv2 = _conv3(width, out, 1, dilation)
        self.adapter2 = _adapter(width, out, 1) if adapters else None
        self.bn2 = make_norm(out)
        self.act = build_activation(norm, after_sum=compensation)
        self.last_act = build_activation(norm, after_sum=True)
        self.downsample = _shortcut(channels, out, stride, make_norm)
        if compensation:
            self.compensate(Unit(("conv1",), "bn1"), Unit(("conv2",), "bn2"))

    def forward(self, input: Tensor, branch: str | None = None) -> Tensor:
        """Map (B, C, H, W) to (B, out, H / stride, W / stride)."""
        return self.last_act(self.before_activation(input, branch))

    def before_activation(self, input: Tensor, branch: str | None = None) -> Tensor:
        """The same, before the last activation."""
        x = through(self.bn1, beside(self.conv1(input), self.adapter1, input, branch), branch)
        if self.units:
            x = self.combined(x, self.bn1_new(self.conv1_new(input)))
        inner = self.act(x)
        x = through(self.bn2, beside(self.conv2(inner), self.adapter2, inner, branch), branch)
        if self.units:
            x = self.combined(x, self.bn2_new(self.conv2_new(inner)))
        return x + _skip(self.downsample, input, branch)


class Bottleneck(Compensated):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; stride, dilation and adapters are the 3x3 one's.

    With `compensation` a new 3x3 convolution stands beside it.
    """

    folds = ((("conv1",), "bn1"), (("conv2",), "bn2"), (("conv3",), "bn3"))
    conv2_new: nn.Module
    bn2_new: nn.Module

    def __init__(
        self, channels: int, width: int, out: int, *, stride: int, dilation: int, norm: NormKind,
        make_norm: MakeNorm, adapters: bool, compensation: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = make_norm(width)
        self.conv2 = _conv3(width, width, stride, dilation)
        self.adapter2 = _adapter(width, width, stride) if adapters else None
        self.bn2 = make_norm(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = make_norm(out)
        self.act = build_activation(norm, after_sum=compensation)
        self.last_act = build_activation(norm, after_sum=True)
        self.downsample = _shortcut(channels, out, stride, make_norm)
        if compensation:
            self.compensate(Unit(("conv2",), "bn2"))

    def forward(self, input: Tensor, branch: str | None = None) -> Tensor:
        """Map (B, C, H, W) to (B, out, H / stride, W / stride)."""
        return self.last_act(self.before_activation(input, branch))

    def before_activation(self, input: Tensor, branch: str | None = None) -> Tensor:
        """The same, before the last activation."""
        inner = self.act(through(self.bn1, self.conv1(input), branch))
        x = through(self.bn2, beside(self.conv2(inner), self.adapter2, inner, branch), branch)
        if self.units:
            x = self.combined(x, self.bn2_new(self.conv2_new(inner)))
        x = self.act(x)
        x = through(self.bn3, self.conv3(x), branch)
        return x + _skip(self.downsample, input, branch)


class Shortcut(nn.Sequential):
    """A convolution and a norm; the norm may be a branch's own, so they are run by `_skip`."""

    folds = ((("0",), "1"),)


def _conv3(channels: int, out: int, stride: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)


def _adapter(channels: int, out: int, stride: int) -> BranchDict:
    """No bias: a norm follows."""
    return BranchDict(partial(nn.Conv2d, channels, out, 1, stride=stride, bias=False))


def _shortcut(channels: int, out: int, stride: int, make_norm: MakeNorm) -> nn.Sequential | None:
    if stride == 1 and channels == out:
        return None
    return Shortcut(nn.Conv2d(channels, out, 1, stride=stride, bias=False), make_norm(out))


def _skip(shortcut: nn.Sequential | None, input: Tensor, branch: str | None) -> Tensor:
    return input if shortcut is None else through(shortcut[1], shortcut[0](input), branch)


class ResNet(nn.Module):
    """ResNet without classifier; the maps of its four stages, each after its last activation.

    Differs from torchvision's dilated ResNet, and agrees with MiB's code, in that *all* blocks of a dilated stage
    are dilated, the first one included; unless `late_dilation` is set.

    Args:
        blocks: blocks of each of the four stages.
        bottleneck: bottleneck or basic blocks.
        stem: channels of the 7x7 stem.
        widths: inner channels of the stages' blocks.
        outputs: output channels of the stages; default 4 * widths for bottlenecks, else widths.
        output_stride: input pixels per cell of the last map, 16 or 8, reached by dilation.
        norm: "bn", "abn" or "iabn".
        stem_pool: 3x3 max pooling after the stem (stride 4 in all); without it, small images keep more detail.
        per_branch: what each branch owns: with "norm" all norms, with "adapter" also a parallel 1x1 convolution
            beside each 3x3 one, whose output is added before the norm (Rebuffi et al., CVPR 2018). The branches differ
            from the first norm on, and `forward` takes the branches and returns the maps of each.
        compensation: RCIL's network: a new convolution beside every 3x3 one (`Compensated`), and no activation after
            the stem. Not where branches own norms.
        in_channels: channels of the images.
    """

    folds = ((("conv1",), "bn1"),)

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
        per_branch: PerBranch = "head",
        late_dilation: bool = False,
        compensation: bool = False,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.by_branch = per_branch in ("norm", "adapter")
        outputs = [w * 4 if bottleneck else w for w in widths] if outputs is None else outputs
        if not len(blocks) == len(widths) == len(outputs) == 4 or min(*blocks, *widths, *outputs, stem) < 1:
            raise ConfigError("model.options: blocks, widths and outputs need four positive numbers each")
        if (output_stride, stem_pool) not in STRIDES:
            raise ConfigError(f"model.output_stride: must be 16 or 8, not {output_stride}")
        make_norm = partial(_branch_norm if self.by_branch else build_norm, norm)
        self.conv1 = nn.Conv2d(in_channels, stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = make_norm(stem)
        # The authors' norms have no activation of their own any more, and nothing replaced the stem's.
        self.act = nn.Identity() if compensation else build_activation(norm)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if stem_pool else nn.Identity()
        block = Bottleneck if bottleneck else BasicBlock
        channels = stem
        strides, dilations = STRIDES[output_stride, stem_pool]
        for k in range(4):
            stage = []
            for i in range(blocks[k]):
                stride = strides[k] if i == 0 else 1
                # Torchvision's first block of a stage still has the dilation of the stage before.
                dilation = dilations[max(k - 1, 0) if late_dilation and i == 0 else k]
                stage.append(
                    block(
                        channels, widths[k], outputs[k], stride=stride, dilation=dilation, norm=norm,
                        make_norm=make_norm, adapters=per_branch == "adapter", compensation=compensation,
                    )
                )  # fmt: skip
                channels = outputs[k]
            self.add_module(f"layer{k + 1}", nn.Sequential(*stage))
        self.out_channels = channels

    def forward(
        self, image: Tensor, branches: Iterable[str] | None = None, *, taps: Taps = ()
    ) -> dict[str, Any]:
        """Map (B, 3, H, W) to the stages' maps "layer1" ... "layer4", finest first; by branch where `by_branch`.

        Asked for "before_activation" also "layer1.pre" ... "layer4.pre", the maps before the stage's last activation.
        """
        before = "before_activation" in taps
        # All that comes before the first norm, so all that branches share in one run.
        start = self.conv1(image)
        if not self.by_branch:
            return self._through(start, None, before)
        return {branch: self._through(start, branch, before) for branch in branches or ()}

    def parameter_layers(self) -> list[list[nn.Parameter]]:
        """The weights of the stem and of each stage, from the image on."""
        stem = [*self.conv1.parameters(), *self.bn1.parameters()]
        return [stem, *([*getattr(self, f"layer{k}").parameters()] for k in (1, 2, 3, 4))]

    def _through(self, start: Tensor, branch: str | None, before_activation: bool) -> dict[str, Tensor]:
        x = self.pool(self.act(through(self.bn1, start, branch)))  # (B, stem, H / 4, W / 4) with pooling
        features = {}
        for name in ("layer1", "layer2", "layer3", "layer4"):
            *blocks, last = getattr(self, name)
            for block in blocks:
                x = block(x, branch)
            if before_activation:
                features[name + PRE] = last.before_activation(x, branch)
                x = last.last_act(features[name + PRE].clone())  # a copy: the activation works in place
            else:
                x = last(x, branch)
            features[name] = x
        return features


def _branch_norm(kind: NormKind, channels: int) -> BranchDict:
    return BranchDict(partial(build_norm, kind, channels))
