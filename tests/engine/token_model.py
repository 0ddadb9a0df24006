"""A tiny network whose classes are tokens, without any library: what `mbs` reads."""

from __future__ import annotations

from attentive_model import Decoder
from torch import Tensor, nn

from everseg.models.model import SegmentationModel
from everseg.models.token_head import TokenHead


class Encoder(nn.Module):
    """Cells of 4 pixels."""

    out_channels = 6

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 4, stride=4), nn.BatchNorm2d(6)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"layer1": self.norm(self.stem(image)).relu()}


def tokens(dropout: float = 0.1) -> SegmentationModel:
    """The network with weights of PyTorch's global generator; not grown."""
    return SegmentationModel(
        Encoder(), Decoder(), {"name": "tokens", "options": {"dropout": dropout}},
        make_head=lambda: TokenHead(6, heads=2, dropout=dropout),
    )  # fmt: skip
