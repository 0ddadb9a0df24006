"""Domain-incremental and mixed scenarios, worked out by hand on small tables of pixel counts."""

from __future__ import annotations

import numpy as np
import pytest

from everseg.config.fields import ScenarioConfig, StepConfig
from everseg.data.base import Dataset
from everseg.errors import ConfigError, DataError
from everseg.labels import SYNTHETIC_BACKGROUND, SYNTHETIC_VOID, LabelSpace, RawLabels
from everseg.scenarios import domain_incremental, scenario_json, summarise
from everseg.scenarios.domain_incremental import build
from everseg.scenarios.summary import naming_notes

STREET = RawLabels({0: "road", 1: "sky", 2: "car"}, background=None, void=(255,))
FARM = RawLabels({0: "background", 1: "cat", 2: "cow"}, background=0, void=(255,))


def table(*images):
    result = np.zeros((len(images), 256), np.int64)
    for row, image in enumerate(images):
        for raw, pixels in image.items():
            result[row, raw] = pixels
    return result


DAY = table({0: 6, 1: 4, 255: 2}, {0: 6, 2: 6}, {255: 12}, {1: 12}, {2: 3, 1: 9})
DAY_VAL = table({0: 12}, {2: 12}, {255: 12})
DUSK = table({0: 4, 1: 8}, {1: 6, 2: 6})
DUSK_VAL = table({1: 12})


@pytest.fixture
def street():
    """Two domains of the same three classes, without background."""
    return {"day": Dataset("street", STREET, {}), "dusk": Dataset("street", STREET, {})}


@pytest.fixture
def street_counts():
    return {"day/train": DAY, "day/val": DAY_VAL, "dusk/train": DUSK, "dusk/val": DUSK_VAL}


def taught(*steps):
    return [StepConfig(**step) for step in steps]


MIXED = taught(
    {"domain": "day", "classes": ["road", "sky"]}, {"domain": "dusk"}, {"domain": "day", "add": ["car"]}
)


def seen(sources):
    return [(s.name, s.branch, s.dataset, s.split, s.indices, list(s.lut[:3]), s.lut[255]) for s in sources]


# ---------------------------------------------------------------- what is taught


def test_every_domain_is_one_step_over_all_its_images_with_a_path_of_its_own(street, street_counts):
    steps = domain_incremental(street, street_counts)
    space = LabelSpace(((0, 1, 2),), ("road", "sky", "car"), background=None)
    assert [step.index for step in steps] == [0, 1]
    assert seen(steps[0].train) == [("day", "day", "day", "train", (0, 1, 2, 3, 4), [0, 1, 2], 255)]
    assert seen(steps[1].train) == [("dusk", "dusk", "dusk", "train", (0, 1), [0, 1, 2], 255)]
    assert dict(steps[0].spaces) == {"day": space}
    assert dict(steps[1].spaces) == {"day": space, "dusk": space}
    assert [dict(step.grows) for step in steps] == [{"day": 3}, {"dusk": 3}]
    assert steps[1].old_branches == ("day",)
    assert not any(step.fresh or step.class_weights or step.val for step in steps)


def test_every_domain_met_so_far_is_tested_through_its_own_path(street, street_counts):
    steps = domain_incremental(street, street_counts)
    day = ("day", "day", "day", "val", (0, 1, 2), [0, 1, 2], 255)
    assert seen(steps[0].test) == [day]
    assert seen(steps[1].test) == [day, ("dusk", "dusk", "dusk", "val", (0,), [0, 1, 2], 255)]


def test_steps_choose_domains_and_their_order(street, street_counts):
    steps = domain_incremental(street, street_counts, taught({"domain": "dusk"}, {"domain": "day"}))
    assert [step.branch for step in steps] == ["dusk", "day"]
    (only,) = domain_incremental(
        street, {k: v for k, v in street_counts.items() if "dusk" in k}, taught({"domain": "dusk"})
    )
    assert only.branch_order == ("dusk",)


def test_a_background_class_is_kept_and_comes_first():
    counts = {"farm/train": table({0: 9, 1: 3}, {0: 12}), "farm/val": table({2: 12})}
    (step,) = domain_incremental({"farm": Dataset("farm", FARM, {})}, counts, policy="mib-voc")
    assert step.spaces["farm"] == LabelSpace(((0, 1, 2),), ("background", "cat", "cow"), background=0)
    assert step.train[0].indices == (0, 1)  # all images, also those of background only
    assert step.train[0].lut[255] == 0  # as this convention trains void


