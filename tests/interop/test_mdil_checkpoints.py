from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import everseg
from everseg import api, interop
from everseg.errors import CheckpointError, ConfigError
from everseg.interop import mdil
from everseg.models.build import deeplabv3_tiny, from_description
from everseg.models.erfnet import erfnet
from everseg.models.model import SegmentationModel


def ours(*classes: int, **options) -> SegmentationModel:
    model = erfnet(**{"widths": (4, 6, 8), "blocks": (1, 2), **options})
    for number, total in enumerate(classes, 1):
        model.grow({f"domain{number}": total})
    return model


def original(*classes: int) -> dict[str, torch.Tensor]:
    """A random checkpoint of as many domains in the original names, without prefix."""
    return {
        n: torch.rand(v.shape) + 0.1 if v.is_floating_point() else torch.tensor(3)
        for n, v in mdil.dump(ours(*classes), prefix="").items()
    }


def test_the_subpackage_gives_mdil_lazily():
    assert interop.mdil is mdil


@pytest.mark.parametrize("classes", [(5,), (5, 4), (3, 5, 7)])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_loading_and_dumping_gives_the_same_tensors(classes, prefix):
    state = {prefix + n: v for n, v in original(*classes).items()}
    model = mdil.load({"epoch": 3, "state_dict": state} if prefix else state)
    assert tuple(head.num_classes for head in model.heads.values()) == classes
    assert model.branches == tuple(f"domain{i}" for i in range(1, len(classes) + 1))
    options = model.describe()["options"]
    assert (options["widths"], options["blocks"], options["dropout"]) == ([4, 6, 8], [1, 2], [0.03, 0.3])
    again = mdil.dump(model, prefix)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[n], v) for n, v in state.items())
    rebuilt = from_description(model.describe())
    rebuilt.load_state_dict(model.state_dict(), strict=True)


def test_names_of_the_original_code():
    assert {
        "encoder.initial_block.conv.weight", "encoder.initial_block.bn_ini.1.running_var",
        "encoder.layers.0.bn_ini.0.bias", "encoder.layers.1.conv3x1_1.bias", "encoder.layers.1.bns_1.0.weight",
        "encoder.layers.2.conv.weight", "encoder.layers.4.parallel_conv_2.1.bias",
        "encoder.layers.3.conv1x3_2.weight", "decoder.1.layers.0.bn.num_batches_tracked",
        "decoder.0.layers.5.bn2.weight", "decoder.0.layers.3.conv.bias", "decoder.1.output_conv.weight",
    } <= set(original(3, 4))  # fmt: skip


@pytest.mark.parametrize(
    "key",
    [
        "encoder.initial_block.bn_ini.0.weight",
        "encoder.layers.1.bns_1.1.running_mean",
        "encoder.layers.2.conv.weight",
        "decoder.0.output_conv.weight",
        "decoder.1.layers.4.bn1.num_batches_tracked",
    ],
)
def test_a_missing_entry_is_named(key):
    state = original(5, 4)
    del state[key]
    with pytest.raises(CheckpointError, match=f"missing: .*{key}"):
        mdil.load(state)


@pytest.mark.parametrize(
    "key",
    ["encoder.layers.1.bns_1.2.weight", "decoder.7.output_conv.bias", "encoder.other.weight", "extra", "x.y"],
)
def test_a_leftover_entry_is_named(key):
    with pytest.raises(CheckpointError, match=f"unexpected: .*{key}"):
        mdil.load({**original(5, 4), key: torch.ones(1)})


def test_ill_shaped_entries_are_named():
    state = original(5)
    for key, value, words in (
        ("decoder.0.layers.0.bn.bias", torch.ones(3), r"bn\.bias \(3,\) instead of \(6,\)"),
        ("decoder.0.output_conv.weight", torch.ones(3), r"ill-shaped: decoder\.0\.output_conv\.weight"),
        (
            "encoder.initial_block.bn_ini.0.weight",
            torch.ones(90),
            r"bn_ini.0.weight \(90,\) instead of \(4,\)",
        ),
        ("encoder.initial_block.conv.weight", torch.ones(90, 3, 3, 3), "increasing"),
        ("encoder.initial_block.conv.weight", torch.ones(3), "ill-shaped: encoder.initial_block.conv.weight"),
    ):
        with pytest.raises(CheckpointError, match=words):
            mdil.load({**state, key: value})


def test_something_else_is_no_checkpoint():
    for content in ({}, {"state_dict": {}}, {"a": 3}, {"state_dict": {"a": "b"}}):
        with pytest.raises(CheckpointError, match="no checkpoint of MDIL"):
            mdil.load(content)
    with pytest.raises(CheckpointError, match="missing"):
        mdil.load({"module.a": torch.ones(1)})


@pytest.mark.parametrize("domains", [("a",), ("a", "a"), ("a", "b", "c")])
def test_every_domain_needs_one_name_of_its_own(domains):
    with pytest.raises(ConfigError, match="2 domains"):
        mdil.load(original(5, 4), domains=domains)


