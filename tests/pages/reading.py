"""What a page of README or docs prints: its blocks, its commands, and what it says a reader has already."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WANTED = re.compile(r"^\| I want to [^\n]*\n\|[-|]+\n((?:\|[^\n]*\n)+)", re.MULTILINE)
"""A table `I want to ... | command | page`."""
GIVEN = re.compile(r"^<!-- given: (.*?) -->$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w-]+\.(?:py|yaml|yml))\n")


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int

    @property
    def file(self) -> str | None:
        """Name of the file that the block is, from its first line `# NAME`."""
        found = FILE.match(self.code) if self.language in ("python", "yaml") else None
        return found[1] if found else None


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def blocks(path: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page in their order; of all languages if none is named.

    The commands of a table `I want to ... | command | page` are a block of the shell.
    """
    text = path.read_text(encoding="utf-8")
    found = [(m.start(), m[1], m[2]) for m in FENCE.finditer(text)]
    for table in WANTED.finditer(text):
        cells = (row.split("|")[2] for row in table[1].splitlines())
        found.append((table.start(), "sh", "".join(f"{cell.strip(' `')}\n" for cell in cells)))
    every = [Block(name, code, text.count("\n", 0, start) + 1) for start, name, code in sorted(found)]
    return [block for block in every if not languages or block.language in languages]


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def given(path: Path) -> list[str]:
    """Names in `<!-- given: photos runs/demo-mib -->`: what the page uses and does not make."""
    return [name for text in GIVEN.findall(prose(path)) for name in text.split()]


def commands(code: str) -> list[str]:
    """The commands of a shell block: continued lines joined, comments gone, `a && b` and `a; b` taken apart."""
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in code.replace("\\\n", " ").splitlines())
    return [re.sub(r"\s+", " ", part) for line in lines if line for part in re.split(r"\s*(?:&&|;)\s*", line)]
