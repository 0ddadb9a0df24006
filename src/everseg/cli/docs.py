"""`everseg docs`: the pages of the documentation, which are installed beside the package."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path
from typing import Annotated

import typer

from everseg.cli.output import console_of_stdout, say
from everseg.display import unicode_output
from everseg.errors import ConfigError, near_miss
from everseg.reports.text import columns

_WIDTH = 100
"""Largest width of a page, in columns."""
_FENCES = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def docs(
    page: Annotated[
        str | None,
        typer.Argument(
            metavar="[PAGE[#SECTION]]", help="A page, or one of its sections; without it the list."
        ),
    ] = None,
) -> None:
    """Show a page of the documentation: quickstart, errors, errors#data, ..."""
    pages = shipped_pages()
    if page is None:
        rows = [(name, title_of(file.read_text(encoding="utf-8"))) for name, file in pages.items()]
        say(columns(["page", "what"], rows) + "\n")
        say("everseg docs PAGE shows one of them, everseg docs PAGE#SECTION a part of it")
        return
    name, _, anchor = page.partition("#")
    name = name.removeprefix("docs/").removesuffix(".md")
    if name not in pages:
        raise ConfigError(f"docs: no page '{name}'{near_miss(name, pages)} (everseg docs lists them)")
    text = pages[name].read_text(encoding="utf-8")
    show_page(section(text, anchor, name) if anchor else text)


def show_page(text: str) -> None:
    """Print Markdown set for a terminal, or as it is written where stdout cannot show it."""
    if not unicode_output():
        say(text)
        return
    from rich.markdown import Markdown

    console = console_of_stdout()
    console.width = min(console.width, _WIDTH)
    console.print(Markdown(text, hyperlinks=False))


def shipped_pages() -> dict[str, Path]:
    """Name -> file of every page: of the checkout that runs, else of the installation.

    Raises:
        ConfigError: the pages are not there.
    """
    package = Path(__file__).resolve().parents[1]
    checkout = package.parents[1] / "docs"
    shared = (sysconfig.get_path("data"), sysconfig.get_path("data", _user_scheme()), package.parent)
    places = [checkout, *(Path(place) / "share" / "everseg" / "docs" for place in shared)]
    folder = next((place for place in places if (place / "errors.md").is_file()), None)
    if folder is None:
        raise ConfigError(
            "docs: the pages are not installed; install everseg again, or read docs/ of its sources"
        )
    files = sorted(folder.rglob("*.md"), key=lambda file: (len(file.parts), file))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def _user_scheme() -> str:
    return sysconfig.get_preferred_scheme("user")


def title_of(text: str) -> str:
    """The first heading."""
    return next((line.lstrip("# ") for line in text.splitlines() if line.startswith("#")), "")


def headings(text: str) -> list[tuple[int, str, int]]:
    """Level, anchor and position of every heading; an anchor is made as the site and git forges make it."""
    bare = _FENCES.sub(lambda fence: "." * len(fence[0]), text)
    return [
        (len(found[1]), re.sub(r"[^\w\- ]", "", found[2].lower()).strip().replace(" ", "-"), found.start())
        for found in re.finditer(r"^(#+) (.*)$", bare, re.MULTILINE)
    ]


def section(text: str, anchor: str, page: str) -> str:
    """A heading with what stands below it, up to the next heading of its level.

    Raises:
        ConfigError: no such heading, with the nearest one.
    """
    found = headings(text)
    known = [name for _, name, _ in found]
    if anchor not in known:
        hint = near_miss(anchor, known, f"; its sections: {', '.join(known)}")
        raise ConfigError(f"docs: page '{page}' has no section '{anchor}'{hint}")
    level, _, start = found[known.index(anchor)]
    end = next((at for depth, _, at in found[known.index(anchor) + 1 :] if depth <= level), len(text))
    return text[start:end].rstrip() + "\n"
