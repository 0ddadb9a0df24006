"""Text files that a data.yaml names: read only beside the data, only regular ones, and their lines are never shown."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trees

from everseg.data.datasets.folder import build
from everseg.errors import ConfigError, DataError

SECRET = "root:x:0:0:secret"
TEXTS = (
    "labels: {palette: FILE}",
    "classes: [background, a]\nskip: FILE",
    "classes: [background, a]\nsplits: {train: FILE}",
)


@pytest.fixture
def described(tmp_path: Path) -> Callable[[str, Path], Path]:
    """A data.yaml that names a file."""
    trees.folder(tmp_path / "data")

    def make(text: str, file: Path) -> Path:
        path = tmp_path / "data/other.yaml"
        path.write_text(
            "images: images/{split}\nmasks: masks/{split}\n" + text.replace("FILE", json.dumps(str(file)))
        )
        return path

    return make


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("way", ["absolute", "above", "a link"])
def test_a_file_outside_of_the_data_is_refused_and_not_shown(
    described: Callable[[str, Path], Path], tmp_path: Path, text: str, way: str
) -> None:
    (tmp_path / "secret.txt").write_text(f"{SECRET}\n")
    (tmp_path / "data/link.txt").symlink_to(tmp_path / "secret.txt")
    named = {"absolute": tmp_path / "secret.txt", "above": Path("../secret.txt"), "a link": Path("link.txt")}
    with pytest.raises(ConfigError, match=r"out(side)? of the data folder") as caught:
        build(descriptor=described(text, named[way]))
    assert "secret:" not in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("text", TEXTS)
def test_a_fifo_is_not_waited_for(described: Callable[[str, Path], Path], tmp_path: Path, text: str) -> None:
    os.mkfifo(tmp_path / "data/pipe.txt")
    with pytest.raises((ConfigError, DataError), match=r"pipe\.txt"):
        build(descriptor=described(text, Path("pipe.txt")))


def test_lines_of_a_palette_that_is_none_are_not_shown(
    described: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    (tmp_path / "data/notes.txt").write_text("a:1,2,3::\n" + f"{SECRET}\n")
    with pytest.raises(ConfigError, match="line 2") as caught:
        build(descriptor=described(TEXTS[0], Path("notes.txt")))
    assert SECRET not in str(caught.value)


def test_a_file_larger_than_any_list_is_not_read(
    described: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    with (tmp_path / "data/large.txt").open("wb") as file:
        file.truncate(50_000_000_000)
    for text in TEXTS:
        with pytest.raises((ConfigError, DataError), match="larger than"):
            build(descriptor=described(text, Path("large.txt")))
