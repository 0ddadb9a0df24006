"""A rule of the texts: "1 images" is never said. A number and its noun come from `display.counted`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import everseg

ROOT = Path(everseg.__file__).parent
NOUNS = (
    "annotations categories channels classes colours domains entries faults files images lines maps masks names "
    "objects outputs pictures pixels problems runs samples steps tensors values"
)
PLURAL = re.compile(rf" (?:(?!in |of |for )[a-z-]+ )?(?:{NOUNS.replace(' ', '|')})\b")
SUMS = re.compile(r"(?:\} of|of the|of its|all|the) $")
"""What is said of a whole: "2 of 3 images", "none of the 3 objects"."""


def unchecked(tree: ast.AST) -> Iterator[int]:
    """Lines of texts that put the length of something before a plural without looking whether it is one."""
    for text in (node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)):
        said = ""
        for part, behind in zip(text.values, [*text.values[1:], None], strict=True):
            if isinstance(part, ast.Constant):
                said += part.value
                continue
            length = isinstance(part, ast.FormattedValue) and (
                isinstance(part.value, ast.Call)
                and isinstance(part.value.func, ast.Name)
                and part.value.func.id == "len"
            )
            plural = isinstance(behind, ast.Constant) and PLURAL.match(behind.value)
            if length and plural and not SUMS.search(said):
                yield part.lineno
            said += "}"


def test_lengths_stand_before_nouns_through_counted_only() -> None:
    asked = {"errors.py"}  # the house's ground floor; it says "problems" of several only
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted(ROOT.rglob("*.py"))
        if path.name not in asked and "losses" not in path.parts
        for line in unchecked(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == [], "everseg.display.counted knows singular and plural"


@pytest.mark.parametrize(("text", "guilty"), [
    ('f"{len(x)} images are gone"', True), ('f"{len(x)} unreadable files"', True),
    ('f"2 of {y}: {len(x)} of {len(z)} images"', False), ('f"{len(x)} in images"', False),
    ('f"{counted(len(x), \'image\')} gone"', False), ('f"none of the {len(x)} objects"', False),
])  # fmt: skip
def test_the_rule_can_be_broken(text: str, guilty: bool) -> None:
    assert bool(list(unchecked(ast.parse(text)))) == guilty
