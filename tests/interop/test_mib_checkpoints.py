from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from everseg import interop
from everseg.errors import CheckpointError, ConfigError
from everseg.inference.predict import load
from everseg.interop import mib
from everseg.models.build import deeplabv3, from_description
from saying import must_say


def original(*, bottleneck: bool = True, sizes: tuple[int, ...] = (4, 2)) -> dict[str, torch.Tensor]:
    """A random checkpoint in the original names, without prefix."""
    model = deeplabv3(
        norm="iabn", blocks=(1, 2, 1, 1), bottleneck=bottleneck, stem=5, widths=(2, 3, 4, 5),
        outputs=(7, 6, 8, 9), hidden=3, out_channels=4,
    )  # fmt: skip
    for size in sizes:
        model.grow({"default": size})
    state = mib.dump(model, prefix="")
    return {n: torch.rand(v.shape) + 0.1 if "var" in n else torch.randn(v.shape) for n, v in state.items()}


def test_the_subpackage_gives_mib_lazily():
    assert interop.mib is mib
    with pytest.raises(AttributeError):
        _ = interop.nobody


@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_loading_and_dumping_gives_the_same_tensors(bottleneck, prefix):
    state = {prefix + n: v for n, v in original(bottleneck=bottleneck).items()}
    model = mib.load(state)
    assert model.head("default").sizes == (4, 2)
    again = mib.dump(model, prefix)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[n], v) for n, v in state.items())


def test_the_loaded_model_owns_its_tensors_and_can_be_described():
    state = original()
    kept = state["cls.0.bias"].clone()
    model = mib.load({"epoch": 3, "model_state": state}, branch="city", output_stride=8, pool_size=4)
    with torch.no_grad():
        model.head("city").classifiers[0].bias.add_(1)
    assert torch.equal(state["cls.0.bias"], kept)
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    again = from_description(model.describe())
    again.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(again.eval()(x)["city"].logits, model.eval()(x)["city"].logits)


def test_names_of_the_original_code():
    names = set(original())
    assert {
        "body.mod1.conv1.weight", "body.mod3.block2.convs.bn3.running_var", "body.mod2.block1.proj_conv.weight",
        "body.mod5.block1.proj_bn.bias", "head.map_convs.3.weight", "head.map_bn.weight", "head.red_bn.bias",
        "head.global_pooling_conv.weight", "head.global_pooling_bn.running_mean", "head.red_conv.weight",
        "head.pool_red_conv.weight", "cls.1.weight", "cls.1.bias",
    } <= names  # fmt: skip
    assert not any("num_batches_tracked" in name for name in names)


def test_batch_counters_of_newer_inplace_abn_are_kept():
    state = original()
    state["body.mod1.bn1.num_batches_tracked"] = torch.tensor(12)
    model = mib.load(state)
    assert model.encoder.bn1.num_batches_tracked == 12
    assert model.decoder.norm.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("body.mod3.block2.convs.bn2.bias", r"missing: body\.mod3\.block2\.convs\.bn2\.bias"),
        ("body.mod1.conv1.weight", r"missing: body\.mod1\.conv1\.weight"),
        ("head.red_conv.weight", r"missing: head\.red_conv\.weight"),
        ("cls.0.weight", r"missing: cls\.0\.weight"),
        ("cls.1.bias", r"missing: cls\.1\.bias"),
        ("body.mod4.block1.convs.conv3.weight", r"missing: body\.mod4\.block1\.convs\.conv3\.weight"),
    ],
)
def test_a_missing_entry_is_named(key, words):
    state = original()
    del state[key]
    with pytest.raises(CheckpointError, match=words):
        mib.load(state)


@pytest.mark.parametrize(
    "key",
    [
        "body.mod6.bn.weight",
        "body.mod3.block2.extra.weight",
        "head.other.weight",
        "optimizer.x",
        "cls.1.scale",
    ],
)
def test_a_leftover_entry_is_named(key):
    with pytest.raises(CheckpointError, match=f"unexpected: .*{key}"):
        mib.load({**original(), key: torch.ones(1)})


def test_an_ill_shaped_entry_is_named():
    state = original()
    state["head.map_bn.weight"] = torch.ones(5)
    with pytest.raises(CheckpointError, match=r"head\.map_bn\.weight \(5,\) instead of \(12,\)"):
        mib.load(state)


def test_something_else_is_no_checkpoint():
    for content in ({}, {"model_state": {}}, {"a": 3}, {"model_state": {"a": "b"}}):
        with pytest.raises(CheckpointError, match="no checkpoint of MiB"):
            mib.load(content)
    for options in ({"norm": "bn"}, {"norm": "iabn", "trained_with": "abn"}):
        with pytest.raises(ConfigError, match=r"interop\.mib"):
            mib.load(original(), **options)


