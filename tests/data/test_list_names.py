"""Image lists as other machines and people wrote them, and splits that stand beside the data."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trees

from everseg.config.fields import DataConfig
from everseg.data.datasets import load_dataset
from everseg.errors import DataError
from saying import must_say

Call = Callable[..., tuple[int, str, str]]
NFC, NFD = (unicodedata.normalize(form, "straße_übung") for form in ("NFC", "NFD"))


def sample(root: Path, number: int, image: str, mask: str) -> None:
    """An image and its mask, whose column `number` is of class 1."""
    trees.save(root / image, trees.image_of(number))
    pixels = np.zeros(trees.SIZE, np.uint8)
    pixels[:, number] = 1
    trees.save(root / mask, pixels)


def listed(root: Path, content: str, name: str = "train.txt", **options: Any) -> Any:
    trees.write(root / name, content)
    options = {
        "images": "images",
        "masks": "masks",
        "splits": {"train": name},
        "classes": ["background", "road"],
        **options,
    }
    return load_dataset(DataConfig(dataset="folder", root=str(root), options=options)).splits["train"]


def numbers(split: Any) -> list[int]:
    """The numbers of the images, read from their masks."""
    return [int(np.flatnonzero((split.read(i)[1] == 1).any(axis=0))[0]) for i in range(len(split))]


@pytest.mark.parametrize(
    "line",
    [
        "images/{0}.png", "{0}", "images\\{0}.png\tmasks\\{0}.png", "D:\\my data\\images\\{0}.png",
        "/srv/label/images/{0}.png /srv/label/masks/{0}.png", "images/{0}.JPG, masks/{0}.PNG", "./images/{0}.png",
        "/home/ann lee/images/{0}.png", '"images/{0}.png" "masks/{0}.png"', "images/{0}.png;masks/{0}.png",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a_{}", "my photo ({}) [x]", "a,{}", "{}.jpg", NFC + "{}", NFD + "{}"])
def test_lines_of_lists_find_their_images_whatever_machine_wrote_them(
    tmp_path: Path, line: str, name: str
) -> None:
    for number in range(4):
        sample(tmp_path, number, f"images/{name.format(number)}.png", f"masks/{name.format(number)}.png")
    content = "".join(line.format(name.format(number)) + "\r\n" for number in (2, 0, 3))
    assert numbers(listed(tmp_path, content)) == [2, 0, 3]


def test_a_line_that_can_be_read_in_two_ways_is_refused_with_both(tmp_path: Path) -> None:
    sample(tmp_path, 0, "images/a b.png", "masks/a b.png")
    sample(tmp_path, 1, "images/a.png", "masks/b.png")
    with pytest.raises(DataError) as stop:
        listed(tmp_path, "a b\n")
    must_say(stop.value, "images/a b.png", "images/a.png", "masks/b.png", "tab")
    assert numbers(listed(tmp_path, "a\tb\n")) == [1]


def test_the_end_of_a_pair_is_no_name(tmp_path: Path) -> None:
    """The image x is missing; its line ends like that of the image y, which is there."""
    sample(tmp_path, 0, "images/y.png", "masks/y.png")
    for line in ("images/x.png masks/y.png", "x y", "images/x masks/y", "/a b/images/x.png /a b/masks/y.png"):
        with pytest.raises(DataError, match="x"):
            listed(tmp_path, f"{line}\ny\n")
        assert numbers(listed(tmp_path, f"{line}\ny\n", on_missing="skip")) == [0]


def test_one_name_in_two_folders_keeps_its_own_mask(tmp_path: Path) -> None:
    sample(tmp_path, 1, "images/north/a.png", "masks/north/a.png")
    sample(tmp_path, 2, "images/south/a.png", "masks/south/a.png")
    sample(tmp_path, 3, "images/south/b.png", "masks/south/b.png")
    split = listed(tmp_path, "images/south/a.png\n/x/north/a.jpg\nb\n")
    assert numbers(split) == [2, 1, 3]
    assert len({split.id(i) for i in range(3)}) == 3
    with pytest.raises(DataError, match="a"):
        listed(tmp_path, "a\n")


def test_folders_of_images_beside_each_other_do_not_share_a_mask(tmp_path: Path) -> None:
    sample(tmp_path, 1, "north/a.png", "masks/north/a.png")
    sample(tmp_path, 2, "south/a.png", "masks/south/a.png")
    assert numbers(listed(tmp_path, "south/a.png\nnorth/a.png\n", images="north")) == [2, 1]
    sample(tmp_path, 3, "north/c.png", "masks/c.png")
    trees.save(tmp_path / "south/c.png", trees.image_of(5))
    with pytest.raises(DataError) as stop:
        listed(tmp_path, "north/c.png\nsouth/c.png\n", images="north")
    must_say(stop.value, "masks/c.png", "north/c.png", "south/c.png")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.csv", "image,mask\nimages/2.png,masks/2.png\nimages/0.png,masks/0.png\n"),
        ("train.csv", "images/2.png,masks/2.png\nimages/0.png,masks/0.png\n"),
        ("train.csv", "2.png\n0.png\n"),
        ("Split.CSV", "id;subset;file_name\nx;Train;2.png\ny;valid;1.png\nz;training;0.png\n"),
        ("Train.TXT", "2\n0\n"),
    ],
)
def test_csv_lists_name_their_columns_or_have_one_or_two(tmp_path: Path, name: str, content: str) -> None:
    for number in range(4):
        sample(tmp_path, number, f"images/{number}.png", f"masks/{number}.png")
    assert numbers(listed(tmp_path, content, name)) == [2, 0]


def test_csv_lists_with_unknown_columns_or_splits_are_refused(tmp_path: Path) -> None:
    sample(tmp_path, 0, "images/0.png", "masks/0.png")
    for content, fact in (("a,b,c\n0.png,0.png,1\n", "image"), ("image,split\n0.png,later\n", "later")):
        with pytest.raises(DataError, match=rf"train\.csv.*{fact}"):
            listed(tmp_path, content, "train.csv")


@pytest.mark.parametrize("ending", [".jpg.png", ".JPG.PNG", ".png"])
def test_masks_that_keep_the_ending_of_their_image_pair(tmp_path: Path, ending: str) -> None:
    for number in range(3):
        sample(tmp_path, number, f"images/{number}.png", f"masks/{number}{ending}")
    assert numbers(listed(tmp_path, "0\n2.png\n")) == [0, 2]
