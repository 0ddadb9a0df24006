"""Polygon files: what is drawn, by hand-made masks, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from everseg.data import polygons
from everseg.data.get.draw_masks import LAYOUTS
from everseg.data.polygons import draw, parse
from everseg.errors import DataError

V = 255


def box(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def thing(label: str, points: list[list[float]], **more: Any) -> dict[str, Any]:
    return {"label": label, "polygon": points, **more}


def file_of(*objects: Any, size: tuple[int, int] = (4, 6), **more: Any) -> bytes:
    content = {"imgHeight": size[0], "imgWidth": size[1], "objects": list(objects), **more}
    return json.dumps(content).encode()


def drawn(kind: str, *objects: Any, **options: Any) -> list[list[int]]:
    layout = LAYOUTS[kind]
    picture = draw(
        parse(file_of(*objects)),
        layout.values,
        background=255,
        least_points=layout.least_points,
        **options,
    )
    return np.asarray(picture).tolist()


def test_a_polygon_covers_its_border_and_the_rest_is_void() -> None:
    assert drawn("cityscapes", thing("road", box(1, 1, 3, 2))) == [
        [V, V, V, V, V, V],
        [V, 0, 0, 0, V, V],
        [V, 0, 0, 0, V, V],
        [V, V, V, V, V, V],
    ]


def test_slanted_borders_are_covered_too() -> None:
    assert drawn("cityscapes", thing("sky", [[0, 0], [3, 0], [0, 3]])) == [
        [10, 10, 10, 10, V, V],
        [10, 10, 10, V, V, V],
        [10, 10, V, V, V, V],
        [10, V, V, V, V, V],
    ]


def test_later_objects_cover_earlier_ones_whatever_they_are() -> None:
    road, car = thing("road", box(0, 0, 3, 2)), thing("car", box(2, 1, 5, 3))
    assert drawn("cityscapes", road, car) == [
        [0, 0, 0, 0, V, V],
        [0, 0, 13, 13, 13, 13],
        [0, 0, 13, 13, 13, 13],
        [V, V, 13, 13, 13, 13],
    ]
    assert drawn("cityscapes", car, road) == [
        [0, 0, 0, 0, V, V],
        [0, 0, 0, 0, 13, 13],
        [0, 0, 0, 0, 13, 13],
        [V, V, 13, 13, 13, 13],
    ]


def test_void_labels_cover_classes_with_void() -> None:
    objects = thing("road", box(0, 0, 5, 3)), thing("ego vehicle", box(0, 2, 5, 3))
    for kind in ("cityscapes", "idd"):
        assert drawn(kind, *objects) == [[0] * 6, [0] * 6, [V] * 6, [V] * 6]


@pytest.mark.parametrize(("deleted", "shown"), [(1, V), (True, V), (0, 0), (False, 0), (None, 0)])
def test_deleted_objects_are_left_out_by_the_value_not_by_the_key(deleted: Any, shown: int) -> None:
    assert drawn("idd", thing("road", box(0, 0, 5, 3), deleted=deleted)) == [[shown] * 6] * 4


def test_a_deleted_object_of_an_unknown_label_is_no_fault() -> None:
    assert drawn("idd", thing("ufo", box(0, 0, 5, 3), deleted=1)) == [[V] * 6] * 4


@pytest.mark.parametrize(
    ("kind", "label", "value"),
    [
        ("cityscapes", "cargroup", 13),
        ("cityscapes", "bicyclegroup", 18),
        ("cityscapes", "polegroup", V),  # a label of its own, not learnt
        ("cityscapes", "pole", 5),
        ("idd", "cargroup", 9),
        ("idd", "autorickshawgroup", 8),
        ("idd", "polegroup", 20),  # a label of its own, of the same class as pole
        ("idd", "drivable fallback", 1),
        ("idd", "parking", 1),
        ("idd", "train", 12),
        ("idd", "fallback background", 25),
    ],
)
def test_groups_count_as_their_label_unless_they_are_one(kind: str, label: str, value: int) -> None:
    assert drawn(kind, thing(label, box(0, 0, 5, 3))) == [[value] * 6] * 4


def test_a_licence_plate_is_part_of_the_car_in_cityscapes_and_void_in_idd() -> None:
    objects = thing("car", box(0, 0, 5, 3)), thing("license plate", box(2, 1, 3, 1))
    assert drawn("cityscapes", *objects) == [[13] * 6] * 4
    assert drawn("idd", *objects) == [[9] * 6, [9, 9, V, V, 9, 9], [9] * 6, [9] * 6]


def test_vertices_may_lie_outside_of_the_image() -> None:
    assert drawn("cityscapes", thing("road", box(-7, 2, 2, 90)), thing("sky", box(40, 40, 50, 50))) == [
        [V, V, V, V, V, V],
        [V, V, V, V, V, V],
        [0, 0, 0, V, V, V],
        [0, 0, 0, V, V, V],
    ]


def test_fractions_of_coordinates_are_cut_off() -> None:
    assert drawn("cityscapes", thing("road", box(1.9, 1.9, 3.9, 2.9))) == drawn(
        "cityscapes", thing("road", box(1, 1, 3, 2))
    )


def test_two_points_are_a_line_in_cityscapes_and_nothing_in_idd() -> None:
    line = thing("road", [[1, 1], [4, 1]])
    assert drawn("cityscapes", line) == [[V] * 6, [V, 0, 0, 0, 0, V], [V] * 6, [V] * 6]
    assert drawn("idd", line) == [[V] * 6] * 4


@pytest.mark.parametrize("points", [[], [[1, 1]]])
@pytest.mark.parametrize("kind", ["cityscapes", "idd"])
def test_fewer_points_are_nothing(kind: str, points: list[list[float]]) -> None:
    assert drawn(kind, thing("road", points)) == [[V] * 6] * 4


def test_unknown_labels_are_all_named_and_can_be_left_out() -> None:
    objects = [thing(name, box(0, 0, 5, 3)) for name in ("road", "ufo", "ufogroup", "group", "ufo")]
    with pytest.raises(DataError, match=r"data set: 'ufo'; 'ufogroup'; 'group'$"):
        drawn("idd", *objects)
    assert drawn("idd", *objects, skip_unknown=True) == [[0] * 6] * 4


def test_an_unknown_label_whose_polygon_is_not_drawn_is_no_fault() -> None:
    assert drawn("idd", thing("ufo", [[0, 0], [5, 3]])) == [[V] * 6] * 4


def test_what_tools_add_to_a_file_is_not_looked_at() -> None:
    text = file_of(
        thing("road", box(0, 0, 5, 3), draw=False, user="a", date="x", id=3, verified=0), comment=""
    )
    layout = LAYOUTS["cityscapes"]
    assert np.asarray(draw(parse(text), layout.values, background=255)).tolist() == [[0] * 6] * 4


def test_sizes_may_be_written_with_a_point() -> None:
    annotation = parse(b'{"imgHeight": 4.0, "imgWidth": 6, "objects": []}')
    assert (annotation.height, annotation.width) == (4, 6)


ROAD = thing("road", box(0, 0, 1, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty"),
        (b"\n ", "is empty"),
        (b'{"imgHeight": 4, "imgWi', "is not JSON"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"imgHeight": ' + b"9" * 5000 + b', "imgWidth": 6, "objects": []}', "is not JSON"),
        (b"[]", "holds a list"),
        (b"3", "holds a number"),
        (b"null", "holds null"),
        (b"{}", "lacks imgHeight, imgWidth, objects"),
        (b'{"imgHeight": 4, "objects": []}', "lacks imgWidth"),
        (file_of(size=(4, 0)), "imgWidth is 0, expected"),
        (file_of(size=(-4, 6)), "imgHeight is -4"),
        (file_of(size=("4", 6)), "imgHeight is '4'"),
        (file_of(size=(True, 6)), "imgHeight is true"),
        (file_of(size=(4.5, 6)), "imgHeight is 4.5"),
        (file_of(size=(float("nan"), 6)), "imgHeight is nan"),
        (file_of(size=(4, float("inf"))), "imgWidth is inf"),
        (file_of(size=(100_000, 100_000)), "100000x100000"),
        (file_of(size=(1, 10**400)), "the limit of 100000000"),
        (file_of(objects={}), "objects is an object"),
        (file_of(7), r"objects[0] is a number"),
        (file_of(ROAD, {"label": "road"}), "objects[1] lacks polygon"),
        (file_of({}), "[0] lacks label and polygon"),
        (file_of(thing(5, [])), "has the label 5, expected a name"),
        (file_of(thing("road", {"x": 1})), "('road'): polygon is"),
        (file_of(thing("road", [[0, 0], 5])), "point 1 is 5, expected [x, y]"),
        (file_of(thing("road", [[0, 0], [1]])), "point 1 is [1]"),
        (file_of(thing("road", [[0, 0, 0]])), "point 0 is [0, 0, 0]"),
        (file_of(thing("road", [["1", 0]])), "point 0 is ['1', 0]"),
        (file_of(thing("road", [[True, 0]])), "point 0 is [True, 0]"),
        (file_of(thing("road", [[None, 0]])), "point 0 is [None, 0]"),
        (file_of(thing("road", [[float("nan"), 0]])), "point 0 is [nan, 0]"),
        (file_of(thing("road", [[0, float("-inf")]])), "point 0 is [0, -inf]"),
        (file_of(thing("road", [[0, 2_000_000]])), "far outside"),
        (file_of(thing("road", [[0, -(10**400)]])), "far outside"),
        (file_of(thing("road", [], deleted="no")), "deleted is 'no', expected 0 or 1"),
    ],
)
def test_malformed_files_are_refused_with_the_place(text: bytes, message: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_all_faults_of_a_file_are_counted_and_the_first_shown() -> None:
    with pytest.raises(DataError) as caught:
        parse(file_of(*range(9), size=(0, 6)))
    assert str(caught.value).count("; ") == 5
    assert str(caught.value).startswith("imgHeight is 0")
    assert str(caught.value).endswith("and 5 more")


def test_enormous_files_are_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polygons, "MAX_BYTES", 20)
    with pytest.raises(DataError, match="limit of 20"):
        parse(b" " * 21)
