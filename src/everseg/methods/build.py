"""Methods from their configuration, and their hyper-parameters with help texts (floor 4)."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import re
import textwrap
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from everseg import registry
from everseg.config import MethodConfig
from everseg.errors import ConfigError
from everseg.methods.base import Method

_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


class Hyperparameter(NamedTuple):
    """One field of a method."""

    name: str
    type: str
    """For people: "float >= 0", "'combined' or 'disjoint'"."""
    default: Any
    """`...` where a value must be given."""
    help: str
    """The field's docstring, "" if it has none."""


def build_method(config: MethodConfig) -> Method:
    """Build the method a configuration names, with its hyper-parameters checked.

    Raises:
        ConfigError: unknown name, or every unknown, missing or wrongly typed hyper-parameter at once.
    """
    cls = registry.resolve("method", config.name)
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise ConfigError(f"method.name: '{config.name}' is not a subclass of everseg.Method")
    hints = get_type_hints(cls, include_extras=True)
    known = {field.name: field for field in _fields(cls)}
    problems, values = [], {}
    for name, value in config.options.items():
        if name not in known:
            problems.append(_unknown(config.name, name, list(known)))
            continue
        try:
            values[name] = _checked(hints[name], value)
        except (ValidationError, ValueError, TypeError):
            problems.append(f"method.{name}: expected {_type_text(hints[name])}, got {value!r}")
    for name, field in known.items():
        if name not in config.options and _default(field) is ...:
            problems.append(f"method.{name}: must be given for method '{config.name}'")
    if problems:
        raise ConfigError(problems)
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"method.{error}") from error


def hyperparameters(cls: type[Method]) -> list[Hyperparameter]:
    """List a method's fields, its own first, then those every method has."""
    helps, hints = _field_docstrings(cls), get_type_hints(cls, include_extras=True)
    return [
        Hyperparameter(f.name, _type_text(hints[f.name]), _default(f), helps.get(f.name, ""))
        for f in _fields(cls)
    ]


def _fields(cls: type[Method]) -> list[dataclasses.Field[Any]]:
    base = {field.name for field in dataclasses.fields(Method)}
    return sorted((f for f in dataclasses.fields(cls) if f.init), key=lambda f: f.name in base)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else ...


def _unknown(method: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"method '{method}' has {', '.join(known)}"
    return f"method.{name}: unknown key, {hint}"


def _checked(hint: Any, value: Any) -> Any:
    """Validate strictly, as JSON: lists may become tuples, but 1 is not true and "10" is not 10."""
    if (get_args(hint) or [hint])[0] is float and isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)  # YAML 1.1 reads 1e-3 as text
    return TypeAdapter(hint).validate_json(json.dumps(value, allow_nan=False), strict=True)


def _type_text(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        base, *rest = get_args(hint)
        signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
        limits = [limit for info in rest if isinstance(info, FieldInfo) for limit in info.metadata]
        bounds = [
            f"{signs[k]} {v}" for limit in limits for k, v in dataclasses.asdict(limit).items() if k in signs
        ]
        return " ".join([_type_text(base), " and ".join(bounds)]).strip()
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _field_docstrings(cls: type) -> dict[str, str]:
    """Collect the string literals that follow annotated assignments in the class and its bases."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__[:-1]):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined]
        except (OSError, TypeError):  # no source at hand
            continue
        for field, text in itertools.pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                found[field.target.id] = inspect.cleandoc(text.value.value).replace("\n", " ")
    return found
