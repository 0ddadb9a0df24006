"""ERFNet with shared factorised convolutions and, where wanted, norms and adapters per branch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everseg.errors import ConfigError
from everseg.models.blocks import (
    PRE,
    BatchNorm,
    BranchDecoder,
    BranchDict,
    PerBranch,
    beside,
    check_in_channels,
    check_per_branch,
    through,
)
from everseg.models.model import SegmentationModel
from everseg.types import Taps

ERFNET_EPS = 1e-3
DILATIONS = (2, 4, 8, 16)
"""Dilations of the blocks at 1/8 of the resolution, over and over."""


class Down(nn.Module):
    """Halve the resolution: a strided 3x3 convolution and a 2x2 max pooling side by side, norm, ReLU.

    Args:
        channels: channels coming in.
        out: channels going out, more than come in.
        make_norm: makes the norm (one, or one per branch) of `out` channels.
    """

    def __init__(self, channels: int, out: int, make_norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out - channels, 3, stride=2, padding=1)
        self.norm = make_norm(out)

    def reduce(self, x: Tensor) -> Tensor:
        """What all branches share: (B, C, H, W) to (B, out, H / 2, W / 2), odd sides rounded up."""
        # Both forms give the same values. The exported graph's sizes are open, and this padding makes the pooled map
        # as large as the convolution's whatever the image's size is.
        if torch.compiler.is_exporting():
            pooled = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), 2)
        else:
            pooled = F.max_pool2d(x, 2, ceil_mode=True)
        return torch.cat([self.conv(x), pooled], dim=1)  # (out - C) + C channels

    def forward(self, x: Tensor, branch: str | None) -> Tensor:
        """Map (B, C, H, W) to (B, out, H / 2, W / 2)."""
        return F.relu(self.before_activation(x, branch))

    def before_activation(self, x: Tensor, branch: str | None) -> Tensor:
        """The same, before the last activation."""
        return through(self.norm, self.reduce(x), branch)


class Block(nn.Module):
    """Non-bottleneck 1D block: two pairs of 3x1 and 1x3 convolutions, the second pair dilated, and a shortcut.

    With adapters a branch's 1x1 convolution of each pair's input is added to the pair's result before the norm:
    a = relu(norm1(pair1(x) + adapter1(x))), result = relu(dropout(norm2(pair2(a) + adapter2(a))) + x).

    Args:
        channels: channels in and out.
        dilation: of the second pair.
        dropout: probability that a whole channel is dropped.
        make_norm: makes a norm (one, or one per branch).
        adapters: each branch has adapters.
    """

    folds = ((("horizontal1",), "norm1"), (("horizontal2",), "norm2"))

    def __init__(
        self,
        channels: int,
        dilation: int,
        dropout: float,
        make_norm: Callable[[int], nn.Module],
        *,
        adapters: bool = False,
    ) -> None:
        super().__init__()
        adapter = partial(nn.Conv2d, channels, channels, 1)
        self.vertical1, self.horizontal1 = _pair(channels, 1)
        self.adapter1 = BranchDict(adapter) if adapters else None
        self.norm1 = make_norm(channels)
        self.vertical2, self.horizontal2 = _pair(channels, dilation)
        self.adapter2 = BranchDict(adapter) if adapters else None
        self.norm2 = make_norm(channels)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor, branch: str | None) -> Tensor:
        """Map (B, channels, H, W) to the same shape."""
        return F.relu(self.before_activation(x, branch))

    def before_activation(self, x: Tensor, branch: str | None) -> Tensor:
        """The same, before the last activation."""
        a = beside(self.horizontal1(F.relu(self.vertical1(x))), self.adapter1, x, branch)
        a = F.relu(through(self.norm1, a, branch))  # (B, channels, H, W), as everything in the block
        b = beside(self.horizontal2(F.relu(self.vertical2(a))), self.adapter2, a, branch)
        # Before the shortcut, so a dropped channel still passes x on.
        b = self.dropout(through(self.norm2, b, branch))
        return b + x


def _pair(channels: int, dilation: int) -> tuple[nn.Conv2d, nn.Conv2d]:
    return (
        nn.Conv2d(channels, channels, (3, 1), padding=(dilation, 0), dilation=(dilation, 1)),
        nn.Conv2d(channels, channels, (1, 3), padding=(0, dilation), dilation=(1, dilation)),
    )


class Encoder(nn.Module):
    """ERFNet's encoder: taps "down1", "down2" and "down3" at 1/2, 1/4 and 1/8, each at the end of its stage.

    Args:
        widths: channels of the three stages.
        blocks: blocks of the second and of the third stage.
        dropout: of the blocks of the second and of the third stage.
        in_channels: channels of the images, fewer than the first stage's: it passes them on beside its own.
        per_branch: what each branch owns; with "norm" and "adapter" the branches differ from the first norm on.

    Attributes:
        fresh_norms: the norms do not start from pretrained ones. The authors' code does the same (their norms' names
            do not match the file's), and adapters, which are not pretrained, come before the norms.
    """

    def __init__(
        self,
        widths: Sequence[int],
        blocks: Sequence[int],
        dropout: Sequence[float],
        per_branch: PerBranch,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.by_branch = per_branch in ("norm", "adapter")
        self.fresh_norms = adapters = per_branch == "adapter"
        norm = _branch_norm if self.by_branch else _norm
        # The order of these lines is the order in which random weights are drawn: changing it changes every run.
        self.down1 = Down(in_channels, widths[0], norm)
        self.down2 = Down(widths[0], widths[1], norm)
        self.blocks2 = nn.ModuleList(
            Block(widths[1], 1, dropout[0], norm, adapters=adapters) for _ in range(blocks[0])
        )
        self.down3 = Down(widths[1], widths[2], norm)
        self.blocks3 = nn.ModuleList(
            Block(widths[2], DILATIONS[i % len(DILATIONS)], dropout[1], norm, adapters=adapters)
            for i in range(blocks[1])
        )

    def forward(
        self, image: Tensor, branches: Iterable[str] | None = None, *, taps: Taps = ()
    ) -> dict[str, Any]:
        """Map (B, 3, H, W) to the taps, or to branch -> taps where branches own parts of the encoder.

        Only the first convolution and pooling come before the branches differ; they run once. Asked for
        "before_activation" also "down1.pre", "down2.pre" and "down3.pre", before the stage's last activation.
        """
        before = "before_activation" in taps
        start = self.down1.reduce(image)
        if not self.by_branch:
            return self._through(start, None, before)
        return {branch: self._through(start, branch, before) for branch in branches or ()}

    def parameter_layers(self) -> list[list[nn.Parameter]]:
        """The weights of the three stages, from the image on."""
        stages = ((self.down1,), (self.down2, self.blocks2), (self.down3, self.blocks3))
        return [[weight for module in stage for weight in module.parameters()] for stage in stages]

    def _through(self, start: Tensor, branch: str | None, before_activation: bool) -> dict[str, Tensor]:
        taps: dict[str, Tensor] = {}
        x = through(self.down1.norm, start, branch)  # (B, widths[0], H / 2, W / 2), as yet without its ReLU
        # The two later stages at 1/4 and 1/8; the first has run up to its norm already.
        later = ("down2", (self.down2, *self.blocks2)), ("down3", (self.down3, *self.blocks3))
        for name, modules in (("down1", ()), *later):
            for module in modules[:-1]:
                x = module(x, branch)
            if modules:
                x = cast(Down | Block, modules[-1]).before_activation(x, branch)
            if before_activation:
                taps[name + PRE] = x
            x = taps[name] = F.relu(x)
        return taps


class Up(nn.Module):
    """Double the resolution: a transposed 3x3 convolution, norm, ReLU."""

    folds = ((("conv",), "norm"),)

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, out, 3, stride=2, padding=1, output_padding=1)
        self.norm = _norm(out)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, out, 2 H, 2 W)."""
        return F.relu(self.norm(self.conv(x)))


