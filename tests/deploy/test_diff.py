"""Where two models disagree, by class name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from constant_model import constant
from PIL import Image, ImageFont

from everseg.deploy.bundle import Contents, open_bundle, write_bundle
from everseg.deploy.diff import Became, diff, shortened
from everseg.errors import CheckpointError, ConfigError, DataError


@pytest.fixture
def photos(tmp_path) -> Path:
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    for position, name in enumerate(("a.png", "sub/b.jpg")):
        image = np.random.RandomState(position).randint(0, 255, (40 + 8 * position, 60, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def test_classes_are_compared_by_name_not_by_number(tmp_path, photos):
    a = constant(tmp_path / "a", ("background", "road", "car"), "car")
    same = constant(tmp_path / "same", ("background", "car", "road"), "car")
    other = constant(tmp_path / "other", ("background", "van", "car"), "van")
    assert diff(a, same, photos, quiet=True).share == 0.0
    found = diff(a, other, photos, quiet=True)
    assert found.share == 1.0
    assert found.became == (Became("car", "van", 1.0),)
    assert (found.only_a, found.only_b) == (("road",), ("van",))
    assert {row.image for row in found.images} == {"a.png", "sub/b.jpg"}


def test_shares_are_those_of_the_predictions(deployed, tmp_path, photos):
    """Counted here from the two predictions, pixel by pixel."""
    import everseg

    bundle = open_bundle(deployed)
    model = bundle.model()
    generator = torch.Generator().manual_seed(1)
    for layer in model.head("default").classifiers:
        layer.weight.data += 0.5 * torch.randn(layer.weight.shape, generator=generator)
    changed = write_bundle(tmp_path / "changed", Contents(model, bundle.spaces), onnx=False).path
    found = diff(deployed, changed, photos, out=tmp_path / "out", largest=1, quiet=True)
    one, two = everseg.load(deployed), everseg.load(changed)
    pixels = wrong = 0
    for row in found.images:
        ids = [m.predict(photos / row.image).ids for m in (one, two)]
        assert row.share == pytest.approx((ids[0] != ids[1]).mean())
        assert sum(entry.share for entry in row.became) == pytest.approx(row.share)
        pixels, wrong = pixels + ids[0].size, wrong + int((ids[0] != ids[1]).sum())
    assert 0 < found.share < 1
    assert found.share == pytest.approx(wrong / pixels)
    assert [row.share for row in found.images] == sorted((row.share for row in found.images), reverse=True)
    assert json.loads((tmp_path / "out" / "diff.json").read_text()) == found.to_json()
    with Image.open(found.sheet) as sheet:
        assert sheet.width > 4 * 60
        assert sheet.height > 40


def test_the_command_prints_the_table(deployed, photos, tmp_path, call):
    other = constant(tmp_path / "other", ("background", "van", "red"), "van")
    code, out, err = call("diff", deployed, other, "--images", photos, "-o", tmp_path / "out")
    assert code == 0, err
    assert "a.png" in out
    assert "-> van" in out
    assert f"only {other} knows: van" in err
    assert (tmp_path / "out" / "diff.png").is_file()
    code, out, _ = call("diff", deployed, deployed.parent / "toy", "--images", photos, "--json")
    assert code == 0
    assert json.loads(out)["share"] == 0.0


def test_what_cannot_be_compared_is_told(deployed, tmp_path, photos):
    street = constant(tmp_path / "street", ("road", "sky"), "sky")
    with pytest.raises(ConfigError, match="share no class"):
        diff(deployed, street, photos, quiet=True)
    with pytest.raises(DataError, match="no such folder"):
        diff(deployed, deployed, tmp_path / "nothing", quiet=True)
    with pytest.raises(CheckpointError):
        diff(deployed, tmp_path / "nothing", photos, quiet=True)


def test_long_names_of_bundles_do_not_run_into_each_other_on_the_sheet():
    """Their ends tell them apart, so the middle is left out."""
    font = ImageFont.load_default(size=14)
    names = [f"warehouse-robot-camera-front-bundle-v{n}" for n in (11, 12)]
    short = [shortened(name, 120, font) for name in names]
    assert all(font.getlength(name) <= 120 for name in short)
    assert [name[-2:] for name in short] == ["11", "12"]
    assert all(name.startswith("ware") for name in short)
    assert shortened("bundle-v2", 120, font) == "bundle-v2"
