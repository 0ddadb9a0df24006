"""The words on report and compare pages mean what docs/glossary.md says: one text, checked here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from everseg.reports.glossary import MEANINGS, PROTOCOLS

PAGE = Path(__file__).resolve().parents[2] / "docs/glossary.md"
HEADINGS = {"old, new, base": "Old, new and all classes"}
"""Word on a page -> heading of its entry, where that is another."""


def entries() -> dict[str, str]:
    """Heading -> its text without marks of Markdown."""
    parts = re.split(r"^#{2,3} (.+)\n", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)|[*`]", r"\1", text) for text in parts[1::2])
    return dict(
        zip((head.lower() for head in parts[::2]), (" ".join(text.split()) for text in plain), strict=True)
    )


@pytest.mark.parametrize("word", MEANINGS)
def test_an_entry_of_the_glossary_begins_with_the_meaning_on_the_pages(word: str) -> None:
    text = entries()[HEADINGS.get(word, word).lower()]
    meaning = MEANINGS[word]
    assert text.startswith(meaning[:1].upper() + meaning[1:])


def test_the_glossary_says_of_every_protocol_what_the_pages_say() -> None:
    text = entries()["protocol"]
    for name, meaning in PROTOCOLS.items():
        assert f"{name}: {meaning}." in text
