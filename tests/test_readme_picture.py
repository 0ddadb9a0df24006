"""The pictures of the pages: their scripts still make them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import loading

from everseg.config import presets

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 150_000
"""Bytes of the picture at the top of README.md."""


@pytest.mark.slow
def test_the_picture_of_the_readme_is_what_its_script_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "load_preset", loading(presets.load_preset))
    spec = importlib.util.spec_from_file_location("readme_picture", ROOT / "scripts/pictures/readme.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    names, shown = script.columns(tmp_path)
    assert names == ["background", "road", "building", "tree", "car", "person", "sign"]
    assert [len(pictures) for _, _, pictures in shown] == [script.SCENES] * 6
    labels = shown[1][2][0].reshape(-1, 3)
    assert {tuple(c) for c in labels.tolist()} == {
        tuple(c) for c in script.palette(7, background=0).tolist()
    }, "all classes"

    stored = Image.open(script.PICTURE)
    assert script.PICTURE.stat().st_size < LIMIT
    made = script.draw(names, shown, new=2)
    assert stored.size == made.size
    tall = script.HEAD + script.SCENES * (script.SCALE * shown[0][2][0].shape[0] + script.GAP)
    columns = slice(0, script.MARGIN + 2 * (script.SCALE * shown[0][2][0].shape[1] + script.GAP))
    scenes = [np.asarray(one.convert("RGB"))[script.HEAD : tall, columns] for one in (stored, made)]
    assert np.array_equal(*scenes), "other scenes or labels: run the script again"
