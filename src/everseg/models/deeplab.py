"""DeepLabV3's decoder: atrous spatial pyramid pooling with a pooled branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from everseg.errors import ConfigError
from everseg.models.blocks import (
    LEAKY_SLOPE,
    NormKind,
    build_activation,
    build_norm,
    replicate_to,
    sliding_mean,
    window_means,
)
from everseg.models.compensation import Compensated, Unit

RATES = {16: (6, 12, 18), 8: (12, 24, 32)}
"""Output stride -> dilations. At stride 8 the last one is 32 as in MiB's code (the paper doubles it to 36)."""


class DeepLabV3(Compensated):
    """DeepLabV3's head without classifier.

    A 1x1 and three dilated 3x3 convolutions run side by side; their outputs are normalised and reduced. The mean of
    the map passes through convolutions of its own and is added. In training that mean is over the whole map. In eval
    mode it is over a sliding window, so that large images see the context that training crops saw. Training needs two
    images per process.

    Args:
        in_channels: channels of the encoder's last map.
        hidden: channels of each side-by-side convolution.
        out_channels: channels of the result.
        rates: dilations of the three 3x3 convolutions.
        norm: "bn", "abn" or "iabn".
        pool_size: side of the sliding window in cells; None or 0 = the whole map in eval mode too.
        compensation: RCIL's head: new convolutions beside the four side-by-side ones, with a norm of their own
            (`Compensated`), and initial weights of gain 1.
        dropout: share of the values behind the last activation that are set to 0 in training, as in torchvision's head.
        last_conv: a further 3x3 convolution with norm and activation behind all this.

    Source: Chen et al., "Rethinking Atrous Convolution" (2017), in the form of MiB's code: no dropout, the pooled
    branch is added after its reduction instead of concatenated (Rota Bulo et al., In-place ABN, CVPR 2018).
    """

    folds = (
        (("aspp.0", "aspp.1", "aspp.2", "aspp.3"), "aspp_norm"),
        (("pool_conv",), "pool_norm"),
        (("reduce", "pool_reduce"), "norm"),
        (("last_conv",), "last_norm"),
    )
    aspp_new: nn.ModuleList
    aspp_norm_new: nn.Module

    def __init__(
        self,
        in_channels: int,
        *,
        hidden: int = 256,
        out_channels: int = 256,
        rates: Sequence[int] = RATES[16],
        norm: NormKind = "abn",
        pool_size: int | None = 32,
        compensation: bool = False,
        dropout: float = 0.0,
        last_conv: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ConfigError("model.options: dropout needs a share from 0 to below 1")
        if len(rates) != 3 or min(*rates, hidden, out_channels) < 1 or (pool_size or 0) < 0:
            raise ConfigError(
                "model.options: rates needs three positive numbers, hidden and out_channels one each; "
                "pool_size must not be negative"
            )
        self.pool_size = pool_size or None
        self.out_channels = out_channels
        self.aspp = nn.ModuleList([nn.Conv2d(in_channels, hidden, 1, bias=False)])
        for rate in rates:
            self.aspp.append(nn.Conv2d(in_channels, hidden, 3, dilation=rate, padding=rate, bias=False))
        self.aspp_norm = build_norm(norm, 4 * hidden)
        self.pool_conv = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.pool_norm = build_norm(norm, hidden)
        self.reduce = nn.Conv2d(4 * hidden, out_channels, 1, bias=False)
        self.pool_reduce = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.norm = build_norm(norm, out_channels)
        self.act = build_activation(norm, after_sum=compensation)
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.last_conv, self.last_norm = None, None
        if last_conv:
            self.last_conv = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
            self.last_norm = build_norm(norm, out_channels)
        if compensation:
            self.compensate(Unit(("aspp.0", "aspp.1", "aspp.2", "aspp.3"), "aspp_norm"))
        # The gain of a leaky ReLU for every norm, also where the activation is a ReLU. RCIL's code takes it from its
        # norms, which have no activation.
        gain = 1.0 if compensation else nn.init.calculate_gain("leaky_relu", LEAKY_SLOPE)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight, gain)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Map the tap "encoder" (B, in_channels, h, w) to (B, out_channels, h, w), after its activation."""
        x = features["encoder"]
        # (B, 4 * hidden, h, w) inside, (B, out_channels, h, w) after `reduce`.
        out = self.aspp_norm(torch.cat([conv(x) for conv in self.aspp], dim=1))
        if self.units:
            out = self.combined(
                out, self.aspp_norm_new(torch.cat([conv(x) for conv in self.aspp_new], dim=1))
            )
        out = self.act(self.norm(self.reduce(self.act(out)) + self._pooled(x)))
        if self.dropout is not None:
            out = self.dropout(out)
        if self.last_conv is None:
            return out
        assert self.last_norm is not None
        return self.act(self.last_norm(self.last_conv(out)))

    def _pooled(self, x: Tensor) -> Tensor:
        """The pooled branch: (B, in_channels, h, w) to (B, out_channels, h, w), or (B, out_channels, 1, 1)."""
        # An exported graph has open sizes, which the sliding window in its usual form cannot express.
        exported = torch.compiler.is_exporting()
        if self.training or self.pool_size is None:
            pooled = x.mean((2, 3), keepdim=True)  # (B, in_channels, 1, 1)
        elif exported:
            pooled = window_means(x, self.pool_size)
        else:
            pooled = sliding_mean(x, self.pool_size)
        # Everything up to the padding works cell by cell, so padding last gives the same and costs less.
        pooled = self.pool_reduce(self.act(self.pool_norm(self.pool_conv(pooled))))
        # A single cell is added to every cell by broadcasting; `window_means` gives a map of full size already.
        if exported or pooled.shape[2:] == (1, 1):
            return pooled
        return replicate_to(pooled, *x.shape[2:])
