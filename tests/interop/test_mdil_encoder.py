"""The ImageNet-pretrained encoder of MDIL's code: to a file of ours and back, by every way the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from everseg import api
from everseg.errors import CheckpointError, ConfigError
from everseg.interop import mdil
from everseg.models.build import deeplabv3_tiny
from everseg.models.erfnet import erfnet
from everseg.models.model import SegmentationModel
from everseg.models.pretrained import load_encoder_weights
from everseg.runs.commit import save_folder

TINY = {"widths": (4, 6, 8), "blocks": (1, 2)}


def filled(per_branch: str, *branches: str) -> SegmentationModel:
    """A model in which every weight and statistic has a value of its own."""
    model = erfnet(per_branch=per_branch, **TINY)
    for branch in branches:
        model.grow({branch: 3})
    generator = torch.Generator().manual_seed(8)
    for number, value in enumerate(model.state_dict().values()):
        random = torch.rand(value.shape, generator=generator) + 0.1
        value.copy_(random if value.is_floating_point() else torch.tensor(number))
    return model


def started(per_branch: str, weights: Path) -> dict[str, Tensor]:
    """The encoder of two new branches that start from a file."""
    torch.manual_seed(2)
    model = erfnet(per_branch=per_branch, **TINY)
    load_encoder_weights(model, str(weights))
    model.grow({"day": 3, "dusk": 4})
    return model.encoder.state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def folder_of(model: SegmentationModel, path: Path, domains: dict[str, str] | None = None) -> Path:
    entry = {"groups": [[0, 1, 2]], "names": ["a", "b", "c"], "background": None}
    document = {
        "architecture": model.describe(), "branches": dict.fromkeys(model.branches, entry), "domains": domains or {},
    }  # fmt: skip
    save_folder(path, {"model": model.state_dict(), "method_state": {}}, {"classes": document})
    return path


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A file as it is published: norms, the classifiers of its own training, counters in some norms only."""
    state = mdil.dump_encoder(filled("decoder"))
    assert {"module.features.encoder.initial_block.bn.running_var",
            "module.features.encoder.layers.3.conv1x3_2.bias",
            "module.features.encoder.layers.1.bn2.weight"} <= state.keys()  # fmt: skip
    del state["module.features.encoder.layers.2.bn.num_batches_tracked"]
    state["module.features.encoder.output_conv.weight"] = torch.ones(5, 8, 1, 1)
    state["module.classifier.linear.weight"] = torch.ones(5, 8)
    path = tmp_path / "encoder.pth.tar"
    torch.save({"epoch": 3, "state_dict": state}, path)
    return path


@pytest.mark.parametrize("per_branch", ["head", "decoder", "norm", "adapter"])
def test_a_run_starts_alike_from_the_original_and_from_the_converted_file(tmp_path, original, per_branch):
    converted = api.import_mdil(original, tmp_path / "encoder.safetensors")
    assert converted == tmp_path / "encoder.safetensors"
    assert load_file(converted).keys() == erfnet(per_branch="decoder", **TINY).encoder.state_dict().keys()
    assert same(started(per_branch, original), started(per_branch, converted))
    own, fresh = started(per_branch, converted), erfnet(per_branch=per_branch, **TINY).encoder.state_dict()
    assert not torch.equal(own["down1.conv.weight"], fresh["down1.conv.weight"])


@pytest.mark.parametrize("per_branch", ["head", "decoder"])
@pytest.mark.parametrize("domain", [None, "night"])
def test_an_encoder_with_one_set_of_norms_goes_out_and_back_unchanged(tmp_path, per_branch, domain):
    model = filled(per_branch, "road")
    folder = folder_of(model, tmp_path / "model", {"night": "road"})
    path = api.export_mdil_encoder(folder, tmp_path / "out.pth", domain=domain)
    again = erfnet(per_branch=per_branch, **TINY)
    load_encoder_weights(again, str(path))
    assert same(again.encoder.state_dict(), model.encoder.state_dict())
    converted = load_file(api.import_mdil(path, tmp_path / "out.safetensors"))
    assert same(converted, model.encoder.state_dict())


