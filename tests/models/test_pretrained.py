from __future__ import annotations

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from everseg.config.fields import ModelConfig
from everseg.errors import CheckpointError, ConfigError
from everseg.models import pretrained
from everseg.models.build import build_model, deeplabv3
from everseg.models.model import SegmentationModel
from everseg.models.pretrained import load_encoder_weights, to_abn_name

SMALL = {"blocks": (1, 2, 1, 1), "stem": 4, "widths": (2, 2, 3, 3), "hidden": 2, "out_channels": 2}


def small(norm: str = "abn", **options) -> SegmentationModel:
    return deeplabv3(norm=norm, **{**SMALL, **options})


def source(positive: bool = False) -> dict[str, torch.Tensor]:
    """An image classifier's state dict in torchvision's names."""
    state = {}
    for name, value in small().encoder.state_dict().items():
        state[name] = torch.randn(value.shape) if value.is_floating_point() else torch.tensor(5)
        if positive and value.dim() == 1 and name.endswith("weight"):
            state[name] = state[name].abs() + 0.1
    return {**state, "fc.weight": torch.randn(10, 12), "fc.bias": torch.randn(10)}


def abn_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {to_abn_name(n): v for n, v in state.items() if not n.endswith("num_batches_tracked")}
    renamed.pop(None)
    return {f"module.{n}": v for n, v in renamed.items()} | {"module.classifier.fc.weight": torch.ones(3)}


def assert_encoder(model: SegmentationModel, state: dict[str, torch.Tensor]) -> None:
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".pth.tar"])
def test_torchvision_and_timm_files_fill_the_encoder(tmp_path, suffix):
    state, path = source(), tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model = build_model(
        ModelConfig(name="deeplabv3-resnet50", options=SMALL, weights=str(path), norm="bn", output_stride=8)
    )
    assert_encoder(model, state)


def test_wrapped_files_with_a_prefix_are_understood(tmp_path):
    state, path = source(), tmp_path / "w.pth"
    torch.save({"epoch": 3, "state_dict": {f"module.{n}": v for n, v in state.items()}}, path)
    model = small()
    assert load_encoder_weights(model, str(path)) == f"encoder: {len(state) - 2} tensors from {path}"
    assert_encoder(model, state)


def test_inplace_abn_files_fill_an_iabn_model_as_they_are(tmp_path):
    state, path = source(), tmp_path / "w.pth.tar"
    torch.save({"state_dict": abn_names(state)}, path)
    model = small("iabn")
    load_encoder_weights(model, str(path))
    for name, value in model.encoder.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert value == 0
        else:
            assert torch.equal(value, state[name]), name


def test_inplace_abn_files_give_other_models_the_absolute_gamma(tmp_path):
    state, path = source(), tmp_path / "w.pth"
    torch.save(abn_names(state), path)
    iabn, abn = small("iabn").eval(), small("abn").eval()
    load_encoder_weights(iabn, str(path))
    assert "|weight| + 1e-5" in load_encoder_weights(abn, str(path))
    assert state["layer2.1.bn2.weight"].min() < 0
    expected = state["layer2.1.bn2.weight"].abs() + 1e-5
    assert_close(abn.encoder.layer2[1].bn2.weight, expected, rtol=0, atol=5e-7)
    with torch.no_grad():
        for model in (iabn, abn):
            for name, buffer in model.encoder.named_buffers():
                if name.endswith("running_var"):
                    buffer.abs_()
        x = torch.randn(1, 3, 64, 64)
        assert_close(abn.encoder(x)["layer4"], iabn.encoder(x)["layer4"])


def test_plain_gammas_become_iabn_weights_where_that_is_possible(tmp_path):
    state, path = source(positive=True), tmp_path / "w.pth"
    torch.save(state, path)
    model = small("iabn")
    assert "gamma - 1e-5" in load_encoder_weights(model, str(path))
    weight = model.encoder.bn1.weight
    assert_close(weight.abs() + 1e-5, state["bn1.weight"], rtol=0, atol=5e-7)
    state["bn1.weight"][1] = -0.5
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"1 norm weight.* negative.*model\.norm=abn"):
        load_encoder_weights(model, str(path))


