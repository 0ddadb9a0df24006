"""A small deployed model, and a folder of images that labels a class it does not know."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import toy
from PIL import Image

import everseg
from everseg.deploy.export import export

CLASSES = ["background", "forklift", "red", "crate"]


def write_data(root: Path, *, old: bool) -> Path:
    """The toy's pictures as files: blue is a forklift, red keeps its label where `old`; the rest is background."""
    table = np.array([0, 2 if old else 0, 0, 1], np.uint8)
    for split, count in (("train", 12), ("val", 6)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        source = toy.build().splits[split]
        for index in range(count):
            image, mask = source.read(index)
            Image.fromarray(image).save(root / "images" / split / f"{index}.png")
            Image.fromarray(table[mask]).save(root / "masks" / split / f"{index}.png")
    (root / "data.yaml").write_text(f"name: {root.name}\nclasses: [{', '.join(CLASSES)}]\n")
    return root / "data.yaml"


@pytest.fixture(scope="session")
def deployed(tmp_path_factory) -> Path:
    """A bundle that knows red and green."""
    out = tmp_path_factory.mktemp("deployed")
    config = toy.settings(out, scenario={"task": [["red", "green"]]}, train={"epochs": 25, "epochs_next": 2})
    return export(everseg.run(config, quiet=True).path, out / "bundle", onnx=False).path


@pytest.fixture(scope="session")
def new_data(tmp_path_factory) -> Path:
    """A data.yaml that labels forklifts only."""
    return write_data(tmp_path_factory.mktemp("data") / "site", old=False)


@pytest.fixture(scope="session")
def old_data(tmp_path_factory) -> Path:
    """A data.yaml that labels forklifts and red."""
    return write_data(tmp_path_factory.mktemp("data") / "plant", old=True)
