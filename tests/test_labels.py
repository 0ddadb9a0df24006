"""Label tables: every cell of the conventions in use (void, background, old and future classes)."""

from __future__ import annotations

import re
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import everseg
from everseg.errors import ConfigError
from everseg.labels import (
    POLICIES,
    SYNTHETIC_BACKGROUND,
    LabelPolicy,
    LabelSpace,
    RawLabels,
    policies_apart,
    policy_name,
    policy_set,
    shared_classes,
)
from saying import must_say

# Raw ids: 0 background, 3 and 1 learnt first, 4 taught now, 2 later; 255 void; 77 is in no list of the data set.
LABELS = RawLabels({0: "background", 1: "cow", 2: "dog", 3: "cat", 4: "sheep"})
SPACE = LabelSpace(((0, 3, 1), (4,)), ("background", "cat", "cow", "sheep"))
BACKGROUND, OLD, NOW, FUTURE, VOID, UNDECLARED = 0, (3, 1), 4, 2, 255, 77

# policy: role -> (background, void, unlabelled old, future); old classes' own ids and the current id are 1, 2 and 3.
CELLS = {
    "mib-voc": {"train": (0, 0, 0, 0), "val": (0, 255, 255, 255), "test": (0, 255, 255, 255)},
    "mib-ade": {"train": (0, 0, 0, 0), "val": (255, 255, 255, 255), "test": (255, 255, 255, 255)},
    **{
        name: {"train": (0, 255, 0, 0), "val": (0, 255, 0, 0), "test": (0, 255, 0, 0)}
        for name in ("plop-voc", "plop-ade", "plop")
    },
    "ignore-void": {"train": (0, 255, 0, 0), "val": (0, 255, 255, 255), "test": (0, 255, 255, 255)},
}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("role", ["train", "val", "test"])
def test_every_cell_of_a_convention(name, role):
    background, void, old, future = CELLS[name][role]
    policy = getattr(POLICIES[name], role)
    table = SPACE.lut((NOW,), policy, LABELS.names)
    assert table.shape == (256,)
    assert table.dtype == np.uint8
    assert table[BACKGROUND] == background
    assert [table[raw] for raw in OLD] == [old, old]
    assert table[NOW] == 3
    assert table[FUTURE] == future
    assert table[VOID] == void
    assert table[UNDECLARED] == void
    seen = SPACE.lut(SPACE.order, policy, LABELS.names)
    assert [seen[raw] for raw in (3, 1, 4)] == [1, 2, 3]
    assert seen[BACKGROUND] == background


def test_every_convention_is_covered_here():
    assert set(CELLS) == set(POLICIES)


@pytest.mark.parametrize("name", ["mib-voc", "plop", "ignore-void"])
def test_a_synthetic_background_takes_old_and_future_but_no_raw_id_of_its_own(name):
    labels = RawLabels({i: f"class {i}" for i in range(11)}, background=None, void=(11,))
    space = LabelSpace(
        ((SYNTHETIC_BACKGROUND, 0, 1, 2), (3, 4)), ("background", *(f"class {i}" for i in range(5)))
    )
    table = space.lut((3, 4), POLICIES[name].train, labels.names)
    assert table[:11].tolist() == [0, 0, 0, 4, 5, 0, 0, 0, 0, 0, 0]
    assert table[11] == POLICIES[name].train.void
    # Raw 0 is a class here, not the background: the policy's background value must not touch it.
    tested = space.lut(space.order, POLICIES["mib-ade"].test, labels.names)
    assert tested[:11].tolist() == [1, 2, 3, 4, 5, 255, 255, 255, 255, 255, 255]


def test_a_space_without_background_has_no_special_raw_id():
    labels = RawLabels({0: "road", 1: "sky"}, background=None)
    space = LabelSpace(((0,), (1,)), ("road", "sky"), background=None)
    assert space.lut(space.order, POLICIES["plop"].test, labels.names)[:3].tolist() == [0, 1, 255]


def test_an_unknown_convention_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'voc'.*mib-voc, mib-ade, plop-voc, plop-ade, plop, ignore-void"):
        policy_set("voc")


def test_raw_labels_tell_classes_from_background_and_void():
    assert LABELS.classes == (1, 2, 3, 4)
    assert LABELS.declared == {0, 1, 2, 3, 4, 255}
    camvid = RawLabels({0: "sky", 1: "road"}, background=None, void=(11,))
    assert camvid.classes == (0, 1)


def test_a_space_without_background_ignores_what_a_policy_calls_background():
    space = LabelSpace(((3, 4),), ("cat", "dog"), background=None)
    table = space.lut([3], LabelPolicy(void=255, background=0, old=0, future=0), [3, 4, 5])
    assert [int(table[raw]) for raw in (3, 4, 5, 9)] == [0, 255, 255, 255]


# ---------------------------------------------------------------- one table


