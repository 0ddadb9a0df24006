"""RCIL's two convolutions in bundles: both are kept for learning, one is run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy import settings

import everseg
from everseg.deploy.bundle import open_bundle
from everseg.deploy.export import export
from everseg.deploy.extend import extend
from everseg.deploy.serve import Served
from everseg.errors import ConfigError
from everseg.inference.predict import load
from everseg.models.compensation import MERGE, compensated
from everseg.runs.commit import load_tensors


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two steps: the old convolutions are merged once."""
    config = settings(
        tmp_path_factory.mktemp("runs"), scenario={"task": [["red"], ["green"]]}, method={"name": "rcil"},
        train={"epochs": 2, "epochs_next": 1},
    )  # fmt: skip
    return everseg.run(config, quiet=True).path


def test_the_next_step_of_a_bundle_merges_again(run, tmp_path, new_data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundle = export(run, tmp_path / "bundle", onnx=False).path
    assert load(bundle).model.describe()["changes"] == [MERGE]
    before = load_tensors(bundle / "model.safetensors")
    overrides = ["data.workers=0", "train.max_iterations=2"]
    made = extend(
        bundle, data=new_data, add=["forklift"], method="rcil", quiet=True, overrides=overrides, onnx=False,
        out=tmp_path / "next",
    )  # fmt: skip
    model = load(made.bundle.path).model
    assert model.describe()["changes"] == [MERGE, MERGE]
    after = model.state_dict()
    changed = [n for n in before if n.endswith("conv1.weight") and not torch.equal(before[n], after[n])]
    assert "encoder.layer1.0.conv1.weight" in changed, (
        "the old convolution took over what the new one had learnt"
    )


def test_a_bundle_of_another_network_is_refused_with_the_option_to_give(
    deployed, tmp_path, new_data, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="compensation"):
        extend(
            deployed, data=new_data, add=["forklift"], method="rcil", quiet=True, out=tmp_path / "next",
            overrides=["data.workers=0", "train.max_iterations=1"],
        )  # fmt: skip


def test_what_is_served_has_one_convolution_and_the_same_masks(run, tmp_path):
    bundle = export(run, tmp_path / "bundle", onnx=False).path
    served, loaded = Served(bundle).model, load(bundle)
    assert compensated(loaded.model)
    assert not compensated(served.model)
    image = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        ours, theirs = (one.model.cpu()(image)["default"].logits for one in (served, loaded))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_onnx_file_has_one_convolution_and_passes_the_comparison(run, tmp_path):
    for name in ("onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="the extra `export` is not installed")
    onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
    bundle = export(run, tmp_path / "bundle").path
    (file,) = bundle.glob("*.onnx")
    graph = onnx.load(file).graph
    plain = [m for m in load(bundle).model.modules() if isinstance(m, torch.nn.Conv2d)]
    new = [n for n, m in load(bundle).model.named_modules() if isinstance(m, torch.nn.Conv2d) and "_new" in n]
    assert sum(node.op_type == "Conv" for node in graph.node) == len(plain) - len(new)
    assert open_bundle(bundle).path == bundle