def test_a_domain_without_background_trains_void_nowhere_whatever_the_convention(street, street_counts):
    for step in domain_incremental(street, street_counts, policy="mib-voc"):
        assert {source.lut[255] for source in (*step.train, *step.test)} == {255}


def test_the_classes_of_a_first_step_are_in_the_given_order(street, street_counts):
    (step, _) = domain_incremental(
        street, street_counts, taught({"domain": "day", "classes": ["car", 0, "sky"]}, {"domain": "dusk"})
    )
    assert step.spaces["day"].names == ("car", "road", "sky")
    assert step.spaces["day"].background is None
    assert list(step.train[0].lut[:3]) == [1, 2, 0]


# ---------------------------------------------------------------- classes and domains


def test_a_mixed_sequence_grows_a_path_when_its_domain_is_met_again(street, street_counts):
    first, second, third = domain_incremental(street, street_counts, MIXED)
    assert first.spaces["day"] == LabelSpace(
        ((SYNTHETIC_BACKGROUND, 0, 1),), ("background", "road", "sky"), 0
    )
    # images with road or sky; car is background, as the background of MiB is
    assert seen(first.train) == [("day", "day", "day", "train", (0, 1, 3, 4), [1, 2, 0], 255)]
    assert seen(first.test) == [("day", "day", "day", "val", (0,), [1, 2, 255], 255)]
    assert second.spaces["dusk"].background is None
    assert dict(second.grows) == {"dusk": 3}
    assert [s.name for s in second.test] == ["day", "dusk"]
    assert seen(third.train) == [("day", "day", "day", "train", (1, 4), [0, 0, 3], 255)]
    assert dict(third.grows) == {"day": 1}
    assert third.num_old("day") == 3
    assert third.old_branches == ("dusk",)
    assert third.branch_order == ("day", "dusk")
    assert third.spaces["day"].groups == ((SYNTHETIC_BACKGROUND, 0, 1), (2,))
    assert seen(third.test)[0] == ("day", "day", "day", "val", (0, 1), [1, 2, 3], 255)
    assert [s.name for s in third.test] == ["day", "dusk"]


def test_a_part_of_a_domains_classes_leaves_the_others_to_the_background(street, street_counts):
    (step,) = domain_incremental(street, street_counts, taught({"domain": "day", "classes": ["car"]}))
    assert step.spaces["day"].names == ("background", "car")
    assert step.train[0].indices == (1, 4)
    assert list(step.train[0].lut[:3]) == [0, 0, 1]


def test_the_protocol_acts_inside_a_domain(street, street_counts):
    steps = domain_incremental(street, street_counts, MIXED, protocol="disjoint")
    assert steps[0].train[0].indices == (0, 3)  # images 1 and 4 show the later class
    sequential = domain_incremental(street, street_counts, MIXED, protocol="sequential")
    assert list(sequential[2].train[0].lut[:3]) == [1, 2, 3]


# ---------------------------------------------------------------- shared paths


def test_domains_on_one_path_share_classes_by_name_and_grow_it_by_the_others(street_counts):
    other = RawLabels({0: "sky", 1: "bus", 2: "car"}, background=None)
    data = {"day": Dataset("a", STREET, {}), "dusk": Dataset("b", other, {})}
    steps = domain_incremental(
        data, street_counts, taught({"domain": "day", "branch": "all"}, {"domain": "dusk", "branch": "all"})
    )
    assert [dict(step.grows) for step in steps] == [{"all": 3}, {"all": 1}]
    assert steps[1].spaces["all"].names == ("road", "sky", "car", "bus")
    assert seen(steps[1].train) == [("dusk", "all", "dusk", "train", (0, 1), [1, 3, 2], 255)]
    assert [(s.name, s.branch, list(s.lut[:3])) for s in steps[1].test] == [
        ("day", "all", [0, 1, 2]),
        ("dusk", "all", [1, 3, 2]),
    ]
    assert steps[1].old_branches == ()


def test_domains_that_share_a_path_with_a_growing_one_have_its_background(street, street_counts):
    steps = domain_incremental(
        street,
        street_counts,
        taught(
            {"domain": "dusk", "branch": "all"},
            {"domain": "day", "branch": "all", "classes": ["road"]},
            {"domain": "day", "add": ["car"]},
        ),
    )
    assert [step.spaces["all"].names for step in steps] == [("background", "road", "sky", "car")] * 3
    assert [dict(step.grows) for step in steps] == [{"all": 4}, {}, {}]
    assert [list(step.train[0].lut[:3]) for step in steps] == [[1, 2, 3], [1, 0, 0], [0, 0, 3]]


