"""A tiny network with attention over the whole image, without any library: what `sats` reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everseg.models.model import SegmentationModel
from everseg.types import Taps


class Encoder(nn.Module):
    """Cells of 4 pixels attend to cells of 8 pixels, with two heads."""

    attention_grids = ((4, 8),)
    out_channels = 6

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 4, stride=4), nn.BatchNorm2d(6)
        self.query, self.key, self.value = (nn.Conv2d(6, 6, 1) for _ in range(3))

    def forward(self, image: Tensor, *, taps: Taps = ()) -> dict[str, Tensor]:
        fine = torch.relu(self.norm(self.stem(image)))
        coarse = F.avg_pool2d(fine, 2)
        query, key, value = (
            layer(x).unflatten(1, (2, 3)).flatten(3)
            for layer, x in ((self.query, fine), (self.key, coarse), (self.value, coarse))
        )
        rows = torch.softmax(torch.einsum("bhdq,bhdk->bhqk", query, key), dim=-1)
        out = fine + torch.einsum("bhqk,bhdk->bhdq", rows, value).flatten(1, 2).view_as(fine)
        grid = rows.unflatten(3, coarse.shape[2:]).unflatten(2, fine.shape[2:])
        return {**({"attention1": grid} if "attention" in taps else {}), "layer1": fine, "layer2": out}


class Decoder(nn.Module):
    out_channels = 6

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        return features["encoder"]


def attentive() -> SegmentationModel:
    """The network with weights of PyTorch's global generator; not grown."""
    return SegmentationModel(Encoder(), Decoder(), {"name": "attentive", "options": {}})
