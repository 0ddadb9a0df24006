"""Images, labels and label spaces of class-incremental steps."""

from __future__ import annotations

import numpy as np
import pytest

from everseg.config.fields import ScenarioConfig
from everseg.data.base import Dataset
from everseg.errors import ConfigError, DataError
from everseg.labels import SYNTHETIC_BACKGROUND, LabelPolicy, PolicySet, RawLabels
from everseg.scenarios import class_incremental
from everseg.scenarios.class_incremental import build
from saying import must_say


def train(steps):
    return [step.train[0].indices for step in steps]


TWELVE = Dataset("twelve", RawLabels({i: f"class {i}" if i else "background" for i in range(13)}), {})
FOURS = ((1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12))


def test_each_protocol_selects_by_its_rule(dataset, groups, counts):
    expected = {
        "overlapped": [(0, 1, 4, 7), (1, 2, 5), (5, 6, 7)],
        "disjoint": [(0, 4), (1, 2), (5, 6, 7)],
        "sequential": [(0, 4), (1, 2), (5, 6, 7)],
    }
    for protocol, lists in expected.items():
        assert train(class_incremental(dataset, groups, counts, protocol=protocol)) == lists


def test_test_images_are_those_with_a_class_seen_and_label_all_of_them(dataset, groups, counts):
    steps = class_incremental(dataset, groups, counts, policy="mib-voc")
    assert [step.test[0].indices for step in steps] == [(0, 4), (0, 3, 4), (0, 1, 3, 4)]
    tables = [list(step.test[0].lut[:5]) for step in steps]
    assert tables == [[0, 1, 2, 255, 255], [0, 1, 2, 3, 255], [0, 1, 2, 3, 4]]


def test_only_classes_taught_now_are_labelled_except_in_sequential(dataset, groups, counts):
    overlapped = class_incremental(dataset, groups, counts)
    assert [list(s.train[0].lut[:5]) for s in overlapped] == [
        [0, 1, 2, 0, 0],
        [0, 0, 0, 3, 0],
        [0, 0, 0, 0, 4],
    ]
    sequential = class_incremental(dataset, groups, counts, protocol="sequential")
    assert [list(s.train[0].lut[:5]) for s in sequential] == [
        [0, 1, 2, 0, 0],
        [0, 1, 2, 3, 0],
        [0, 1, 2, 3, 4],
    ]


def test_steps_grow_one_space_with_the_background_first(dataset, groups, counts):
    steps = class_incremental(dataset, ((3, 1), (4,), (2,)), counts, branch="farm")
    assert [step.spaces["farm"].order for step in steps] == [(0, 3, 1), (0, 3, 1, 4), (0, 3, 1, 4, 2)]
    assert steps[-1].spaces["farm"].groups == ((0, 3, 1), (4,), (2,))
    assert steps[-1].spaces["farm"].names == ("background", "dog", "cat", "sheep", "cow")
    assert [step.grows["farm"] for step in steps] == [3, 1, 1]
    assert [step.num_old("farm") for step in steps] == [0, 3, 4]
    assert [step.index for step in steps] == [0, 1, 2]


def test_a_class_in_no_step_counts_as_foreign_in_disjoint_and_as_future_in_labels(dataset, counts):
    steps = class_incremental(dataset, ((1, 2), (3,)), counts, protocol="disjoint", policy="mib-voc")
    assert train(steps) == [(0, 4), (1, 2)]
    assert steps[1].test[0].lut[4] == 255


def test_data_without_background_get_a_synthetic_one_and_their_own_void(counts):
    names = {i: f"class {i}" for i in range(4)}
    camvid = Dataset("roads", RawLabels(names, background=None, void=(11,)), {})
    table = np.zeros((4, 256), int)
    table[0, [0, 11]] = table[1, [1, 0]] = table[2, [2, 1, 11]] = table[3, [3, 2]] = 5
    steps = class_incremental(camvid, ((0, 1), (2, 3)), {"train": table, "val": table}, protocol="disjoint")
    assert train(steps) == [(0, 1), (2, 3)]
    assert steps[0].spaces["default"].order == (SYNTHETIC_BACKGROUND, 0, 1)
    assert steps[0].spaces["default"].names[0] == "background"
    assert list(steps[1].train[0].lut[:4]) == [0, 0, 3, 4]
    assert steps[1].train[0].lut[11] == 255


def test_void_other_than_255_is_void_and_255_is_not_then():
    labels = RawLabels({0: "background", 1: "a", 2: "b"}, void=(11,))
    table = np.zeros((3, 256), int)
    table[0, [0, 1, 11]] = table[1, [0, 1, 255]] = table[2, 2] = 1
    steps = class_incremental(
        Dataset("d", labels, {}), ((1,), (2,)), {"train": table, "val": table}, protocol="disjoint"
    )
    assert train(steps) == [(0,), (2,)]