def test_every_misfit_is_listed_and_nothing_is_loaded(tmp_path):
    state, path = source(), tmp_path / "w.pth"
    del state["layer1.0.conv1.weight"]
    state["layer9.weight"] = torch.ones(1)
    state["bn1.weight"] = torch.ones(7)
    torch.save(state, path)
    model = small()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_encoder_weights(model, str(path))
    lines = str(caught.value).splitlines()
    assert [line.strip() for line in lines[1:]] == [
        "missing: layer1.0.conv1.weight",
        "unexpected: layer9.weight",
        "bn1.weight: (7,) in the file, (4,) in the model",
    ]
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_a_long_list_of_misfits_stays_within_twenty_lines(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"conv1.weight": torch.ones(4, 3, 7, 7)}, path)
    with pytest.raises(CheckpointError) as caught:
        load_encoder_weights(small(), str(path))
    lines = str(caught.value).splitlines()
    missing = sum(not n.endswith("num_batches_tracked") for n in small().encoder.state_dict()) - 1
    assert len(lines) == 21
    assert lines[-1].strip() == f"and {missing - 19} more"


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Attack()}, "w.pth")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps({"conv1.weight": Attack()}, protocol=2))
    for name in ("w.pth", "raw.pt"):
        with pytest.raises(CheckpointError, match="read safely"):
            load_encoder_weights(small(), name)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_truncated_file_is_a_checkpoint_error(tmp_path, suffix, keep):
    path = tmp_path / f"w{suffix}"
    save_file(source(), path) if suffix == ".safetensors" else torch.save(source(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(CheckpointError, match="w"):
        load_encoder_weights(small(), str(path))


def test_files_that_hold_something_else_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    for content in ([1, 2], {"conv1.weight": 3}):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"dictionary|not a tensor"):
            load_encoder_weights(small(), str(path))
    with pytest.raises(ConfigError, match=r"model\.weights: no file"):
        load_encoder_weights(small(), str(tmp_path / "absent.pth"))


def test_the_hub_is_not_reached_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"model\.download=true"):
        load_encoder_weights(small(), "hf:timm/resnet50.a1_in1k")
    with pytest.raises(ConfigError, match="hf:org/name"):
        load_encoder_weights(small(), "hf:resnet50")


def test_the_hub_file_is_loaded_once_allowed_or_cached(tmp_path, monkeypatch):
    state, path, asked = source(), tmp_path / "model.safetensors", []
    save_file(state, path)

    def fake(repo, filename, *, revision, local_files_only):
        asked.append((repo, filename, revision, local_files_only))
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake)
    for download in (False, True):
        model = small()
        load_encoder_weights(model, "hf:timm/resnet50.a1_in1k@v2", download=download)
        assert_encoder(model, state)
    assert asked == [("timm/resnet50.a1_in1k", "model.safetensors", "v2", not d) for d in (False, True)]


def test_inplace_abn_names_go_both_ways():
    names = [n for n in small().encoder.state_dict() if not n.endswith("num_batches_tracked")]
    theirs = [to_abn_name(n) for n in names]
    assert "mod3.block2.convs.bn2.running_var" in theirs
    assert "mod2.block1.proj_bn.weight" in theirs
    renamed, unknown = pretrained.convert_encoder_names({t: torch.tensor(i) for i, t in enumerate(theirs)})
    assert [int(renamed[n]) for n in names] == list(range(len(names)))
    assert unknown == []
    assert pretrained.convert_encoder_names({"mod6.bn.weight": torch.ones(1)}) == ({}, ["mod6.bn.weight"])
    assert to_abn_name("fc.weight") is None


@pytest.mark.parametrize("per_branch", ["norm", "adapter"])
def test_first_branches_start_from_the_files_norms_later_ones_do_not(tmp_path, per_branch):
    state, path = source(positive=True), tmp_path / "w.pth"
    torch.save(state, path)
    model = small("iabn", per_branch=per_branch)
    assert load_encoder_weights(model, str(path)).startswith(f"encoder: {len(state) - 2} tensors")
    model.grow({"day": 2, "dusk": 2})
    model.grow({"night": 2})
    own = model.encoder.state_dict()
    for name, value in state.items():
        if name in own:
            assert torch.equal(own[name], value), name
        elif not name.startswith("fc"):
            module, _, leaf = name.rpartition(".")
            for branch in ("day", "dusk"):
                gamma = value - 1e-5 if leaf == "weight" else value
                assert_close(own[f"{module}.{branch}.{leaf}"], gamma)
            assert own[f"{module}.night.{leaf}"].unique().tolist() in ([0], [1]), name


def test_loading_draws_no_random_numbers(tmp_path):
    torch.save(source(), tmp_path / "w.pth")
    model = small(per_branch="adapter")
    before = torch.get_rng_state()
    load_encoder_weights(model, str(tmp_path / "w.pth"))
    assert torch.equal(torch.get_rng_state(), before)
