"""How a model sees an image: the same from a configuration, a model folder, a bundle's and an ONNX file's metadata."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import everseg
from everseg.config.fields import DataConfig
from everseg.data.base import Dataset
from everseg.data.datasets.decode import Reading
from everseg.data.datasets.folder import build as folder_data
from everseg.data.datasets.relabel import relabelled
from everseg.data.demo import build as demo
from everseg.deploy.bundle import Contents, open_bundle, write_bundle
from everseg.errors import DataError
from everseg.inference.predict import LoadedModel
from everseg.labels import LabelSpace
from everseg.models.build import deeplabv3_tiny
from everseg.runs.input_form import InputForm, Windows

FORMS = {
    "crop": DataConfig(evaluation="crop", crop=40),
    "whole": DataConfig(evaluation="whole", normalisation="unit"),
    "resize": DataConfig(evaluation="resize", size=(48, 64)),
    "sliding": DataConfig(evaluation="sliding", crop=40),
    "sliding, own window": DataConfig(evaluation="sliding", crop=40, window=24, overlap=0.25),
}


@pytest.mark.parametrize("kind", FORMS)
def test_every_way_gives_the_same_form(tmp_path: Path, kind: str) -> None:
    """Configuration -> form -> bundle -> classes.json, preprocessing.json, loaded model."""
    form = InputForm.of_config(FORMS[kind])
    model = deeplabv3_tiny(widths=[8, 8, 8, 8])
    model.grow({"default": 2})
    spaces = {"default": LabelSpace(((0, 1),), ("background", "a"))}
    made = write_bundle(tmp_path / "b", Contents(model.eval(), spaces, form=form), onnx=False)
    beside = json.loads((made.path / "preprocessing.json").read_text())
    found = [
        open_bundle(made.path).about.form,
        everseg.load(made.path).form,
        InputForm.of_preprocessing(beside),
    ]
    assert found == [form] * 3


def test_what_each_kind_means() -> None:
    forms = {kind: InputForm.of_config(data) for kind, data in FORMS.items()}
    assert {kind: form.resized_to for kind, form in forms.items() if form.resized_to} == {"resize": (48, 64)}
    assert {kind: form.windows() for kind, form in forms.items() if form.windows()} == {
        "sliding": Windows(40, 1 / 3), "sliding, own window": Windows(24, 0.25),
    }  # fmt: skip
    assert forms["sliding"].windows(7) == Windows(40, 1 / 3, 7)
    assert forms["resize"].preprocessing()["size"] == [48, 64]
    assert forms["crop"].preprocessing()["size"] is forms["crop"].preprocessing()["windows"] is None
    assert forms["whole"].preprocessing()["std"] == [1.0, 1.0, 1.0]
    assert forms["crop"].preprocessing()["mean"][0] == 0.485
    assert InputForm().settings() == {"normalisation": "imagenet"}, "an imported model says no more"
    assert forms["sliding"].settings() == {
        "size": (512, 1024),
        "evaluation": "sliding",
        "normalisation": "imagenet",
    }


@given(
    st.builds(
        InputForm,
        st.sampled_from([None, "crop", "whole"]),
        st.none() | st.tuples(st.integers(1, 65536), st.integers(1, 65536)),
        st.sampled_from(["imagenet", "unit"]),
        bit_depth=st.sampled_from([8, 16]),
        exif=st.sampled_from(["apply", "ignore"]),
    )
    | st.builds(
        InputForm, st.just("sliding"), window=st.integers(1, 65536), overlap=st.floats(0, 0.99)
    )
)  # fmt: skip
def test_any_form_reads_back_equal(form: InputForm) -> None:
    assert InputForm.of_json(json.loads(json.dumps(form.to_json()))) == (form, [])
    assert InputForm.of_preprocessing(json.loads(json.dumps(form.preprocessing()))) == form


@pytest.mark.parametrize(
    "stored", [{}, {"form": 3}, {"form": {"evaluation": "resize"}}, {"form": {"bit_depth": 12}}]
)
def test_a_foreign_preprocessing_is_refused(stored: dict) -> None:
    with pytest.raises(ValueError, match=r"form|size|bit_depth"):
        InputForm.of_preprocessing(stored)


# ---------------------------------------------------------------- files


def deep(folder: Path, more: str = "") -> Dataset:
    """Images of 16 bits with masks, described by a data.yaml."""
    rng = np.random.RandomState(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for name in ("a", "b"):
            values = rng.randint(0, 65536, (40, 48)).astype(np.uint16)
            Image.fromarray(values).save(folder / f"images/{split}/{name}.png")
            mask = rng.randint(0, 2, (40, 48)).astype(np.uint8)
            Image.fromarray(mask).save(folder / f"masks/{split}/{name}.png")
    (folder / "data.yaml").write_text(f"classes: [background, a]\n{more}")
    return folder_data(None, descriptor=str(folder / "data.yaml"))


def test_how_files_are_read_is_known_to_the_data_only(tmp_path: Path) -> None:
    plain = InputForm.of_config(DataConfig(), [demo(size=(40, 48), num_train=2, num_val=1)])
    assert plain.reading == Reading(follow_links=True)
    data = deep(tmp_path / "deep", "bit_depth: 16\nexif: ignore\n")
    for seen in (data, relabelled(data, {"a": "b"})):
        form = InputForm.of_config(DataConfig(), [seen])
        assert (form.bit_depth, form.exif) == (16, "ignore")
    tiled = deep(tmp_path / "tiled", "bit_depth: 16\ntiles: {size: 16}\n")
    assert InputForm.of_config(DataConfig(), [tiled]).bit_depth == 16
    other = deep(tmp_path / "other", "bit_depth: 16\n")
    both = InputForm.of_config(DataConfig(), [data, other])
    assert (both.bit_depth, both.exif) == (16, "apply"), "turned unless all data say not to"


def test_a_model_of_16_bits_predicts_files_of_16_bits(tmp_path: Path) -> None:
    """By its higher byte, as in training; a model of 8 bits refuses such a file."""
    deep(tmp_path / "data", "bit_depth: 16\n")
    settings = {
        "name": "deep", "out": str(tmp_path), "tracker": [], "report": False,
        "data": {"dataset": str(tmp_path / "data/data.yaml"), "crop": 32, "workers": 0},
        "scenario": {"task": "offline"},
        "model": {"name": "deeplabv3-tiny", "options": {"widths": [8, 8, 8, 8], "hidden": 8}},
        "train": {"batch": 2, "max_iterations": 1, "threads": 1},
    }  # fmt: skip
    run = everseg.run(settings, quiet=True)
    model, picture = everseg.load(run.path), tmp_path / "data/images/val/a.png"
    assert model.form.bit_depth == 16
    higher = (np.asarray(Image.open(picture)) >> 8).astype(np.uint8)
    np.testing.assert_array_equal(model.predict(picture).ids, model.predict(higher).ids)
    assert everseg.load(run.export(tmp_path / "b", onnx=False).path).form == model.form
    with pytest.raises(DataError, match="8 bits"):
        LoadedModel(model.model, model.spaces).predict(picture)
