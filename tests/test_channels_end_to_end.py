"""Images of five channels in three files, and of one channel of 16 bits: from the data.yaml to ONNX and a next step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from encoders import TYPES, need_transformers
from PIL import Image

import everseg
from everseg.cli.main import main
from everseg.errors import ConfigError, DataError
from everyday import some
from saying import must_say

NAMES = ["red", "green", "blue", "infrared", "height"]
FIVE = """
classes: [background, roof, water]
channels:
  names: [red, green, blue, infrared, height]
  bits: 16
  range: [[0, 255], [0, 255], [0, 255], [0, 1000], [0, 10000]]
  folders: ["infrared/{split}", "height/{split}"]
"""
ONE = """
classes: [background, roof, water]
channels: {names: [depth], bits: 16, mean: 20000, std: 9000}
"""


def _scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A mask, and (H, W, 5) uint16: the classes differ in infrared and height only."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((32, 32), np.uint8)
    mask[:16, :16], mask[16:, 16:] = rng.permutation([1, 2])
    image = rng.integers(0, 256, (32, 32, 5))
    ids = mask.astype(int)
    image[..., 3] = 100 + 400 * ids + rng.integers(0, 20, mask.shape)
    image[..., 4] = 9000 - 4000 * ids + rng.integers(0, 200, mask.shape)
    return image.astype(np.uint16), mask


def _write(root: Path, kind: str) -> Path:
    for split, count in (("train", 8), ("val", 3)):
        for folder in ("images", "masks", "infrared", "height"):
            (root / folder / split).mkdir(parents=True)
        for number in range(count):
            image, mask = _scene(number + 100 * (split == "val"))
            name = f"{split}/{number}"
            Image.fromarray(mask).save(root / "masks" / f"{name}.png")
            if kind == "five":
                Image.fromarray(image[..., :3].astype(np.uint8)).save(root / "images" / f"{name}.png")
                Image.fromarray(image[..., 3]).save(root / "infrared" / f"{name}.tif")
                np.save(root / "height" / f"{name}.npy", image[..., 4])
            else:
                Image.fromarray(image[..., 4] * 4).save(root / "images" / f"{name}.png")
    (root / "data.yaml").write_text(FIVE if kind == "five" else ONE)
    return root / "data.yaml"


def _settings(data: Path, out: Path) -> list[str]:
    return [
        f"data.dataset={data}", f"out={out}", "name=r", "scenario.task=[[roof],[water]]", "data.crop=32",
        "data.workers=0", "data.scale=[0.5,1]", "data.evaluation=whole", "data.brightness=[0.9,1.1]",
        "data.contrast=[0.9,1.1]", "data.blur=[0,0.5]", "data.rotate=0.5", "train.batch=4", "train.epochs=30",
        "train.lr=0.05", "train.lr_next=0.02", "train.threads=1", "tracker=[]", "method.name=mib",
        "model.name=deeplabv3-tiny",
    ]  # fmt: skip


@pytest.fixture(scope="module", params=some(["five", "one"], "five"))
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    root = tmp_path_factory.mktemp(request.param)
    data = _write(root / "data", request.param)
    everseg.run(overrides=_settings(data, root / "runs"), quiet=True)
    return request.param, data, root / "runs" / "r"


def _succeeds(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0


def _raw(kind: str, seed: int = 100) -> np.ndarray:
    image, _ = _scene(seed)
    return image if kind == "five" else image[..., 4:] * np.uint16(4)


def test_it_learns_what_only_the_further_channels_show(trained: tuple[str, Path, Path]) -> None:
    kind, _, run = trained
    results = everseg.load(run).predict(_raw(kind))
    _, mask = _scene(100)
    assert (results.ids == mask).mean() > 0.9
    assert results.image.shape == (32, 32, 3)
    assert results.image.dtype == np.uint8


def test_the_picture_for_people_shows_the_stated_channels(trained: tuple[str, Path, Path]) -> None:
    kind, _, run = trained
    raw, shown = _raw(kind), everseg.load(run).predict(_raw(kind)).image
    if kind == "five":
        np.testing.assert_array_equal(shown, raw[..., :3])
    else:
        low, high = 0.0, 65535.0
        expected = np.rint((raw[..., 0].astype(np.float64) - low) / (high - low) * 255)
        assert np.abs(shown - expected[..., None]).max() <= 1


def test_eval_predict_and_report_from_the_command_line(
    trained: tuple[str, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, _, run = trained
    np.save(tmp_path / "a.npy", _raw(kind))
    _succeeds("predict", str(run), str(tmp_path / "a.npy"), "--out", str(tmp_path / "out"))
    mask = np.asarray(Image.open(tmp_path / "out" / "a_mask.png"))
    np.testing.assert_array_equal(mask, everseg.load(run).predict(_raw(kind)).ids)
    _succeeds("report", str(run))
    assert (run / "report.html").is_file()
    _succeeds("eval", str(run), "data.evaluation=sliding", "data.window=16")


def test_the_bundle_its_onnx_file_and_its_script_give_the_same(
    trained: tuple[str, Path, Path], tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    kind, _, run = trained
    bundle = tmp_path / "bundle"
    everseg.export(run, bundle)
    raw = _raw(kind)
    expected = everseg.load(run).predict(raw).ids
    np.testing.assert_array_equal(everseg.load(bundle).predict(raw).ids, expected)
    session = onnxruntime.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[3] == raw.shape[2]
    (mask,) = session.run(["mask"], {"image": raw[None].astype(np.float32)})
    np.testing.assert_array_equal(mask[0], expected)
    np.save(tmp_path / "a.npy", raw)
    subprocess.run(
        [sys.executable, str(bundle / "example.py"), "a.npy"], cwd=tmp_path, check=True, capture_output=True
    )
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.mask.png")), expected)


def test_serve_refuses_with_a_sentence(trained: tuple[str, Path, Path], tmp_path: Path) -> None:
    from everseg.deploy.serve import Served

    kind, _, run = trained
    everseg.export(run, tmp_path / "bundle", onnx=False)
    with pytest.raises(ConfigError) as caught:
        Served(tmp_path / "bundle")
    must_say(caught.value, len(NAMES) if kind == "five" else 1, 16, "everseg predict")


def test_a_bundle_is_extended_with_the_same_channels_only(
    trained: tuple[str, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, data, run = trained
    everseg.export(run, tmp_path / "bundle", onnx=False)
    text = data.read_text().replace("water]", "water, road]")
    other = data.with_name("more.yaml")
    other.write_text(text)
    masks = sorted((data.parent / "masks").rglob("*.png"))
    for path in masks:
        mask = np.array(Image.open(path))
        mask[:16, 16:] = 3
        Image.fromarray(mask).save(path)
    try:
        small = ["train.epochs=1", "data.workers=0", "train.threads=1", "report=false", "tracker=[]"]
        extended = everseg.load(tmp_path / "bundle").extend(
            data=other, add=["road"], out=tmp_path / "next", overrides=small, onnx=False
        )
        assert "road" in everseg.load(tmp_path / "next").classes, extended
        other.write_text(
            text.replace("bits: 16", "bits: 32").replace("std: 9000", "std: 9000, range: [0, 9]")
        )
        with pytest.raises(ConfigError) as caught:
            everseg.load(tmp_path / "bundle").extend(
                data=other,
                add=["road"],
                out=tmp_path / "third",
                overrides=small,
                onnx=False,
            )
        must_say(caught.value, "32 bits", "16 bits")
    finally:
        for path in masks:
            mask = np.array(Image.open(path))
            mask[:16, 16:] = 0
            Image.fromarray(mask).save(path)


def test_wrong_images_are_refused_in_a_sentence(trained: tuple[str, Path, Path], tmp_path: Path) -> None:
    kind, _, run = trained
    model, count = everseg.load(run), len(NAMES) if kind == "five" else 1
    for image, facts in (
        (np.zeros((8, 8, 2), np.uint16), [2, count]),
        (np.zeros((8, 8, count), np.float64), ["float64", "uint16"]),
        (np.zeros((8, 8, count, 1), np.uint16), [f"8x8x{count}x1"]),
    ):
        with pytest.raises(DataError) as caught:
            model.predict(image)
        must_say(caught.value, *facts)


@pytest.mark.parametrize(
    ("setting", "facts"),
    [
        ("data.hue=[0,0.1]", ["data.hue"]),
        ("model.name=torchvision-fcn", ["model.name"]),
        ("model.options.in_channels=4", ["in_channels", "4"]),
    ],
)
def test_settings_that_need_rgb_are_refused_before_training(
    trained: tuple[str, Path, Path], tmp_path: Path, setting: str, facts: list[str]
) -> None:
    _, data, _ = trained
    with pytest.raises(ConfigError) as caught:
        everseg.run(overrides=[*_settings(data, tmp_path), setting], quiet=True)
    must_say(caught.value, *facts)
    assert not (tmp_path / "r" / "steps").exists()


def test_an_encoder_of_a_library_sees_the_channels_too(tmp_path: Path) -> None:
    need_transformers()
    data = _write(tmp_path / "data", "five")
    small = [
        "model.name=mlp", "model.encoder=hf:segformer", "model.options.hidden=8", "train.epochs=1", "report=false",
        *(f"model.options.config.{key}={value}" for key, value in TYPES["segformer"].items()),
    ]  # fmt: skip
    everseg.run(overrides=[*_settings(data, tmp_path), *small], quiet=True)
    assert everseg.load(tmp_path / "r").predict(_raw("five")).ids.shape == (32, 32)
    _succeeds("export", str(tmp_path / "r"), "-o", str(tmp_path / "bundle"), "--no-onnx")


@pytest.mark.parametrize("kind", ["five", "one"])
def test_erfnet_sees_the_channels_too(tmp_path: Path, kind: str) -> None:
    data = _write(tmp_path / "data", kind)
    small = ["model.name=erfnet", "model.options.per_branch=decoder", "train.epochs=1", "report=false"]
    everseg.run(overrides=[*_settings(data, tmp_path), *small], quiet=True)
    assert everseg.load(tmp_path / "r").predict(_raw(kind)).ids.shape == (32, 32)