def test_the_background_of_one_domain_is_that_of_the_path(street_counts):
    data = {"day": Dataset("a", STREET, {}), "dusk": Dataset("b", FARM, {})}
    steps = domain_incremental(
        data, street_counts, taught({"domain": "day", "branch": "all"}, {"domain": "dusk", "branch": "all"})
    )
    assert steps[1].spaces["all"].names == ("background", "road", "sky", "car", "cat", "cow")
    assert steps[1].spaces["all"].background == 0
    assert list(steps[1].train[0].lut[:3]) == [0, 4, 5]


# ---------------------------------------------------------------- void output


def test_a_void_output_is_last_and_no_pixel_is_labelled_with_it(street, street_counts):
    steps = domain_incremental(street, street_counts, void_channel=True)
    space = steps[1].spaces["dusk"]
    assert space.names == ("road", "sky", "car", "void")
    assert space.order == (0, 1, 2, SYNTHETIC_VOID)
    assert space.background is None
    assert [dict(step.grows) for step in steps] == [{"day": 4}, {"dusk": 4}]
    assert all(3 not in source.lut for step in steps for source in (*step.train, *step.test))


def test_a_void_output_is_refused_where_there_is_a_background_or_growth(street, street_counts):
    with pytest.raises(ConfigError, match=r"scenario\.void_channel.*'day'.*step by step"):
        domain_incremental(street, street_counts, MIXED, void_channel=True)
    with pytest.raises(ConfigError, match=r"scenario\.void_channel.*'farm'.*background"):
        domain_incremental(
            {"farm": Dataset("farm", FARM, {})}, {"farm/train": DUSK, "farm/val": DUSK}, void_channel=True
        )
    data = {**street, "dusk": Dataset("b", RawLabels({0: "road", 1: "bus"}, background=None), {})}
    shared = taught({"domain": "day", "branch": "all"}, {"domain": "dusk", "branch": "all"})
    with pytest.raises(ConfigError, match=r"step 1 adds bus .*'all'.* void output"):
        domain_incremental(data, street_counts, shared, void_channel=True)
    same = domain_incremental(street, street_counts, shared, void_channel=True)
    assert [dict(step.grows) for step in same] == [{"all": 4}, {}]


# ---------------------------------------------------------------- validation


def test_validation_images_come_from_where_they_are_asked_from(street, street_counts):
    def vals(validation, **more):
        steps = domain_incremental(street, street_counts, MIXED, validation=validation, **more)
        return [[(s.name, s.split, s.indices) for s in step.val] for step in steps]

    assert vals("none") == [[], [], []]
    assert vals("train") == [
        [("day", "train", (0, 1, 3, 4))], [("dusk", "train", (0, 1))], [("day", "train", (1, 4))]
    ]  # fmt: skip
    assert vals("split") == [[("day", "val", (0,))], [("dusk", "val", (0,))], [("day", "val", (1,))]]
    steps = domain_incremental(street, street_counts, MIXED, validation="cross", seed=1)
    whole = domain_incremental(street, street_counts, MIXED)
    for step, full in zip(steps, whole, strict=True):
        kept, held = step.train[0].indices, step.val[0].indices
        assert held
        assert sorted((*kept, *held)) == list(full.train[0].indices)
        assert step.val[0].lut == step.train[0].lut


# ---------------------------------------------------------------- joint and single


def test_joint_is_multi_task_training_over_all_domains(street, street_counts):
    config = ScenarioConfig(kind="domain-incremental", joint=True)
    (step,) = build(config, street, street_counts, seed=0)
    assert step.trained_branches == ("day", "dusk")
    assert dict(step.grows) == {"day": 3, "dusk": 3}
    assert [(s.name, s.indices) for s in step.train] == [("day", (0, 1, 2, 3, 4)), ("dusk", (0, 1))]
    assert [s.name for s in step.test] == ["day", "dusk"]


def test_joint_of_a_mixed_sequence_labels_all_classes_of_each_domain(street, street_counts):
    config = ScenarioConfig(kind="domain-incremental", joint=True, steps=MIXED, validation="cross")
    (step,) = build(config, street, street_counts, seed=0)
    assert [list(s.lut[:3]) for s in step.train] == [[1, 2, 3], [0, 1, 2]]
    assert dict(step.grows) == {"day": 4, "dusk": 3}
    for train, val in zip(step.train, step.val, strict=True):
        assert not set(train.indices) & set(val.indices)


