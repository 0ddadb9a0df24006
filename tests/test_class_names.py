"""Names of classes: one rule says when two are one name, and one place matches them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import everseg
from everseg.errors import ConfigError
from everseg.labels import (
    IGNORED,
    SYNTHETIC_BACKGROUND,
    SYNTHETIC_VOID,
    LabelSpace,
    RawLabels,
    doubled,
    find_name,
    is_background_name,
    is_void_name,
    match_names,
    matching_notes,
    shared_classes,
    spelling,
)
from saying import must_say

NAMES = st.text(alphabet="abC1 2-_+é\N{LATIN SMALL LETTER SHARP S}й\u0301\u00ad", max_size=6)

# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Road", "road"),
        ("traffic light", "Traffic-Light"),
        ("traffic_light", "trafficlight"),
        ("traffic \u2013 light", "traffic light"),  # an en dash
        (" road\t", "road"),
        ("ro\u00adad", "road"),  # a soft hyphen
        ("Café", "cafe\u0301"),
        ("Straße", "STRASSE"),
        ("ｒｏａｄ", "road"),
        ("ΔΡΟΜΟΣ", "δρόμος"),
        ("class 1", "class_1"),
        ("class 1", "Class1"),
        ("__background__", "Background"),
        ("_background_", "BG"),
        ("back ground", "bg"),
    ],
)
def test_two_spellings_of_one_name(one: str, other: str) -> None:
    assert spelling(one) == spelling(other)
    assert find_name(one, ["x", other]) == other


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("bus", "bush"),
        ("+", "-"),
        ("CD3+", "CD3-"),
        ("CD3", "CD3-"),
        ("C", "C++"),
        ("-1", "1"),
        ("zone 1-11", "zone 11-1"),
        ("grade 1 2", "grade 12"),
        ("и", "й"),  # in these alphabets a mark makes another letter
        ("か", "が"),
        ("道", "道路"),
        ("_", "-"),
        ("other", "background"),
        ("unlabeled", "background"),
    ],
)
def test_two_names(one: str, other: str) -> None:
    assert spelling(one) != spelling(other)
    assert find_name(one, ["x", other]) is None


@given(st.text(max_size=6))
def test_a_spelling_is_its_own_and_blank_for_blank_names_only(name: str) -> None:
    assert spelling(spelling(name)) == spelling(name)
    assert bool(spelling(name)) == bool(name.strip())


def test_usual_names_of_background_and_void() -> None:
    known = ["background", "Background", "__background__", "_background_", "BG", "bg", "back_ground", "bkg"]
    assert all(map(is_background_name, known))
    assert not any(map(is_background_name, ["", "other", "unlabeled", "void", "ground", "big"]))
    assert all(map(is_void_name, ["ignore", "__ignore__", "Void", "unlabeled", "UNLABELLED"]))
    assert not any(map(is_void_name, ["background", "other", ""]))


# ---------------------------------------------------------------- matching


def one_of_each(names: list[str]) -> list[str]:
    return list({spelling(name): name for name in names}.values())


@given(st.lists(NAMES), st.lists(NAMES))
def test_matching_is_symmetric_and_loses_nobody(wanted: list[str], known: list[str]) -> None:
    wanted, known = one_of_each(wanted), one_of_each(known)
    there, back = match_names(wanted, known), match_names(known, wanted)
    assert dict(back.pairs) == {b: a for a, b in there.pairs.items()}
    assert (there.unmatched_wanted, there.unmatched_known) == (back.unmatched_known, back.unmatched_wanted)
    assert sorted([*there.pairs, *there.unmatched_wanted]) == sorted(wanted)
    assert sorted([*there.pairs.values(), *there.unmatched_known]) == sorted(known)
    assert all(spelling(a) == spelling(b) for a, b in there.pairs.items())
    assert not {*map(spelling, there.unmatched_wanted)} & {*map(spelling, there.unmatched_known)}


@pytest.mark.parametrize(("wanted", "known"), [(["Road", "road"], ["sky"]), (["sky"], ["BG", "background"])])
def test_a_name_that_may_mean_two_is_an_error_with_both(wanted: list[str], known: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        match_names(wanted, known, what=("the data", "the model"))
    (problem,) = caught.value.problems
    both = wanted if len(wanted) == 2 else known
    assert all(f"'{name}'" in problem for name in both)
    assert problem.startswith("the data" if len(wanted) == 2 else "the model")


def test_two_classes_of_one_name_cannot_exist() -> None:
    assert doubled({0: "road", 3: "Road", 4: "sky", 5: "ROAD"}) == [(0, 3), (0, 5)]
    with pytest.raises(ConfigError, match="ids 2 'traffic light' and 7 'Traffic_Light'"):
        RawLabels({0: "background", 2: "traffic light", 7: "Traffic_Light"})
    space = LabelSpace(((SYNTHETIC_BACKGROUND, 3),), ("background", "Background"))
    (problem,) = space.problems()
    must_say(problem, "0 'background' and 1 'Background'", "one name")
    assert "background: Background" in problem
    assert space.problems(stored=True) == []  # as older versions made them: they can be read
    with pytest.raises(ConfigError, match=r"run x .*one name.* 0 'background' and 1"):
        shared_classes(RawLabels({0: "background", 1: "road"}), space, what=("the data", "run x"))


# ---------------------------------------------------------------- a data set seen through a model's classes


def test_a_data_set_meets_a_label_space_by_name_and_its_background_by_role() -> None:
    labels = RawLabels({0: "sky", 4: "Green", 5: "truck", 6: "red"}, background=0)
    space = LabelSpace(((9, 1), (2, 3)), ("background", "red", "green", "blue"))
    found = shared_classes(labels, space)
    assert found.train_ids == {4: 2, 6: 1}
    assert found.respelt == {"Green": "green"}
    assert (found.only_data, found.only_space) == ({5: "truck"}, {3: "blue"})


def test_a_background_that_the_model_does_not_have_is_a_class_that_meets_nobody() -> None:
    labels = RawLabels({0: "background", 1: "road"})
    space = LabelSpace(((7, SYNTHETIC_VOID),), ("road", "void"), None)
    found = shared_classes(labels, space)
    assert (found.train_ids, found.only_data, found.only_space) == ({1: 0}, {0: "background"}, {})
    bare = RawLabels({0: "road"}, background=None)
    with_background = LabelSpace(((SYNTHETIC_BACKGROUND, 7),), ("background", "road"))
    assert shared_classes(bare, with_background).only_space == {}  # ours: no data set has it
    real = LabelSpace(((0, 7),), ("background", "road"))
    assert shared_classes(bare, real).only_space == {0: "background"}


@pytest.mark.parametrize(("fate", "text"), [(IGNORED, "they are ignored"), (0, "they count as background")])
def test_notes_say_who_met_nobody_and_what_that_means(fate: int, text: str) -> None:
    labels = RawLabels({0: "background", 1: "truck", 2: "Red"})
    space = LabelSpace(((0, 1, 2),), ("background", "red", "blue"))
    shared = shared_classes(labels, space)
    table, pixels = np.full(256, IGNORED), np.zeros(256, np.int64)
    table[[0, 1, 2]], pixels[1] = (0, fate, 1), 1234
    notes = matching_notes(shared, space, table, pixels, what=("data set 'd'", "the model"))
    assert len(notes) == 3
    assert "'Red' of data set 'd' is taken for 'red'" in notes[0]
    must_say(notes[1], "the model", "not know 'truck'", "1,234 pixels", "'d'", text)
    must_say(notes[2], "'d'", "no class 'blue'", "mean")
    same = RawLabels({0: "background", 1: "red", 2: "blue"})
    assert matching_notes(shared_classes(same, space), space, table, pixels) == []


# ---------------------------------------------------------------- one owner

SOURCE = Path(everseg.__file__).parent
FOLDED_ELSEWHERE = {
    "cli/docs.py": "anchors of headings",
    "cli/output.py": "the label of an address in the package's metadata",
    "config/show.py": "the first letter of a setting's help",
    "config/loading.py": "the ending of a file",
    "data/datasets/__init__.py": "the ending of a file",
    "data/datasets/coco.py": "names and endings of files",
    "data/datasets/descriptor.py": "the ending of a file",
    "data/datasets/file_names.py": "names of files and words for splits",
    "data/datasets/files.py": "the ending of a file",
    "data/datasets/segments.py": "the ending of a file, and the release's words for its splits",
    "data/datasets/folder.py": "names of folders and endings of files",
    "data/datasets/listing.py": "endings of files",
    "data/datasets/hf.py": "the end of a column's name",
    "engine/peers.py": "a switch of the environment",
    "errors.py": "names of settings and plug-ins, for a hint",
    "methods/switches.py": "a value as YAML writes it",
    "data/datasets/annotated.py": "names of folders and endings of files",
    "data/datasets/tool_files.py": "a tool's words for its splits",
    "data/doctor/examine.py": "the ending of a file",
    "data/get/fetch.py": "hexadecimal digits",
    "data/get/unpack.py": "paths inside archives that a disk would take for one",
    "data/proposal/guess.py": "names of folders and endings of files",
    "data/proposal/unreadable.py": "names and endings of files",
    "data/proposal/lists.py": "names of folders and endings of files",
    "data/verbs.py": "the ending of a file",
    "display.py": "an encoding",
    "deploy/card.py": "the values of a readout",
    "deploy/http_server.py": "names of headers",
    "deploy/serve.py": "names of hosts and types of content",
}
"""Where text is folded that is no name of a class, and what it is."""


def test_no_second_rule_folds_names() -> None:
    folding = re.compile(r"\.(casefold|lower)\(|unicodedata\.normalize\(")
    found = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if folding.search(path.read_text(encoding="utf-8"))
    }
    assert found - {"labels.py", *FOLDED_ELSEWHERE} == set()


def test_no_second_list_holds_the_names_of_the_background() -> None:
    other = re.compile(r"""["'](__background__|_background_|BG|bg|bkg)["']""")
    found = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if other.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"labels.py"}
