"""Inputs that are large where nobody looks: headers, messages, and objects on each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from everseg.config.loading import load
from everseg.data.datasets import coco_shapes
from everseg.data.datasets.coco_shapes import Picture, draw
from everseg.data.datasets.decode import Reading, read_image
from everseg.data.datasets.listing import files_to_predict
from everseg.errors import MOST_LISTED, ConfigError, DataError
from saying import must_say


@pytest.mark.parametrize(
    ("magic", "numbers", "values"),
    [("P6", "2 2\n255", 12), ("P5", "2 2\n255", 4), ("P4", "2 2", 2), ("Pf", "2 2\n-1.0", 16)],
)
def test_the_header_of_a_ppm_is_short(magic: str, numbers: str, values: int) -> None:
    honest = f"{magic}\n# made by hand\n{numbers}\n".encode() + b" " * values
    if magic != "Pf":  # floats are refused for another reason
        assert read_image(honest).shape == (2, 2, 3)
    width, rest = numbers.split(" ", 1)
    long = f"{magic}\n{width} #".encode() + b"x" * 70_000 + f"\n{rest}\n".encode() + b" " * values
    with pytest.raises(DataError) as caught:
        read_image(long)
    must_say(caught.value, "64 KiB", "comments")


def test_large_ppms_of_blank_bytes_are_read() -> None:
    assert read_image(b"P6\n300 300\n255\n" + b" " * 270_000).shape == (300, 300, 3)
    assert read_image(b"P4\n960 960\n" + b" " * 115_200).shape == (960, 960, 3)


def test_a_message_of_many_problems_lists_the_first(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("".join(f"k{i}: 1\n" for i in range(3 * MOST_LISTED)))
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert len(caught.value.problems) >= 3 * MOST_LISTED
    assert len(str(caught.value).splitlines()) == MOST_LISTED + 2
    (tmp_path / "in").mkdir()
    for number in range(2 * MOST_LISTED):
        (tmp_path / "in" / f"{number}.png").touch()
    with pytest.raises(DataError) as empty:
        files_to_predict([tmp_path / "in"], tmp_path / "out", Reading())
    must_say(empty.value, f"{2 * MOST_LISTED} unreadable")
    must_say(empty.value, f"{MOST_LISTED} more")


def test_objects_that_lie_on_each_other_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Picture("a.png", 100, 100, [(1, [[0, 0, 100, 0, 0, 100]])] * 5)
    assert draw(picture, {1: 1}, 10_000).any()
    for limit, most in (("MOST_DRAWN", 10_000), ("MOST_RUNS", 300)):
        with monkeypatch.context() as changed:
            changed.setattr(coco_shapes, limit, most)
            with pytest.raises(DataError) as caught:
                draw(picture, {1: 1}, 10_000)
            must_say(caught.value, "object", "10000")