def test_single_starts_every_domain_afresh_and_tests_it_alone(street, street_counts):
    steps = build(ScenarioConfig(kind="domain-incremental", single=True), street, street_counts, seed=0)
    assert [(step.index, step.fresh) for step in steps] == [(0, True), (1, True)]
    assert [step.branch_order for step in steps] == [("day",), ("dusk",)]
    assert [[s.name for s in step.test] for step in steps] == [["day"], ["dusk"]]
    assert [dict(step.grows) for step in steps] == [{"day": 3}, {"dusk": 3}]


def test_single_of_domains_on_one_path_teaches_each_all_its_classes(street, street_counts):
    shared = taught({"domain": "day", "branch": "all"}, {"domain": "dusk", "branch": "all"})
    config = ScenarioConfig(kind="domain-incremental", single=True, steps=shared, void_channel=True)
    first, second = build(config, street, street_counts, seed=0)
    assert second.spaces["all"].names == ("road", "sky", "car", "void")
    assert [s.name for s in second.test] == ["dusk"]
    assert list(second.train[0].lut[:3]) == [0, 1, 2]
    assert dict(first.grows) == dict(second.grows) == {"all": 4}


def test_single_of_a_mixed_sequence_teaches_each_steps_classes_alone(street, street_counts):
    steps = build(
        ScenarioConfig(kind="domain-incremental", single=True, steps=MIXED), street, street_counts, seed=0
    )
    assert [step.spaces[step.branch].names for step in steps] == [
        ("background", "road", "sky"), ("road", "sky", "car"), ("background", "car")
    ]  # fmt: skip
    assert list(steps[2].train[0].lut[:3]) == [0, 0, 1]
    assert seen(steps[2].test) == [("day", "day", "day", "val", (0, 1), [255, 255, 1], 255)]


# ---------------------------------------------------------------- what cannot be


def test_all_wrong_steps_are_told_at_once(street, street_counts):
    wrong = taught(
        {"domain": "dsuk"},
        {"domain": "dusk", "add": ["car"]},
        {"domain": "day", "classes": ["raod", "sky"]},
        {"domain": "day"},
        {"domain": "day", "add": ["sky", "car"]},
        {"domain": "day", "add": []},
        {"domain": "day", "add": ["car"], "branch": "x"},
        {"domain": "day", "classes": ["car"], "add": ["car"]},
    )
    with pytest.raises(ConfigError) as caught:
        domain_incremental(street, street_counts, wrong)
    expected = (
        "scenario.steps[0].domain: no domain 'dsuk' in data.domains (day, dusk); did you mean 'dusk'?",
        "scenario.steps[1].add: domain 'dusk' has not been met before; write classes",
        "scenario.steps[2].classes: unknown class 'raod'; classes: 0 road, 1 sky, 2 car",
        "scenario.steps[3]: domain 'day' is named twice (first in step 0); write add: [...]",
        "scenario.steps[4].add: taught before from domain 'day': sky",
        "scenario.steps[5].add: teaches no class",
        "scenario.steps[6].add: taught before from domain 'day': car",
        "scenario.steps[6].branch: domain 'day' goes through 'day' already",
        "scenario.steps[7]: write classes (a domain met first) or add",
    )
    for problem, start in zip(caught.value.problems, expected, strict=True):
        assert problem.startswith(start)


def test_missing_splits_are_told_per_domain(street, street_counts):
    del street_counts["dusk/val"]
    with pytest.raises(ConfigError, match=r"'dusk'.*'val'.* train \("):
        domain_incremental(street, street_counts)
    with pytest.raises(ConfigError, match=r"'day'.*'test'.* train, val"):
        domain_incremental(street, street_counts, test_split="test")


def test_no_steps_are_refused(street, street_counts):
    with pytest.raises(ConfigError, match=r"scenario.steps: no steps"):
        domain_incremental(street, street_counts, [])


def test_a_class_that_a_domain_never_shows_is_no_fault_where_all_of_them_are_taught(street, street_counts):
    counts = {**street_counts, "dusk/train": DUSK[:1]}  # no car at dusk
    shared = taught(
        {"domain": "day", "branch": "all", "classes": ["road", "car"]}, {"domain": "dusk", "branch": "all"}
    )
    for steps in (domain_incremental(street, counts), domain_incremental(street, counts, shared)):
        assert steps[1].train[0].indices == (0,)
        assert "car" in steps[1].spaces[steps[1].branch].names


