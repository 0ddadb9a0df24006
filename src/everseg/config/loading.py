"""From presets, YAML files, mappings and `key=value` to a checked `RunConfig`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from everseg import registry
from everseg.config import presets
from everseg.config.checks import (
    Problem,
    accepts_text_only,
    data_problems,
    key_text,
    memory_problems,
    method_problems,
    place_problems,
    plain,
    run_problems,
    section_in,
    shown,
    train_problems,
)
from everseg.config.fields import DataConfig, RunConfig
from everseg.config.show import config_hash, difference, dump, fields, identity, in_words, settings, to_json
from everseg.config.yaml import MAX_DEPTH, FullKey, Origin, Parsed, parse, read, scalar
from everseg.errors import ConfigError
from everseg.files import real_path

__all__ = [
    "config_hash", "difference", "dump", "fields", "from_stored", "identity", "in_words", "load", "load_data",
    "override_value", "own_code", "refuse_own_code", "settings", "to_json",
]  # fmt: skip

SHORTHAND: dict[str, FullKey] = {
    "data": ("data", "dataset"),
    "scenario": ("scenario", "kind"),
    "model": ("model", "name"),
    "method": ("method", "name"),
}
"""`method=mib` means method.name=mib."""

ALIASES: dict[str, FullKey] = {
    "task": ("scenario", "task"),
    "protocol": ("scenario", "protocol"),
}
"""Keys that may be written without their section."""

_FORMER: dict[str, tuple[str, dict[bool, list[str]]]] = {
    "tensorboard": ("tracker", {True: ["tensorboard"], False: []}),
}
"""Key of an earlier release -> today's, and the values that took the place of true and false."""

_OWNED: dict[FullKey, tuple[str, ...]] = {
    ("data", "dataset"): ("options",),
    ("model", "name"): ("options",),
    ("model", "encoder"): ("options", "output_stride"),
    ("method", "name"): ("*",),
}
"""When such a name changes, these neighbours belonged to the old one and are dropped ("*": all)."""
_OWNED_BY_DOMAIN = ("options", "rename")
"""The same where the data set of a domain changes."""


def load(
    source: str | Path | Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    *,
    import_own: bool = True,
    **sections: Any,
) -> RunConfig:
    """Read and check the configuration of a run that the user asks for.

    Later wins: defaults, `preset:` (or `base:`, another file) named in a file, the file, `sections`, `overrides`.
    Changing the method drops the hyper-parameters given for the former one; the hyper-parameters that are not given
    are filled in with the method's defaults, so that the result says everything.

    To check the hyper-parameters of a user's own method, it is imported. So `load` is for configurations that the user
    wrote; `from_stored` reads those in run folders and bundles.

    Args:
        source: preset name, path of a YAML file, mapping with the same keys, or None for the defaults.
        overrides: "key=value" with dotted keys; values are read as YAML 1.2 (`train.lr=1e-3`,
            `scenario.task=[[road,sky],[car]]`). `method=mib`, `data=...`, `model=...`, `task=...`, `protocol=...`
            are short for method.name and so on.
        import_own: False leaves a method that is not everseg's own unchecked, and never imports it.
        sections: the same as keywords: `method="mib"`, `train={"lr": 0.02}`, `seed=1`.

    Raises:
        ConfigError: every problem found, each with its key and, for files, file:line.
    """
    problems: list[Problem] = []
    tree = _Tree()
    _add_source(tree, source, problems)
    tree.merge(Parsed(plain(sections, problems)))
    tree.merge(_overrides(overrides, problems))
    return _checked(
        tree, problems, lambda name: import_own or registry.is_builtin("method", name), is_new=True
    )


def load_data(dataset: str | Path, overrides: Sequence[str] = ()) -> DataConfig:
    """Read and check the settings of a data set alone, for `everseg data`.

    No method is looked up: checking images needs none, and importing one would import torch.

    Args:
        dataset: a name of `everseg list datasets`, a data.yaml, or your own file.py:build.
        overrides: "key=value" as for `load`; `root=DIR` is short for `data.root=DIR` here.

    Raises:
        ConfigError: every problem found.
    """
    problems: list[Problem] = []
    tree = _Tree()
    keys = [text if text.startswith("data.") else f"data.{text}" for text in overrides]
    tree.merge(_overrides([f"data.dataset={dataset}", *keys], problems))
    return _checked(tree, problems, lambda name: False).data