def test_disjoint_is_within_overlapped_and_its_steps_share_no_image(random_counts):
    data = {"train": random_counts, "val": random_counts}
    overlapped = class_incremental(TWELVE, FOURS, data, strict=False)
    disjoint = class_incremental(TWELVE, FOURS, data, protocol="disjoint", strict=False)
    assert any(len(a) < len(b) for a, b in zip(train(disjoint), train(overlapped), strict=True))
    for small, large in zip(train(disjoint), train(overlapped), strict=True):
        assert set(small) <= set(large)
        assert list(large) == sorted(large)
    together = [i for one in train(disjoint) for i in one]
    assert len(together) == len(set(together))


def test_partitioned_gives_every_image_with_a_class_to_one_of_its_classes(random_counts):
    data = {"train": random_counts, "val": random_counts}
    steps = class_incremental(TWELVE, FOURS, data, protocol="partitioned", seed=5, strict=False)
    again = class_incremental(TWELVE, FOURS, data, protocol="partitioned", seed=5, strict=False)
    other = class_incremental(TWELVE, FOURS, data, protocol="partitioned", seed=6, strict=False)
    assert train(steps) == train(again)
    assert train(steps) != train(other)
    with_class = np.flatnonzero((random_counts[:, 1:13] > 0).any(axis=1)).tolist()
    assert 0 < len(with_class) < 60
    assert sorted(i for one in train(steps) for i in one) == with_class
    for step, group in zip(steps, FOURS, strict=True):
        assert (random_counts[list(step.train[0].indices)][:, group] > 0).any(axis=1).all()


def test_partitioned_draws_uniformly_among_the_classes_of_an_image():
    labels = RawLabels({0: "background", 1: "a", 2: "b", 3: "c"})
    table = np.ones((30000, 256), int)
    steps = class_incremental(
        Dataset("d", labels, {}),
        ((1, 2), (3,)),
        {"train": table, "val": table},
        protocol="partitioned",
        seed=0,
    )
    # Two of three classes belong to the first step; 5 standard deviations of a binomial are 408.
    assert abs(len(steps[0].train[0].indices) - 20000) < 408


def test_a_policy_of_ones_own_is_used(dataset, groups, counts):
    way = LabelPolicy(void=7, background=9, old=11, future=13)
    steps = class_incremental(dataset, groups, counts, policy=PolicySet(way, way, way))
    assert list(steps[1].train[0].lut[:5]) == [9, 11, 11, 3, 13]
    assert steps[1].train[0].lut[255] == 7


def test_validation_takes_the_val_split_with_its_own_labels(dataset, groups, counts):
    data = {**counts, "test": counts["val"][:4]}
    steps = class_incremental(
        dataset, groups, data, policy="mib-voc", test_split="test", validation="split", strict=False
    )
    assert [step.val[0].split for step in steps] == ["val"] * 3
    assert [step.val[0].indices for step in steps] == [(0, 4), (3, 4), (1,)]
    assert list(steps[1].val[0].lut[:5]) == [0, 255, 255, 3, 255]
    assert steps[1].test[0].split == "test"
    same = class_incremental(dataset, groups, counts, validation="split")
    assert same[1].val[0].split == same[1].test[0].split == "val"
    assert class_incremental(dataset, groups, counts)[0].val == ()


def test_validation_on_the_training_images_uses_them_as_they_are(dataset, groups, counts):
    steps = class_incremental(dataset, groups, counts, validation="train")
    assert all(step.val == step.train for step in steps)


def test_cross_validation_splits_80_to_20_with_training_labels(random_counts):
    data = {"train": random_counts, "val": random_counts}
    whole = class_incremental(TWELVE, FOURS, data)
    steps = class_incremental(TWELVE, FOURS, data, validation="cross", seed=1)
    again = class_incremental(TWELVE, FOURS, data, validation="cross", seed=1)
    other = class_incremental(TWELVE, FOURS, data, validation="cross", seed=2)
    assert steps == again
    assert train(steps) != train(other)
    for step, full in zip(steps, whole, strict=True):
        kept, held = step.train[0], step.val[0]
        assert len(kept.indices) == int(0.8 * len(full.train[0].indices))
        assert sorted(kept.indices + held.indices) == list(full.train[0].indices)
        assert held.lut == kept.lut == full.train[0].lut
        assert held.split == "train"
        assert step.test == full.test


