"""Smaller ONNX files of a bundle: made, measured, gated, and used for predicting."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import everseg
from everseg.deploy import precisions
from everseg.deploy.bundle import Bundle, open_bundle
from everseg.deploy.card import model_card
from everseg.deploy.http_server import RefusedError
from everseg.deploy.precisions import Measured
from everseg.deploy.serve import Served
from everseg.display import size
from everseg.errors import CheckpointError, ConfigError, GateError
from everseg.runs.commit import verify
from everseg.runs.documents import LINEAGE
from everseg.runs.model_folder import read_model_file
from everseg.runs.shapes import problems_of
from hostile_documents import variants
from saying import must_say
from sealed import reseal

pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
FIXTURES = Path(__file__).parent.parent / "fixtures"
BUNDLE, SCENES = FIXTURES / "bundle-format-1", FIXTURES / "scenes"
PICTURE = SCENES / "images/val/0.png"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A copy of the bundle that has both smaller files."""
    out = tmp_path_factory.mktemp("small") / "b"
    return everseg.export(
        BUNDLE, out, precision=["fp16", "int8"], calibrate=SCENES / "data.yaml", max_drop=5.0
    ).path


def test_the_smaller_files_are_measured_on_labels_and_told(small: Path) -> None:
    made = open_bundle(small)
    assert made.about.reduced == {"default": {"fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}}
    for name, one in made.reduced["default"].items():
        assert one["bytes"] == (small / one["file"]).stat().st_size < 0.8 * one["full_bytes"], name
        assert (one["images"], one["measure"]) == (4, "mIoU")
        assert set(one["classes"]) == set(made.spaces["default"].names)
        known = [pair for pair in one["classes"].values() if None not in pair]
        assert np.mean(known, axis=0) == pytest.approx([one["full"], one["reduced"]])
        assert abs(one["full"] - one["reduced"]) < 0.05
        assert 0.9 < one["equal_pixels"] <= 1
        must_say(
            (small / "MODEL_CARD.md").read_text(), name, f"{100 * one['reduced']:.1f}", size(one["bytes"])
        )
        must_say(made.shown(), name, f"{100 * one['full']:.1f}")
    assert {"model.fp16.onnx", "model.int8.onnx"} <= set(
        json.loads((small / "MANIFEST.json").read_text())["files"]
    )
    # Everything else is the bundle's own.
    for name in ("model.onnx", "model.safetensors", "preprocessing.json"):
        assert (small / name).read_bytes() == (BUNDLE / name).read_bytes()
    assert made.lineage["history"] == open_bundle(BUNDLE).lineage["history"]


def test_weights_are_of_8_bits_by_channel_and_classifiers_are_whole(small: Path) -> None:
    import onnx

    graph = onnx.load(small / "model.int8.onnx").graph
    stored = {one.name: one for one in graph.initializer}
    scales = {
        node.input[0]: stored[node.input[1]].dims
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored
    }
    weights = {name: dims for name, dims in scales.items() if len(stored[name].dims) == 4}
    assert weights
    assert all(list(dims) == [stored[name].dims[0]] for name, dims in weights.items())
    assert all(np.abs(onnx.numpy_helper.to_array(stored[name]).astype(int)).max() <= 64 for name in weights)
    made_by = {output: node for node in graph.node for output in node.output}
    assert not any("heads" in name for name in weights)
    assert any("heads" in node.input[1] for node in graph.node if node.op_type == "Conv")
    assert made_by["logits"].op_type != "DequantizeLinear"


def test_smaller_files_ask_for_no_newer_onnxruntime_than_the_full_one(small: Path) -> None:
    import onnx

    full, *others = (onnx.load(small / name) for name in ("model.onnx", "model.fp16.onnx", "model.int8.onnx"))
    for one in others:
        assert one.ir_version == full.ir_version
        assert (
            one.opset_import == full.opset_import
        )  # an old onnxruntime refuses versions of sets that nothing uses
        assert {node.domain for node in one.graph.node} == {""}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_predict_and_load_use_a_file(small: Path, tmp_path: Path, call: Callable, precision: str) -> None:
    code, out, err = call("predict", small, PICTURE, "-o", tmp_path, "--precision", precision, "--json")
    assert code == 0, err
    with Image.open(json.loads(out)["images"][0]["mask"]) as mask:
        found = np.asarray(mask)
    whole = everseg.load(small).predict(PICTURE).ids
    assert (found == whole).mean() > (0.999 if precision == "fp32" else 0.9)
    assert (found == everseg.load(small, precision=precision).predict(PICTURE).ids).all()
    if precision == "int8":
        assert (found != whole).any(), "the smaller file was used"


def test_a_file_that_is_not_there_is_told_with_what_is(small: Path, tmp_path: Path, call: Callable) -> None:
    code, _, err = call("predict", BUNDLE, PICTURE, "-o", tmp_path / "out", "--precision", "int8")
    assert code == 2
    must_say(err, "int8", "fp32", "--precision")
    code, _, err = call("predict", small, PICTURE, "-o", tmp_path / "out", "--precision", "int4")
    assert code == 2
    must_say(err, "int4", "int8")
    code, _, err = call(
        "predict", FIXTURES / "run-format-1", PICTURE, "-o", tmp_path / "out", "--precision", "fp32"
    )
    assert code == 2
    must_say(err, "--precision", "export")
    assert not (tmp_path / "out").exists()


def test_what_loses_more_than_allowed_is_not_kept(tmp_path: Path, call: Callable, monkeypatch) -> None:
    before = precisions._measured

    def worse(*given: object) -> dict[str, Measured]:
        return {
            name: Measured(**{**vars(one), "reduced": one.full - 0.02})
            for name, one in before(*given).items()
        }

    monkeypatch.setattr(precisions, "_measured", worse)
    asked = (
        "export",
        BUNDLE,
        "-o",
        tmp_path / "b",
        "--precision",
        "fp16",
        "--calibrate",
        SCENES / "data.yaml",
    )
    code, _, err = call(*asked)
    assert code == 6
    must_say(err, "fp16", "2.00", "mIoU", "--max-drop")
    assert list(tmp_path.iterdir()) == []
    assert call(*asked, "--max-drop", 2.5)[0] == 0


def test_without_labels_the_pixels_decide(tmp_path: Path) -> None:
    made = everseg.export(BUNDLE, tmp_path / "b", precision=["fp16"], calibrate=SCENES / "images/val")
    (one,) = made.reduced["default"].values()
    assert (one["measure"], one["full"], one["classes"]) == ("agreement", 1.0, {})
    assert one["reduced"] == one["equal_pixels"] > 0.99
    assert one["images"] == 4
    with pytest.raises(GateError, match=r"--calibrate DATA"):
        everseg.export(
            BUNDLE, tmp_path / "c", precision=["int8"], calibrate=SCENES / "images/val", max_drop=0.0
        )


def test_what_is_missing_is_asked_for_at_once(tmp_path: Path, call: Callable) -> None:
    code, _, err = call("export", BUNDLE, "--precision", "int8")
    assert code == 2
    must_say(err, "-o", "--calibrate")
    code, _, err = call("export", BUNDLE, "-o", tmp_path / "b", "--precision", "int7", "--calibrate", SCENES)
    assert code == 2
    must_say(err, "int7", "int8")
    code, _, err = call("export", BUNDLE, "-o", tmp_path / "b", "--calibrate", SCENES)
    assert code == 2
    must_say(err, "--calibrate", "--precision")
    code, _, err = call(
        "export",
        BUNDLE,
        "-o",
        tmp_path / "b",
        "--precision",
        "int8",
        "--calibrate",
        SCENES,
        "--memory",
        "--step",
        0,
    )
    assert code == 2
    must_say(err, "--memory", "--step")
    with pytest.raises(ConfigError, match="no-onnx"):
        everseg.export(BUNDLE, tmp_path / "b", precision=["int8"], onnx=False)


def test_what_a_lineage_says_of_them_is_told_or_harmless(small: Path) -> None:
    made = open_bundle(small)
    honest = dict(made.lineage)
    assert problems_of(honest, LINEAGE) == []
    told = 0
    for case, value in variants(honest["reduced"]["default"]["int8"]):
        changed = {**honest, "reduced": {"default": {"int8": value}}}
        if problems_of(changed, LINEAGE):
            told += 1
            continue
        assert list(Bundle(made.path, made.digest, made.about, changed).shown()), case
        assert model_card("b", made.about, changed, 1), case
    assert told > 50


def test_a_damaged_or_strange_entry_is_refused(small: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(small, tmp_path / "b")
    for value in ({"int8": "../x"}, {"int4": "model.int8.onnx"}, {"int8": 1}, ["int8"]):
        document = json.loads((copy / "classes.json").read_text())
        document["branches"]["default"]["reduced"] = value
        (copy / "classes.json").write_text(json.dumps(document))
        reseal(copy)
        with pytest.raises(CheckpointError, match="reduced"):
            read_model_file(copy)
    copy = shutil.copytree(small, tmp_path / "c")
    data = bytearray((copy / "model.int8.onnx").read_bytes())
    data[100] ^= 1
    (copy / "model.int8.onnx").write_bytes(data)
    with pytest.raises(CheckpointError, match=re.escape("model.int8.onnx")):
        everseg.load(copy, precision="int8")
    with pytest.raises(CheckpointError, match=re.escape("model.int8.onnx")):
        verify(copy)


def test_served_in_a_precision_a_prediction_has_its_time(small: Path, monkeypatch) -> None:
    served = Served(small, precision="int8")
    assert ("Run by", "onnxruntime, int8") in served.about()
    with Image.open(PICTURE) as picture:
        image = np.asarray(picture.convert("RGB"))
    first = served.predict(image, None)
    served.timeout = 0.05
    run = served.model.onnx.sessions["default"].run

    class Slow:
        def run(self, *given: object) -> object:
            time.sleep(0.2)
            return run(*given)

    monkeypatch.setitem(served.model.onnx.sessions, "default", Slow())
    with pytest.raises(RefusedError) as refused:
        served.predict(image, None)
    assert refused.value.status == 504
    monkeypatch.undo()
    assert served.predict(image, None)["mask"] == first["mask"]
    assert torch.get_num_threads() >= 1
