"""Task names and explicit steps become groups of raw ids, or one clear refusal."""

from __future__ import annotations

import pytest

from everseg.errors import ConfigError
from everseg.labels import RawLabels
from everseg.scenarios import known_tasks, task_groups
from everseg.scenarios.tasks import canonical_task
from saying import must_say

VOC = RawLabels({i: f"class {i}" if i else "background" for i in range(21)})
ADE = RawLabels({i: f"class {i}" if i else "other" for i in range(151)})
ROADS = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
CAMVID = RawLabels(dict(enumerate(ROADS)), background=None, void=(11,))


def span(first, last):
    return tuple(range(first, last + 1))


@pytest.mark.parametrize(
    ("task", "labels", "name", "expected"),
    [
        ("15-1", VOC, "voc", (span(1, 15), (16,), (17,), (18,), (19,), (20,))),
        ("15-5s", VOC, "voc", (span(1, 15), (16,), (17,), (18,), (19,), (20,))),
        ("10-1", VOC, "voc", (span(1, 10), *((i,) for i in range(11, 21)))),
        ("5-3", VOC, "voc", (span(1, 5), span(6, 8), span(9, 11), span(12, 14), span(15, 17), span(18, 20))),
        ("10-5-5", VOC, "voc", (span(1, 10), span(11, 15), span(16, 20))),
        ("19-1b", VOC, "voc", (tuple(i for i in span(1, 20) if i != 5), (5,))),
        ("10", VOC, "anything", (span(1, 10), span(11, 20))),
        ("50", ADE, "ade", (span(1, 50), span(51, 100), span(101, 150))),
        ("6-5", CAMVID, "camvid", (span(0, 5), span(6, 10))),
        ("offline", CAMVID, "camvid", (span(0, 10),)),
    ],
)
def test_a_name_cuts_the_ascending_classes(task, labels, name, expected):
    assert task_groups(task, labels, name) == expected


def test_15_1_is_15_5s_and_50_50_is_50():
    assert canonical_task("15-1", "voc") == "15-5s"
    assert canonical_task("10-5", "voc") == "10-5-5"
    assert canonical_task("50-50b", "ade") == "50b"
    assert canonical_task("7-13", "voc") == "7-13"
    assert "15-1" in known_tasks("voc")
    assert known_tasks("my own data") == ()


def test_every_listed_task_fits_its_data_set():
    for name, total in (("voc", 20), ("ade", 150), ("camvid", 11), ("demo", 6)):
        labels = RawLabels({i: f"class {i}" for i in range(total + 1)})
        for task in known_tasks(name):
            groups = task_groups(task, labels, name)
            assert sorted(i for group in groups for i in group) == list(range(1, total + 1)), (name, task)


@pytest.mark.parametrize("task", ["6-4", "12-1-1", "11-5", "3-5s", "7"])
def test_a_name_that_does_not_fit_is_refused_with_those_that_do(task):
    with pytest.raises(ConfigError, match=r"11 classes of camvid.*: \d+-\d+, \d+-\d+"):
        task_groups(task, CAMVID, "camvid")


def test_the_nearest_fitting_tasks_come_first():
    with pytest.raises(ConfigError, match=r"possible near it: 6-5, 7-4"):
        task_groups("6-4", CAMVID, "camvid")


@pytest.mark.parametrize("task", ["", "15_5", "0-5", "15-5x", "-5", "15-5-", "offline5"])
def test_what_is_no_task_name_is_refused_with_the_known_ones(task):
    with pytest.raises(ConfigError, match=rf"'{task}'.* for voc: offline, 19-1"):
        task_groups(task, VOC, "voc")


def test_an_order_that_nobody_published_is_refused():
    with pytest.raises(ConfigError, match=r"class order 'c'.*voc.*known: b"):
        task_groups("15-5c", VOC, "voc")
    with pytest.raises(ConfigError, match=r"class order 'b' of voc.*20 classes"):
        task_groups("6-5b", CAMVID, "voc")


def test_an_own_order_is_cut_as_given():
    order = ["road", "sky", 8, "tree", "car", "sign", "fence", "pole", "building", 4, 10, 9]
    with pytest.raises(ConfigError, match="'car' is repeated"):
        task_groups("6-5", CAMVID, "camvid", order)
    order.remove("car")
    assert task_groups("6-5", CAMVID, "camvid", order) == ((3, 0, 8, 5, 6, 7), (2, 1, 4, 10, 9))
    with pytest.raises(ConfigError, match="missing: pedestrian"):
        task_groups("6-5", CAMVID, "camvid", order[:-1])
    with pytest.raises(ConfigError, match="already fixes"):
        task_groups("15-5b", VOC, "voc", list(range(1, 21)))


def test_explicit_steps_take_names_and_ids_in_the_order_given():
    assert task_groups([["road", "sky"], [8, "5"]], CAMVID, "camvid") == ((3, 0), (8, 5))


def test_all_faults_of_explicit_steps_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        task_groups([["road", "raod"], [], [11, "road"]], CAMVID, "camvid")
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert "unknown class 'raod'" in text
    assert "step 1: teaches no class" in text
    assert "11 is void" in text
    must_say(text, "one step: road")
    with pytest.raises(ConfigError, match="is the background"):
        task_groups([[0, 1]], VOC, "voc")
    with pytest.raises(ConfigError, match="no steps given"):
        task_groups([], VOC, "voc")