def from_stored(stored: Any, overrides: Sequence[str] = ()) -> RunConfig:
    """Read back a configuration that a file holds, as `to_json` wrote it: plain keys and values, nothing else.

    A run folder or a bundle may come from somebody else, and reading it must not run anything. So no preset and no
    other file is read, no shorthand is understood, and a name that is not everseg's own stays a text. Whoever needs
    the code behind such a name asks `refuse_own_code` first.

    Args:
        stored: the value from the file; anything but a mapping is refused.
        overrides: "key=value" that the user adds, as for `load`. A method named here is imported and checked: it is
            the user who names it.

    Raises:
        ConfigError: every problem found, each with its key.
    """
    if not isinstance(stored, Mapping):
        raise ConfigError(f"expected keys and values, got {shown(stored)}")
    problems: list[Problem] = []
    tree = _Tree()
    tree.value = _expanded(Parsed(plain(stored, problems)), former_only=True).value
    given = _overrides(overrides, problems)
    tree.merge(given)
    named = _texts_in(given.value)
    return _checked(
        tree,
        problems,
        lambda name: registry.is_builtin("method", name) or (isinstance(name, str) and name in named),
    )


def own_code(config: RunConfig) -> dict[tuple[str, str], str]:
    """Names in a configuration that stand for code which is not everseg's own.

    These are `file.py:Name`, `package.module:Name` and the entry points of installed packages. A data.yaml is no code,
    unless its `layout` is such an entry point.

    Returns:
        (kind of the registry, key as on the command line) -> name.
    """
    places = {
        ("model", "model"): config.model.name,
        ("dataset", "data"): config.data.dataset,
        **{
            ("dataset", f"data.domains.{name}.dataset"): domain.dataset
            for name, domain in config.data.domains.items()
        },
        ("scenario", "scenario.kind"): config.scenario.kind,
        ("method", "method"): config.method.name,
    }
    return {
        (kind, key): name
        for (kind, key), name in places.items()
        if not registry.is_builtin(kind, name)
        and not (kind == "dataset" and _is_description(name) and installed_layout(name) is None)
    }


def _is_description(dataset: str) -> bool:
    return dataset.lower().endswith((".yaml", ".yml"))


def installed_layout(description: str) -> str | None:
    """Return the `layout` of a data.yaml if it is the entry point of an installed package, else None.

    It is also None if the file cannot be read: opening the data says what is wrong with it.
    """
    try:
        content = read(Path(description).expanduser()).value
    except (ConfigError, OSError, RuntimeError):  # RuntimeError: a home folder that does not exist
        return None
    layout = content.get("layout") if isinstance(content, Mapping) else None
    installed = isinstance(layout, str) and not registry.is_builtin("dataset", layout)
    return layout if installed and layout in registry.names("dataset") else None


def refuse_own_code(
    config: RunConfig,
    overrides: Sequence[str] = (),
    *,
    named: Collection[str] = (),
    kinds: Collection[str] = ("model", "dataset", "scenario"),
) -> None:
    """Stop where a stored configuration names code that the user has not named again.

    Args:
        config: from a file that may be somebody else's.
        overrides: what the user wrote: a name that stands here as a value may be imported.
        named: further names that the user wrote.
        kinds: what is about to be imported.

    Raises:
        ConfigError: all such names, with what to write to let them run.
    """
    said = {*named, *_texts_in(_overrides(overrides, []).value)}
    refused = {
        key: name for (kind, key), name in own_code(config).items() if kind in kinds and name not in said
    }
    if refused:
        raise ConfigError([_refusal(key, name) for key, name in refused.items()])


def _refusal(key: str, name: str) -> str:
    layout = installed_layout(name) if _is_description(name) else None
    if layout is None:
        return f"this run uses your own code '{name}'; say so to let it run: {key}={name}"
    return (
        f"this run reads its data with '{name}', whose layout '{layout}' is the code of an installed package; "
        f"say so to let it run: {key}={name}"
    )


def _texts_in(value: Any) -> set[str]:
    """Collect every text that is a value somewhere in a mapping or list."""
    if isinstance(value, Mapping):
        return {text for item in value.values() for text in _texts_in(item)}
    if isinstance(value, list):
        return {text for item in value for text in _texts_in(item)}
    return {value} if isinstance(value, str) else set()