class Decoder(nn.Module):
    """ERFNet's decoder without its last layer: two doublings, two blocks without dropout after each.

    Args:
        widths: the encoder's; the map returned has the first stage's channels at half the image's resolution.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.out_channels = widths[0]
        self.up2 = Up(widths[2], widths[1])
        self.blocks2 = nn.ModuleList(Block(widths[1], 1, 0.0, _norm) for _ in range(2))
        self.up1 = Up(widths[1], widths[0])
        self.blocks1 = nn.ModuleList(Block(widths[0], 1, 0.0, _norm) for _ in range(2))

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Map the tap "encoder" (B, C, h, w) to (B, out_channels, 4 h, 4 w)."""
        x = self.up2(features["encoder"])  # (B, widths[1], 2 h, 2 w)
        for block in self.blocks2:
            x = block(x, None)
        x = self.up1(x)  # (B, widths[0], 4 h, 4 w)
        for block in self.blocks1:
            x = block(x, None)
        return x


def erfnet(
    *,
    per_branch: str = "adapter",
    dropout: Sequence[float] = (0.03, 0.3),
    widths: Sequence[int] = (16, 64, 128),
    blocks: Sequence[int] = (5, 8),
    in_channels: int = 3,
) -> SegmentationModel:
    """Build ERFNet, alone or with MDIL's norms and adapters per branch; it has no outputs until it is grown.

    Logits come at the image's resolution (its sides rounded up to multiples of 8, then cut). Weights start as
    PyTorch's layers do; norms have eps 1e-3.

    Args:
        per_branch: what each branch owns: "head" = its last layer (a transposed 2x2 convolution), "decoder" = its
            decoder too (the plain ERFNet of the baselines), "norm" = the encoder's norms too, "adapter" = two
            parallel 1x1 convolutions in each of the encoder's blocks too (MDIL).
        dropout: probabilities in the encoder's second and third stage.
        widths: channels of the encoder's stages, increasing.
        blocks: blocks of the second and third stage.
        in_channels: channels of the images; a run sets it as its data set states.

    Raises:
        ConfigError: a dimension or a choice that cannot be.

    Source: Romera et al., "ERFNet", T-ITS 2018; adapters and norms per branch: Garg et al., "Multi-Domain Incremental
    Learning for Semantic Segmentation", WACV 2022. Behaves as the authors' code; the branch is an argument here and a
    global variable there.
    """
    choice = check_per_branch(per_branch)
    if len(widths) != 3 or not check_in_channels(in_channels) < widths[0] < widths[1] < widths[2]:
        raise ConfigError(
            f"model.options: widths needs three increasing numbers, the first above {in_channels}, the image's channels"
        )
    if len(blocks) != 2 or min(blocks) < 0 or len(dropout) != 2 or not all(0 <= p < 1 for p in dropout):
        raise ConfigError("model.options: blocks needs two numbers, dropout two probabilities below 1")
    options: dict[str, Any] = {
        "per_branch": choice, "dropout": list(dropout), "widths": list(widths), "blocks": list(blocks),
    }  # fmt: skip
    if in_channels != 3:
        options["in_channels"] = in_channels
    encoder = Encoder(widths, blocks, dropout, choice, in_channels)
    decoder = Decoder(widths) if choice == "head" else BranchDecoder(partial(Decoder, list(widths)))
    classifier = partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
    return SegmentationModel(
        encoder, decoder, {"name": "erfnet", "options": options}, make_classifier=classifier
    )


def _norm(channels: int) -> nn.Module:
    return BatchNorm(channels, ERFNET_EPS)


def _branch_norm(channels: int) -> nn.Module:
    return BranchDict(partial(_norm, channels))
