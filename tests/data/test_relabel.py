"""Renaming, joining and leaving out classes, so that data sets share them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import trees

from everseg.data.base import Dataset
from everseg.data.batches.index import class_counts
from everseg.data.datasets import camvid, folder
from everseg.data.datasets.relabel import relabelled
from everseg.errors import ConfigError, DataError
from everseg.labels import RawLabels
from saying import must_say

STRIPES = [0, 1, 2, 3, 4, 9]


def _data(root: Path, **options: object) -> Dataset:
    """Background 0, road 1, pavement 2, car 3, truck 4, void 9: one stripe of each in one mask."""
    trees.save(root / "images/train/a.png", trees.image_of(3))
    trees.save(root / "masks/train/a.png", trees.mask_of(STRIPES))
    given = {"classes": ["background", "road", "pavement", "car", "truck"], "ignore": 9} | options
    return folder.build(root, **given)


def _seen(data: Dataset) -> list[int]:
    """What the stripes read as, in their order, through both ways of reading."""
    split = data.splits["train"]
    image, mask = split.read(0)
    np.testing.assert_array_equal(image, trees.image_of(3))
    np.testing.assert_array_equal(mask, split.read_mask(0))
    assert mask.dtype == np.uint8
    columns = [int(np.flatnonzero(trees.mask_of(STRIPES)[0] == raw)[0]) for raw in STRIPES]
    return mask[0, columns].tolist()


def test_a_class_renamed_keeps_its_id(tmp_path: Path) -> None:
    data = _data(tmp_path)
    new = relabelled(data, {"pavement": "sidewalk"})
    assert new.labels == RawLabels({0: "background", 1: "road", 2: "sidewalk", 3: "car", 4: "truck"}, 0, (9,))
    assert _seen(new) == STRIPES
    assert new.splits["train"].fingerprint() == data.splits["train"].fingerprint()  # the masks read the same


def test_classes_of_one_name_become_one_class_with_the_smallest_id(tmp_path: Path) -> None:
    new = relabelled(_data(tmp_path), {"truck": "vehicle", "car": "vehicle"})
    assert new.labels == RawLabels({0: "background", 1: "road", 2: "pavement", 3: "vehicle"}, 0, (9,))
    assert _seen(new) == [0, 1, 2, 3, 3, 9]
    joined = relabelled(_data(tmp_path), {"truck": "road"})  # a name that stands already
    assert joined.labels.names == {0: "background", 1: "road", 2: "pavement", 3: "car"}
    assert _seen(joined) == [0, 1, 2, 3, 1, 9]


def test_names_are_replaced_at_once(tmp_path: Path) -> None:
    new = relabelled(_data(tmp_path), {"road": "car", "car": "road"})
    assert new.labels.names == {0: "background", 1: "car", 2: "pavement", 3: "road", 4: "truck"}
    assert _seen(new) == STRIPES


def test_ignored_classes_read_as_void(tmp_path: Path) -> None:
    new = relabelled(_data(tmp_path), {"truck": "ignore", "road": "ignore"})
    assert new.labels == RawLabels({0: "background", 2: "pavement", 3: "car"}, 0, (9,))
    assert _seen(new) == [0, 9, 2, 3, 9, 9]


def test_ignored_classes_of_a_data_set_without_void_become_its_void(tmp_path: Path) -> None:
    classes = ["background", "road", "pavement", "car", "truck", "a", "b", "c", "d", "tree"]
    new = relabelled(_data(tmp_path, classes=classes, ignore=None), {"truck": "ignore", "pavement": "ignore"})
    assert new.labels.void == (2,)
    assert sorted(new.labels.names) == [0, 1, 3, 5, 6, 7, 8, 9]
    assert _seen(new) == [0, 1, 2, 3, 2, 9]


@pytest.mark.parametrize(
    ("rename", "name", "background", "seen"),
    [
        ({"background": "other"}, "other", 0, [0, 1, 2, 3, 4, 9]),
        ({"pavement": "background"}, "background", 0, [0, 1, 0, 3, 4, 9]),
        ({"background": "road"}, "road", 0, [0, 0, 2, 3, 4, 9]),
        ({"background": "ignore"}, None, None, [9, 1, 2, 3, 4, 9]),
    ],
)
def test_the_background_may_be_renamed_joined_and_ignored(
    tmp_path: Path, rename: dict[str, str], name: str | None, background: int | None, seen: list[int]
) -> None:
    new = relabelled(_data(tmp_path), rename)
    assert new.labels.background == background
    if background is not None:
        assert new.labels.names[background] == name
    assert _seen(new) == seen


def test_a_background_of_a_large_id_moves_with_the_class_that_joins_it(tmp_path: Path) -> None:
    data = _data(tmp_path, background="truck")
    new = relabelled(data, {"road": "truck"})
    assert new.labels.background == 1
    assert new.labels.names[1] == "truck"
    assert new.labels.classes == (0, 2, 3)


def test_fingerprint_and_index_follow_the_table(tmp_path: Path) -> None:
    data = _data(tmp_path / "data")
    one, two = (relabelled(data, {"truck": to}) for to in ("car", "ignore"))
    prints = {d.splits["train"].fingerprint() for d in (data, one, two)}
    assert len(prints) == 3
    counts = [class_counts(d.splits["train"], d.labels, cache_dir=tmp_path / "cache")[0] for d in (data, one)]
    assert counts[1][3] == counts[0][3] + counts[0][4]
    assert counts[1][4] == 0
    again = relabelled(data, {"truck": "car"}).splits["train"].fingerprint()
    assert again == one.splits["train"].fingerprint()


def test_undeclared_ids_are_still_found(tmp_path: Path) -> None:
    new = relabelled(_data(tmp_path, ignore=7), {"truck": "car"})
    with pytest.raises(DataError, match="id 9 "):
        class_counts(new.splits["train"], new.labels, cache_dir=tmp_path / "cache")


def test_the_split_keeps_its_paths_and_survives_pickling(tmp_path: Path) -> None:
    data = _data(tmp_path)
    split = pickle.loads(pickle.dumps(relabelled(data, {"truck": "car"}).splits["train"]))
    assert (len(split), split.id(0), split.name) == (1, "a", "train")
    assert split.mask_path(0) == tmp_path / "masks/train/a.png"
    assert split.warnings == ()
    assert not hasattr(split, "nothing")
    assert relabelled(data, {}) is data


def test_two_data_sets_share_classes_under_one_name(tmp_path: Path) -> None:
    street = relabelled(_data(tmp_path / "a"), {"pavement": "sidewalk", "background": "ignore"})
    cam = relabelled(
        camvid.build(trees.camvid(tmp_path / "b")), {"pavement": "sidewalk", "bicyclist": "ignore"}
    )
    assert set(street.labels.names.values()) & set(cam.labels.names.values()) == {"road", "sidewalk", "car"}


def test_all_wrong_names_are_reported_with_near_misses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        relabelled(_data(tmp_path), {"raod": "street", "zebra": "x", "car": "", "truck": "Road"})
    for facts in (
        ("rename.raod", "'folder'", "did you mean 'road'"),
        ("rename.zebra", "'folder'", "background, road, pavement"),
        ("rename.car", "class name", "'ignore'", "got ''"),
        ("rename: 'road' and 'Road'", "two classes"),
    ):
        must_say(caught.value, *facts)


def test_new_names_that_differ_in_spaces_or_dashes_only_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'Big-Car'.*'big car'.*two classes"):
        relabelled(_data(tmp_path), {"car": "Big-Car", "truck": "big car"})


def test_a_data_set_without_any_class_left_is_refused(tmp_path: Path) -> None:
    everything = dict.fromkeys(("road", "pavement", "car", "truck"), "ignore")
    with pytest.raises(ConfigError, match=r"'folder' without a class"):
        relabelled(_data(tmp_path), everything)


def test_names_are_found_in_any_spelling(tmp_path: Path) -> None:
    data = _data(tmp_path)
    plain = relabelled(data, {"truck": "car", "pavement": "ignore"})
    spelt = relabelled(data, {"TRUCK": "car", "pave-ment": "__ignore__"})
    assert spelt.labels == plain.labels
    assert _seen(spelt) == _seen(plain)
    with pytest.raises(ConfigError, match="rename: 'truck' and 'Truck' are one name"):
        relabelled(data, {"truck": "car", "Truck": "bus"})


def test_a_class_renamed_to_the_background_is_it_where_there_was_none(tmp_path: Path) -> None:
    data = _data(tmp_path, background=None)
    new = relabelled(data, {"background": "sky", "pavement": "BG"})
    assert (new.labels.background, new.labels.classes) == (2, (0, 1, 3, 4))
    assert relabelled(data, {"car": "vehicle"}).labels.background is None