def _checked(
    tree: _Tree,
    problems: list[Problem],
    may_import: Callable[[Any], bool],
    *,
    is_new: bool = False,
) -> RunConfig:
    """Check the merged settings; the method's hyper-parameters too where its name `may_import` code.

    Args:
        is_new: check the name of the run too. One that is read back keeps the name that it once got.
    """
    raw = tree.value
    _texts(raw, tree.origins, RunConfig)
    method = raw.get("method", {})
    if isinstance(method, Mapping) and may_import(method.get("name", "ft")):
        full, wrong = method_problems(method)
        raw = {**raw, "method": full}
        problems += wrong
    config, wrong = run_problems(raw)
    if config is not None:
        wrong = [
            *wrong,
            *data_problems(config.data),
            *train_problems(config.train),
            *memory_problems(config),
            *(place_problems(config.name, config.out) if is_new else ()),
        ]
    # A value that could not even be read is None by now; the schema's complaint about that None would add nothing.
    known = {full_key for full_key, _ in problems}
    problems += [problem for problem in wrong if problem[0] not in known]
    if config is None or problems:
        texts = [_problem_text(full_key, text, tree.origins) for full_key, text in problems]
        raise ConfigError(texts, "" if len(texts) == 1 else "the configuration")
    return config


def _problem_text(full_key: FullKey, text: str, origins: Mapping[FullKey, Origin]) -> str:
    key = key_text(full_key)
    # Name the place of the value itself, or else of the nearest section around it that a file holds.
    for length in range(len(full_key), -1, -1):
        origin = origins.get(full_key[:length])
        if origin is not None and (origin.where or length == len(full_key)):
            return f"{key}: {text}" + (f" ({origin.where})" if origin.where else "")
    return f"{key}: {text}" if key else text


# ---------------------------------------------------------------- layers


class _Tree:
    """The merged raw configuration, with the place each value comes from."""

    def __init__(self) -> None:
        self.value: dict[str, Any] = {}
        self.origins: dict[FullKey, Origin] = {}
        self._has_preset_domains = False

    def merge(self, layer: Parsed, *, preset: bool = False) -> None:
        """Lay a mapping over the present values; mappings merge, everything else replaces.

        Domains of a preset do not merge with others: a layer that brings domains of its own names all of them.

        Args:
            preset: the layer is a preset.
        """
        layer = _expanded(layer)
        given = _at(layer.value, ("data", "domains"))
        present = _at(self.value, ("data", "domains"))
        if self._has_preset_domains and isinstance(given, Mapping) and isinstance(present, dict):
            # A name without data is no new domain: it is misspelt.
            added = [item for name, item in given.items() if name not in present]
            if any(isinstance(item, Mapping) and "dataset" in item for item in added):
                self.value["data"]["domains"] = {name: present.get(name, {}) for name in given}
                self._has_preset_domains = False
        elif preset and isinstance(given, Mapping):
            self._has_preset_domains = True
        # Options belong to the name beside them. A layer that changes the name drops the options of the former one;
        # one that repeats the name keeps them.
        owned = dict(_OWNED)
        domains = _at(layer.value, ("data", "domains"))
        for domain in domains if isinstance(domains, Mapping) else ():
            owned["data", "domains", domain, "dataset"] = _OWNED_BY_DOMAIN
        for full_key, neighbours in owned.items():
            name = _at(layer.value, full_key)
            if name is not None and name != self._effective(full_key):
                self._drop(full_key, neighbours)
        _overlay(self.value, layer.value)
        # A value replaced by this layer no longer stands where the lower layer wrote it.
        new = {full_key: origin for full_key, origin in layer.origins.items() if full_key}
        stale = [
            old
            for old in self.origins
            if any(old[: len(full_key)] == full_key for full_key in _leaves(layer.value))
        ]
        for full_key in stale:
            del self.origins[full_key]
        self.origins.update(new)

    def _effective(self, full_key: FullKey) -> Any:
        default: Any = RunConfig()
        for key in full_key:
            default = getattr(default, str(key), None)  # a domain has none
        return _at(self.value, full_key, default)

    def _drop(self, full_key: FullKey, neighbours: Sequence[str]) -> None:
        section = _at(self.value, full_key[:-1])
        if isinstance(section, dict):
            for key in list(section):
                if key in neighbours or ("*" in neighbours and key != full_key[-1]):
                    del section[key]