def test_what_the_original_code_cannot_express_is_refused():
    tiny = deeplabv3_tiny()
    tiny.grow({"a": 2})
    grown = ours(5)
    grown.grow({"domain1": 2})
    for model, words in (
        (tiny, "one network"), (ours(5, per_branch="norm"), "one network"), (ours(), "no outputs"),
        (grown, "'domain1'.* several steps"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            mdil.dump(model)


def whole(state: dict[str, torch.Tensor]) -> dict:
    """What the original scripts write."""
    return {
        "epoch": 150, "arch": "Net", "best_acc": np.float64(0.61), "optimizer": {"state": {}, "param_groups": []},
        "state_dict": {f"module.{n}": v for n, v in state.items()},
    }  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
def test_a_converted_checkpoint_predicts_as_the_model_and_goes_back(tmp_path, zipped):
    state, path = original(4, 20), tmp_path / "checkpoint.pth.tar"
    torch.save(whole(state), path, _use_new_zipfile_serialization=zipped)
    folder = api.import_mdil(path, tmp_path / "ours", domains=["camvid", "cs"], classes=[["a", "b", "c"], CS])
    document = json.loads((folder / "classes.json").read_text())
    assert document["branches"]["camvid"] == {
        "groups": [[0, 1, 2, -2]], "names": ["a", "b", "c", "void"], "background": None,
    }  # fmt: skip
    assert document["branches"]["cs"]["names"] == [*CS, "void"]
    assert document["domains"] == {"camvid": "camvid", "cs": "cs"}
    assert (document["normalisation"], document["evaluation"], document["size"]) == (
        "unit",
        "resize",
        [512, 1024],
    )
    loaded = everseg.load(tmp_path / "ours")
    expected = mdil.load(state, domains=["camvid", "cs"])
    assert loaded.model.branches == ("camvid", "cs")
    own = loaded.model.state_dict()
    assert all(torch.equal(own[n].cpu(), v) for n, v in expected.state_dict().items())
    api.export_mdil(tmp_path / "ours", tmp_path / "back.pth.tar")
    back = mdil.read(tmp_path / "back.pth.tar")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[n], v) for n, v in state.items())
    with pytest.raises(ConfigError, match="exists"):
        api.export_mdil(tmp_path / "ours", tmp_path / "back.pth.tar")
    with pytest.raises(ConfigError, match="not empty"):
        api.import_mdil(path, tmp_path / "ours")


CS = [
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
]  # fmt: skip


def test_names_follow_from_the_number_of_outputs(tmp_path):
    torch.save(whole(original(20, 27, 4)), tmp_path / "x.pth")
    folder = api.import_mdil(tmp_path / "x.pth", tmp_path / "ours")
    branches = json.loads((folder / "classes.json").read_text())["branches"]
    names = {branch: entry["names"] for branch, entry in branches.items()}
    assert names["domain1"] == [*CS, "void"]
    assert len(names["domain2"]) == 27
    assert {"autorickshaw", "billboard", "void"} <= set(names["domain2"])
    assert names["domain3"] == ["class 0", "class 1", "class 2", "void"]


def test_wrong_numbers_of_names_leave_nothing_behind(tmp_path):
    torch.save(whole(original(4, 3)), tmp_path / "x.pth")
    for classes, words in (
        ([["a", "b", "c"]], "2 domains.* 1 time"),
        ([["a", "b", "c"], ["a"]], "'domain2' has 3 outputs.* void; 1 name"),
    ):
        with pytest.raises(ConfigError, match=words):
            api.import_mdil(tmp_path / "x.pth", tmp_path / "ours", classes=classes)
    assert not (tmp_path / "ours").exists()


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_unsafe_damaged_and_absent_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": original(3), "best_acc": Attack()}, "unsafe.pth")
    Path("damaged.pth").write_bytes(Path("unsafe.pth").read_bytes()[:500])
    for name in ("unsafe.pth", "damaged.pth"):
        with pytest.raises(CheckpointError, match="read safely"):
            api.import_mdil(name, "ours")
    assert not Path("attacked").exists()
    with pytest.raises(ConfigError, match="no such file"):
        api.import_mdil("absent.pth", "ours")
    assert not Path("ours").exists()


def test_the_command_goes_both_ways_and_its_model_predicts(tmp_path, call):
    state = original(4, 3)
    torch.save(whole(state), tmp_path / "x.pth.tar")
    picture = tmp_path / "a.png"
    Image.fromarray(np.full((24, 40, 3), 90, np.uint8)).save(picture)
    code, out, err = call(
        "import", "mdil", tmp_path / "x.pth.tar", "-o", tmp_path / "ours", "--domains", "day, dusk",
        "--classes", "road,sky,car", "--classes", "road,sky",
    )  # fmt: skip
    assert code == 0, err
    assert "ours" in out
    loaded = everseg.load(tmp_path / "ours")
    assert {name: space.names for name, space in loaded.spaces.items()} == {
        "day": ("road", "sky", "car", "void"), "dusk": ("road", "sky", "void"),
    }  # fmt: skip
    assert loaded.predict(picture, branch="dusk").ids.shape == (24, 40)
    code, _, err = call("import", "mdil", tmp_path / "ours", "-o", tmp_path / "back.pth", "--back")
    assert code == 0, err
    assert mdil.read(tmp_path / "back.pth").keys() == state.keys()
    code, _, err = call("import", "mdil", tmp_path / "x.pth.tar", "-o", tmp_path / "new", "--domains", "day")
    assert code == 2
    assert "2 domains" in err
    assert "Traceback" not in err
