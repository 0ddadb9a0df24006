"""Class weights of a scenario's steps."""

from __future__ import annotations

import math

import numpy as np
import pytest

from everseg.config.fields import ScenarioConfig, StepConfig
from everseg.data.base import Dataset
from everseg.data.class_weights import published_weights
from everseg.errors import ConfigError
from everseg.labels import RawLabels
from everseg.scenarios import class_incremental, weighted
from everseg.scenarios.class_incremental import build as build_classes
from everseg.scenarios.domain_incremental import build

LABELS = RawLabels({3: "road", 5: "sky"}, background=None, void=(255,))


@pytest.fixture
def counts():
    """Two images: road 30, sky 10, void 7; and road 2, void 1. The third is not in the training split."""
    table = np.zeros((2, 256), np.int64)
    table[0, [3, 5, 255]] = 30, 10, 7
    table[1, [3, 255]] = 2, 1
    return {"day/train": table, "day/val": table[:1], "dusk/train": table[:1], "dusk/val": table[:1]}


@pytest.fixture
def data():
    return {"day": Dataset("street", LABELS, {}), "dusk": Dataset("street", LABELS, {})}


def weight(pixels, total):
    return 1 / math.log(1.1 + pixels / total)


@pytest.mark.parametrize("void_channel", [False, True])
def test_computed_weights_are_the_formula_over_the_domains_pixels(data, counts, void_channel):
    config = ScenarioConfig(kind="domain-incremental", class_weights="computed", void_channel=void_channel)
    first, second = build(config, data, counts, seed=0)
    void = (0.0,) if void_channel else ()
    # every count is one higher: road 33, sky 11, void 9
    assert first.class_weights["day"] == pytest.approx((weight(33, 53), weight(11, 53), *void))
    assert second.class_weights["dusk"] == pytest.approx((weight(31, 50), weight(11, 50), *void))
    assert list(second.class_weights) == ["dusk"]  # only what is trained


def test_computed_weights_of_a_growing_path_are_those_of_the_steps_labels(data, counts):
    steps = [StepConfig(domain="day", classes=["road"]), StepConfig(domain="day", add=["sky"])]
    config = ScenarioConfig(kind="domain-incremental", class_weights="computed", steps=steps)
    first, second = build(config, data, counts, seed=0)
    # background, road; step 0: background is the 10 sky pixels
    assert first.class_weights["day"] == pytest.approx((weight(11, 53), weight(33, 53)))
    # step 1: the image with sky alone; background is its 30 road pixels, road is no label
    assert second.class_weights["day"] == pytest.approx((weight(31, 51), weight(1, 51), weight(11, 51)))


def test_multi_task_weights_are_per_path(data, counts):
    config = ScenarioConfig(kind="domain-incremental", class_weights="computed", joint=True)
    (step,) = build(config, data, counts, seed=0)
    apart = build(config.model_copy(update={"joint": False}), data, counts, seed=0)
    assert dict(step.class_weights) == {**apart[0].class_weights, **apart[1].class_weights}


def test_images_held_out_for_validation_do_not_count(data, counts):
    full = np.tile(counts["day/train"], (5, 1))
    counts["day/train"] = counts["dusk/train"] = full
    config = ScenarioConfig(kind="domain-incremental", class_weights="computed", validation="cross")
    for step in build(config, data, counts, seed=0):
        pixels = full[list(step.train[0].indices)].sum(axis=0)[[3, 5, 255]] + 1
        expected = [weight(n, pixels.sum()) for n in pixels[:2]]
        assert step.class_weights[step.branch] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["cityscapes", "bdd100k", "idd"])
def test_published_weights_are_matched_by_class_name(name, counts):
    table = published_weights(name)
    names = dict(enumerate(reversed(table)))
    data = {"day": Dataset(name, RawLabels(names, background=None), {})}
    config = ScenarioConfig(kind="domain-incremental", class_weights="published", void_channel=True)
    (step,) = build(config, data, counts, seed=0)
    assert step.class_weights["day"] == (*(table[n] for n in names.values()), 0.0)


def test_published_weights_that_do_not_exist_are_told(data, counts):
    config = ScenarioConfig(kind="domain-incremental", class_weights="published")
    with pytest.raises(ConfigError, match=r"published.*'street'"):
        build(config, data, counts, seed=0)
    renamed = {"day": Dataset("idd", RawLabels({0: "road", 1: "rikscha"}, background=None), {})}
    with pytest.raises(ConfigError, match=r"'rikscha'.*published.*'idd'"):
        build(config, renamed, counts, seed=0)


def test_published_weights_of_two_data_sets_on_one_path_must_agree(counts):
    labels = RawLabels({3: "road", 5: "sky"}, background=None)
    data = {"day": Dataset("cityscapes", labels, {}), "dusk": Dataset("idd", labels, {})}
    steps = [StepConfig(domain="day", branch="all"), StepConfig(domain="dusk", branch="all")]
    config = ScenarioConfig(kind="domain-incremental", class_weights="published", steps=steps)
    one, two = build(config, data, counts, seed=0)  # one after the other each has its own
    assert one.class_weights["all"] == tuple(published_weights("cityscapes")[n] for n in ("road", "sky"))
    assert two.class_weights["all"] == tuple(published_weights("idd")[n] for n in ("road", "sky"))
    with pytest.raises(ConfigError, match=r"'road' differ.*'all'"):
        build(config.model_copy(update={"joint": True}), data, counts, seed=0)


def test_class_incremental_scenarios_can_be_weighted_too(data, counts):
    split = {"train": counts["day/train"], "val": counts["day/val"]}
    config = ScenarioConfig(task=[["road"], ["sky"]], class_weights="computed")
    first, second = build_classes(config, data["day"], split, seed=0)
    assert first.class_weights["default"] == pytest.approx((weight(11, 53), weight(33, 53)))
    assert len(second.class_weights["default"]) == 3
    plain = class_incremental(data["day"], ((3,), (5,)), split)
    assert weighted(plain, "none", {}, {}) == plain
