"""The help of a setting: the text that stands below its field in the source of its class."""

from __future__ import annotations

import ast
import contextlib
import inspect
import textwrap
from functools import cache
from itertools import pairwise

from pydantic import BaseModel


@cache
def attribute_docs(cls: type) -> dict[str, str]:
    """The texts below the fields of a class, as one line each.

    The class itself says which fields there are, their types and their defaults; only the texts are read from its
    source. There is no other place for them: Python keeps the docstring of a class and drops that of an attribute.
    Pydantic (`use_attribute_docstrings`) and the tools that make reference pages read the source too; pydantic does
    it at every import and for its own classes only, this function when a help is shown, and for the dataclasses of
    methods as well.

    Returns:
        Field -> text, those of base classes included. Fields without a text are missing, and so are all fields of a
        class whose source is not at hand.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base in (object, BaseModel):
            continue
        with contextlib.suppress(OSError, TypeError, SyntaxError):  # its source is not at hand
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            for field, below in pairwise(getattr(definition, "body", ())):
                match field, below:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                        value=ast.Constant(value=str(text))
                    ):
                        found[name] = " ".join(text.split())
    return found
