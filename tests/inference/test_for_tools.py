"""Predictions for labelling tools: what a tool gives back uncorrected is the prediction, to the pixel."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

import everseg
from everseg.config.fields import DataConfig
from everseg.config.loading import from_stored
from everseg.data.base import Dataset
from everseg.data.datasets import load_dataset
from everseg.data.datasets.tool_files import _brush
from everseg.errors import ConfigError, DataError
from everseg.inference.for_tools import brush, writer_of
from everseg.labels import LabelSpace
from saying import must_say

FIXTURES = Path(__file__).parent.parent / "fixtures"
BUNDLE, IMAGES = FIXTURES / "bundle-format-1", FIXTURES / "scenes/images/val"


def opened(root: Path, **description: object) -> Dataset:
    """The data that a description in this folder gives."""
    (root / "data.yaml").write_text(json.dumps(description))
    config: DataConfig = from_stored({}, [f"data={root / 'data.yaml'}"]).data
    return load_dataset(config)


def as_predicted(dataset: Dataset) -> None:
    """Every pixel of the data is the class that the model predicts."""
    model = everseg.load(BUNDLE)
    seen = {}
    for split in dataset.splits.values():
        for place in range(len(split)):
            image, mask = split.read(place)
            seen[Path(split.id(place)).stem] = image
            predicted = np.array(model.classes)[model.predict(image).ids]
            assert (np.vectorize(dataset.labels.names.get)(mask) == predicted).all()
    assert sorted(name.replace("a & b+c#3 100%", "3") for name in seen) == ["0", "1", "2", "3"]


def predict(call: Callable, out: Path, form: str, images: Path = IMAGES) -> dict[str, object]:
    code, told, err = call("predict", BUNDLE, images, "-o", out, "--format", form, "--json")
    assert code == 0, err
    found = json.loads(told)
    assert found["format"] == form
    assert all(Path(path).is_file() for path in found["made"])
    return found


def test_the_zip_for_cvat_comes_back_as_its_export(tmp_path: Path, call: Callable) -> None:
    predict(call, tmp_path / "out", "cvat")
    with zipfile.ZipFile(tmp_path / "out/cvat.zip") as archive:
        archive.extractall(tmp_path / "back")
    # Readers of this form know VOC's colours as numbers of objects, and no others.
    voc = [
        (128, 0, 0),
        (0, 128, 0),
        (128, 128, 0),
        (0, 0, 128),
        (128, 0, 128),
        (0, 128, 128),
        (128, 128, 128),
    ]
    for path in (tmp_path / "back/SegmentationObject").iterdir():
        with (
            Image.open(path) as objects,
            Image.open(path.parent.parent / "SegmentationClass" / path.name) as of,
        ):
            found = {tuple(pixel) for pixel in np.asarray(objects).reshape(-1, 3).tolist()}
            both = np.concatenate([np.asarray(objects), np.asarray(of)], axis=2).reshape(-1, 6)
        assert 1 < len(found - {(0, 0, 0)}) <= len(voc)
        assert found - {(0, 0, 0)} == set(voc[: len(found - {(0, 0, 0)})])
        assert len(np.unique(both, axis=0)) == len(found), "an object is of one class"
    shutil.copytree(IMAGES, tmp_path / "back/JPEGImages")  # CVAT: "save images"
    lists = (tmp_path / "back/ImageSets/Segmentation/default.txt").read_text().split()
    assert sorted(lists) == ["0", "1", "2", "3"]
    as_predicted(
        opened(
            tmp_path / "back", images="JPEGImages", masks="SegmentationClass", labels={"palette": "labelmap.txt"},
            split={"val": 0.5},
        )
    )  # fmt: skip


def test_coco_comes_back(tmp_path: Path, call: Callable) -> None:
    predict(call, tmp_path / "out", "coco")
    shutil.copytree(IMAGES, tmp_path / "out/images")
    stored = json.loads((tmp_path / "out/annotations/instances_default.json").read_text())
    assert {one["file_name"] for one in stored["images"]} == {f"{n}.png" for n in range(4)}
    assert "background" not in {one["name"] for one in stored["categories"]}
    predict(call, tmp_path / "out", "coco")  # what was predicted is replaced
    people = tmp_path / "people/annotations/instances_default.json"
    people.parent.mkdir(parents=True)
    people.write_text('{"info": {"description": ""}, "images": []}')
    code, _, err = call("predict", BUNDLE, IMAGES, "-o", tmp_path / "people", "--format", "coco", "--quiet")
    assert code == 2
    must_say(err, people, "--out")
    assert '"images": []' in people.read_text()
    as_predicted(opened(tmp_path / "out", layout="coco", split={"val": 0.5}))


def test_label_studio_s_tasks_come_back_once_they_are_submitted(tmp_path: Path, call: Callable) -> None:
    given = tmp_path / "given"
    given.mkdir()
    for number in range(4):
        shutil.copy(IMAGES / f"{number}.png", given / f"{number}.png")
    (given / "3.png").rename(given / "a & b+c#3 100%.png")
    predict(call, tmp_path / "out", "labelstudio", given)
    tasks = json.loads((tmp_path / "out/tasks.json").read_text())
    # The tool reads these addresses as a web server does.
    asked = [parse_qs(urlsplit(task["data"]["image"]).query)["d"] for task in tasks]
    assert sorted(asked) == sorted([path.name] for path in given.iterdir())
    config = (tmp_path / "out/label_config.xml").read_text()
    root = tmp_path / "back"
    shutil.copytree(given, root / "images")
    for task in tasks:  # what a person does who finds nothing to correct
        (prediction,) = task.pop("predictions")
        for one in prediction["result"]:
            (name,) = one["value"]["brushlabels"]
            assert f'value="{name}"' in config
        task["annotations"] = [{"result": prediction["result"], "was_cancelled": False}]
    (root / "tasks.json").write_text(json.dumps(tasks))
    as_predicted(opened(root, layout="annotated", split={"val": 0.5}))


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (257, 300)])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_a_brush_is_read_back_to_the_pixel(shape: tuple[int, int], density: float) -> None:
    mask = np.random.default_rng(0).random(shape) < density
    assert (_brush(brush(mask), *shape) == mask).all()


def geotiff(path: Path, image: np.ndarray) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, kind, value in (
        (33550, 12, (0.25, 0.25, 0.0)),
        (33922, 12, (0.0, 0.0, 0.0, 500000.0, 4649776.5, 0.0)),
        (34735, 3, (1, 1, 0, 1, 3072, 0, 1, 32633)),
        (34737, 2, "WGS 84 / UTM zone 33N|"),
    ):
        tags[tag] = value
        tags.tagtype[tag] = kind
    Image.fromarray(image).save(path, tiffinfo=tags)


def test_a_geotiff_lies_where_its_image_lies(tmp_path: Path, call: Callable) -> None:
    with Image.open(IMAGES / "0.png") as picture:
        image = np.asarray(picture.convert("RGB"))
    (tmp_path / "in/north").mkdir(parents=True)
    geotiff(tmp_path / "in/north/a.tif", image)
    code, _, err = call(
        "predict", BUNDLE, tmp_path / "in", "-o", tmp_path / "out", "--format", "geotiff", "--quiet"
    )
    assert code == 0, err
    with Image.open(tmp_path / "out/north/a.tif") as mask, Image.open(tmp_path / "in/north/a.tif") as given:
        assert (np.asarray(mask) == everseg.load(BUNDLE).predict(image).ids).all()
        for tag in (33550, 33922, 34735, 34737):
            assert mask.tag_v2[tag] == given.tag_v2[tag]
            assert mask.tag_v2.tagtype[tag] == given.tag_v2.tagtype[tag]
    before = (tmp_path / "in/north/a.tif").read_bytes()
    for images, out in (("in", "in"), ("in/north/a.tif", "in/north")):
        code, _, err = call("predict", BUNDLE, tmp_path / images, "-o", tmp_path / out, "--format", "geotiff")
        assert code == 2, (images, out)
        must_say(err, "overwrite", "a.tif")
        assert (tmp_path / "in/north/a.tif").read_bytes() == before
    names = json.loads((tmp_path / "out/classes.json").read_text())
    assert tuple(names.values()) == everseg.load(BUNDLE).classes
    code, _, err = call("predict", BUNDLE, IMAGES, "-o", tmp_path / "none", "--format", "geotiff")
    assert code == 3
    must_say(err, "geotiff", 4, "0.png")
    assert not (tmp_path / "none").exists()


def test_what_a_form_cannot_hold_is_told_before_anything_is_predicted(tmp_path: Path) -> None:
    space = LabelSpace(((0, 1),), ("background", "a:b"), background=0)
    with pytest.raises(ConfigError, match="a:b"):
        writer_of("cvat", tmp_path / "o", [space], [])
    many = LabelSpace((tuple(range(300)),), tuple(f"c{n}" for n in range(300)), background=0)
    with pytest.raises(ConfigError, match=r"299.*coco"):
        writer_of("cvat", tmp_path / "o", [many], [])
    with pytest.raises(ConfigError, match=r"xml.*cvat"):
        writer_of("xml", tmp_path / "o", [space], [])
    with pytest.raises(DataError, match=r"x\.tif"):
        writer_of("geotiff", tmp_path / "o", [space], [(tmp_path / "x.tif", Path("x"))])
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_background_has_no_black_class(tmp_path: Path) -> None:
    space = LabelSpace(((0, 1),), ("road", "sky"), background=None)
    writer = writer_of("cvat", tmp_path, [space], [])
    writer.add("a.png", np.array([[0, 1]], np.uint8), space.names, tmp_path)
    writer.finish()
    with zipfile.ZipFile(tmp_path / "cvat.zip") as archive, archive.open("SegmentationClass/a.png") as file:
        picture = np.asarray(Image.open(file))
        lines = archive.read("labelmap.txt").decode().splitlines()
    assert (picture.reshape(-1, 3) != 0).any(1).all()
    assert lines[2] == f"road:{','.join(map(str, picture[0, 0]))}::"