def _at(tree: Any, full_key: FullKey, default: Any = None) -> Any:
    for key in full_key:
        if not isinstance(tree, Mapping) or key not in tree:
            return default
        tree = tree[key]
    return tree


def _overlay(under: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, Mapping):
            inner = under.get(key)
            # A copy, so that one layer never changes the mappings of another.
            fresh: dict[str, Any] = dict(inner) if isinstance(inner, Mapping) else {}
            _overlay(fresh, value)
            under[key] = fresh
        else:
            under[key] = value


def _leaves(tree: Mapping[str, Any], full_key: FullKey = ()) -> Iterator[FullKey]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*full_key, key))
        else:
            yield (*full_key, key)


def _expanded(layer: Parsed, *, former_only: bool = False) -> Parsed:
    """Replace shorthands (`method: mib`, `task: 15-5`) by the full keys, and keys of earlier releases by today's.

    Args:
        former_only: leave shorthands as they are.
    """
    value: dict[str, Any] = {}
    origins = dict(layer.origins)
    for key, item in layer.value.items():
        if key in _FORMER and isinstance(item, bool):
            now, values = _FORMER[key]
            value.setdefault(now, values[item])
            if (key,) in origins:
                origins.setdefault((now,), origins.pop((key,)))
            continue
        if former_only:
            value[key] = item
            continue
        full_key = ALIASES.get(key)
        if full_key is None and key in SHORTHAND and not isinstance(item, Mapping):
            full_key = SHORTHAND[key]
        if full_key is None:
            _overlay(value, {key: item})
            continue
        _overlay(value, {str(full_key[0]): {str(full_key[1]): item}})
        for old in [old for old in origins if old[:1] == (key,)]:
            origins[full_key + old[1:]] = origins.pop(old)
    return Parsed(value, origins)


def _add_source(tree: _Tree, source: str | Path | Mapping[str, Any] | None, problems: list[Problem]) -> None:
    if source is None:
        return
    if isinstance(source, Mapping):
        given = Parsed(plain(source, problems))
        _add_layer(tree, given, Path(), problems, ())
    elif isinstance(source, Path) or _is_file_name(source):
        _add_file(tree, Path(source).expanduser(), problems, ())
    else:
        tree.merge(Parsed(presets.load_preset(source)), preset=True)


def _is_file_name(source: str) -> bool:
    if presets.is_preset(source):
        return False
    return source.endswith((".yaml", ".yml")) or "/" in source or Path(source).is_file()


def _add_file(tree: _Tree, path: Path, problems: list[Problem], parents: tuple[Path, ...]) -> None:
    if real_path(path) in parents:
        raise ConfigError(f"{path}: names itself as its base; name another file, or a preset")
    if len(parents) >= 10:
        raise ConfigError(
            f"{path}: a chain of more than 10 files, each the base of the next; put some of them together"
        )
    parsed = read(path)
    if parsed.value is None:
        parsed = Parsed({})
    if not isinstance(parsed.value, dict):
        raise ConfigError(f"{path}: expected keys and values, such as 'preset: voc-15-5-mib'")
    _add_layer(tree, parsed, path.parent, problems, (*parents, real_path(path)))


def _add_layer(
    tree: _Tree, layer: Parsed, folder: Path, problems: list[Problem], parents: tuple[Path, ...]
) -> None:
    value = {str(key): item for key, item in layer.value.items()}
    named = [(key, value.pop(key)) for key in ("preset", "base") if key in value]
    if len(named) > 1:
        problems.append((("base",), "write either preset or base, not both"))
    for key, name in named[:1]:
        if not isinstance(name, str):
            problems.append(((key,), "expected the name of a preset or a YAML file"))
        elif key == "base" and not presets.is_preset(name):
            _add_file(tree, folder / Path(name).expanduser(), problems, parents)
        else:
            try:
                tree.merge(Parsed(presets.load_preset(name)), preset=True)
            except ConfigError as error:
                where = layer.origins.get((key,))
                problems.append(((key,), f"{error}" + (f" ({where.where})" if where else "")))
    # After the base: the file's own values lie above those of the preset or file that it names.
    layer_origins = {
        full_key: o for full_key, o in layer.origins.items() if full_key[:1] not in (("preset",), ("base",))
    }
    expanded = _expanded(Parsed(plain(value, problems), layer_origins))
    if folder != Path():
        for full_key in _FILES:
            _place(expanded.value, full_key, folder)
    tree.merge(expanded)


