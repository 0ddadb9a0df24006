"""Models of other heads and readouts in bundles: the file, the ONNX graph, prediction and serving agree."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from everseg.data.batches.transforms import normalise
from everseg.deploy.bundle import Contents, write_bundle
from everseg.deploy.onnx import Deployed, check_parity
from everseg.errors import CheckpointError, ConfigError, GateError
from everseg.inference.predict import LoadedModel, load
from everseg.interop import mib
from everseg.labels import LabelSpace
from everseg.losses.readout import full_values
from everseg.models.build import deeplabv3_tiny
from everseg.models.heads import Head, last_layer
from everseg.models.model import SegmentationModel
from everseg.runs.commit import save_folder
from everseg.runs.input_form import InputForm
from everseg.runs.model_folder import read_model_file
from everseg.types import Readout
from saying import must_say

SPACE = LabelSpace(((0, 1, 2), (3, 4)), ("background", "a", "b", "c", "d"))
SSUL = (
    [Head(hidden=8, background="own", auxiliary={"unknown": 1}), Head(hidden=8)],
    Readout("sigmoid", merge=("unknown",)),
)
BARM = (
    [Head(hidden=8), Head(hidden=8, beside={"residual": 1})],
    Readout("sigmoid", before=True, residual="residual"),
)
DKD = ([Head(background="constant", auxiliary={"auxiliary": 1}, detached=("auxiliary",)), Head()], Readout())
KINDS = {"ssul": SSUL, "barm": BARM, "dkd": DKD}


def network(kind: str) -> SegmentationModel:
    """A network of random weights whose classes all appear, and whose readout changes many pixels."""
    heads, readout = KINDS[kind]
    torch.manual_seed(7)
    model = deeplabv3_tiny(norm="bn", widths=(8, 8, 8, 8), hidden=8, out_channels=8, last_conv=kind == "dkd")
    for number, head in zip((3, 2), heads, strict=True):
        model.grow({"default": number}, heads={"default": head})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # one batch, and the statistics are its own
    given = torch.from_numpy(np.stack(pictures(4)).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        model(normalise(given, "imagenet", None))
        for name, part in model.head("default").parts.items():
            layer = last_layer(part)
            layer.weight.mul_(6)
            layer.bias.fill_(-0.5 if name in ("background", "unknown") else 0.0)
    model.readout = readout
    return model.eval()


def contents(kind: str, form: InputForm | None = None) -> Contents:
    return Contents(network(kind), {"default": SPACE}, {}, form=form or InputForm("whole"))


def pictures(count: int = 2) -> list[np.ndarray]:
    rng = np.random.RandomState(3)
    coarse = rng.randint(0, 256, (count, 8, 10, 3), dtype=np.uint8)
    return [np.kron(one, np.ones((9, 9, 1), np.uint8)) for one in coarse]


def by_hand(model: SegmentationModel, image: np.ndarray) -> np.ndarray:
    loaded = LoadedModel(model, {"default": SPACE})
    given = loaded._normalised(torch.from_numpy(image.transpose(2, 0, 1).copy()))[None]
    with torch.no_grad():
        output = model(given.to(loaded.device))["default"]
    return full_values(output, model.readout, image.shape[:2]).argmax(1)[0].cpu().numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_stores_the_readout_and_predicts_by_it(kind, tmp_path):
    made = write_bundle(tmp_path / "b", contents(kind), onnx=False)
    stored = json.loads((made.path / "classes.json").read_text())
    readout = KINDS[kind][1]
    assert stored.get("readout", {}) == readout.to_json()
    assert ("readout" in stored) == (readout != Readout())
    loaded = load(made.path)
    assert loaded.model.readout == readout
    (image,) = pictures(1)
    found = loaded.predict(image).ids
    assert (found == by_hand(network(kind), image)).mean() > 0.999
    if readout != Readout():
        loaded.model.readout = Readout()
        assert (loaded.predict(image).ids != found).mean() > 0.02, "the readout must matter in this test"
        must_say((made.path / "MODEL_CARD.md").read_text(), "readout", "sigmoid")
        how = json.loads((made.path / "preprocessing.json").read_text())
        assert how["readout"] == readout.to_json()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ssul", "barm"])
def test_the_onnx_graph_gives_the_masks_of_the_readout(kind, tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="the extra `export` is not installed")
    import onnxruntime

    made = write_bundle(tmp_path / "b", contents(kind), images=pictures(), source="squares")
    assert made.parity["default"]["equal_pixels"] > 0.999
    session = onnxruntime.InferenceSession(made.path / "model.onnx", providers=["CPUExecutionProvider"])
    (image,) = pictures(1)
    (mask,) = session.run(["mask"], {"image": image[None]})
    ids = made.registry.ids(made.spaces["default"])
    assert (mask[0] == np.array(ids)[by_hand(network(kind), image)]).mean() > 0.999
    # A model that reads its outputs in another way than the graph is found out.
    other = network(kind)
    other.readout = Readout()
    with pytest.raises(GateError, match="differs"):
        check_parity(
            Deployed(other, "default", ids, InputForm("whole")),
            (made.path / "model.onnx").read_bytes(),
            pictures(),
            "squares",
        )


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_graph_is_made_of_gives_the_masks_of_the_readout(kind):
    model, (image,) = network(kind), pictures(1)
    logits, mask = Deployed(model, "default", [0, 1, 2, 3, 4], InputForm("whole"))(
        torch.from_numpy(image)[None]
    )
    assert logits.shape[1] == 5
    assert (mask[0].numpy() == by_hand(network(kind), image)).mean() > 0.999


@pytest.mark.parametrize("kind", ["ssul", "barm"])
def test_windows_are_read_by_the_same_rule(kind, tmp_path):
    form = InputForm("sliding", window=256)
    made = write_bundle(tmp_path / "b", contents(kind, form), onnx=False)
    (image,) = pictures(1)  # smaller than a window: one window sees it whole
    assert (load(made.path).predict(image).ids == by_hand(network(kind), image)).mean() > 0.999


def test_mibs_files_cannot_hold_other_heads_or_readouts():
    for kind in KINDS:
        model = network(kind)
        model.description["options"] |= {"norm": "abn", "stem_pool": True, "rates": None}
        with pytest.raises(ConfigError, match="another method"):
            mib.dump(model)


def test_a_damaged_readout_is_told(tmp_path):
    made = write_bundle(tmp_path / "b", contents("ssul"), onnx=False)
    about = replace(made.about, readout=Readout())
    for wrong in ({"activation": "relu"}, [], {"merge": ["unknown"], "threshold": 0.5}):
        document = about.document() | {"readout": wrong}
        folder = tmp_path / f"other-{len(list(tmp_path.iterdir()))}"
        save_folder(
            folder, {"model": network("ssul").state_dict(), "method_state": {}}, {"classes": document}
        )
        with pytest.raises(CheckpointError) as error:
            read_model_file(folder)
        must_say(error.value, "readout", "damaged")


def test_a_growth_that_no_version_wrote_is_told(tmp_path):
    made = write_bundle(tmp_path / "b", contents("ssul"), onnx=False)
    document = made.about.document()
    document["architecture"]["growth"][1]["default"]["head"]["colour"] = "blue"
    folder = Path(tmp_path / "other")
    save_folder(folder, {"model": network("ssul").state_dict(), "method_state": {}}, {"classes": document})
    with pytest.raises(CheckpointError) as error:
        read_model_file(folder)
    must_say(error.value, "growth", "colour")
