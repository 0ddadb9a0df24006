"""Tiny encoders of the transformers library, a family each, with random weights."""

from __future__ import annotations

import pytest
import torch

from everseg.config.fields import ModelConfig
from everseg.models.build import build_model
from everseg.models.model import SegmentationModel

FOUR = {"hidden_sizes": [8, 8, 12, 16], "depths": [1, 1, 1, 1]}
SHIFTED = {"embed_dim": 8, "depths": [1, 1, 1, 2], "num_heads": [1, 1, 2, 2], "window_size": 4}
PLAIN = {"hidden_size": 16, "num_hidden_layers": 8, "num_attention_heads": 2}
TYPES = {
    "segformer": {**FOUR, "num_attention_heads": [1, 1, 2, 2]},
    "resnet": {**FOUR, "embedding_size": 8, "layer_type": "basic"},
    "convnext": FOUR,
    "convnextv2": FOUR,
    "swin": SHIFTED,
    "swinv2": SHIFTED,
    "pvt_v2": {**FOUR, "num_attention_heads": [1, 1, 2, 2]},
    "focalnet": {"embed_dim": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]},
    "regnet": {**FOUR, "embedding_size": 8, "groups_width": 4},
    "mobilenet_v2": {"depth_multiplier": 0.2},
    "mobilevit": {
        "neck_hidden_sizes": [4, 8, 8, 12, 16, 20, 32],
        "hidden_sizes": [8, 8, 8],
        "num_attention_heads": 2,
    },
    "beit": {**PLAIN, "image_size": 32, "intermediate_size": 32},
    "dinov2": {**PLAIN, "image_size": 28, "patch_size": 14},
    "dinov2_with_registers": {**PLAIN, "image_size": 28, "patch_size": 14},
    "dinov3_vit": {**PLAIN, "image_size": 32, "intermediate_size": 32},
    "dinov3_convnext": FOUR,
}
"""Type -> a configuration of a few thousand weights."""
WITH_PATCHES = {"beit": 16, "dinov2": 14, "dinov2_with_registers": 14, "dinov3_vit": 16}
"""The plain transformers, whose maps all have one stride."""


def need_transformers() -> None:
    """Skip where transformers, or its vision models, cannot be imported: an extra, broken by a torchvision that does
    not fit torch."""
    try:
        import transformers
        import transformers.models.segformer.modeling_segformer

        assert transformers.AutoBackbone
    except Exception as error:
        pytest.skip(f"transformers cannot be imported: {error}", allow_module_level=True)


def tiny(kind: str = "segformer", name: str = "mlp", **changes) -> SegmentationModel:
    """A model on a tiny encoder, the same weights at every call; not grown."""
    torch.manual_seed(5)
    options = {"config": TYPES[kind], "hidden": 8, **({"out_channels": 8} if name == "deeplabv3" else {})}
    options |= changes.pop("options", {})
    return build_model(ModelConfig(name=name, encoder=f"hf:{kind}", options=options, **changes))
