"""Methods from their configuration."""

from __future__ import annotations

from everseg import registry
from everseg.config.checks import key_text, method_problems
from everseg.config.fields import MethodConfig
from everseg.errors import ConfigError
from everseg.methods.base import Method


def build_method(config: MethodConfig) -> Method:
    """Build the method a configuration names, with its hyper-parameters checked.

    Raises:
        ConfigError: unknown name, or every unknown, missing or wrongly typed hyper-parameter at once.
    """
    values, problems = method_problems({"name": config.name, **config.options})
    if problems:
        raise ConfigError([f"{key_text(key)}: {problem}" for key, problem in problems])
    del values["name"]
    cls = registry.resolve("method", config.name)
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise ConfigError(f"method.name: '{config.name}' is not a subclass of everseg.Method")
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"method.{error}") from error
