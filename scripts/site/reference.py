"""The reference pages of the site, written from the code: commands, settings, presets, Python.

Usage: python scripts/site/reference.py FOLDER
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from settings import preset_pages, settings, table

import everseg
from everseg import api, errors
from everseg.cli.main import app
from everseg.display import Result
from everseg.reports.outline import Outline

CONTRACTS = ("everseg.methods.base", "everseg.data.base", "everseg.models.model", "everseg.types", "everseg.labels",
             "everseg.errors")  # fmt: skip
"""Modules that own plug-ins meet, beside the public names."""


def commands() -> str:
    """Every verb with its arguments and options, and the exit codes."""
    parts = [
        "# Commands",
        app.info.epilog or "",
        "Settings (`KEY=VALUE`) are those of [Settings](settings.md).",
    ]
    for name, command in leaves(typer.main.get_command(app), "everseg"):
        usage = " ".join(
            filter(None, [name, *(_usage(p) for p in command.params if p.param_type_name == "argument")])
        )
        parts += [f"## {name}", command.help or "", f"```text\n{usage} [OPTIONS]\n```"]
        rows = [_parameter(p) for p in command.params if p.name != "help"]
        parts.append(table(["", "meaning", "default"], rows))
    kinds = [
        cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.EversegError)
    ]
    rows = [
        (
            f"[{kind.topic}](../docs/errors.md#{kind.topic})",
            _code_of(kind),
            (kind.__doc__ or "").split("\n")[0],
        )
        for kind in kinds
    ]
    parts += ["## Exit codes", "0 is success.", table(["kind", "code", "what"], rows)]
    return "\n\n".join(parts) + "\n"


def leaves(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Full name and command of every verb."""
    for verb, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, f"{name} {verb}")
        else:
            yield f"{name} {verb}", command


def _usage(argument: Any) -> str:
    shown = argument.metavar or argument.name.upper()
    return shown if argument.required or shown.startswith("[") else f"[{shown}]"


def _parameter(parameter: Any) -> tuple[str, str, str]:
    if parameter.param_type_name == "argument":
        shown = _usage(parameter)
    else:
        shown = ", ".join((*parameter.opts, *parameter.secondary_opts))
        if not parameter.is_flag:
            shown += f" {parameter.metavar or 'VALUE'}"
    text = parameter.help or ""
    limits = [
        f"{sign} {value}"
        for sign, value in ((">=", parameter.min), ("<=", parameter.max))
        if value is not None
    ]
    if limits:
        text += f" ({', '.join(limits)})"
    default = "" if parameter.default is None or parameter.default is False else f"`{parameter.default}`"
    return f"`{shown}`", text, "required" if parameter.required else default


def _code_of(kind: type[errors.EversegError]) -> str:
    return "128 + signal: 130, 143" if kind is errors.Interrupted else str(kind.exit_code)


def python() -> dict[str, str]:
    """Name -> instructions for mkdocstrings: every public name, then the contracts of plug-ins, in four pages."""
    rooms = ("interop", "data")
    addresses = {name: address for name, address in everseg._LAZY.items() if name not in rooms}
    modules = [address for address in addresses.values() if ":" not in address]
    names = [
        f"{address.replace(':', '.')}\n    options:\n      heading: everseg.{name}"
        for name, address in addresses.items()
        if ":" in address and address.split(":")[0] not in CONTRACTS
    ]
    for module in (*modules, "everseg.interop"):
        importlib.import_module(module)
    interop = sys.modules["everseg.interop"]
    data = [
        f"{address.replace(':', '.')}\n    options:\n      heading: everseg.data.{name}"
        for name, address in everseg.data._LAZY.items()
    ]
    kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in results() if kind is not everseg.Run]
    pages = {
        "python": (
            "# Python",
            "What `import everseg` offers. Further pages: [what the calls return](python-results.md), "
            "[losses, metrics, scenarios](python-parts.md), [what your own plug-ins meet](python-contracts.md). "
            "Everything else may change.",
            {
                "everseg": names,
                "everseg.data": data,
                "Original checkpoints": [f"everseg.interop.{name}" for name in interop.__all__],
            },
        ),
        "python-results": ("# Python: results", "What the calls return.", {"Results": kinds}),
        "python-parts": ("# Python: parts", "Losses, metrics and scenarios, for a loop of your own.",
                         {"Building blocks": modules}),
        "python-contracts": ("# Python: contracts", "What your own method, data set or model meets.",
                             {"Contracts": list(CONTRACTS)}),
    }  # fmt: skip
    texts = {}
    for page, (title, intro, sections) in pages.items():
        parts = [title, intro]
        for heading, found in sections.items():
            parts += [f"## {heading}", *(f"::: {address}{_hidden(address)}" for address in found)]
        texts[page] = "\n\n".join(parts) + "\n"
    return texts


def results() -> list[type]:
    """The types of what the verbs give, and of what stands in their attributes, in the order of the verbs."""
    verbs = [getattr(everseg, name) for name in everseg.__all__]
    verbs += [getattr(everseg.data, name) for name in everseg.data.__all__]
    verbs += [everseg.Run.table, everseg.Run.steps.func, everseg.Run.sequence.func, Outline.settings.fget]
    found: dict[type, None] = {}
    for verb in [*verbs, api.Model.predict]:
        if inspect.isfunction(verb):
            kind = typing.get_type_hints(verb)["return"]
            _collect(kind, found)
            if isinstance(kind, type):
                found[kind] = None
    return list(found)


def _collect(annotation: Any, found: dict[type, None]) -> None:
    """Add the dataclasses and named tuples in an annotation, then those of their fields."""
    for inner in typing.get_args(annotation):
        _collect(inner, found)
    if not isinstance(annotation, type) or annotation in found:
        return
    if issubclass(annotation, Result) or (
        annotation.__module__.startswith("everseg.")
        and annotation.__module__ not in CONTRACTS
        and (dataclasses.is_dataclass(annotation) or hasattr(annotation, "_fields"))
    ):
        found[annotation] = None
        for name, inner in typing.get_type_hints(annotation).items():
            if not name.startswith("_"):
                _collect(inner, found)


def _hidden(package: str) -> str:
    """The public names of a package that have a file of the same name, which hides them from mkdocstrings."""
    module, found = sys.modules.get(package), ""
    for name in getattr(module, "__all__", ()):
        home = getattr(getattr(module, name), "__module__", "")
        if home == f"{package}.{name}":
            found += f"\n\n::: {home}.{name}\n    options:\n      heading: {name}\n      heading_level: 4"
    return found


def write(folder: Path) -> None:
    """Write all pages."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"commands": commands(), "settings": settings(), **preset_pages(), **python()}
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