_FILES: tuple[FullKey, ...] = (
    ("data", "dataset"), ("data", "root"), ("data", "options", "skip"), ("data", "domains", "*", "dataset"),
    ("data", "domains", "*", "root"), ("data", "domains", "*", "options", "skip"), ("scenario", "kind"),
    ("scenario", "bundle"), ("scenario", "lists"), ("scenario", "memory", "file"), ("data", "extra", "*"),
    ("data", "domains", "*", "extra", "*"), ("model", "name"), ("model", "weights"), ("method", "name"),
)  # fmt: skip
"""Settings that may name a file; in a YAML file its path starts from the folder of this file. `out` is none of them: it
is where the user works."""
_ALWAYS_FILES = ("root", "skip", "bundle", "file", "*")


def _place(tree: Any, full_key: FullKey, folder: Path) -> None:
    """Let a relative path in a file start from the folder of that file."""
    if not isinstance(tree, dict):
        return
    key, rest = full_key[0], full_key[1:]
    for name in list(tree) if key == "*" else [key] if key in tree else []:
        value = tree[name]
        if rest:
            _place(value, rest, folder)
        elif isinstance(value, str) and _names_file(str(key), value):
            tree[name] = value if Path(value).is_absolute() else _from_here(folder / value)


def _from_here(path: Path) -> str:
    """Write a path from the working folder if it lies inside it, so that a project may move with its runs."""
    place, here = Path(os.path.normpath(path)), Path.cwd()
    return str(place.relative_to(here) if place.is_relative_to(here) else place)


def _names_file(key: str, value: str) -> bool:
    if not value or value.startswith("~"):
        return False
    if key == "weights":
        return re.match("[a-z]+:", value) is None  # hf:org/name
    if key == "lists":
        return value != "published"
    return key in _ALWAYS_FILES or value.lower().endswith((".yaml", ".yml")) or ".py:" in value


def _overrides(texts: Sequence[str], problems: list[Problem]) -> Parsed:
    """Make one layer of all `key=value`, so that their order does not matter unless a key comes twice."""
    layer = Parsed({})
    for text in texts:
        key, sign, written = text.partition("=")
        full_key: FullKey = tuple(key.strip().split("."))
        if not sign or not all(full_key) or len(full_key) > MAX_DEPTH:
            problems.append(((), f"{shown(text)}: expected key=value, such as train.epochs=10"))
            continue
        try:
            value, origin = override_value(written)
        except ConfigError as error:
            problems.append((full_key, str(error)))
            continue
        value = plain(value, problems, full_key)
        for part in reversed(full_key):
            value = {part: value}
        one = _expanded(Parsed(value, {full_key: origin}))
        _overlay(layer.value, one.value)
        layer.origins.update(one.origins)
    return layer


def override_value(text: str) -> tuple[Any, Origin]:
    """Read the right side of `key=value`: lists, mappings and quoted texts as YAML, anything else as one scalar."""
    text = text.strip()
    if text[:1] in ("[", "{", '"', "'"):
        return parse(text, "value").value, Origin("")
    return scalar(text), Origin("", text)


def _texts(
    raw: dict[str, Any], origins: Mapping[FullKey, Origin], section: type[BaseModel], full_key: FullKey = ()
) -> None:
    """Give text fields their text as it was written, where it was read as a number: `scenario.task=50`."""
    for key, value in raw.items():
        field = section.model_fields.get(key)
        if field is None:
            continue
        here = (*full_key, key)
        inner, several = section_in(field.annotation)
        if inner is not None:
            items: Iterable[tuple[Any, Any]] = [(None, value)]
            if several:
                items = (
                    value.items()
                    if isinstance(value, dict)
                    else enumerate(value if isinstance(value, list) else ())
                )
            for name, item in items:
                if isinstance(item, dict):
                    _texts(item, origins, inner, here if name is None else (*here, name))
        elif isinstance(value, (int, float)) and accepts_text_only(field.annotation):
            # `scenario.task=50` was read as a number. The text as written also keeps what a number loses (1.0, 1e3).
            origin = origins.get(here)
            if origin is not None and origin.text is not None:
                raw[key] = origin.text
            elif isinstance(value, int) and not isinstance(value, bool):
                raw[key] = str(value)
