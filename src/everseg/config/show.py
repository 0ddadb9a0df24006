"""A checked configuration as text, as a table, and compared with another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import yaml
from pydantic import BaseModel

from everseg.config import words
from everseg.config.fields import HARMLESS, DomainConfig, RunConfig
from everseg.config.helps import attribute_docs
from everseg.config.hyperparameters import method_options
from everseg.config.yaml import scalar

SECTIONS = frozenset(
    name
    for name, field in RunConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(scalar(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump(config: RunConfig) -> str:
    """Write a configuration as YAML that `load` reads back unchanged."""
    return yaml.dump(to_json(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def to_json(config: RunConfig) -> dict[str, Any]:
    """The whole configuration as JSON values."""
    return config.model_dump(mode="json")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys; the mappings inside `options` and the list of steps stay whole."""
    for key, value in tree.items():
        if not prefix and key in SECTIONS:
            yield from _flat(value, f"{key}.")
        elif f"{prefix}{key}" == "data.domains" and value:
            for name, domain in value.items():
                yield from _flat(domain, f"data.domains.{name}.")
        else:
            yield f"{prefix}{key}", value


def settings(config: RunConfig) -> dict[str, Any]:
    """Every setting, dotted key -> value; unlike `fields` without the helps, for which a method must be imported."""
    return dict(_flat(to_json(config)))


def is_harmless(key: str) -> bool:
    """Whether a dotted key cannot change a run's result."""
    return any(fnmatchcase(key, pattern) for pattern in HARMLESS)


def identity(config: RunConfig) -> dict[str, Any]:
    """Everything that can change the result, dotted key -> value: the configuration without the harmless keys.

    Where there are domains, "data.domains" holds their order, which is that of the steps by default. Where there are
    further maps, "data.extra" holds their names: only their folders may differ.
    """
    order = {"data.domains": list(config.data.domains)} if config.data.domains else {}
    folders = (config.data.extra, *(domain.extra for domain in config.data.domains.values()))
    names = sorted({name for extra in folders for name in extra})
    maps = {"data.extra": names} if names else {}
    return {
        **{key: value for key, value in settings(config).items() if not is_harmless(key)},
        **order,
        **maps,
    }


def config_hash(config: RunConfig) -> str:
    """SHA-256 of the identity."""
    text = json.dumps(identity(config), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def difference(a: RunConfig, b: RunConfig) -> list[str]:
    """Identity settings in which two configurations differ: "train.lr: 0.01 -> 0.02"."""
    left, right = identity(a), identity(b)
    keys = [*left, *(key for key in right if key not in left)]
    return [
        f"{key}: {_shown(left, key)} -> {_shown(right, key)}"
        for key in keys
        if (key in left) != (key in right) or left.get(key) != right.get(key)
    ]


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "(not set)"


def in_words(key: str) -> str:
    """A setting as people say it, with its key: "later learning rate (train.lr_next)"."""
    return f"{words.name(key)} ({key})"


def fields(config: RunConfig) -> list[tuple[str, Any, str]]:
    """Every setting for `everseg show`: dotted key, value, help; the method's hyper-parameters included."""
    rows: list[tuple[str, Any, str]] = []
    options = method_options(config.method.name)
    for key, value in settings(config).items():
        section, _, name = key.rpartition(".")
        model: Any = RunConfig
        if section:
            domain = section.startswith("data.domains.")
            model = DomainConfig if domain else RunConfig.model_fields[section].annotation
        if name in model.model_fields:
            text = attribute_docs(model).get(name, "")
        else:
            text = options[name].help if section == "method" and name in options else ""
        rows.append((key, value, text))
    return rows
