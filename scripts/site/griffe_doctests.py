"""For the site: the doctests at the end of our docstrings as a section of examples (an extension of griffe)."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Put "Examples:" above each block of `>>>` lines."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is not None and "\n>>> " in f"\n{obj.docstring.value}":
            blocks = re.split(r"\n\n(?=>>> )", f"\n\n{obj.docstring.value}")
            obj.docstring.value = "\n\n".join([blocks[0].strip(), *map(_examples, blocks[1:])])


def _examples(block: str) -> str:
    """A block whose lines up to an empty one are a doctest."""
    test, gap, rest = block.partition("\n\n")
    return "Examples:\n    " + test.replace("\n", "\n    ") + gap + rest
