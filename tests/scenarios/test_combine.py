"""Joint, single and chained scenarios."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from everseg.data.base import Dataset
from everseg.errors import ConfigError, DataError
from everseg.labels import LabelSpace, RawLabels
from everseg.scenarios import Source, Step, chain, class_incremental, cross_validation, joint, single, singles


@pytest.fixture
def steps(dataset, groups, counts):
    return class_incremental(dataset, groups, counts, policy="mib-voc")


@pytest.mark.parametrize("protocol", ["overlapped", "disjoint", "sequential", "partitioned"])
def test_joint_teaches_every_class_on_every_image_in_one_growth(dataset, groups, counts, protocol):
    steps = class_incremental(
        dataset, groups, counts, policy="mib-voc", protocol=protocol, validation="split", strict=False
    )
    (step,) = joint(steps)
    assert step.index == 0
    assert step.train[0].indices == (0, 1, 2, 4, 5, 6, 7)  # all but the one with background only
    assert list(step.train[0].lut[:5]) == [0, 1, 2, 3, 4]
    assert step.train[0].lut[255] == 0  # mib-voc trains void as background
    assert step.test == steps[-1].test
    assert step.val[0].indices == (0, 1, 3, 4)
    assert list(step.val[0].lut[:5]) == [0, 1, 2, 3, 4]
    assert step.val[0].lut[255] == 255
    assert step.spaces["default"] == steps[-1].spaces["default"]
    assert step.spaces["default"].groups == ((0, 1, 2), (3,), (4,))
    assert dict(step.grows) == {"default": 5}
    assert step.num_old("default") == 0


def test_joint_of_a_class_that_is_never_taught_leaves_it_to_the_policy(dataset, counts):
    (step,) = joint(class_incremental(dataset, ((1, 2), (3,)), counts))
    assert list(step.train[0].lut[:5]) == [0, 1, 2, 3, 0]
    assert step.train[0].indices == (0, 1, 2, 4, 5, 7)


def test_joint_validated_on_its_training_images_keeps_them(dataset, groups, counts):
    (step,) = joint(class_incremental(dataset, groups, counts, validation="train"))
    assert step.val == step.train
    assert len(step.train[0].indices) == 7


def test_joint_does_not_train_what_any_step_held_out(dataset, groups, counts):
    steps = class_incremental(dataset, groups, counts)
    parts = [((0, 1, 4), (7,)), ((1, 2), (5,)), ((5, 7), (6,))]
    steps = [
        dataclasses.replace(
            step,
            train=(dataclasses.replace(step.train[0], indices=kept),),
            val=(dataclasses.replace(step.train[0], indices=held),),
        )
        for step, (kept, held) in zip(steps, parts, strict=True)
    ]
    (step,) = joint(steps)
    assert step.train[0].indices == (0, 1, 2, 4)
    assert step.val[0].indices == (5, 6, 7)
    with pytest.raises(ConfigError, match="no steps"):
        joint([])


def test_cross_validation_keeps_the_lists_order_and_refuses_one_image(dataset, groups, counts):
    lists = [[7, 4, 1, 0], [5, 2], [6]]
    steps = class_incremental(dataset, groups, counts, lists=lists)
    with pytest.raises(DataError, match=r"step 2: 1 training image.*split"):
        cross_validation(steps, seed=0)
    for step, full in zip(cross_validation(steps[:2], seed=0), lists, strict=False):
        kept, held = step.train[0].indices, step.val[0].indices
        assert len(held) == 1
        assert list(kept) == [i for i in full if i not in held]


def test_single_teaches_one_steps_classes_from_scratch(steps):
    (step,) = single(steps, 1)
    assert step.index == 0
    assert step.train[0].indices == steps[1].train[0].indices
    assert step.spaces["default"] == LabelSpace(((0, 3),), ("background", "dog"))
    assert dict(step.grows) == {"default": 2}
    assert list(step.train[0].lut[:5]) == [0, 0, 0, 1, 0]
    assert list(step.test[0].lut[:5]) == [0, 255, 255, 1, 255]  # as classes not yet taught in mib-voc
    with pytest.raises(ConfigError, match="steps 0 to 2"):
        single(steps, 3)


def test_single_scores_old_classes_as_the_convention_scores_unknown_ones(dataset, groups, counts):
    (step,) = single(class_incremental(dataset, groups, counts, policy="plop"), 2)
    assert list(step.test[0].lut[:5]) == [0, 0, 0, 0, 1]
    assert step.test[0].lut[255] == 255
    first = class_incremental(dataset, groups, counts)[0]
    assert single([first], 0) == (first,)


def test_single_of_a_sequential_step_unlabels_old_classes(dataset, groups, counts):
    steps = class_incremental(dataset, groups, counts, protocol="sequential", validation="split")
    (step,) = single(steps, 2)
    assert [one.protocol for one in steps] == ["sequential"] * 3
    assert step.protocol == "", "old classes are not labelled any more"
    assert list(step.train[0].lut[:5]) == [0, 0, 0, 0, 1]
    assert list(step.val[0].lut[:5]) == [0, 255, 255, 255, 1]


def domain(branch, dataset, lut):
    """One domain step: all classes of one branch, without background."""
    table = bytes([*lut, *[255] * (256 - len(lut))])
    names = ("road", "sky", "car")[: len(lut)]
    source = Source(branch, dataset, "train", (0, 1), table)
    test = dataclasses.replace(source, split="val")
    space = LabelSpace((tuple(range(len(lut))),), names, background=None)
    return (Step(0, (source,), (test,), {branch: space}, {branch: len(lut)}),)


def test_chained_domains_keep_their_branches_and_tests():
    steps = chain(domain("city", "cs", [0, 1]), domain("road", "bdd", [0, 1, 2]))
    assert [step.index for step in steps] == [0, 1]
    assert [step.branch for step in steps] == ["city", "road"]
    assert steps[1].old_branches == ("city",)
    assert steps[1].branch_order == ("city", "road")
    assert dict(steps[1].grows) == {"road": 3}
    assert [(s.branch, s.dataset) for s in steps[1].test] == [("city", "cs"), ("road", "bdd")]
    assert len(steps[0].test) == 1


def test_a_chained_domain_of_known_classes_on_the_same_branch_grows_by_the_new_ones_only():
    steps = chain(domain("all", "cs", [0, 1]), domain("all", "bdd", [0, 1, 2]))
    assert dict(steps[1].grows) == {"all": 1}
    assert steps[1].spaces["all"].names == ("road", "sky", "car")
    assert steps[1].num_old("all") == 2
    again = chain(domain("all", "cs", [0, 1, 2]), domain("all", "bdd", [0, 1]))
    assert dict(again[1].grows) == {}
    assert again[1].num_old("all") == 3


def test_joint_over_domains_is_multi_task_training():
    (step,) = joint(chain(domain("city", "cs", [0, 1]), domain("road", "bdd", [0, 1, 2])))
    assert [source.branch for source in step.train] == ["city", "road"]
    assert dict(step.grows) == {"city": 2, "road": 3}
    assert list(step.train[1].lut[:4]) == [0, 1, 2, 255]


def test_a_branch_met_again_grows_behind_its_classes_and_is_tested_on_all(dataset, counts):
    first = class_incremental(dataset, ((1, 2),), counts, policy="mib-voc")
    second = class_incremental(dataset, ((4,), (3,)), counts, policy="mib-voc")
    steps = chain(first, second)
    whole = class_incremental(dataset, ((1, 2), (4,), (3,)), counts, policy="mib-voc")
    for ours, expected in zip(steps, whole, strict=True):
        assert ours.index == expected.index
        assert ours.train == expected.train
        assert ours.test == expected.test
        assert dict(ours.spaces) == dict(expected.spaces)
        assert dict(ours.grows) == dict(expected.grows)


def test_other_data_with_the_same_raw_ids_are_told_apart_by_name(dataset, groups, counts):
    horses = Dataset("stud", RawLabels({0: "background", 1: "horse", 2: "cat"}), {})
    table = np.zeros((2, 256), int)
    table[0, [0, 1]] = table[1, 2] = 1
    steps = chain(
        class_incremental(dataset, groups, counts),
        class_incremental(horses, ((1, 2),), {"train": table, "val": table}),
    )
    last = steps[-1]
    assert last.spaces["default"].names == ("background", "cat", "cow", "dog", "sheep", "horse")
    assert dict(last.grows) == {"default": 1}
    assert list(last.train[0].lut[:3]) == [0, 5, 1]
    assert [source.dataset for source in last.test] == ["farm", "stud"]
    assert last.test[0] == steps[2].test[0]
    (together,) = joint(steps)
    assert [(s.dataset, list(s.lut[:5])) for s in together.train] == [
        ("farm", [0, 1, 2, 3, 4]),
        ("stud", [0, 5, 1, 255, 255]),
    ]


def test_singles_are_every_step_alone_under_its_own_index(steps):
    alone = singles(steps)
    assert [step.index for step in alone] == [0, 1, 2]
    assert all(step.fresh for step in alone)
    for index, step in enumerate(alone):
        assert dataclasses.replace(step, index=0, fresh=False) == single(steps, index)[0]
    assert [step.spaces["default"].names for step in alone] == [
        ("background", "cat", "cow"), ("background", "dog"), ("background", "sheep")
    ]  # fmt: skip


def test_single_leaves_out_what_the_step_does_not_train():
    steps = chain(domain("city", "cs", [0, 1]), domain("road", "bdd", [0, 1, 2]))
    (step,) = single(steps, 1)
    assert step.branch_order == ("road",)
    assert [source.dataset for source in step.test] == ["bdd"]


def test_single_of_other_data_on_a_known_branch_keeps_all_classes_it_labels():
    steps = chain(domain("all", "cs", [0, 1, 2]), domain("all", "bdd", [1, 0]))
    (step,) = single(steps, 1)
    assert step.spaces["all"].names == ("road", "sky")
    assert list(step.train[0].lut[:3]) == [1, 0, 255]
    assert [source.dataset for source in step.test] == ["bdd"]
    assert dict(step.grows) == {"all": 2}
