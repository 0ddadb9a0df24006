"""Class weights: the formula, the counts they are made of, and the published numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import trees

from everseg.config.fields import DataConfig
from everseg.data.base import Dataset
from everseg.data.class_weights import class_weights, dataset_pixels, output_order, published_weights
from everseg.data.datasets import load_dataset
from everseg.data.datasets.street_labels import CITYSCAPES_CLASSES, IDD_CLASSES
from everseg.errors import ConfigError, DataError
from everseg.labels import RawLabels


def by_hand(pixels: list[int], constant: float) -> list[float]:
    """The formula, one class at a time."""
    whole = sum(n + 1 for n in pixels)
    return [1 / math.log(constant + (n + 1) / whole) for n in pixels[:-1]] + [0.0]


@pytest.mark.parametrize("constant", [1.1, 1.2])
@pytest.mark.parametrize("pixels", [[3, 0], [97, 0, 899, 1], [10**12, 5, 0, 10**13]])
def test_the_formula_class_by_class(pixels: list[int], constant: float) -> None:
    weights = class_weights(np.array(pixels), constant)
    assert weights.dtype == np.float64
    np.testing.assert_allclose(weights, by_hand(pixels, constant), rtol=1e-13)


def test_known_weights() -> None:
    # shares with one pixel more each: 4/8, 2/8 and void 2/8; 1/ln(1.6), 1/ln(1.35)
    np.testing.assert_allclose(class_weights(np.array([3, 1, 1])), [2.127643145, 3.3321716, 0], rtol=1e-9)


def test_void_takes_its_share_but_weighs_nothing() -> None:
    without, with_void = class_weights(np.array([50, 50, 0])), class_weights(np.array([50, 50, 900]))
    assert without[-1] == with_void[-1] == 0
    assert (with_void[:2] > without[:2]).all()


def test_an_absent_class_has_a_finite_weight() -> None:
    assert class_weights(np.array([10**9, 0, 0]))[1] == pytest.approx(1 / math.log(1.1), abs=1e-6)


@pytest.mark.parametrize(
    "pixels", [[5], [[1, 2]], [-1, 4], [math.nan, 1], [math.inf, 1]], ids=["one", "2d", "minus", "nan", "inf"]
)
def test_what_cannot_be_counts_is_refused(pixels: list[float]) -> None:
    with pytest.raises(ValueError):
        class_weights(np.array(pixels))


def test_a_constant_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="above 1"):
        class_weights(np.array([1, 1]), 1.0)


def tiny(root: Path, void: str = "[255, 9]") -> Dataset:
    """Two training masks over classes 7, 8 and void 255 and 9."""
    for name, mask in {"a": [[7, 7, 8], [255, 9, 7]], "b": [[7, 8, 8], [9, 9, 9]]}.items():
        trees.save(root / "masks/train" / f"{name}.png", np.array(mask, np.uint8))
        trees.save(root / "images/train" / f"{name}.png", trees.image_of(1, (2, 3)))
    (root / "data.yaml").write_text(
        f"name: tiny\nsplits: [train]\nclasses: {{8: tree, 7: road}}\nbackground: null\nignore: {void}\n"
    )
    return load_dataset(DataConfig(dataset=str(root / "data.yaml")))


def test_pixels_come_in_output_order_with_all_void_last(tmp_path: Path) -> None:
    dataset = tiny(tmp_path)
    assert dataset_pixels(dataset).tolist() == [4, 3, 5]
    with pytest.raises(DataError, match="no split 'val'"):
        dataset_pixels(dataset, "val")


def test_the_counts_are_read_once_and_then_come_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERSEG_CACHE", str(tmp_path / "cache"))
    dataset, seen = tiny(tmp_path), []
    for _ in range(2):
        dataset_pixels(dataset, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_the_background_is_the_first_output() -> None:
    assert output_order(RawLabels({3: "a", 1: "b", 2: "rest"}, background=2)) == (2, 1, 3)
    assert output_order(RawLabels({3: "a", 1: "b"}, background=None)) == (1, 3)


@pytest.mark.parametrize(
    ("name", "classes"),
    [("cityscapes", CITYSCAPES_CLASSES), ("bdd100k", CITYSCAPES_CLASSES), ("idd", IDD_CLASSES)],
)
def test_published_weights_name_every_class_in_order(name: str, classes: tuple[str, ...]) -> None:
    weights = published_weights(name)
    assert tuple(weights) == classes
    assert all(1 / math.log(2.1) < weight < 1 / math.log(1.1) for weight in weights.values())


@pytest.mark.golden
def test_published_weights_are_the_authors_to_the_last_digit(golden: Path) -> None:
    authors = json.loads((golden / "mdil_class_weights.json").read_text())
    for name, key in (("cityscapes", "cityscapes"), ("bdd100k", "BDD"), ("idd", "IDD")):
        assert [*published_weights(name).values(), 0.0] == authors[key]


def test_a_data_set_without_published_weights_is_told_which_have_them() -> None:
    with pytest.raises(ConfigError, match=r"'camvid'.*cityscapes, bdd100k, idd.*computed"):
        published_weights("camvid")
