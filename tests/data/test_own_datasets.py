"""A data set of one's own that breaks the contract of a split is told: which sample, what it gave, what is right."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import everseg
from everseg.config.fields import DataConfig
from everseg.data.datasets import load_dataset
from everseg.errors import ConfigError, DataError
from saying import must_say

SOURCE = """
import hashlib
import numpy as np
from everseg.data.base import Dataset
from everseg.labels import RawLabels


class Squares:
    def __init__(self, name, count):
        self.name, self.count = name, count

    def __len__(self):
        return self.count

    def id(self, i):
        return {id}

    def read_mask(self, i):
        mask = np.zeros((48, 40), np.uint8)
        mask[8:24, 8:24] = 1 + i % 3
        mask[24:40, 16:32] = 1 + (i + 1) % 3
        return {mask}

    def read(self, i):
        mask = self.read_mask(i)
        image = np.stack([np.full((48, 40), 20 + 40 * (i % 3), np.uint8)] * 3, -1)
        return {image}, mask

    def fingerprint(self):
        return hashlib.sha256(f"{self.name}{self.count}{__file__}".encode()).hexdigest()


def build(root=None):
    labels = {labels}
    return Dataset("squares", labels, {splits})
"""
USUAL = {
    "id": 'f"{self.name}-{i}"',
    "mask": "mask",
    "image": "image",
    "labels": 'RawLabels({0: "background", 1: "a", 2: "b", 3: "c"})',
    "splits": '{"train": Squares("train", 12), "val": Squares("val", 6)}',
}


def own(folder: Path, **changes: str) -> str:
    text = SOURCE
    for key, value in {**USUAL, **changes}.items():
        text = text.replace("{" + key + "}", value)
    (folder / "own.py").write_text(text)
    return f"{folder / 'own.py'}:build"


def run(folder: Path, dataset: str, **data: object) -> None:
    everseg.run(
        "demo-mib", quiet=True, name="own", out=str(folder / "runs"), tracker=[], report=False,
        data={"dataset": dataset, "crop": 32, "workers": 0, **data}, scenario={"task": "2-1", "test_split": "val"},
        train={"epochs": 1, "epochs_next": 1, "batch": 4, "threads": 1},
    )  # fmt: skip


@pytest.mark.parametrize("evaluation", ["resize", "crop", "whole"])
@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"mask": "mask.repeat(2, 0).repeat(2, 1)"}, ("40x48", "80x96")),
        ({"image": "image[:, ::-1][:, 1:]"}, ("39x48", "40x48")),
        ({"image": "image.transpose(1, 0, 2)"}, ("48x40", "40x48")),
        ({"image": "image[..., 0]"}, ("(48, 40)", "uint8", "grey")),
        ({"image": "image[..., :1]"}, ("(48, 40, 1)", "grey")),
        ({"image": "image.transpose(2, 0, 1)"}, ("(3, 48, 40)", "last")),
        ({"image": "np.dstack([image, image[..., 0]])"}, ("(48, 40, 4)", "alpha")),
        ({"image": "image.astype(np.float32) / 255"}, ("float32", "0..255")),
        ({"image": "image.astype(np.uint16)"}, ("uint16", "0..255")),
        ({"image": "image.tolist()"}, ("list",)),
    ],
)
def test_an_image_that_does_not_fit_its_mask_names_its_sample(tmp_path, changes, facts, evaluation):
    with pytest.raises(DataError) as caught:
        run(tmp_path, own(tmp_path, **changes), evaluation=evaluation, size=[48, 48])
    must_say(caught.value, *facts)
    assert "train-" in str(caught.value)


@pytest.mark.parametrize(
    ("mask", "facts"),
    [
        ("mask[..., None]", ("(48, 40, 1)", "mask[:, :, 0]")),
        ("np.stack([mask] * 3, -1)", ("(48, 40, 3)",)),
        ("mask.astype(np.int64)", ("int64", "astype")),
        ("mask.astype(np.float32)", ("float32",)),
        ("mask == 1", ("bool",)),
        ("mask.tolist()", ("list",)),
        ("mask[:0]", ("(0, 40)",)),
        ("None", ("NoneType",)),
    ],
)
def test_a_mask_that_is_none_names_its_sample_before_training(tmp_path, mask, facts):
    with pytest.raises(DataError) as caught:
        run(tmp_path, own(tmp_path, mask=mask))
    must_say(caught.value, "train-0", *facts)
    assert not [*(tmp_path / "runs").glob("*/steps")]


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"id": "'one'"}, ("train", "'one'", "12 times")),
        ({"id": "f'{i // 2}'"}, ("val", "'2'", "2 times")),
        ({"id": "i"}, ("train", "int")),
        ({"id": "''"}, ("train", "''")),
        ({"splits": "[Squares('train', 3)]"}, ("splits", "list")),
        ({"splits": "{'train': [1, 2]}"}, ("'train'", "list", "fingerprint")),
        ({"labels": "{0: 'background'}"}, ("RawLabels", "dict")),
        ({"labels": "RawLabels({0: 'a', -1: 'b'})"}, ("-1",)),
        ({"labels": "RawLabels({0: 'a', 255: 'b'})"}, ("255", "void")),
        ({"labels": "RawLabels({1: 'a', 2: 'b'}, background=0)"}, ("background", "0")),
        ({"labels": "RawLabels({'0': 'a'}, background=None)"}, ("'0'",)),
    ],
)
def test_what_is_no_data_set_is_told_when_it_is_opened(tmp_path, changes, facts):
    with pytest.raises(ConfigError) as caught:
        load_dataset(DataConfig(dataset=own(tmp_path, **changes)))
    must_say(caught.value, *facts)


def test_a_data_set_that_keeps_the_contract_trains(tmp_path):
    run(tmp_path, own(tmp_path))
    assert dataclasses.is_dataclass(load_dataset(DataConfig(dataset=own(tmp_path))))