def test_names_of_one_path_that_differ_in_spelling_only_are_one_class(street_counts):
    other = RawLabels({0: "Road", 1: "s k-y", 2: "car"}, background=None)
    data = {"day": Dataset("a", STREET, {}), "dusk": Dataset("b", other, {})}
    shared = taught({"domain": "day", "branch": "all"}, {"domain": "dusk", "branch": "all"})
    steps = domain_incremental(data, street_counts, shared)
    assert steps[1].spaces["all"].names == steps[0].spaces["all"].names == ("road", "sky", "car")
    assert [step.grows for step in steps] == [{"all": 3}, {}]
    assert list(steps[1].train[0].lut[:3]) == [0, 1, 2]
    notes = naming_notes(steps, data, street_counts)
    assert [note.partition(":")[0] for note in notes] == [
        "class 'Road' of data set 'b' (domain 'dusk') is taken for 'road', which branch 'all' knows",
        "class 's k-y' of data set 'b' (domain 'dusk') is taken for 'sky', which branch 'all' knows",
    ]
    alone = domain_incremental(data, street_counts)  # paths of their own may spell as they like
    assert alone[1].spaces["dusk"].names == ("Road", "s k-y", "car")
    assert naming_notes(alone, data, street_counts) == []


def test_a_domain_without_images_is_refused(street, street_counts):
    street_counts["dusk/train"] = DUSK[:0]
    with pytest.raises(DataError, match=r"data\.domains\.dusk.*'train'.*no image"):
        domain_incremental(street, street_counts)
    with pytest.raises(DataError, match=r"domain 'day' .*\n.*'train' has sky"):
        domain_incremental(street, {**street_counts, "day/train": DAY[1:2]}, MIXED[:1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"joint": True, "single": True}, r"scenario\.single: .*scenario\.joint"),
        ({"lists": "published"}, "scenario.lists: .* scenario.kind=class-incremental"),
        ({"order": ["road"]}, "scenario.order: .* scenario.kind=class-incremental"),
    ],
)
def test_settings_of_other_scenarios_are_refused(street, street_counts, settings, message):
    with pytest.raises(ConfigError, match=message):
        build(ScenarioConfig(kind="domain-incremental", **settings), street, street_counts, seed=0)


# ---------------------------------------------------------------- what is told about it


def test_the_summary_tells_domains_and_hidden_classes_of_mixed_sequences(street, street_counts):
    config = ScenarioConfig(kind="domain-incremental", steps=MIXED, class_weights="computed")
    steps = build(config, street, street_counts, seed=0)
    first, second, third = summarise(steps, street_counts)
    assert [told["domains"] for told in (first, second, third)] == [["day"], ["dusk"], ["day"]]
    assert third["branches"] == {"day": {"num_old": 3, "num_classes": 4}}
    assert third["new_classes"] == ["car"]
    assert first["hidden"] == {"old": {}, "future": {"car": 9}}
    assert third["hidden"] == {"old": {"road": 6, "sky": 9}, "future": {}}
    assert second["hidden"] == {"old": {}, "future": {}}
    assert third["leaks"]["shared_images"] == {
        "0": 2
    }  # the dusk images have the same numbers, not the same data
    assert third["class_weights"]["car"] == steps[2].class_weights["day"][3]
    record = scenario_json(steps)["steps"]
    assert [source["domain"] for source in record[2]["test"]] == ["day", "dusk"]
    assert record[1]["class_weights"] == {"dusk": steps[1].class_weights["dusk"]}


def test_the_summary_of_multi_task_training_tells_classes_per_domain(street, street_counts):
    steps = build(ScenarioConfig(kind="domain-incremental", joint=True), street, street_counts, seed=0)
    (told,) = summarise(steps, street_counts)
    assert told["domains"] == ["day", "dusk"]
    assert told["classes"]["day: sky"] == {"images": 3, "pixels": 25}
    assert told["classes"]["dusk: sky"] == {"images": 2, "pixels": 14}
    assert told["new_classes"] == [f"{d}: {c}" for d in ("day", "dusk") for c in ("road", "sky", "car")]
    assert (told["train"], told["test"], told["ignored_pixels"]) == (7, 4, 14)


def test_the_record_says_which_steps_start_afresh(street, street_counts):
    steps = build(ScenarioConfig(kind="domain-incremental", single=True), street, street_counts, seed=0)
    assert [step["fresh"] for step in scenario_json(steps)["steps"]] == [True, True]
    assert "fresh" not in scenario_json(domain_incremental(street, street_counts))["steps"][1]
