"""Every published setting under its name, composed of small parts.

Names read `<data>-<task>[-<protocol>]-<method>`: voc-15-5-mib, voc-15-1-overlapped-mib, ade-100-50b-lwf,
voc-15-5-joint (all classes at once, scored in the task's groups), voc-offline-ft; and over domains
`<domains>-<method>`: cs-bdd-idd-mdil, camvid-day-dusk-ft, camvid-mixed-mdil+mib (classes and domains). Behind one of
the former may stand a network of later papers: voc-15-1-mib@swin-b.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from everseg.config.fields import ScenarioConfig
from everseg.config.yaml import parse
from everseg.errors import ConfigError, near_miss

PROTOCOLS = ("disjoint", "overlapped", "sequential", "partitioned")
JOINT = "joint"
OFFLINE = "offline"
NETWORK = "@"
"""Stands between a preset and a network."""
MIXED_METHODS = ("mdil+mib", "mdil", "mib", "ft", "multi")


@dataclass(frozen=True)
class _Preset:
    data: str
    task: str
    protocol: str
    method: str
    """A method's name, or "joint"."""
    listed: bool
    """Shown by `names()`: a published combination under its shortest name."""


@dataclass(frozen=True)
class _DomainPreset:
    group: str
    """Key of domains.yaml."""
    sequence: str
    method: str
    listed: bool


@cache
def _part(name: str) -> dict[str, Any]:
    text = resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return parse(text, f"presets/{name}.yaml", quick=True).value


@cache
def _table() -> dict[str, _Preset]:
    return {
        name: _Preset(data, str(task), protocol, method, listed)
        for data in _part("data")
        for task, settings in _part("tasks")[data].items()
        for method in ([*_part("methods"), JOINT] if task != OFFLINE else ["ft"])
        for name, protocol, listed in _spellings(data, str(task), settings, method)
    }


@cache
def _domain_table() -> dict[str, _DomainPreset]:
    methods = list(_part("domain_methods"))
    result = {}
    for group, settings in _part("domains").items():
        mixed = settings.get("mixed", {})
        for sequence in (*settings["sequences"], *mixed):
            listed = MIXED_METHODS if sequence in mixed else settings["listed"]
            for method in listed if sequence in mixed else (m for m in methods if m != "mdil+mib"):
                name = f"{sequence}-{method}"
                result[name] = _DomainPreset(group, sequence, method, method in listed)
    return result


def _method(key: str) -> dict[str, Any]:
    """A method's name and hyper-parameters in presets; a variant such as ssul-m changes some of its method's."""
    own = _part("methods")[key]
    name = own.get("name", key)
    return {"name": name, **(_part("methods")[name] if name != key else {}), **own}


def _family(method: str, data: str) -> dict[str, Any]:
    """What the method's own code does differently from MiB's on a data set; {} where it follows MiB."""
    own = _part("families").get(method, {}).get(data, {})
    name = _part("methods").get(method, {}).get("name", method)
    return own if name == method else _merged(_family(name, data), own)


def _spellings(
    data: str, task: str, settings: dict[str, Any], method: str
) -> Iterator[tuple[str, str, bool]]:
    """Every name of one combination of data set, task and method, with its protocol."""
    own = {**_part("data")[data], **_family(method, data)}
    default, published = own["default"], own["published"]
    tasks = [task, *([settings["alias"]] if "alias" in settings else [])]
    for spelt in tasks:
        listed = spelt == task and default in published and not settings.get("short", False)
        yield f"{data}-{spelt}-{method}", default, listed
        if task == OFFLINE:
            continue
        for protocol in PROTOCOLS:
            listed = spelt == task and protocol in published and protocol != default and method != JOINT
            yield f"{data}-{spelt}-{protocol}-{method}", protocol, listed
    if settings.get("short", False):
        yield f"{data}-{method}", default, True


def names(*, every: bool = False) -> list[str]:
    """Names of the presets.

    Args:
        every: with the aliases (15-5s = 15-1), the spelt-out defaults and the protocols nobody published.
    """
    tables = (_table(), _domain_table())
    return [name for table in tables for name, preset in table.items() if every or preset.listed]


def is_preset(name: str) -> bool:
    """Whether a preset has this name, with or without a network behind it."""
    return split(name)[0] in _all_names()


def split(name: str) -> tuple[str, str]:
    """Take a network off the end of a name: ("voc-15-1-mib", "@swin-b"); the second is "" where there is none."""
    preset, sign, network = name.rpartition(NETWORK)
    return (preset, sign + network) if sign and network in _part("networks") else (name, "")


@cache
def _all_names() -> frozenset[str]:
    return frozenset(names(every=True))


def networks() -> dict[str, str]:
    """Networks that may stand behind a preset's name, and what they are."""
    return {name: str(own["about"]) for name, own in _part("networks").items()}