@pytest.mark.parametrize("per_branch", ["norm", "adapter"])
def test_where_norms_are_per_branch_the_shared_convolutions_go_out_and_back(tmp_path, per_branch):
    model = filled(per_branch, "day", "dusk")
    path = api.export_mdil_encoder(folder_of(model, tmp_path / "model"), tmp_path / "out.pth")
    assert not [name for name in torch.load(path)["state_dict"] if ".bn" in name]
    shared = {n: v for n, v in model.encoder.state_dict().items() if ".norm" not in n and ".adapter" not in n}
    converted = api.import_mdil(path, tmp_path / "out.safetensors")
    assert same(load_file(converted), shared)
    for file in (path, converted):
        again = erfnet(per_branch="adapter", **TINY)
        load_encoder_weights(again, str(file))
        assert same(again.encoder.state_dict(), shared)
        with pytest.raises(CheckpointError, match=r"missing: down1\.norm\.weight"):
            load_encoder_weights(erfnet(per_branch="norm", **TINY), str(file))


@pytest.mark.parametrize("per_branch", ["norm", "adapter"])
def test_the_norms_of_one_domain_go_out_and_back(tmp_path, per_branch):
    model = filled(per_branch, "day", "dusk")
    folder = folder_of(model, tmp_path / "model", {"day": "day", "evening": "dusk"})
    path = api.export_mdil_encoder(folder, tmp_path / "out.pth", domain="evening")
    again = erfnet(per_branch="norm", **TINY)
    load_encoder_weights(again, str(path))
    again.grow({"dusk": 3})
    own = model.encoder.state_dict()
    expected = {name: own[name] for name in again.encoder.state_dict()}
    assert same(again.encoder.state_dict(), expected)
    assert not torch.equal(own["down1.norm.day.weight"], own["down1.norm.dusk.weight"])


def test_the_commands_go_both_ways(tmp_path, original, call):
    code, out, err = call("import", "mdil", original, "-o", tmp_path / "e.safetensors")
    assert code == 0, err
    assert f"model.weights={tmp_path / 'e.safetensors'}" in out
    folder = folder_of(filled("adapter", "day", "dusk"), tmp_path / "model")
    back = ("import", "mdil", folder, "--back", "--encoder", "-o")
    code, out, err = call(*back, tmp_path / "e.pth", "--domain", "dusk")
    assert code == 0, err
    assert mdil.is_encoder(mdil.read(tmp_path / "e.pth"))
    for arguments, words in (
        ((*back, tmp_path / "e.pth"), "exists"),
        (
            (*back, tmp_path / "f.pth", "--domain", "fog"),
            "branches day, dusk",
        ),
        (
            ("import", "mdil", folder, "--back", "-o", tmp_path / "f.pth", "--domain", "day"),
            "--back --encoder",
        ),
        (("import", "mdil", original, "-o", tmp_path / "f", "--encoder"), "recognised without it"),
        (("import", "mdil", original, "-o", tmp_path / "f"), "f.safetensors"),
        (("import", "mdil", original, "-o", tmp_path / "e.safetensors"), "exists"),
        (("import", "mdil", original, "-o", tmp_path / "f.safetensors", "--domains", "a"), "no domains"),
    ):
        code, _, err = call(*arguments)
        assert code == 2
        assert words in err
        assert "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("layers.3.conv1x3_2.bias", None, r"missing: blocks3\.0\.horizontal2\.bias"),
        ("layers.1.bn2.running_var", None, r"missing: blocks2\.0\.norm2\.running_var"),
        ("initial_block.conv.weight", None, r"missing: encoder\.initial_block\.conv\.weight"),
        ("initial_block.conv.weight", torch.ones(3), "ill-shaped"),
        (
            "layers.0.bn.weight",
            torch.ones(3),
            r"down2\.norm\.weight: \(3,\) in the file, \(6,\) in the model",
        ),
        ("layers.0.conv.weight", torch.ones(90, 4, 3, 3), "increasing"),
        ("layers.0.other.weight", torch.ones(3), r"unexpected: .*layers\.0\.other"),
        ("layers.0.bn.bias", torch.full((6,), torch.nan), "not finite"),
    ],
)
def test_a_broken_encoder_is_told_and_leaves_nothing_behind(tmp_path, original, name, value, words):
    state = torch.load(original)["state_dict"]
    key = f"module.features.encoder.{name}"
    if value is None:
        del state[key]
    else:
        state[key] = value
    torch.save({"state_dict": state}, original)
    with pytest.raises(CheckpointError, match=words):
        api.import_mdil(original, tmp_path / "e.safetensors")
    assert not (tmp_path / "e.safetensors").exists()


def test_another_architecture_has_no_such_encoder(tmp_path):
    model = deeplabv3_tiny()
    model.grow({"a": 3})
    with pytest.raises(ConfigError, match="ERFNet"):
        api.export_mdil_encoder(folder_of(model, tmp_path / "model"), tmp_path / "e.pth")
    assert not (tmp_path / "e.pth").exists()
