"""The hyper-parameters of methods, with the help that stands below them."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from functools import cache
from typing import Any, ClassVar, get_origin

from everseg import registry
from everseg.config.helps import attribute_docs
from everseg.errors import ConfigError


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
    helps = attribute_docs(method)
    told = [inspect.get_annotations(cls) for cls in method.__mro__]
    # Those of the class that says most about a hyper-parameter first: the method's own, then each base's.
    ordered = sorted(
        fields.values(), key=lambda field: next(i for i, own in enumerate(told) if field.name in own)
    )
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