def by_name(dataset: RawLabels, space: LabelSpace, policy: LabelPolicy, visible: set[int]) -> np.ndarray:
    """The table of another data set, written down pixel class by pixel class."""
    if space.background is None:
        policy = LabelPolicy(*(255 if value == 0 else value for value in astuple(policy)))
    table = np.full(256, policy.void, np.uint8)
    for raw, name in dataset.names.items():
        if raw == dataset.background and space.background is not None:
            table[raw] = policy.background
        elif name not in space.names:
            table[raw] = policy.future
        else:
            table[raw] = space.names.index(name) if raw in visible else policy.old
    return table


@given(
    data=st.data(),
    policy=st.builds(LabelPolicy, *[st.sampled_from([0, 255])] * 4),
    background=st.sampled_from([0, None]),
)
def test_tables_of_other_data_sets_go_by_name(
    data: st.DataObject, policy: LabelPolicy, background: int | None
) -> None:
    pool = ["background", "road", "sky", "car", "bus", "tree"]
    known = data.draw(st.permutations(pool).map(lambda names: names[:4]))
    raws = data.draw(st.lists(st.integers(0, 255), min_size=4, max_size=4, unique=True))
    names = dict(zip(raws, data.draw(st.permutations(pool)), strict=False))
    labels = RawLabels(names, background=data.draw(st.sampled_from([None, *raws])))
    space = LabelSpace(((0, 1), (2, 3)), tuple(known), background)
    train_ids = shared_classes(labels, space).train_ids
    visible = data.draw(st.sets(st.sampled_from(raws)))
    expected = by_name(labels, space, policy, visible)
    np.testing.assert_array_equal(space.lut_for(labels, train_ids, policy, visible), expected)
    everything = by_name(labels, space, policy, set(raws))
    np.testing.assert_array_equal(space.lut_for(labels, train_ids, policy), everything)


def test_a_table_of_the_same_ids_is_the_space_s_own() -> None:
    labels = RawLabels({0: "background", 3: "road", 7: "sky", 9: "car"}, background=0)
    space = LabelSpace(((0, 7), (3,)), ("background", "sky", "road"))
    policy = LabelPolicy(void=255, background=0, old=0, future=255)
    own = space.lut([7, 3], policy, labels.names)
    np.testing.assert_array_equal(space.lut_for(labels, shared_classes(labels, space).train_ids, policy), own)
    assert own[[0, 3, 7, 9, 255]].tolist() == [0, 2, 1, 255, 255]


def test_what_is_no_list_of_classes_is_told() -> None:
    assert LabelSpace(((0, 5), (7,)), ("background", "car", "bus")).problems() == []
    wrong = LabelSpace(((-1, 1), (-1,)), ("a", "b", "b"), 3)
    ids, names, background = wrong.problems(stored=True)
    must_say(ids, "id -1", "twice")
    must_say(names, "name b", "twice")
    must_say(background, "background", "not", "classes")
    must_say(wrong.problems()[-1], "1 'b' and 2 'b'", "one name")
    number, empty = LabelSpace(((0, 1),), ("a", "b", ""), None).problems()
    must_say(number, "3 names", "2 ids")
    must_say(empty, "no name")


def test_the_ignored_id_is_a_constant_and_tables_of_labels_have_one_maker() -> None:
    """255 as a number may stand where it is a byte's largest value or a raw void, not where it means `ignored`."""
    package = Path(everseg.__file__).parent
    ignored = re.compile(
        r"(?:!=|==|\bignore_index=|\bfuture=|\bold=|masked_fill\([^)]*,) *(?:255|65_?535)\b|\(255, space"
    )
    makers, literal = [], []
    for path in sorted(package.rglob("*.py")):
        text = path.read_text()
        name = path.relative_to(package).as_posix()
        literal += [f"{name}: {line.strip()}" for line in text.splitlines() if ignored.search(line)]
        if re.search(r"np\.full\(width, policy", text):
            makers.append(name)
    assert literal == []
    assert makers == ["labels.py"]


def test_the_old_name_of_plops_labels_is_that_of_the_data_set():
    assert [policy_name("plop", data) for data in ("voc", "ade", "camvid")] == [
        "plop-voc",
        "plop-ade",
        "plop-voc",
    ]
    assert policy_name("mib-voc", "ade") == "mib-voc"
    for name in ("plop-voc", "plop-ade"):
        assert policy_set(name) == policy_set("plop")


def test_what_two_conventions_do_differently_is_told():
    assert policies_apart("plop", "plop-voc") == []
    void, future = policies_apart("mib-voc", "plop-voc")
    must_say(void, "annotation", "training", "background under mib-voc", "ignored under plop-voc")
    must_say(future, "not learnt yet", "tests", "ignored under mib-voc", "background under plop-voc")
    must_say(policies_apart("plop-ade", "mib-ade"), "background pixels", "tests", "ignored under mib-ade")
    assert len(policies_apart("plop-voc", "ignore-void")) == 1
