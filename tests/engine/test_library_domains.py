"""MDIL over domains on encoders of another library, frozen or nearly so: trained, killed, tested, exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from domain_toy import build, domain, settings
from encoders import TYPES, need_transformers
from processes import complete, killed, results

from everseg.config.fields import ModelConfig
from everseg.data.batches.transforms import normalise
from everseg.deploy.onnx import Deployed, check_parity, to_onnx
from everseg.models.build import build_model
from everseg.runs.input_form import InputForm
from everseg.runs.run_folder import RunFolder
from everyday import some

need_transformers()

FEW = {"train": 8, "val": 4}
FROZEN = {"freeze_encoder": True, "freeze_from": 1}


def config(out: Path, kind: str, **method) -> dict:
    smaller = {"num_hidden_layers": 4} if kind == "dinov2" else {}
    options = {"config": TYPES[kind] | smaller, "hidden": 8, "per_branch": "adapter", "rank": 2}
    model = {"name": "mlp", "encoder": f"hf:{kind}", "options": options}
    domains = {light: domain(light, **FEW) for light in ("day", "dusk")}
    return settings(
        out,
        model=model,
        data={"domains": domains},
        method={"name": "mdil", **method},
        train={"max_iterations": 3, "batch": 4, "checkpoint_every": 2},
    )


def pixels(light: str) -> torch.Tensor:
    split = build(light=light, **FEW).splits["val"]
    return torch.from_numpy(np.stack([split.read(i)[0] for i in range(len(split))])).permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize("kind", some(["dinov2", "convnext"], "convnext"))
def test_where_nothing_shared_moves_the_old_domain_keeps_its_outputs_to_the_bit(kind, tmp_path):
    assert complete(config(tmp_path / "whole", kind, **FROZEN)) == 0
    killed(config(tmp_path / "killed", kind, **FROZEN), "iteration", 5)
    assert complete(config(tmp_path / "killed", kind, **FROZEN)) == 0
    path = tmp_path / "whole" / "domains"
    assert results(tmp_path / "killed" / "domains") == results(path)
    folder = RunFolder(path)
    before, after = (folder.load_final(step)[0] for step in (0, 1))
    image = pixels("day")
    with torch.no_grad():
        assert torch.equal(before(image, ("day",))["day"].logits, after(image, ("day",))["day"].logits)
    old, new = before.state_dict(), after.state_dict()
    assert [name for name in old if not torch.equal(old[name], new[name])] == []
    assert any(
        ".adapter.dusk." in name and bool(new[name].any()) for name in new if name.endswith("up.weight")
    )
    np.testing.assert_array_equal(folder.counts(0)["day"], folder.counts(1)["day"])
    assert set(folder.counts(1)) == {"day", "dusk"}


@pytest.mark.slow
def test_a_branch_is_exported_as_a_plain_graph():
    pytest.importorskip("onnxruntime")
    model = build_model(ModelConfig(**config(Path(), "convnext")["model"]))
    model.grow({"day": 3})
    model.grow({"dusk": 2}, init_from="day")
    with torch.no_grad():
        for weight in model.branch_parameters("dusk"):
            weight += 0.05 * torch.randn(
                weight.shape, generator=torch.Generator().manual_seed(weight.numel())
            )
    deployed = Deployed(model.eval(), "dusk", (0, 1), InputForm())
    image = np.random.default_rng(0).integers(0, 256, (75, 53, 3), np.uint8)
    found = check_parity(deployed, to_onnx(deployed, {}), [image], "noise")
    assert found.logit_difference < 1e-5
    with torch.no_grad():
        pixels = normalise(torch.from_numpy(image).permute(2, 0, 1)[None])
        merged, own = (one(pixels, ("dusk",))["dusk"].logits for one in (deployed.model, model))
    torch.testing.assert_close(merged, own, atol=1e-5, rtol=1e-5)