@dataclass(frozen=True)
class Entry:
    """What a list says of a preset."""

    name: str
    title: str
    """Its heading: what is new in its steps, and the data."""
    protocol: str | None
    """None over domains."""
    policy: str
    """Label policy."""
    also: tuple[str, ...]
    """Other spellings of the name."""


def entries(contains: str = "") -> list[Entry]:
    """List the presets of which some spelling contains a text.

    Those under a published setting come without the others; the others only where none of the published fits.
    """
    spellings: dict[object, list[str]] = {}
    for name, preset in _table().items():
        spellings.setdefault((preset.data, preset.task, preset.protocol, preset.method), []).append(name)
    groups = [*spellings.values(), *([name] for name in _domain_table())]
    found = [group for group in groups if any(contains in name for name in group)]
    published = [group for group in found if any(map(_listed, group))]
    return [_entry(group) for group in published or found]


@dataclass(frozen=True)
class Group:
    """The published presets under one title, and how their names are made."""

    title: str
    names: str
    """How a name is made, such as "voc-TASK-METHOD"."""
    parts: dict[str, tuple[str, ...]]
    """"tasks" or "domains", "protocols" and "methods" -> what may stand in a name."""
    number: int
    """Number of presets."""
    example: str
    """One of them."""


def groups() -> list[Group]:
    """Summarise the published presets by their titles, in the order of `entries`."""
    found: dict[str, list[str]] = {}
    for name in names():
        found.setdefault(title(name), []).append(name)
    return [_group(heading, members) for heading, members in found.items()]


def _group(heading: str, members: list[str]) -> Group:
    domain, table = _domain_table(), _table()

    def distinct(values: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(values))

    example = next((name for name in members if name.endswith(("-mib", "-mdil"))), members[0])
    if members[0] in domain:
        chosen = [domain[name] for name in members]
        parts = {"domains": distinct(one.sequence for one in chosen)}
        parts["methods"] = distinct(one.method for one in chosen)
        return Group(heading, "DOMAINS-METHOD", parts, len(members), example)
    own = [table[name] for name in members]
    pattern = f"{own[0].data}-TASK[-PROTOCOL]-METHOD"
    if any(name == f"{one.data}-{one.method}" for name, one in zip(members, own, strict=True)):
        pattern = f"{own[0].data}[-TASK][-PROTOCOL]-METHOD"
    parts = {
        "tasks": distinct(one.task for one in own),
        "protocols": distinct(one.protocol for one in own),
        "methods": distinct(one.method for one in own),
    }
    return Group(heading, pattern, parts, len(members), example)


def _listed(name: str) -> bool:
    return (_domain_table().get(name) or _table()[name]).listed


def _entry(spellings: list[str]) -> Entry:
    name = next(filter(_listed, spellings), spellings[0])
    scenario = load_preset(name)["scenario"]
    policy = scenario.get("policy", ScenarioConfig().policy)
    others = tuple(other for other in spellings if other != name)
    return Entry(name, title(name), scenario.get("protocol"), policy, others)


def title(name: str) -> str:
    """Heading that a preset stands under in lists: what is new in its steps, and the data."""
    over_domains = _domain_table().get(name)
    part, key = ("domains", over_domains.group) if over_domains else ("data", _table()[name].data)
    return str(_part(part)[key]["title"])


def load_preset(name: str) -> dict[str, Any]:
    """Compose a preset.

    Returns:
        A part of a run's configuration, as a YAML file would give it; `name` is the preset's.

    Raises:
        ConfigError: unknown name, with the nearest one.
    """
    if NETWORK in name:
        return _with_network(*name.split(NETWORK, 1))
    if name in _domain_table():
        return {"name": name, **_domain_config(_domain_table()[name])}
    preset = _table().get(name)
    if preset is None:
        raise ConfigError(_unknown(name))
    task = _part("tasks")[preset.data][_key(preset)]
    config = copy.deepcopy(_part("data")[preset.data]["config"])
    config["scenario"] |= {"task": preset.task, "protocol": preset.protocol}
    if preset.method == JOINT:
        config["scenario"]["joint"] = True
        config["method"] = {"name": "ft"}
    else:
        if preset.protocol in task.get("lists", ()):
            config["scenario"]["lists"] = "published"
        method = _method(preset.method)
        own = {
            key: value
            for part in (_part("data")[preset.data], task)
            for name in (method["name"], preset.method)
            for key, value in part.get("method", {}).get(name, {}).items()
        }
        config["method"] = {**method, **own}
        family = _family(preset.method, preset.data)
        changed = family.get("config", {})
        if "name" in changed.get("model", {}):  # another network: nothing of the data set's own fits it
            del config["model"]
        config = _merged(config, changed)
        config = copy.deepcopy(_merged(config, family.get("tasks", {}).get(preset.task, {})))
    # The name becomes a folder's, where an asterisk would mean any name to a shell.
    return {"name": name.replace("*", "-star"), **config}


