"""The hyper-parameters of methods, with the help that stands below them.

Those of everseg's own methods are read from their source, as `everseg show` and checking a configuration need the
hyper-parameters only, and importing a method imports torch.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import dataclasses
import importlib
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any, ClassVar, get_origin

from everseg import registry
from everseg.errors import ConfigError


class UnreadableError(Exception):
    """Something in a method's source that only importing it can tell."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One hyper-parameter of a method."""

    name: str
    annotation: Any
    default: Any
    help: str


def method_options(name: str) -> dict[str, Option]:
    """The hyper-parameters of a method, those of its base last.

    Raises:
        ConfigError: no such method, or its class is no method.
    """
    try:
        with contextlib.suppress(UnreadableError):
            return written_options(registry.BUILTIN["method"].get(name, ""))
        return class_options(registry.resolve("method", name))
    except ConfigError as error:
        problem = str(error).removeprefix("method: ")
        raise ConfigError(f"method.name: {problem}") from None


@cache
def class_options(method: Any) -> dict[str, Option]:
    """The hyper-parameters of a class.

    Raises:
        ConfigError: it is no method.
    """
    if not (isinstance(method, type) and dataclasses.is_dataclass(method) and hasattr(method, "losses")):
        raise ConfigError(f"'{getattr(method, '__name__', method)}' is not a subclass of everseg.Method")
    hints = typing.get_type_hints(method, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(method) if field.init}
    lost = [
        key for key in inspect.get_annotations(method)
        if key not in fields and get_origin(hints[key]) is not ClassVar and hints[key] is not ClassVar
    ]  # fmt: skip
    if lost:
        raise ConfigError(
            f"'{method.__name__}' has fields ({', '.join(lost)}) but no @dataclass(kw_only=True) above its class"
        )
    helps: dict[str, str] = {}
    for cls in reversed(method.__mro__):
        with contextlib.suppress(OSError, TypeError, SyntaxError):  # its source is not at hand
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
            helps |= {name: text for name, (_, text) in _written_fields(definition).items() if text}
    own = inspect.get_annotations(method)
    ordered = sorted(fields.values(), key=lambda field: field.name not in own)
    return {
        field.name: Option(field.name, hints[field.name], _default(field), helps.get(field.name, ""))
        for field in ordered
    }


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return dataclasses.MISSING


# ---------------------------------------------------------------- read from the source


@cache
def written_options(address: str) -> dict[str, Option]:
    """The hyper-parameters of a class of everseg, read from its source without importing it.

    Args:
        address: "everseg.package.module:Name".

    Raises:
        UnreadableError: it must be imported to know them.
    """
    module, _, name = address.partition(":")
    lines = list(_lineage(module, name))
    own = _written_fields(lines[0][1])
    found: dict[str, Option] = {}
    for home, definition in reversed(lines):
        names = _Names(home)
        for key, (field, text) in _written_fields(definition).items():
            annotation = names.evaluated(field.annotation)
            if annotation is ClassVar or get_origin(annotation) is ClassVar:
                continue
            default = dataclasses.MISSING if field.value is None else names.evaluated(field.value)
            if isinstance(default, dataclasses.Field):
                default = _default(default)
            found[key] = Option(key, annotation, default, text or (found[key].help if key in found else ""))
    return {key: found[key] for key in sorted(found, key=lambda key: key not in own)}


@cache
def written_helps(module: str, name: str) -> dict[str, str]:
    """The texts that stand below the fields of a class of everseg; pydantic could tell them, but reads them slowly."""
    return {key: text for key, (_, text) in _written_fields(_definition(module, name)[1]).items()}


def _lineage(module: str, name: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """A class and its bases, each with the module it is written in."""
    home, node = _definition(module, name)
    if not isinstance(node, ast.ClassDef) or len(node.bases) > 1:
        raise UnreadableError(name)
    yield home, node
    for base in node.bases:
        if not isinstance(base, ast.Name):
            raise UnreadableError(name)
        yield from _lineage(home, base.id)


@cache
def _definition(module: str, name: str) -> tuple[str, ast.stmt]:
    """Where in everseg a name comes from: the module, and the class or assignment there."""
    for node in _tree(module).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(node.module, alias.name)
        elif (isinstance(node, ast.ClassDef) and node.name == name) or (
            isinstance(node, ast.Assign)
            and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
        ):
            return module, node
    raise UnreadableError(f"{module}:{name}")


@cache
def _tree(module: str) -> ast.Module:
    package, *path = module.split(".")
    if package != "everseg" or not path:
        raise UnreadableError(module)
    try:
        file = resources.files(package).joinpath(*path[:-1], f"{path[-1]}.py")
        return ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise UnreadableError(module) from error


class _Names(Mapping[str, Any]):
    """What the names in a module's annotations and defaults mean."""

    def __init__(self, module: str) -> None:
        self.module = module

    def evaluated(self, expression: ast.expr) -> Any:
        code = compile(ast.Expression(expression), self.module, "eval")
        try:
            return eval(code, {"__builtins__": {}}, self)  # of everseg's own source, which is run anyway
        except (NameError, TypeError, AttributeError) as error:
            raise UnreadableError(f"{self.module}: {error}") from error

    def __getitem__(self, name: str) -> Any:
        for node in _tree(self.module).body:
            if isinstance(node, ast.ImportFrom) and node.module in ("typing", "pydantic", "dataclasses"):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return getattr(importlib.import_module(node.module), alias.name)
        if hasattr(builtins, name):
            return getattr(builtins, name)
        home, node = _definition(self.module, name)
        if not isinstance(node, ast.Assign):
            raise UnreadableError(name)
        return _Names(home).evaluated(node.value)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _written_fields(definition: ast.stmt) -> dict[str, tuple[ast.AnnAssign, str]]:
    """The annotated names of a class's body, each with the text that stands below it."""
    body = getattr(definition, "body", [])
    found = {}
    for field, text in itertools.zip_longest(body, body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            value = text.value if isinstance(text, ast.Expr) else None
            written = value.value if isinstance(value, ast.Constant) else None
            found[field.target.id] = field, " ".join(written.split()) if isinstance(written, str) else ""
    return found
