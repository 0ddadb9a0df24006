"""`everseg predict FOLDER`: what is left out is said, damage costs only itself, every file is decoded once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from miniature import Everseg
from PIL import Image, ImageFile

from everseg.errors import ConfigError
from everseg.inference import predict as inference
from saying import must_say


def photos(folder: Path, count: int = 3) -> None:
    folder.mkdir()
    for number in range(count):
        Image.fromarray(np.full((20, 24, 3), 40 * number, np.uint8)).save(folder / f"IMG_{number}.JPG")


def test_files_left_out_are_counted_with_the_reason(everseg: Everseg, done: Path) -> None:
    photos(done / "phone")
    for number in range(3, 8):
        (done / f"phone/IMG_{number}.xyz").write_bytes(b"?")
    (done / "phone/IMG_9.HEIC").write_bytes(b"\0\0\0\x20ftypheic" + bytes(20))
    (done / "phone/._IMG_1.JPG").write_bytes(b"?")
    code, _, err = everseg("predict", "runs/x", "phone", "-o", "phone/out")
    must_say(err, 5, "left out", ".xyz", "IMG_3.xyz")
    if code == 0:  # without the extra, HEIC files are left out as well
        must_say(err, 1, "left out", "HEIC", "IMG_9.HEIC", "everseg[heic]")
        must_say(err, 1, "hidden")
        assert sorted(p.name for p in (done / "phone/out").glob("*_mask.png")) == [
            f"IMG_{i}_mask.png" for i in range(3)
        ]
    again = everseg("predict", "runs/x", "phone", "-o", "phone/out", "--json")
    if again.code == 0:
        assert len(json.loads(again.out)["images"]) == 3  # not the masks of the first call
        must_say(json.loads(again.out)["notes"], 7, "results")


def test_damage_behind_a_sound_header_costs_one_image(everseg: Everseg, done: Path) -> None:
    photos(done / "phone")
    whole = (done / "phone/IMG_1.JPG").read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(done / "phone/IMG_1.JPG")
    (done / "phone/IMG_1.JPG").write_bytes((done / "phone/IMG_1.JPG").read_bytes()[:2000])
    assert len(whole) < 2000
    code, _, err = everseg("predict", "runs/x", "phone", "-o", "out")
    assert code == 3
    must_say(err, 1, "unreadable", 2, "out")
    must_say(err, "IMG_1.JPG", "damaged")
    assert sorted(p.name for p in (done / "out").glob("*_mask.png")) == ["IMG_0_mask.png", "IMG_2_mask.png"]


def test_every_file_is_decoded_once(everseg: Everseg, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(done / "phone")
    decoded: list[str] = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", _counting(decoded))
    assert everseg("predict", "runs/x", "phone", "-o", "out").code == 0
    assert len(decoded) == 3
    assert inference.MASK_IDS in {p.name for p in (done / "out").iterdir()}


def _counting(decoded: list[str]) -> Callable[[ImageFile.ImageFile], object]:
    load = ImageFile.ImageFile.load

    def counted(self: ImageFile.ImageFile) -> object:
        if self.format == "JPEG" and self.tile:
            decoded.append(str(self.filename))
        return load(self)

    return counted


def test_large_images_are_told_of_and_windows_see_them_in_parts(
    everseg: Everseg, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (done / "wide").mkdir()
    image = np.random.default_rng(0).integers(0, 256, (70, 150, 3), np.uint8)
    Image.fromarray(image).save(done / "wide/a.png")
    monkeypatch.setattr(inference, "LARGE", 70 * 150 - 1)
    code, _, err = everseg("predict", "runs/x", "wide", "-o", "whole")
    assert code == 0, err
    must_say(err, "wide/a.png", "--window", "KiB")
    code, _, err = everseg("predict", "runs/x", "wide", "-o", "parts", "--window", 64)
    assert code == 0, err
    assert "--window" not in err
    model = inference.load(done / "runs/x")
    model.see_through(64)
    with Image.open(done / "parts/a_mask.png") as mask:
        assert (np.asarray(mask) == model.predict(image).ids).all()
    assert model.windows is not None
    assert len(model.windows.starts(150)) > 1
    with pytest.raises(ConfigError, match="63"):
        model.see_through(63)
    monkeypatch.setattr(model, "see", _refuse)
    assert model.memory_of(10**8) is None
    monkeypatch.setattr(inference, "LARGE", 70 * 150)
    code, _, err = everseg("predict", "runs/x", "wide", "-o", "whole")
    assert "--window" not in err


def _refuse(*_: object) -> None:
    raise ValueError("this network takes no image of 128 x 128")