def _with_network(name: str, network: str) -> dict[str, Any]:
    """A preset with a network of later papers and the rates of its authors."""
    known = _part("networks")
    if network not in known:
        raise ConfigError(
            f"'{name}{NETWORK}{network}': no network '{network}'{near_miss(network, known)}; networks: "
            f"{', '.join(known)}"
        )
    config = load_preset(name)
    preset = _table().get(name)
    if preset is None or "model" in _family(preset.method, preset.data).get("config", {}):
        raise ConfigError(
            f"'{name}{NETWORK}{network}': the preset's method needs parts of the network that it brings itself; give "
            f"the encoder by hand (model.encoder=..., docs/models.md)"
        )
    own = known[network]
    parts = _merged(known[own["like"]]["config"], own["config"]) if "like" in own else own["config"]
    model = {"model": own["config"]["model"]}
    changed = _merged({key: value for key, value in config.items() if key != "model"}, {**parts, **model})
    return copy.deepcopy(changed | {"name": f"{config['name']}{NETWORK}{network}"})


def without_method(name: str) -> str:
    """The data and task of a preset: its name without the method."""
    preset = _domain_table().get(name) or _table()[name]
    return name.removesuffix(f"-{preset.method}")


def variant(name: str, *, method: str | None = None, task: str | None = None) -> str | None:
    """Name of the preset that differs from another one in its method or task; None where there is none."""
    over_domains = _domain_table().get(name)
    if over_domains is not None:
        found = f"{over_domains.sequence}-{method or over_domains.method}"
        return found if task is None and found in _domain_table() else None
    preset = _table()[name]
    if task in (None, preset.task) and method in (None, preset.method):
        return name
    head, method = f"{preset.data}-{task or preset.task}", method or preset.method
    return next(
        (n for n in (f"{head}-{preset.protocol}-{method}", f"{head}-{method}") if n in _table()), None
    )


def variants(method: str) -> list[str]:
    """Names under which presets use a method: its own, and those with other settings, such as ssul-m with a memory."""
    return [key for key, own in _part("methods").items() if own.get("name", key) == method]


def domain_methods() -> dict[str, dict[str, Any]]:
    """What every method of the domain presets (`single`, `mdil-authors`, ...) sets, as a part of a configuration."""
    return {
        name: copy.deepcopy(_merged(part, {"method": _part("methods").get(name, {})}))
        for name, part in _part("domain_methods").items()
    }


def _domain_config(preset: _DomainPreset) -> dict[str, Any]:
    group = _part("domains")[preset.group]
    config = _merged(group["config"], _part("domain_methods")[preset.method])
    if preset.sequence in group["sequences"]:
        order, steps = group["sequences"][preset.sequence], None
    else:
        mixed = group["mixed"][preset.sequence]
        steps, config = mixed["steps"], _merged(config, {"train": mixed.get("train", {})})
        order = dict.fromkeys(step["domain"] for step in steps)
    domains = {domain: group["domains"][domain] for domain in order}
    scenario = {"kind": "domain-incremental"} | ({"steps": steps} if steps else {})
    method = {"method": _part("methods").get(preset.method, {})}
    return copy.deepcopy(_merged(config, {"data": {"domains": domains}, "scenario": scenario, **method}))


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Both mappings in a new one; where both hold mappings these merge, else `over` counts."""
    both = {
        key: _merged(under[key], value)
        if isinstance(value, dict) and isinstance(under.get(key), dict)
        else value
        for key, value in over.items()
    }
    return {**under, **both}


def _key(preset: _Preset) -> str | int:
    tasks = _part("tasks")[preset.data]
    return preset.task if preset.task in tasks else int(preset.task)


def _unknown(name: str) -> str:
    if Path(name).is_dir():
        run = (Path(name) / "run.json").is_file()
        more = "; the same command that began it goes on" if run else ""
        what = "a run folder" if run else "a folder"
        return f"'{name}' is {what}; a preset or a YAML file is needed (everseg list presets){more}"
    hint = near_miss(name, [*_domain_table(), *_table()])
    data = next((data for data in _part("data") if name.startswith(f"{data}-")), None)
    own = f"; for another task: everseg run {_example(data)} scenario.task=..." if data else ""
    return f"no preset and no file '{name}'{hint} (everseg list presets{own})"


def _example(data: str) -> str:
    tasks = _part("tasks")[data]
    task = next(task for task, settings in tasks.items() if task != OFFLINE and "method" not in settings)
    return f"{data}-{task}-mib"
