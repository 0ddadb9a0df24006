"""Files of the web pages: of the local server, and of the folder that runs a bundle in the browser."""

from __future__ import annotations

from importlib import resources

_HEAD = "head.html"
"""What the heads of all pages have in common. It stands in a page where a comment names it."""


def template(name: str) -> bytes:
    """Read a file of the pages, with the common head in its place."""
    folder = resources.files("everseg.deploy").joinpath("templates")
    head = folder.joinpath(_HEAD).read_bytes()
    return folder.joinpath(name).read_bytes().replace(f"<!-- {_HEAD} -->\n".encode(), head)