def test_inplace_abn_weights_become_plain_ones_on_request():
    state = original()
    assert min(v.min() for n, v in state.items() if ".bn1.weight" in n) < 0
    converted = mib.load(state, norm="abn", trained_with="iabn").eval()
    x = torch.randn(1, 3, 64, 64)
    expected = mib.load(state, norm="iabn").eval()(x)["default"].logits
    assert_close(converted(x)["default"].logits, expected)
    assert not torch.allclose(mib.load(state, norm="abn").eval()(x)["default"].logits, expected)


def test_dumping_needs_a_choice_among_branches():
    model = mib.load(original())
    model.grow({"night": 3})
    with pytest.raises(ConfigError, match="choose one"):
        mib.dump(model)
    night = mib.dump(model, branch="night")
    assert night["module.cls.0.weight"].shape[0] == 3
    assert "module.cls.1.weight" not in night


def whole_checkpoint(state: dict[str, torch.Tensor]) -> dict:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    return {
        "epoch": 29,
        "model_state": state,
        "optimizer_state": optimizer.state_dict(),
        "scheduler_state": {"base_lrs": [0.01], "last_epoch": 4, "power": 0.9, "_step_count": 5},
        "best_score": np.float64(0.25),
        "trainer_state": {"regularizer": {"fisher": {"module.cls.0.bias": torch.ones(4)}}},
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_original_files_are_read_without_running_their_code(tmp_path, zipped):
    state = {f"module.{n}": v for n, v in original().items()}
    path = tmp_path / "15-5-voc_MiB_1.pth"
    torch.save(whole_checkpoint(state), path, _use_new_zipfile_serialization=zipped)
    read = mib.read(path)
    assert {f"module.{n}" for n in read} == set(state)
    assert all(torch.equal(value, state[f"module.{n}"]) for n, value in read.items())
    assert mib.load(read).head("default").sizes == (4, 2)


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_unsafe_damaged_and_absent_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state": original(), "best_score": Attack()}, "unsafe.pth")
    Path("damaged.pth").write_bytes(Path("unsafe.pth").read_bytes()[:500])
    for name in ("unsafe.pth", "damaged.pth"):
        with pytest.raises(CheckpointError, match="read safely"):
            mib.read(name)
    assert not Path("attacked").exists()
    with pytest.raises(ConfigError, match="no such file"):
        mib.read("absent.pth")
    with pytest.raises(ConfigError, match="folder"):
        mib.read(tmp_path)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "blocks", "count"), [("resnet50", [3, 4, 6, 3], 288), ("resnet101", [3, 4, 23, 3], 543)]
)
def test_key_lists_of_the_official_checkpoints_are_consumed(golden, name, blocks, count):
    lists = json.loads((golden / "mib_resnet101_keys.json").read_text())[name]
    shapes = lists["full_classes_16_5"]
    assert len(shapes) == count
    state = {f"module.{key}": torch.empty(shape, device="meta") for key, shape in shapes.items()}
    model = mib.load(state)
    assert model.describe()["options"]["blocks"] == blocks
    assert model.head("default").sizes == (16, 5)
    assert model.parameter_count == lists["n_params"]
    assert sum(p.numel() for p in model.encoder.parameters()) == lists["n_body_params"]
    assert {n: list(v.shape) for n, v in mib.dump(model, "").items()} == shapes
    body, unknown = mib.convert_encoder_names(
        {n: torch.empty(s, device="meta") for n, s in lists["imagenet_body_with_classifier"].items()}
    )
    assert unknown == ["classifier.fc.weight", "classifier.fc.bias"]
    own = model.encoder.state_dict()
    assert set(body) == {n for n in own if not n.endswith("num_batches_tracked")}
    assert all(body[n].shape == own[n].shape for n in body)


def test_names_given_for_a_checkpoint_are_checked(tmp_path, call):
    torch.save({"model_state": original(sizes=(2, 1))}, tmp_path / "x.pth")

    def imported(names: str) -> tuple[int, str]:
        code, _, err = call("import", "mib", tmp_path / "x.pth", "-o", tmp_path / "out", "--classes", names)
        return code, err

    for names, facts in (
        ("car,Background,bus", ["output 0", "background", "'car'"]),
        ("bg,Car,car", ["1 'Car' and 2 'car'", "one name"]),
        ("bg,car", ["3 outputs", "2 names"]),
    ):
        code, err = imported(names)
        assert code == 2
        must_say(err, *facts)
    assert imported("BG,car,bus")[0] == 0
    assert load(tmp_path / "out" / "final").classes == ("background", "car", "bus")
