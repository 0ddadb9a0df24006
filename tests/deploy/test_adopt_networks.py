"""Whole networks of transformers with auxiliary heads, wrapped classifiers or one size of images become bundles."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import everseg
from everseg.data.batches.transforms import normalise
from everseg.deploy.adopt import adopt
from everseg.errors import GateError

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")

NAMES = {0: "background", 1: "road", 2: "car"}
PLAIN = {
    "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 64,
    "patch_size": 16,
}  # fmt: skip
BEIT = PLAIN | {
    "out_indices": [1, 2, 3, 4],
    "pool_scales": [1, 2],
    "auxiliary_channels": 4,
    "use_mask_token": True,
}


def upernet():
    backbone = transformers.ConvNextConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 12, 8], out_features=[f"stage{k}" for k in (1, 2, 3, 4)]
    )
    return transformers.UperNetConfig(
        backbone_config=backbone,
        hidden_size=8,
        auxiliary_channels=4,
        auxiliary_in_channels=12,
        pool_scales=[1, 2],
    )


NETWORKS = {
    "upernet": (upernet, "decode_head.classifier", None),
    "beit": (lambda: transformers.BeitConfig(**BEIT), "decode_head.classifier", None),
    "data2vec-vision": (
        lambda: transformers.Data2VecVisionConfig(**BEIT), "decode_head.classifier", (64, 64),
    ),
    "dpt": (
        lambda: transformers.DPTConfig(
            **PLAIN, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4, fusion_hidden_size=8
        ),
        "head.head.4", (64, 64),
    ),
    "mobilenet_v2": (
        lambda: transformers.MobileNetV2Config(depth_multiplier=0.2), "segmentation_head.classifier.convolution", None,
    ),
}  # fmt: skip
"""Name -> configuration, the layer that gives its logits, and the only size (H, W) of its images."""


def made(kind: str, folder: Path):
    """A network of random weights, its statistics and last layers too, stored as the library does."""
    torch.manual_seed(3)
    config = NETWORKS[kind][0]()
    config.num_labels, config.id2label = 3, NAMES
    network = transformers.AutoModelForSemanticSegmentation.from_config(config).eval()
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.copy_(
                torch.rand_like(value) + 0.5 if name.endswith("running_var") else torch.randn_like(value) / 4
            )
    network.save_pretrained(folder)
    return network


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_main_classifier_is_found_and_the_logits_stay(tmp_path: Path, kind: str) -> None:
    network = made(kind, tmp_path / "w")
    _, layer, size = NETWORKS[kind]
    done = adopt(
        tmp_path / "w/model.safetensors",
        arch=f"transformers:{tmp_path / 'w'}",
        out=tmp_path / "b",
        onnx=False,
    )
    assert f"'{layer}'" in done.check
    assert done.bundle.about.form.resized_to == size
    image = normalise(torch.randint(0, 255, (1, 3, *(size or (96, 128))), dtype=torch.uint8), "imagenet")
    model = done.bundle.model()
    with torch.no_grad():
        expected = network(pixel_values=image).logits
        found = model(image)["default"].logits
    assert expected.std() > 0.01
    found = torch.nn.functional.interpolate(found, expected.shape[2:], mode="bilinear")
    torch.testing.assert_close(found, expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=0)
    # An auxiliary head would have weights that no gradient reaches.
    assert not [name for name in model.state_dict() if "auxiliary" in name]
    model.grow({"default": 1})
    assert model.head("default").sizes == (3, 1)


@pytest.mark.slow
def test_a_network_of_one_size_has_a_graph_of_that_size(tmp_path: Path) -> None:
    """The bundle's example resizes to it, as `predict` does (and `serve`, which runs the same)."""
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    made("dpt", tmp_path / "w")
    done = adopt(tmp_path / "w/model.safetensors", arch=f"transformers:{tmp_path / 'w'}", out=tmp_path / "b")
    how = json.loads((done.bundle.path / "preprocessing.json").read_text())
    assert (how["size"], how["one_size"]) == ([64, 64], True)
    assert done.bundle.parity["default"]["sizes"] == [[64, 64]]
    pixels = np.random.RandomState(0).randint(0, 255, (9, 12, 3), np.uint8)
    Image.fromarray(pixels).resize((120, 90)).save(tmp_path / "photo.png")
    subprocess.run(
        [sys.executable, str(done.bundle.path / "example.py"), "photo.png"], cwd=tmp_path, check=True
    )
    with Image.open(tmp_path / "photo.mask.png") as mask:
        found = np.asarray(mask)
    expected = everseg.load(done.bundle.path).predict(tmp_path / "photo.png").ids
    assert found.shape == expected.shape == (90, 120)
    assert len(np.unique(expected)) > 1
    assert (found == expected).mean() > 0.9  # example.py enlarges the mask, everseg the logits


def test_a_network_with_more_behind_its_classifier_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("mobilenet_v2", tmp_path / "w")
    kind = transformers.MobileNetV2ForSemanticSegmentation
    usual = kind.forward

    def squared(self, *given, **named):
        output = usual(self, *given, **named)
        output.logits = output.logits**2
        return output

    monkeypatch.setattr(kind, "forward", squared)
    with pytest.raises(GateError, match=r"segmentation_head\.classifier\.convolution"):
        adopt(
            tmp_path / "w/model.safetensors",
            arch=f"transformers:{tmp_path / 'w'}",
            out=tmp_path / "b",
            onnx=False,
        )
    assert not (tmp_path / "b").exists()
