"""A model of the user's own, as a plug-in file: two convolutions, no batch norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from everseg.models.model import SegmentationModel


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, 2, 1), nn.ReLU()
        )

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"layer1": self.layers(image)}


class Decoder(nn.Module):
    out_channels = 12

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(12, 12, 3, 1, 1)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.layer(features["encoder"]).relu()


def build(*, output_stride: int = 16, norm: str = "bn", **options: Any) -> SegmentationModel:
    return SegmentationModel(Encoder(), Decoder(), {"name": "plain", "options": {}})
