"""What is told about a scenario before training."""

from __future__ import annotations

import dataclasses
import json

import pytest

from everseg.labels import policy_set
from everseg.scenarios import chain, class_incremental, digests, joint, scenario_json, summarise


@pytest.fixture
def steps(dataset, groups, counts):
    return class_incremental(dataset, groups, counts, policy="mib-voc")


def test_a_step_is_told_by_images_pixels_and_leaks(steps, counts):
    told = summarise(steps, counts)
    # Step 1 (dog) trains images 1, 2 and 5: background 12, cat 2, dog 16, sheep 6.
    assert told[1] == {
        "index": 1,
        "domains": [],
        "branches": {"default": {"num_old": 3, "num_classes": 4}},
        "new_classes": ["dog"],
        "train": 3,
        "val": 0,
        "test": 3,
        "classes": {"dog": {"images": 3, "pixels": 16}},
        "class_weights": {},
        "background_pixels": 12 + 2 + 6,
        "ignored_pixels": 0,
        "hidden": {"old": {"cat": 2, "cow": 0}, "future": {"sheep": 6}},
        "leaks": {
            "shared_images": {"0": 1, "2": 1},
            "images_with_future_classes": 1,
            "images_with_old_classes_unlabelled": 1,
        },
    }
    assert told[0]["new_classes"] == ["cat", "cow"]
    assert told[0]["background_pixels"] == 9 + 5 + 1 + 5 + 5 + 5 + 6  # background, void 5, dog 5, sheep 6
    assert told[0]["leaks"]["images_with_future_classes"] == 2
    json.dumps(told)


def test_void_is_told_as_ignored_where_the_convention_ignores_it(dataset, groups, counts):
    told = summarise(class_incremental(dataset, groups, counts, policy="plop"), counts)
    assert [one["ignored_pixels"] for one in told] == [5, 0, 0]


def test_disjoint_has_no_future_and_sequential_hides_nothing(dataset, groups, counts):
    disjoint = summarise(class_incremental(dataset, groups, counts, protocol="disjoint"), counts)
    assert [one["leaks"]["images_with_future_classes"] for one in disjoint] == [0, 0, 0]
    assert [one["leaks"]["shared_images"] for one in disjoint] == [{}, {}, {}]
    assert disjoint[2]["hidden"]["old"] == {"cat": 1, "cow": 0, "dog": 4}
    sequential = summarise(class_incremental(dataset, groups, counts, protocol="sequential"), counts)
    assert sequential[2]["hidden"]["old"] == {}
    assert sequential[2]["classes"]["dog"] == {"images": 1, "pixels": 4}


def test_joint_and_chained_scenarios_can_be_told(steps, counts):
    (told,) = summarise(joint(steps), counts)
    assert told["new_classes"] == ["cat", "cow", "dog", "sheep"]
    assert told["hidden"] == {"old": {}, "future": {}}
    assert told["classes"]["sheep"] == {"images": 3, "pixels": 24}
    keyed = {f"farm/{split}": table for split, table in counts.items()}
    assert summarise(chain(steps), keyed) == summarise(steps, counts)


def test_the_runs_record_names_classes_policy_and_every_list(steps):
    told = json.loads(json.dumps(scenario_json(steps, policy_set("mib-voc"), {"task": "2-1"})))
    assert told["settings"] == {"task": "2-1"}
    assert told["policy"]["test"] == {"void": 255, "background": 0, "old": 255, "future": 255}
    second = told["steps"][1]
    assert second["branches"]["default"]["classes"] == ["background", "cat", "cow", "dog"]
    assert second["branches"]["default"]["groups"] == [[0, 1, 2], [3]]
    assert second["train"][0]["images"] == 3
    assert second["train"][0]["sha256"] == steps[1].train[0].digest
    assert second["train"][0]["lut"][3] == 3


def test_a_digest_changes_with_images_order_and_labels(steps):
    source = steps[0].train[0]
    before = digests(steps)[0]["train"]
    for change in (
        {"indices": source.indices[::-1]},
        {"indices": source.indices[1:]},
        {"lut": bytes(256)},
        {"split": "val"},
    ):
        changed = dataclasses.replace(steps[0], train=(dataclasses.replace(source, **change),))
        assert digests([changed])[0]["train"] != before
    assert digests(steps) == digests(tuple(steps))
    assert [len(one["train"][0]) for one in digests(steps)] == [64, 64, 64]
