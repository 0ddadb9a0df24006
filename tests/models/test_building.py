from __future__ import annotations

import pytest
import torch

from everseg.config.fields import ModelConfig
from everseg.errors import ConfigError
from everseg.models.build import ARCHITECTURES, build_model, deeplabv3_resnet50, deeplabv3_resnet101
from everseg.registry import BUILTIN

TORCHVISION_RESNET50_START = [
    "conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked",
    "layer1.0.conv1.weight", "layer1.0.bn1.weight", "layer1.0.bn1.bias", "layer1.0.bn1.running_mean",
    "layer1.0.bn1.running_var", "layer1.0.bn1.num_batches_tracked", "layer1.0.conv2.weight",
]  # fmt: skip


@pytest.mark.parametrize(
    ("builder", "count"), [(deeplabv3_resnet50, 39_048_533), (deeplabv3_resnet101, 58_040_661)]
)
def test_parameter_counts_of_the_original_networks(builder, count):
    with torch.device("meta"):
        model = builder()
        model.grow({"default": 16})
        model.grow({"default": 5})
    assert model.parameter_count == count


def test_encoder_weights_are_named_as_in_torchvision():
    with torch.device("meta"):
        names = {n: list(ARCHITECTURES[n]().encoder.state_dict()) for n in ARCHITECTURES if "resnet" in n}
    resnet50, resnet18 = names["deeplabv3-resnet50"], names["deeplabv3-resnet18"]
    assert resnet50[: len(TORCHVISION_RESNET50_START)] == TORCHVISION_RESNET50_START
    # torchvision's state dicts without `fc`: 320 - 2, 626 - 2, 122 - 2, 218 - 2 entries
    assert [len(names[f"deeplabv3-resnet{k}"]) for k in (50, 101, 18, 34)] == [318, 624, 120, 216]
    assert "layer1.0.downsample.0.weight" in resnet50
    assert "layer1.0.downsample.1.running_var" in resnet50
    assert "layer4.2.bn3.bias" in resnet50
    assert not any(name.startswith("layer1.0.downsample") for name in resnet18)
    assert "layer2.0.downsample.1.num_batches_tracked" in resnet18


def test_every_listed_model_is_a_known_architecture():
    assert set(BUILTIN["model"]) <= set(ARCHITECTURES)


def test_the_configuration_reaches_the_model():
    model = build_model(
        ModelConfig(name="deeplabv3-tiny", norm="bn", output_stride=8, options={"hidden": 4, "pool_size": 7})
    )
    described = model.describe()
    assert described["name"] == "deeplabv3-tiny"
    assert described["growth"] == []
    options = described["options"]
    assert (options["norm"], options["output_stride"], options["hidden"], options["pool_size"]) == (
        "bn",
        8,
        4,
        7,
    )
    assert model.decoder.aspp[0].out_channels == 4


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"name": "deeplabv3-tine"}, "did you mean 'deeplabv3-tiny'"),
        ({"name": "deeplabv3-tiny", "options": {"colour": 3}}, "colour.*it takes .*pool_size"),
        ({"name": "deeplabv3-tiny", "options": {"widths": [1, 2]}}, "four positive numbers"),
        ({"name": "deeplabv3-tiny", "options": {"hidden": 0}}, "hidden"),
        ({"name": "deeplabv3-tiny", "options": {"widths": "wide"}}, "cannot be built"),
        ({"name": "deeplabv3-tiny", "options": {"name": "x"}}, "unexpected keyword"),
    ],
)
def test_wrong_names_and_options_are_told(config, words):
    with pytest.raises(ConfigError, match=words):
        build_model(ModelConfig(**config))


def test_a_users_own_file_is_a_model(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from everseg.models.build import deeplabv3_tiny\n"
        "def build(output_stride=16, norm='bn', hidden=4):\n"
        "    return deeplabv3_tiny(output_stride=output_stride, norm=norm, hidden=hidden)\n"
        "def wrong():\n"
        "    return 3\n"
    )
    model = build_model(ModelConfig(name=f"{file}:build", norm="abn", options={"hidden": 3}))
    assert model.describe() == {
        "name": f"{file}:build",
        "options": {"norm": "abn", "hidden": 3},
        "growth": [],
    }
    with pytest.raises(ConfigError, match=r"return .*SegmentationModel"):
        build_model(ModelConfig(name=f"{file}:wrong"))


def test_equal_seeds_give_equal_weights():
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(build_model(ModelConfig(name="deeplabv3-tiny", options={"widths": [4, 4, 4, 4]})))
    first, second, third = (m.encoder.conv1.weight for m in models)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
