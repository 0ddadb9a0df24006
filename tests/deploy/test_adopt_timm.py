"""Encoders of timm under everseg's heads become bundles; against a stand-in with timm's feature interface."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from fake_timm import Timm
from safetensors.torch import save_file
from untrained import ONE_ITERATION

from everseg.config.fields import ModelConfig
from everseg.data.batches.transforms import normalise
from everseg.deploy.adopt import adopt
from everseg.deploy.bundle import open_bundle
from everseg.deploy.extend import extend
from everseg.errors import CheckpointError, ConfigError, GateError
from everseg.models.build import build_model, from_description
from everseg.models.model import SegmentationModel
from saying import must_say

NAMES = "background,road,tree"
SAID = {"norm": "bn", "normalisation": "imagenet"}
"""What no weight shows."""


@pytest.fixture(autouse=True)
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", Timm())


def trained(head: str, *grown: int) -> SegmentationModel:
    """A network as if it had been trained elsewhere: no weight and no statistic as it is initialised."""
    torch.manual_seed(4)
    options = {"hidden": 6} | ({"out_channels": 5} if head == "deeplabv3" else {})
    model = build_model(ModelConfig(name=head, encoder="timm:toynet", options=options))
    for number in grown or (3,):
        model.grow({"default": number})
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(
                0.5 + torch.rand_like(value)
                if name.endswith(("var", "norm.weight"))
                else torch.randn_like(value) / 3
            )
    return model.eval()


def renamed(state: dict[str, torch.Tensor], encoder: str, classifier: str) -> dict[str, torch.Tensor]:
    moved = {"encoder.body.": encoder, "heads.default.classifiers.0.": classifier}
    for ours, theirs in moved.items():
        state = {
            theirs + k.removeprefix(ours) if k.startswith(ours) else k: v.clone() for k, v in state.items()
        }
    return state


@pytest.mark.parametrize("head", ["mlp", "deeplabv3"])
@pytest.mark.parametrize(
    ("encoder", "classifier"),
    [
        ("encoder.body.", "heads.default.classifiers.0."),
        ("encoder.", "classifier."),
        ("backbone.", "classifier."),
    ],
)
def test_the_adopted_model_gives_the_networks_logits(tmp_path: Path, call, head, encoder, classifier) -> None:
    model = trained(head)
    save_file(renamed(model.state_dict(), encoder, classifier), tmp_path / "w.safetensors")
    code, out, err = call("adopt", tmp_path / "w.safetensors", "--arch", "timm:toynet", "--classes", NAMES,
                          "--no-onnx", "--norm", "bn", "--normalisation", "imagenet", "-o", tmp_path / "b")  # fmt: skip
    assert code == 0, err
    assert "3 finite logits" in out
    must_say(out.replace("\n", " "), "norm bn", "imagenet", "given", "dilations")
    image = torch.randn(1, 3, 75, 50)
    with torch.no_grad():
        expected, found = (m(image)["default"].logits for m in (model, open_bundle(tmp_path / "b").model()))
    assert expected.std() > 0.01
    assert torch.equal(found, expected)


def test_the_classifiers_of_several_growths_are_one(tmp_path: Path) -> None:
    model = trained("mlp", 2, 1)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    made = adopt(
        tmp_path / "w.safetensors", arch="timm:toynet", classes=NAMES, out=tmp_path / "b", onnx=False, **SAID
    )
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, found = (m(image)["default"].logits for m in (model, made.bundle.model()))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert made.bundle.model().head("default").sizes == (3,)


@pytest.mark.parametrize("head", ["mlp", "deeplabv3"])
def test_it_is_extended_like_any_other(
    tmp_path: Path, new_data: Path, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(trained(head).state_dict(), tmp_path / "w.safetensors")
    made = adopt(
        tmp_path / "w.safetensors", arch="timm:toynet", classes=NAMES, out=tmp_path / "b", onnx=False, **SAID
    )
    done = extend(made.bundle.path, data=new_data, add=["forklift"], overrides=ONE_ITERATION, quiet=True)
    assert [c.name for c in done.bundle.registry.classes] == [*NAMES.split(","), "forklift"]


@pytest.mark.parametrize(
    ("drop", "words"),
    [
        ("decoder.project", r"neither decoder\.project\.0\.weight \(all-MLP.*nor decoder\.aspp\.0\.weight"),
        (
            "heads.",
            r"no classifier: heads\.default\.classifiers\.0\.weight and \.bias, or classifier\.weight",
        ),
        (
            "encoder.body.stages.2.",
            r"(?s)toynet.* mlp head.*missing: encoder\.body\.stages\.2\.bias",
        ),
        ("decoder.fuse.1", r"missing: decoder\.fuse\.1\.weight"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, drop: str, words: str) -> None:
    state = {k: v for k, v in trained("mlp").state_dict().items() if not k.startswith(drop)}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=words):
        adopt(
            tmp_path / "w.safetensors",
            arch="timm:toynet",
            classes=NAMES,
            out=tmp_path / "b",
            onnx=False,
            **SAID,
        )
    assert not (tmp_path / "b").exists()


def test_part_of_a_head_two_branches_and_foreign_weights_are_told(tmp_path: Path) -> None:
    def refused(state: dict[str, torch.Tensor], words: str) -> None:
        save_file(state, tmp_path / "w.safetensors")
        with pytest.raises(CheckpointError, match=words):
            adopt(
                tmp_path / "w.safetensors",
                arch="timm:toynet",
                classes=NAMES,
                out=tmp_path / "b",
                onnx=False,
                **SAID,
            )

    state = trained("deeplabv3").state_dict()
    refused(
        {k: v for k, v in state.items() if k != "decoder.reduce.weight"}, r"decoder\.reduce\.weight.*missing"
    )
    two = {f"heads.other.classifiers.0.{part}": torch.zeros(1) for part in ("weight", "bias")}
    refused({**state, **two}, r"several classifiers \(heads\.default, heads\.other\)")
    refused({**state, "decoder.more": torch.zeros(1)}, r"not in this model: decoder\.more")


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("timm:nonet", "no model 'nonet'"),
        ("timm:toynet.in1k", "write timm:toynet"),
        ("timm:", "or timm:NAME"),
    ],
)
def test_wrong_names_are_told(tmp_path: Path, call, arch: str, words: str) -> None:
    save_file(trained("mlp").state_dict(), tmp_path / "w.safetensors")
    code, _, err = call("adopt", tmp_path / "w.safetensors", "--arch", arch, "--classes", NAMES, "--no-onnx",
                        "-o", tmp_path / "b")  # fmt: skip
    assert (code, words in err) == (2, True), err


def test_classifiers_of_two_kinds_and_of_unequal_width_are_told(tmp_path: Path) -> None:
    state = trained("mlp", 2, 1).state_dict()
    two = {f"classifier.{part}": torch.zeros(1) for part in ("weight", "bias")}
    second = "heads.default.classifiers.1.weight"
    narrow = {second: state[second][:, :2]}
    for more, words in (
        (two, r"several classifiers \(classifier, heads\.default\)"),
        (narrow, r"one head.*weight.* \(\(2, 6, 1, 1\), \(1, 2, 1, 1\)\)"),
        ({second.replace("weight", "bias"): torch.tensor(1.0)}, r"one head.*bias"),
    ):
        save_file({k: v.contiguous() for k, v in {**state, **more}.items()}, tmp_path / "w.safetensors")
        with pytest.raises(CheckpointError, match=words):
            adopt(
                tmp_path / "w.safetensors",
                arch="timm:toynet",
                classes=NAMES,
                out=tmp_path / "b",
                onnx=False,
                **SAID,
            )


def of_another_activation(head: str = "mlp") -> SegmentationModel:
    """A network whose norms are followed by a leaky ReLU; its weights are named and shaped like the others'."""
    model = trained(head)
    described = model.describe()
    described["options"]["norm"] = "abn"
    again = from_description(described)
    again.load_state_dict(model.state_dict(), strict=True)
    return again.eval()


