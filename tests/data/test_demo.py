"""The generated scenes: the same everywhere, and with what class-incremental learning needs in them."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from everseg.config.fields import DataConfig
from everseg.data.batches.index import class_counts
from everseg.data.datasets import load_dataset
from everseg.data.datasets.relabel import Relabelled
from everseg.data.demo import build
from everseg.data.demo import scenes as demo_scenes
from everseg.errors import ConfigError

OLD, NEW = (1, 2, 3, 4), (5, 6)


@pytest.fixture(scope="module")
def masks() -> np.ndarray:
    split = build(num_train=200).splits["train"]
    return np.stack([split.read_mask(i) for i in range(len(split))])


def test_demo_is_the_default_data_set_and_needs_no_root() -> None:
    data = load_dataset(DataConfig())
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 400, "val": 100}
    assert data.labels.background == 0
    assert data.labels.classes == OLD + NEW
    image, mask = data.splits["val"].read(0)
    assert image.shape == (64, 96, 3)
    assert mask.shape == (64, 96)
    assert image.dtype == mask.dtype == np.uint8


def test_scene_depends_on_seed_split_and_index_only() -> None:
    few = build(num_train=3, num_val=3, size=(48, 64))
    many = build(num_train=9, num_val=3, size=(48, 64))
    for index in (2, 0):
        for a, b in zip(few.splits["train"].read(index), many.splits["train"].read(index), strict=True):
            np.testing.assert_array_equal(a, b)
    first = few.splits["train"].read(0)[0]
    others = [
        few.splits["train"].read(1)[0],
        few.splits["val"].read(0)[0],
        build(num_train=1, size=(48, 64), seed=1).splits["train"].read(0)[0],
    ]
    assert all(not np.array_equal(first, other) for other in others)


def test_scenes_are_equal_in_another_process() -> None:
    code = "from everseg.data.demo import build; print(build(num_train=4).splits['train'].fingerprint())"
    text = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src"), "PYTHONHASHSEED": "5"},
    ).stdout.strip()
    assert text == build(num_train=4).splits["train"].fingerprint()
    assert text != build(num_train=5).splits["train"].fingerprint()


def test_scenes_are_made_once_and_cannot_be_changed() -> None:
    split = build(num_train=2).splits["train"]
    image, mask = split.read(0)
    assert split.read(0)[0] is image
    assert split.read_mask(0) is mask
    with pytest.raises(ValueError, match="read-only"):
        mask[0, 0] = 1
    copy = pickle.loads(pickle.dumps(split))
    np.testing.assert_array_equal(copy.read(0)[0], image)
    assert len(pickle.dumps(split)) < 1000


def test_every_class_is_frequent_enough_to_be_learnt(masks: np.ndarray) -> None:
    assert set(np.unique(masks).tolist()) == set(range(7))
    for raw in OLD + NEW:
        assert (masks == raw).any((1, 2)).mean() > 0.5, raw
        assert (masks == raw).mean() > 0.02, raw
    assert 0.3 < (masks == 0).mean() < 0.6


def test_new_classes_stand_together_with_old_ones(masks: np.ndarray) -> None:
    has = np.stack([(masks == raw).any((1, 2)) for raw in range(7)], axis=1)
    new = has[:, NEW].any(1)
    assert new.mean() > 0.6
    assert (~new).mean() > 0.02  # and some scenes have only old ones: a disjoint first step is not empty
    assert (has[new][:, OLD].sum(1) >= 2).mean() > 0.95


def test_light_varies_and_objects_hide_each_other() -> None:
    split = build(num_train=60).splits["train"]
    pairs = [split.read(i) for i in range(60)]
    road = np.array([image[mask == 1].mean() for image, mask in pairs])
    assert road.std() > 8
    touching = {
        (int(a), int(b))
        for _, mask in pairs
        for a, b in np.unique(np.stack([mask[:, :-1].ravel(), mask[:, 1:].ravel()], 1), axis=0)
    }
    assert {(5, 4), (5, 2), (3, 2), (6, 3)} <= touching


def test_image_edges_lie_where_the_mask_changes() -> None:
    split = build(num_train=30).splits["train"]
    at_edges, elsewhere = [], []
    for i in range(30):
        image, mask = split.read(i)
        step = np.abs(np.diff(image.astype(int), axis=1)).sum(2)
        edge = mask[:, 1:] != mask[:, :-1]
        at_edges.append(step[edge].mean())
        elsewhere.append(step[~edge].mean())
    assert np.mean(at_edges) > 2.5 * np.mean(elsewhere)


def test_dusk_shows_other_scenes_darker_bluer_and_grainier_with_the_same_classes() -> None:
    day, dusk = build(num_train=60), build(num_train=60, light="dusk")
    again = build(num_train=60, light="dusk")
    assert dusk.labels == day.labels
    splits = [data.splits["train"] for data in (day, dusk, again)]
    np.testing.assert_array_equal(splits[1].read(5)[0], splits[2].read(5)[0])
    assert splits[0].fingerprint() != splits[1].fingerprint() == splits[2].fingerprint()
    images, masks = (
        np.stack([[split.read(i)[k] for i in range(60)] for split in splits[:2]]) for k in (0, 1)
    )
    images = images.astype(float)
    brightness = images.mean(axis=(1, 2, 3, 4))
    assert brightness[1] < 0.6 * brightness[0]
    blue = images[..., 2].mean(axis=(1, 2, 3)) / images[..., 0].mean(axis=(1, 2, 3))
    assert blue[1] > 1.4 * blue[0]
    between = np.abs(np.diff(images[..., 0] - images[..., 2], axis=3))  # by day the noise is grey
    grain = np.median(between, axis=(1, 2, 3))
    assert grain[0] < 2 < 5 < grain[1]
    assert set(np.unique(masks[1])) == set(range(7))


def test_wrong_options_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        build(size=[64], num_train=0, num_val=2.5, seed=-1, light="night")
    for key in ("size", "num_train", "num_val", "seed", "light"):
        assert f"data.options.{key}" in str(caught.value)
    with pytest.raises(ConfigError, match="size"):
        build(size=64)
    with pytest.raises(IndexError):
        build(num_train=1).splits["train"].id(1)


def test_the_class_index_is_found_again_without_drawing_a_scene(tmp_path, monkeypatch):
    def counts(**options):
        made = build(num_train=4, num_val=1, size=(32, 48), **options)
        return class_counts(made.splits["train"], made.labels, cache_dir=tmp_path)

    first = counts()
    other = counts(seed=1)
    assert not np.array_equal(first, other)
    with monkeypatch.context() as patch:
        patch.setattr(demo_scenes, "scene", lambda *_, **__: pytest.fail("a scene was drawn"))
        np.testing.assert_array_equal(counts(), first)
        np.testing.assert_array_equal(counts(seed=1), other)
    dusk = counts(light="dusk")  # a key of its own, though the masks are alike
    assert dusk.shape == first.shape
    split = build(num_train=4, num_val=1, size=(32, 48)).splits["train"]
    assert split.index_key() != Relabelled(split, np.arange(256, dtype=np.uint8)).index_key()
    before = split.index_key()
    monkeypatch.setattr(np, "__version__", "another")
    assert split.index_key() != before
