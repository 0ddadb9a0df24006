"""What docs/reliability.md and SECURITY.md promise is what tests and campaigns show: each one named is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from campaigns import all_campaigns

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"docs/reliability.md": 40, "SECURITY.md": 20}
"""Page -> the least number of tests that it names."""
NODE = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
RELIABILITY = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_a_page_names_exists(page: str) -> None:
    named = NODE.findall((ROOT / page).read_text(encoding="utf-8"))
    assert len(named) >= PAGES[page]
    for file, function in named:
        assert (ROOT / file).is_file(), file
        assert not function or function in functions(ROOT / file), f"{file}::{function}"
        assert not function or function.startswith("test_"), function


def rows() -> list[list[str]]:
    """The rows of all tables of four columns."""
    found = [line.strip("|").split(" | ") for line in RELIABILITY.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in found if len(row) == 4 and row[0].strip() != "fault"]


def test_every_row_names_what_shows_it_and_how_often() -> None:
    assert len(rows()) >= 40
    for fault, promise, test, figure in rows():
        assert NODE.search(test) or re.search(r"\*`[^`]+`\*", test), fault
        assert promise
        assert figure, fault


def test_every_campaign_is_on_the_page_with_all_its_trials_held() -> None:
    told = {name: row[3] for row in rows() for name in re.findall(r"\*`([^`]+)`\*", row[2])}
    assert told.keys() == all_campaigns().keys()
    for name, one in all_campaigns().items():
        held = re.match(r"([\d,]+) of \1\b", told[name])
        assert held, f"{name}: {told[name]}"
        assert one.everyday <= int(held[1].replace(",", "")) <= one.long, f"{name}: {told[name]}"
