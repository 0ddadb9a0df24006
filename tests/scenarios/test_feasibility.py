"""What cannot be trained is said before step 0, all of it; what is never tested is warned of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import everseg
from everseg.errors import ConfigError
from everseg.labels import LabelSpace
from everseg.scenarios.feasibility import doubtful, impossible
from everseg.scenarios.steps import Source, Step
from saying import must_say

SPACE = LabelSpace(((0, 1), (2,)), ("background", "road", "car"))
LUT = bytes([0, 1, 2, *[255] * 253])


def source(images: int, branch: str = "default", split: str = "train") -> Source:
    return Source(branch, "toy", split, tuple(range(images)), LUT)


def step(index: int, images: int = 4, **values) -> Step:
    given = {"train": (source(images),), "test": (source(2, split="test"),)} | values
    return Step(index, given["train"], given["test"], given.get("spaces", {"default": SPACE}), {"default": 1})


def test_a_sound_plan_has_no_problem():
    assert impossible([step(0), step(1)], batch=4, processes=2) == []


def test_every_problem_of_every_step_is_told_at_once():
    many = LabelSpace((tuple(range(65535)),), tuple(f"c{i}" for i in range(65535)))
    steps = [step(0, 1), step(1, 0), step(2, spaces={"default": many})]
    told = impossible(steps, batch=4, processes=2)
    assert len(told) == 3
    assert told[0].startswith("step 0: has 1 training image, fewer than the 2 processes")
    assert told[1].startswith("step 1: has no training images")
    assert told[2].startswith("step 2: has 65535 outputs, and labels tell at most 65534 apart")


def test_65534_outputs_are_possible():
    most = LabelSpace((tuple(range(65534)),), tuple(f"c{i}" for i in range(65534)))
    assert impossible([step(0, spaces={"default": most})], batch=4) == []


def test_a_branch_is_named_where_there_are_several():
    two = step(0, train=(source(3, "day"), source(1, "dusk")), spaces={"day": SPACE, "dusk": SPACE})
    assert impossible([two], batch=4, processes=2) == [
        "step 0: branch 'dusk' has 1 training image, fewer than the 2 processes that share each batch; "
        "use fewer processes"
    ]


def test_a_batch_smaller_than_the_number_of_processes_is_told_once():
    assert impossible([step(0), step(1)], batch=2, processes=3) == [
        "train.batch: 2 images for 3 processes; give each at least one"
    ]


def test_only_single_images_are_tried_on_the_network():
    tried = []

    def trial(step: Step) -> str:
        tried.append(step.index)
        return "no"

    (alone,) = impossible([step(0, 4), step(1, 1), step(2, 5)], batch=3, trial=trial)
    must_say(alone, "step 1: no", "1 training image", "add images", "data.crop")
    assert "train.batch" not in alone  # a batch cannot hold more images than the step has
    (shared,) = impossible([step(0, 4)], batch=2, processes=2, trial=trial)
    must_say(shared, "step 0: no", "train.batch")
    (both,) = impossible([step(0, 2)], batch=2, processes=2, trial=trial)
    must_say(both, "step 0: no", "2 training images", "2 processes", "fewer processes")
    assert tried == [1, 0, 0]


def test_classes_without_test_pixels_are_warned_of():
    counts = {"test": np.zeros((2, 256), np.int64), "train": np.ones((4, 256), np.int64)}
    counts["test"][:, 1] = 5
    taught = replace(step(0), grows={"default": 3})
    assert doubtful([taught], counts) == [
        "step 0: no test image shows background, car: their IoU stays undefined and counts in no mean"
    ]
    assert doubtful([step(1)], counts) == [
        "step 1: no test image shows car: its IoU stays undefined and counts in no mean"
    ]
    counts["test"][1, 2] = 1
    assert doubtful([step(1)], counts) == []


@pytest.mark.parametrize("model", ["deeplabv3-tiny", "deeplabv3-resnet18"])
def test_one_image_at_a_time_is_refused_by_a_network_that_pools_to_one_cell(tmp_path: Path, model: str):
    """Both steps are named, before anything is written."""
    with pytest.raises(ConfigError) as told:
        everseg.run(
            "demo-mib", out=str(tmp_path), quiet=True, overrides=["train.batch=1", f"model.name={model}"]
        )
    assert len(told.value.problems) == 2
    assert "step 0" in str(told.value)
    assert "batch norm" in str(told.value)
    assert "step 1: batch norm" in str(told.value)
    assert not (tmp_path / "demo-mib").exists()


def test_one_image_at_a_time_is_enough_for_a_network_without_such_a_norm(tmp_path: Path):
    done = everseg.run(
        "demo-mib",
        out=str(tmp_path),
        quiet=True,
        overrides=[
            "train.batch=1",
            "train.max_iterations=1",
            "model.name=erfnet",
            "model.output_stride=null",
            "model.norm=null",
            "report=false",
        ],
    )
    assert len(done.steps) == 2
