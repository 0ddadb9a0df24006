"""Reads a page that everseg wrote: its tags, its text, and the files it offers."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path


class Parsed(HTMLParser):
    """Tags with their attributes, and the text outside of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.said: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())

    def download(self, ending: str) -> str:
        (address,) = [a["href"] for a in self.all("a") if a.get("download", "").endswith(ending)]
        return base64.b64decode(address.partition(",")[2]).decode()


def parsed(path: Path) -> Parsed:
    return Parsed(path.read_text(encoding="utf-8"))
