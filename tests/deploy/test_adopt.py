"""Models that were not trained here become bundles that give the original's logits."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from untrained import ONE_ITERATION

import everseg
from everseg.data.batches.transforms import normalise
from everseg.deploy.adopt import adopt, class_names
from everseg.deploy.bundle import open_bundle
from everseg.deploy.extend import extend
from everseg.errors import CheckpointError, ConfigError
from saying import must_say

BLOCKS, STEM, WIDTHS, OUTPUTS, HIDDEN = (3, 4, 6, 3), 8, (4, 4, 6, 6), (12, 16, 20, 24), 6
NAMES = ["__background__", "boat", "dog"]


def torchvision_state(kind: str) -> dict[str, torch.Tensor]:
    """A small network's weights under torchvision's names, written from its documentation."""
    rng = torch.Generator().manual_seed(3)
    state: dict[str, torch.Tensor] = {}

    def conv(name: str, out: int, channels: int, size: int, bias: bool = False) -> None:
        state[f"{name}.weight"] = (
            torch.randn(out, channels, size, size, generator=rng) / (channels * size) ** 0.5
        )
        if bias:
            state[f"{name}.bias"] = torch.randn(out, generator=rng)

    def norm(name: str, channels: int) -> None:
        state[f"{name}.weight"] = 0.5 + torch.rand(channels, generator=rng)
        state[f"{name}.bias"] = torch.randn(channels, generator=rng) / 4
        state[f"{name}.running_mean"] = torch.randn(channels, generator=rng) / 4
        state[f"{name}.running_var"] = 0.5 + torch.rand(channels, generator=rng)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    conv("backbone.conv1", STEM, 3, 7)
    norm("backbone.bn1", STEM)
    channels = STEM
    for k in range(4):
        for i in range(BLOCKS[k]):
            at, width, out = f"backbone.layer{k + 1}.{i}", WIDTHS[k], OUTPUTS[k]
            for n, (a, b, size) in enumerate([(channels, width, 1), (width, width, 3), (width, out, 1)], 1):
                conv(f"{at}.conv{n}", b, a, size)
                norm(f"{at}.bn{n}", b)
            if i == 0:
                conv(f"{at}.downsample.0", out, channels, 1)
                norm(f"{at}.downsample.1", out)
            channels = out
    if kind == "fcn":
        conv("classifier.0", HIDDEN, channels, 3)
        norm("classifier.1", HIDDEN)
    else:
        for n, size in enumerate([1, 3, 3, 3, 1]):
            at = f"classifier.0.convs.{n}.{1 if n == 4 else 0}"
            conv(at, HIDDEN, channels, size)
            norm(f"{at[:-1]}{2 if n == 4 else 1}", HIDDEN)
        conv("classifier.0.project.0", HIDDEN, 5 * HIDDEN, 1)
        norm("classifier.0.project.1", HIDDEN)
        conv("classifier.1", HIDDEN, HIDDEN, 3)
        norm("classifier.2", HIDDEN)
    conv("classifier.4", len(NAMES), HIDDEN, 1, bias=True)
    state["aux_classifier.4.weight"] = torch.zeros(3, 4, 1, 1)
    return state


def torchvision_forward(state: dict[str, torch.Tensor], kind: str, x: torch.Tensor) -> torch.Tensor:
    """torchvision's network written out with functions: ResNet (replace_stride_with_dilation), then the head."""

    def conv(x, name, stride=1, dilation=1):
        weight = state[f"{name}.weight"]
        padding = dilation * (weight.shape[2] // 2)
        return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, padding, dilation)

    def norm(x, name):
        return F.batch_norm(
            x, *(state[f"{name}.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
        )

    x = F.max_pool2d(F.relu(norm(conv(x, "backbone.conv1", 2), "backbone.bn1")), 3, 2, 1)
    strides, first, rest = (1, 2, 1, 1), (1, 1, 1, 2), (1, 1, 2, 4)
    for k in range(4):
        for i in range(BLOCKS[k]):
            at, stride, dilation = (
                f"backbone.layer{k + 1}.{i}",
                strides[k] if i == 0 else 1,
                (rest if i else first)[k],
            )
            y = F.relu(norm(conv(x, f"{at}.conv1"), f"{at}.bn1"))
            y = F.relu(norm(conv(y, f"{at}.conv2", stride, dilation), f"{at}.bn2"))
            y = norm(conv(y, f"{at}.conv3"), f"{at}.bn3")
            skip = norm(conv(x, f"{at}.downsample.0", stride), f"{at}.downsample.1") if i == 0 else x
            x = F.relu(y + skip)
    if kind == "fcn":
        return conv(F.relu(norm(conv(x, "classifier.0"), "classifier.1")), "classifier.4")
    at = "classifier.0.convs"
    maps = [F.relu(norm(conv(x, f"{at}.0.0"), f"{at}.0.1"))]
    maps += [
        F.relu(norm(conv(x, f"{at}.{n}.0", 1, rate), f"{at}.{n}.1"))
        for n, rate in ((1, 12), (2, 24), (3, 36))
    ]
    pooled = F.relu(norm(conv(x.mean((2, 3), keepdim=True), f"{at}.4.1"), f"{at}.4.2"))
    maps.append(F.interpolate(pooled, x.shape[2:], mode="bilinear", align_corners=False))
    x = F.relu(norm(conv(torch.cat(maps, 1), "classifier.0.project.0"), "classifier.0.project.1"))
    return conv(F.relu(norm(conv(x, "classifier.1"), "classifier.2")), "classifier.4")


@pytest.mark.parametrize("kind", ["deeplabv3", "fcn"])
def test_torchvisions_networks_give_the_logits_of_an_independent_form(kind, tmp_path):
    state = torchvision_state(kind)
    torch.save({"model": state}, tmp_path / "w.pth")
    done = adopt(
        tmp_path / "w.pth", arch=f"torchvision:{kind}_resnet50", classes=NAMES, out=tmp_path / "b", onnx=False
    )
    assert done.background
    image = torch.randint(
        0, 255, (1, 3, 97, 130), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    expected = torchvision_forward(state, kind, normalise(image))
    with torch.no_grad():
        found = done.bundle.model()(normalise(image))["default"].logits
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    ids = F.interpolate(expected, (97, 130), mode="bilinear", align_corners=False).argmax(1)[0]
    prediction = everseg.load(tmp_path / "b").predict(image[0].permute(1, 2, 0).numpy())
    assert (prediction.ids == ids.numpy()).mean() > 0.999
    assert prediction.classes == ("background", "boat", "dog")


def test_an_adopted_model_is_extended_like_any_other(tmp_path, new_data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(torchvision_state("fcn"), tmp_path / "w.safetensors")
    made = adopt(
        tmp_path / "w.safetensors", arch="torchvision:fcn_resnet50", classes="__background__,boat,dog",
        out=tmp_path / "b", onnx=False,
    ).bundle  # fmt: skip
    done = extend(made.path, data=new_data, add=["forklift"], overrides=ONE_ITERATION, quiet=True)
    assert [(c.id, c.name, c.step) for c in done.bundle.registry.classes] == [
        (0, "background", 0), (1, "boat", 0), (2, "dog", 0), (3, "forklift", 1),
    ]  # fmt: skip
    assert done.bundle.lineage["parent"] == made.digest


def test_what_does_not_fit_is_told_and_nothing_written(tmp_path, call):
    state = torchvision_state("fcn")
    torch.save(state, tmp_path / "w.pth")
    cases = {
        "near": (
            ["--arch", "torchvision:fcn_resnet5O", "--classes", "a,b,c"],
            2,
            "did you mean 'torchvision:fcn_resnet50'",
        ),
        "kind": (["--arch", "smp:unet", "--classes", "a,b,c"], 2, "transformers:FOLDER"),
        "number": (["--arch", "torchvision:fcn_resnet50", "--classes", "a,b"], 2, "3 outputs, 2"),
        "none": (["--arch", "torchvision:fcn_resnet50"], 2, "--classes"),
        "blocks": (["--arch", "torchvision:fcn_resnet101", "--classes", "a,b,c"], 4, "3, 4, 6, 3"),
        "head": (["--arch", "torchvision:deeplabv3_resnet50", "--classes", "a,b,c"], 4, "missing"),
        "config": (["--arch", f"transformers:{tmp_path}"], 2, "config.json"),
    }
    for name, (arguments, code, text) in cases.items():
        got, _, err = call("adopt", tmp_path / "w.pth", *arguments, "--no-onnx", "-o", tmp_path / name)
        assert (got, text in err) == (code, True), (name, err)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


@pytest.mark.parametrize(
    ("names", "known", "facts"),
    [
        ("BG,boat,dog", ["background", "boat", "dog"], ("class 'BG'", "background")),
        (
            "boat,_background_,dog",
            ["boat", "_background_", "dog"],
            ("background", "output 1"),
        ),
        ("boat,car,dog", ["boat", "car", "dog"], ("first class is not",)),
    ],
)
def test_the_background_is_recognised_or_told(tmp_path, call, names, known, facts):
    torch.save(torchvision_state("fcn"), tmp_path / "w.pth")
    arguments = ("adopt", tmp_path / "w.pth", "--arch", "torchvision:fcn_resnet50", "--no-onnx")
    code, _, err = call(*arguments, "--classes", names, "-o", tmp_path / "b")
    assert code == 0, err
    must_say(err, "note:", *facts)
    made = open_bundle(tmp_path / "b")
    assert [entry.name for entry in made.registry.classes] == known
    assert made.spaces["default"].background == (0 if known[0] == "background" else None)


def test_two_outputs_of_one_name_are_refused(tmp_path, call):
    torch.save(torchvision_state("fcn"), tmp_path / "w.pth")
    arguments = ("adopt", tmp_path / "w.pth", "--arch", "torchvision:fcn_resnet50", "--no-onnx")
    code, _, err = call(*arguments, "--classes", "BG,boat,background", "-o", tmp_path / "b")
    assert code == 2
    must_say(err, "0 'background' and 2 'background'", "one name")
    code, _, err = call(*arguments, "--classes", "Boat,dog,bo_at", "-o", tmp_path / "b")
    assert code == 2
    assert "outputs 0 'Boat' and 2 'bo_at'" in err
    assert not (tmp_path / "b").exists()


def test_names_come_from_a_list_a_text_or_a_file(tmp_path):
    (tmp_path / "names.txt").write_text("road\n traffic light \n\n")
    (tmp_path / "names.json").write_text('["road", "car"]')
    (tmp_path / "wrong.json").write_text('{"road": 1}')
    assert class_names("road, car") == ["road", "car"]
    assert class_names(tmp_path / "names.txt") == ["road", "traffic light"]
    assert class_names(str(tmp_path / "names.json")) == ["road", "car"]
    for wrong in (tmp_path / "wrong.json", tmp_path / "nothing.txt"):
        with pytest.raises(ConfigError):
            class_names(wrong)


@pytest.fixture(scope="module")
def segformer(tmp_path_factory) -> tuple[Path, object]:
    """A folder with a random SegFormer as the transformers library writes it, and the network."""
    transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16,
        num_labels=4, mlp_ratios=[2, 2, 2, 2], id2label={0: "background", 1: "road", 2: "car", 3: "tree"},
    )  # fmt: skip
    network = transformers.SegformerForSemanticSegmentation(config).eval()
    torch.nn.init.normal_(network.decode_head.classifier.weight)
    folder = tmp_path_factory.mktemp("segformer")
    network.save_pretrained(folder)
    return folder, network


def test_a_segformer_gives_the_librarys_logits(segformer, tmp_path, call):
    folder, network = segformer
    code, out, err = call(
        "adopt",
        folder / "model.safetensors",
        "--arch",
        f"transformers:{folder}",
        "--no-onnx",
        "-o",
        tmp_path / "b",
    )
    assert code == 0, err
    assert "decode_head.classifier" in out
    bundle = open_bundle(tmp_path / "b")
    assert [c.name for c in bundle.registry.classes] == ["background", "road", "car", "tree"]
    image = torch.randint(0, 255, (1, 3, 96, 131), dtype=torch.uint8)
    with torch.no_grad():
        expected = network(pixel_values=normalise(image)).logits
        found = bundle.model()(normalise(image))["default"].logits
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    head = bundle.model().head("default")
    assert head.sizes == (4,)
    assert torch.equal(head.classifiers[0].weight, network.decode_head.classifier.weight)


def test_a_segformer_learns_a_further_class(segformer, tmp_path, new_data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _ = segformer
    made = adopt(
        folder / "model.safetensors", arch=f"transformers:{folder}", out=tmp_path / "b", onnx=False
    ).bundle
    changes = [
        "data.workers=0",
        "train.max_iterations=2",
        "train.log_every=1",
        "data.crop=64",
        "train.batch=2",
    ]
    done = extend(made.path, data=new_data, add=["forklift"], overrides=changes, quiet=True)
    assert done.bundle.model().head("default").sizes == (4, 1)
    before, after = (bundle.model().state_dict() for bundle in (made, done.bundle))
    moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert any(name.startswith("encoder.network.segformer") for name in moved)


def test_weights_of_another_network_are_refused(segformer, tmp_path):
    folder, network = segformer
    state = {name: value.clone() for name, value in network.state_dict().items()}
    state["decode_head.extra"] = torch.zeros(1)
    del state["decode_head.batch_norm.bias"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"batch_norm\.bias[\s\S]*decode_head\.extra"):
        adopt(tmp_path / "w.safetensors", arch=f"transformers:{folder}", out=tmp_path / "b", onnx=False)
    for foreign in (
        {"use_pretrained_backbone": True},
        {"x": {"auto_map": {"a": "b"}}},
        {"attn_implementation": "a/b"},
    ):
        changed = json.loads((folder / "config.json").read_text()) | foreign
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match="from elsewhere"):
            adopt(
                folder / "model.safetensors", arch=f"transformers:{tmp_path}", out=tmp_path / "b", onnx=False
            )


@pytest.mark.parametrize(
    "sizes",
    [{"hidden_sizes": [60_000] * 4}, {"depths": [60_000] * 4}, {"hidden_sizes": [10**9] * 4}],
    ids=["wide", "deep", "numbers that no weights have"],
)
def test_a_configuration_larger_than_its_weights_is_refused_before_it_is_built(segformer, tmp_path, sizes):
    """It may come from somebody else, and would take minutes and all memory."""
    folder, _ = segformer
    changed = json.loads((folder / "config.json").read_text()) | sizes
    (tmp_path / "config.json").write_text(json.dumps(changed))
    begun = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        adopt(folder / "model.safetensors", arch=f"transformers:{tmp_path}", out=tmp_path / "b", onnx=False)
    must_say(caught.value, "weights hold")
    assert time.process_time() - begun < 10


@pytest.mark.slow
def test_a_segformer_has_an_onnx_file(segformer, tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    folder, _ = segformer
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 96, 3), np.uint8)).save(tmp_path / "a.png")
    done = adopt(
        folder / "model.safetensors", arch=f"transformers:{folder}", out=tmp_path / "b", images=tmp_path
    )
    assert done.bundle.lineage["parity"]["default"]["logit_difference"] < 1e-4