def a_reference(path: Path, model: SegmentationModel, normalisation: str) -> Path:
    image = torch.randint(0, 255, (60, 75, 3), dtype=torch.uint8)
    with torch.no_grad():
        logits = model(normalise(image.movedim(2, 0)[None], normalisation))["default"].logits
    save_file({"image": image, "logits": logits[0].contiguous()}, path)
    return path


def test_what_no_weight_shows_is_asked_for(tmp_path: Path, call) -> None:
    save_file(trained("mlp").state_dict(), tmp_path / "w.safetensors")
    given = ("adopt", tmp_path / "w.safetensors", "--arch", "timm:toynet", "--classes", NAMES, "--no-onnx")
    code, _, err = call(*given, "-o", tmp_path / "b")
    assert code == 2
    must_say(err, "--norm", "--normalisation", "--reference")
    code, _, err = call(*given, "--norm", "bn", "-o", tmp_path / "b")
    assert (code, "--normalisation needed" in err) == (2, True), err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("normalisation", ["imagenet", "unit"])
def test_a_reference_finds_activation_and_normalisation(tmp_path: Path, normalisation: str) -> None:
    model = of_another_activation()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    reference = a_reference(tmp_path / "r.safetensors", model, normalisation)
    made = adopt(tmp_path / "w.safetensors", arch="timm:toynet", classes=NAMES, out=tmp_path / "b",
                 onnx=False, reference=reference)  # fmt: skip
    must_say(made.check, "norm abn", f"images {normalisation}")
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(made.bundle.model()(image)["default"].logits, model(image)["default"].logits)
    assert made.bundle.about.form.normalisation == normalisation


def test_a_reference_that_what_was_given_does_not_reproduce_is_an_error(tmp_path: Path) -> None:
    model = of_another_activation()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    reference = a_reference(tmp_path / "r.safetensors", model, "unit")
    with pytest.raises(GateError, match=r"norm bn, images imagenet: \d"):
        adopt(tmp_path / "w.safetensors", arch="timm:toynet", classes=NAMES, out=tmp_path / "b",
              onnx=False, reference=reference, **SAID)  # fmt: skip
    assert not (tmp_path / "b").exists()
    save_file({"image": torch.zeros(3, 4, 4)}, tmp_path / "r.safetensors")
    with pytest.raises(ConfigError, match=r"image and logits"):
        adopt(tmp_path / "w.safetensors", arch="timm:toynet", classes=NAMES, out=tmp_path / "b",
              onnx=False, reference=tmp_path / "r.safetensors")  # fmt: skip