def test_lists_replace_the_rule_and_keep_their_order(dataset, groups, counts):
    steps = class_incremental(dataset, groups, counts, lists=[np.array([4, 0]), [5, 1], (6,)])
    assert train(steps) == [(4, 0), (5, 1), (6,)]
    with pytest.raises(ConfigError, match="2 image lists for 3 steps"):
        class_incremental(dataset, groups, counts, lists=[[0], [1]])
    with pytest.raises(DataError, match=r"step 1: position 8.*step 2: image 6.* 2"):
        class_incremental(dataset, groups, counts, lists=[[0], [8], [6, 6]])


def test_a_disjoint_step_without_images_is_refused_with_the_way_out(dataset, counts):
    with pytest.raises(DataError) as caught:
        class_incremental(dataset, ((4,), (1, 2, 3)), {**counts, "train": counts["train"][[5, 7, 0, 2, 4]]},
                          protocol="disjoint")  # fmt: skip
    text = str(caught.value)
    must_say(text, "step 0 (sheep)", "no image", "'train'")
    assert "scenario.protocol=overlapped" in text
    assert "step 1" not in text


def test_all_classes_without_an_image_are_named_at_once(dataset, groups, counts):
    counts["train"][:, [2, 4]] = 0
    with pytest.raises(DataError) as caught:
        class_incremental(dataset, groups, counts)
    text = str(caught.value)
    assert "step 0 (cat, cow)" in text
    assert "'train' has cow" in text
    must_say(text, "step 2 (sheep)", "no image", "'train'")
    assert "'train' has sheep" in text
    assert "everseg data check" in text


def test_a_class_that_only_other_steps_images_have_is_named(dataset, groups, counts):
    counts["train"][4, 3] = 1
    with pytest.raises(DataError, match=r"step 0 .* has cow.*overlapped"):
        class_incremental(dataset, groups, counts, protocol="disjoint")
    with pytest.raises(DataError, match=r"has cow.*scenario\.lists"):
        class_incremental(dataset, groups, counts, lists=[[0], [1], [6]])


def test_a_step_without_test_images_is_refused(dataset, groups, counts):
    with pytest.raises(DataError, match=r"step 0 .*'val'.*taught so far"):
        class_incremental(dataset, groups, {**counts, "val": counts["val"][1:4]})


def test_wrong_arguments_are_refused_together(dataset, counts):
    with pytest.raises(ConfigError) as caught:
        class_incremental(dataset, ((1,), (1, 0)), counts, protocol="joint", test_split="test")
    assert len(caught.value.problems) == 3
    must_say(caught.value, "split 'test'", "train, val")


def test_build_follows_the_configuration(dataset, counts):
    config = ScenarioConfig(task=[["cat", "cow"], ["dog"], ["sheep"]], protocol="disjoint", policy="mib-voc")
    steps = build(config, dataset, counts, seed=0)
    assert train(steps) == [(0, 4), (1, 2), (5, 6, 7)]
    assert steps[0].train[0].lut[255] == 0
    ordered = build(ScenarioConfig(task="2-1", order=["dog", "cat", 4, 2]), dataset, counts, seed=0)
    assert ordered[-1].spaces["default"].order == (0, 3, 1, 4, 2)
    (together,) = build(ScenarioConfig(task="2-1", joint=True), dataset, counts, seed=0)
    assert together.train[0].indices == (0, 1, 2, 4, 5, 6, 7)
    with pytest.raises(ConfigError, match=r"N \+ k\*M = 4"):
        build(ScenarioConfig(task="15-5"), dataset, counts, seed=0)


def test_joint_cross_validation_never_trains_a_held_out_image(dataset, counts):
    (step,) = build(ScenarioConfig(task="2-1", joint=True, validation="cross"), dataset, counts, seed=3)
    kept, held = set(step.train[0].indices), set(step.val[0].indices)
    assert kept | held == {0, 1, 2, 4, 5, 6, 7}
    assert (len(kept), len(held)) == (5, 2)


def test_single_in_the_configuration_teaches_every_step_afresh(dataset, counts):
    config = ScenarioConfig(task=[["cat", "cow"], ["dog"]], single=True)
    steps = build(config, dataset, counts, seed=0)
    assert [(step.index, step.fresh) for step in steps] == [(0, True), (1, True)]
    assert steps[1].spaces["default"].names == ("background", "dog")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"single": True, "joint": True}, r"scenario\.single: .*scenario\.joint"),
        ({"void_channel": True}, r"scenario\.void_channel: .*without background"),
        ({"steps": [{"domain": "day"}]}, r"scenario\.steps: .*data\.domains"),
    ],
)
def test_settings_of_domains_are_refused_in_class_incremental_scenarios(dataset, counts, settings, message):
    with pytest.raises(ConfigError, match=message):
        build(ScenarioConfig(task="2-1", **settings), dataset, counts, seed=0)
