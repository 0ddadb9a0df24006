"""Reference pages of the settings and presets, written from the configuration's models."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import yaml
from pydantic import BaseModel

from everseg import registry
from everseg.config import presets
from everseg.config.fields import DomainConfig, LrFactors, RunConfig, StepConfig
from everseg.config.helps import attribute_docs
from everseg.config.hyperparameters import method_options
from everseg.config.show import SECTIONS

SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars and line ends in its cells are made harmless."""
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(
        "| " + " | ".join(line) + " |" for line in [list(head), ["---"] * len(head), *lines]
    )  # fmt: skip


def code(value: Any) -> str:
    """A value as it is written in YAML."""
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return f"`{text.removesuffix(chr(10)).removesuffix('...').strip()}`"


def settings() -> str:
    """Every key of a configuration and every hyper-parameter of the methods."""
    parts = ["# Settings", "Keys of a YAML file, and of `KEY=VALUE` on the command line. `everseg show PRESET` prints "
             "them with a preset's values. Presets change many of these defaults."]  # fmt: skip
    parts += ["## Run", table(["key", "values", "default", "meaning"], _fields(RunConfig, ""))]
    nested = {"data.domains.NAME": DomainConfig, "scenario.steps": StepConfig, "train.lr_factors": LrFactors}
    models: dict[str, Any] = {
        name: RunConfig.model_fields[name].annotation for name in RunConfig.model_fields if name in SECTIONS
    }
    for name, model in {**models, **nested}.items():
        rows = _fields(model, "" if name == "scenario.steps" else f"{name}.")  # steps are a list
        parts += [f"## {name}", model.__doc__ or "", table(["key", "values", "default", "meaning"], rows)]
    parts += ["## Methods", "Further keys of `method`; the formulas are in [Methods](../docs/methods.md)."]
    common = set.intersection(*(set(method_options(name)) for name in registry.BUILTIN["method"]))
    parts += ["### All methods", _options("ft", common)]
    for name in registry.BUILTIN["method"]:
        own = set(method_options(name)) - common
        if own:
            parts += [f"### {name}", _options(name, own)]
    return "\n\n".join(parts) + "\n"


def _fields(model: type[BaseModel], prefix: str) -> list[tuple[str, str, str, str]]:
    helps = attribute_docs(model)
    rows = []
    for name, field in model.model_fields.items():
        if name in SECTIONS and not prefix:
            continue  # a table of its own
        value = None if field.is_required() else field.get_default(call_default_factory=True)
        value = value.model_dump() if isinstance(value, BaseModel) else value
        default = "required" if field.is_required() else code(value)
        values = values_of(field.annotation, field.metadata)
        rows.append((f"`{prefix}{name}`", values, default, helps.get(name, "")))
    return rows


def _options(method: str, names: set[str]) -> str:
    rows = [
        (f"`method.{name}`", values_of(option.annotation), code(option.default), option.help)
        for name, option in method_options(method).items()
        if name in names
    ]
    return table(["key", "values", "default", "meaning"], rows)


def values_of(annotation: Any, limits: Sequence[Any] = ()) -> str:
    """What a key accepts, in words: type, choices, range."""
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return ", ".join(code(value) for value in arguments)
    if origin is typing.Annotated:
        return values_of(
            arguments[0], [limit for part in arguments[1:] for limit in getattr(part, "metadata", [part])]
        )
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if a is type(None) else values_of(a, limits) for a in arguments)
    if origin in (list, tuple):
        inner = [values_of(a) for a in arguments if a is not ...]
        return f"list of ({inner[0]})" if origin is list else f"[{', '.join(inner)}]"
    if origin is dict:
        return f"mapping of {values_of(arguments[1])}"
    if annotation is Any:
        return "any value"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "settings of its own"
    ranges = [
        f"{sign} {getattr(limit, key)}"
        for limit in limits
        for key, sign in SIGNS.items()
        if hasattr(limit, key)
    ]
    plain = {"int": "whole number", "float": "number", "str": "text", "bool": "true, false"}
    return " ".join(
        [plain.get(getattr(annotation, "__name__", ""), str(annotation)), ", ".join(ranges)]
    ).strip()


PRESET_PAGES = {
    "voc": "Pascal VOC",
    "ade": "ADE20K",
    "camvid": "CamVid",
    "demo": "the demo",
    "domains": "domains",
}
"""Data of presets -> its words; a page each, those over several domains share one."""


def preset_pages() -> dict[str, str]:
    """Name -> text of the pages of presets: by data, what all of them set, then each with what it sets beside."""
    families: dict[str, dict[str, dict[str, Any]]] = {}
    page_of: dict[str, str] = {}
    for name in presets.names():
        preset, data = presets.load_preset(name), name.split("-")[0]
        over_domains = "domains" in preset["data"]
        family = presets.without_method(name) if over_domains else data
        page_of[family] = "domains" if over_domains else data
        families.setdefault(family, {})[name] = {key: value for key, value in flat(preset) if key != "name"}
    parts = {page: [f"# Presets: {words}"] for page, words in PRESET_PAGES.items()}
    for family, members in families.items():
        first = next(iter(members.values()))
        shared = {k: v for k, v in first.items() if all(m.get(k, ...) == v for m in members.values())}
        rows = [
            (f"`{name}`", " ".join(f"`{k}={code(v).strip('`')}`" for k, v in own.items() if k not in shared))
            for name, own in members.items()
        ]
        parts[page_of[family]] += [
            f"## {family}",
            table(["all set", "to"], [(f"`{k}`", code(v)) for k, v in shared.items()]),
            table(["preset", "sets"], rows),
        ]
    lists = [
        (
            f"[{words}](presets-{page}.md)",
            str(sum(len(families[f]) for f, on in page_of.items() if on == page)),
        )
        for page, words in PRESET_PAGES.items()
    ]
    intro = [
        "# Presets",
        "A preset is a named, complete set of settings: data, task, method, model, schedule. `everseg list presets` "
        "prints the names, `everseg show NAME` all settings of one with their meaning. Further names follow the same "
        "pattern: `everseg run voc-15-5-sequential-mib`.",
        table(["presets of", "how many"], lists),
    ]
    pages = {"presets": intro, **{f"presets-{page}": texts for page, texts in parts.items()}}
    return {name: "\n\n".join(texts) + "\n" for name, texts in pages.items()}


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a preset; domains and the options of its model stay whole."""
    for key, value in tree.items():
        if isinstance(value, dict) and value and f"{prefix}{key}" not in ("data.domains", "model.options"):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
