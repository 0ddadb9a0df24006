"""Class tokens: a mask transformer whose classes are vectors, one more for each new class."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everseg.errors import ConfigError
from everseg.models.heads import GrowingHead, Growth, Head, HeadOutput

PATCHES, TOKENS, CLASSES = "patches", "class_tokens", "class_features"
"""Names of the head's taps: what the masks are products of, and the class tokens behind the transformer."""
PLAIN = Head()
MASK_SCALE = 10.0
"""Where the factor on the cosines starts: the largest difference between two logits is then 20."""


class ClassTokens(nn.Module):
    """The tokens of the classes that one growth has added.

    Args:
        number: of classes.
        width: of a token.
    """

    def __init__(self, number: int, width: int) -> None:
        super().__init__()
        self.out_channels = number
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(number, width), std=0.02))
        self.bias = None


class Block(nn.Module):
    """A block of a transformer: attention, then two layers with GELU, each behind a norm and added to its input.

    Args:
        width: of a token.
        heads: of the attention; divides `width`.
        dropout: probability, on what is added.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.qkv, self.out, self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(tokens)).chunk(3, dim=2)
        )  # each (B, heads, N, D / heads)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + self.dropout(self.out(seen))
        return tokens + self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(self.norm2(tokens))))))


class TokenHead(GrowingHead):
    """Segmenter's mask transformer, with tokens that grow.

    The decoder's cells and one token per class run together through the blocks, as one sequence. A class's logit in a
    cell is a learnt factor times the cosine between a projection of the cell and one of the token. (The published code
    has a layer norm over the classes in its place, which would tie the logits of old classes to the number of new ones,
    and fix their spread.)

    The tokens of a later growth start as copies of the branch's first token, the background's. They take part in the
    attention, so a growth changes the logits of old classes a little.

    Args:
        width: channels of the decoder's map, and of a token.
        layers: number of blocks.
        heads: of each block's attention.
        dropout: probability, in the blocks.

    Raises:
        ConfigError: a dimension that cannot be.

    Source: Strudel et al., "Segmenter", ICCV 2021; the growing tokens as in MBS (Park et al., ECCV 2024).
    """

    gives_tokens = True
    """Asked by rooms that do not know the class."""

    def __init__(
        self, width: int, *, layers: int = 2, heads: int | None = None, dropout: float = 0.1
    ) -> None:
        super().__init__(width)
        heads = heads or max(1, width // 64)
        if layers < 0 or not 0 <= dropout < 1 or heads < 1 or width % heads:
            raise ConfigError(
                "model.options: hidden must be a multiple of heads, layers a number from 0, dropout a probability "
                f"below 1; got hidden {width}, heads {heads}, layers {layers}, dropout {dropout}"
            )
        self.blocks = nn.ModuleList([Block(width, heads, dropout) for _ in range(layers)])
        self.last_norm = nn.LayerNorm(width)
        self.patch_projection = nn.Linear(width, width, bias=False)
        self.class_projection = nn.Linear(width, width, bias=False)
        for layer in (self.patch_projection, self.class_projection):
            nn.init.normal_(layer.weight, std=width**-0.5)
        self.mask_scale = nn.Parameter(torch.tensor(MASK_SCALE))

    def check(self, growth: Growth) -> None:
        """Stop unless the head can grow like this.

        Raises:
            ConfigError: it cannot.
        """
        if growth.head != PLAIN:
            raise ConfigError(
                "the classes of this network are tokens, which have no further outputs, layers or background of their "
                "own; choose another network for this method, or another method"
            )
        super().check(growth)

    @torch.no_grad()
    def grow(self, num_classes: int, head: Head = PLAIN) -> None:
        """Append tokens for `num_classes` >= 1 more classes; later ones start from the first token.

        Raises:
            ConfigError: as `check`.
        """
        super().grow(num_classes, head)
        if len(self.classifiers) > 1:
            first, new = (cast(ClassTokens, self.classifiers[at]).weight for at in (0, -1))
            new.copy_(first[:1].expand_as(new))

    def make_part(self, number: int, head: Head) -> nn.Module:
        """Make the tokens of `number` classes."""
        return ClassTokens(number, self.in_channels)

    def refine(self, cells: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Run cells (B, N, D) and tokens (B, C, D) through the blocks."""
        both = torch.cat([cells, tokens], dim=1)
        for block in self.blocks:
            both = block(both)
        both = self.last_norm(both)
        return both[:, : cells.shape[1]], both[:, cells.shape[1] :]

    def project(self, cells: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Project refined cells and tokens to what the masks are products of."""
        return self.patch_projection(cells), self.class_projection(tokens)

    def forward(self, features: Tensor, extra: object = None) -> HeadOutput:
        """Map (B, D, h, w) to logits (B, C, h, w).

        The taps are "patches" (B, D, h, w) and "class_features" (B, C, D), whose cosines the logits are, and
        "class_tokens" (B, C, D), the tokens behind the blocks.
        """
        size = features.shape[2:]
        rows = torch.cat([cast(ClassTokens, one).weight for one in self.classifiers])
        # `shape[0]` and not `len`: an export would take the length for a constant.
        cells, tokens = self.refine(
            features.flatten(2).transpose(1, 2), rows.expand(features.shape[0], -1, -1).to(features.dtype)
        )
        patches, classes = self.project(cells, tokens)
        cosine = F.normalize(patches, dim=2) @ F.normalize(classes, dim=2).mT  # (B, N, C)
        logits = (self.mask_scale * cosine).transpose(1, 2).unflatten(2, size)
        taps = {PATCHES: patches.transpose(1, 2).unflatten(2, size), TOKENS: tokens, CLASSES: classes}
        return HeadOutput(logits, {}, taps)
