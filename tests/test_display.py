"""Results as text, as HTML, and as the dictionaries that they were."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from everseg.display import OnceADictionary, Picture, Piece, Result, Table, table

HOSTILE = '<script>alert("x")</script>\x1b[31m&'


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.attributes: dict[str, str | None] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= dict(attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


@dataclass(frozen=True, repr=False)
class Weighed(OnceADictionary):
    name: str
    weight: float
    notes: Sequence[str] = ()

    def shown(self) -> Iterable[Piece]:
        yield f"weighed: {self.name}"
        yield table(["name", "weight"], [[self.name, self.weight]], title="Weights", right="weight")
        yield Picture(lambda: b"PNG", f"a picture of {self.name}")

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "weight": self.weight}


def test_a_table_is_text_as_in_the_terminal() -> None:
    made = table(["class", "pixels"], [["road", 12], ["car", 5]], title="Pixels", right="pixels")
    lines = str(made).splitlines()
    assert lines[0] == "Pixels"
    assert [line.split() for line in (lines[1], *lines[3:])] == [
        ["class", "pixels"],
        ["road", "12"],
        ["car", "5"],
    ]
    assert lines[3].index("12") + 2 == lines[4].index("5") + 1, "numbers stand to the right"
    assert made.row_count == 2


def test_no_table_is_cut_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit follows below, beside the first column again; letters of two columns' width count so."""
    monkeypatch.setenv("COLUMNS", "60")
    columns = ["method", *(f"score number {n}" for n in range(6))]
    rows = [
        [name, *(f"{k}{n}.5 ± 0.{n} – 9" for n in range(6))]
        for k, name in enumerate(("mib minus ft", "道路と歩道"))
    ]
    lines = str(table(columns, rows, title="Scores", right="|".join(columns[1:]))).splitlines()
    assert max(map(len, lines)) <= 60
    for row in rows:
        for cell in row[1:]:
            assert sum(cell in line for line in lines) == 1, cell
    assert sum("道路と歩道" in line for line in lines) == sum("method" in line for line in lines) == 2


def test_a_result_prints_its_lines_and_tables_and_leaves_pictures_out() -> None:
    result = Weighed("cat", 4.5)
    assert str(result) == repr(result)
    lines = str(result).splitlines()
    assert lines[0] == "weighed: cat"
    assert lines[1] == "Weights"
    assert lines[-1].split() == ["cat", "4.5"]
    assert "picture" not in str(result)


def test_notes_stand_before_the_rest() -> None:
    result = Weighed("cat", 4.5, [HOSTILE])
    assert str(result).splitlines()[0].startswith("note: <script>")
    assert Tags(result._repr_html_()).text.startswith("note: <script>")


def test_a_notebook_shows_tables_and_pictures() -> None:
    page = Tags(Weighed("cat", 4.5)._repr_html_())
    assert [tag for tag in page.tags if tag in ("p", "table", "figure", "img")] == [
        "p",
        "p",
        "table",
        "figure",
        "img",
    ]
    assert page.attributes["src"] == "data:image/png;base64," + base64.b64encode(b"PNG").decode()
    assert page.attributes["alt"] == "a picture of cat"


def test_a_picture_whose_file_is_gone_says_so(tmp_path: Path) -> None:
    shown = Picture((tmp_path / "gone.png").read_bytes, "what it was")._repr_html_()
    assert "img" not in Tags(shown).tags
    assert "gone.png" in Tags(shown).text
    assert "what it was" in Tags(shown).text


def test_every_text_in_a_notebook_is_escaped() -> None:
    for shown in (
        Weighed(HOSTILE, 1.0)._repr_html_(),
        table([HOSTILE], [[HOSTILE]], title=HOSTILE, right=HOSTILE)._repr_html_(),
    ):
        page = Tags(shown)
        assert "script" not in page.tags
        assert "\x1b" not in shown
        assert '<script>alert("x")</script>\\x1b[31m&' in page.text


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in str(Weighed(HOSTILE, 1.0))


def test_keys_of_the_former_dictionary_work_with_a_warning() -> None:
    result = Weighed("cat", 4.5)
    with pytest.warns(DeprecationWarning, match=r"Weighed\['weight'\].*to_json"):
        assert result["weight"] == 4.5
    with pytest.warns(DeprecationWarning, match="height"), pytest.raises(KeyError):
        result["height"]


def test_a_class_must_say_what_it_shows() -> None:
    with pytest.raises(NotImplementedError):
        Result().shown()
    with pytest.raises(NotImplementedError):
        Result().to_json()
    assert isinstance(table(["a"], []), Table)
