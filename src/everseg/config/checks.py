"""Validation of a raw configuration: every problem at once, in the words of the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from everseg.config.fields import DataConfig, MemoryConfig, RunConfig, TrainConfig
from everseg.config.hyperparameters import Option, method_options
from everseg.config.yaml import MAX_DEPTH, FullKey
from everseg.errors import MOST_LISTED, ConfigError, near_miss

Problem = tuple[FullKey, str]
"""A key, and what is wrong with its value."""

MAX_INT = 2**53
"""No setting is a larger whole number; up to here a float holds each exactly."""
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def plain(value: Any, problems: list[Problem], full_key: FullKey = ()) -> Any:
    """Turn a mapping given from Python into JSON values; every other value becomes a problem."""
    if len(full_key) > MAX_DEPTH:
        problems.append((full_key, f"nested deeper than {MAX_DEPTH} levels"))
    elif isinstance(value, BaseModel):
        return plain(value.model_dump(), problems, full_key)
    elif isinstance(value, Mapping):
        return {str(key): plain(item, problems, (*full_key, str(key))) for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        return [plain(item, problems, (*full_key, i)) for i, item in enumerate(value)]
    elif isinstance(value, PurePath):
        return plain(str(value), problems, full_key)
    elif isinstance(value, str):
        if _encodable(value):
            return str(value)
        problems.append((full_key, "text that is not valid Unicode"))
    elif value is None or isinstance(value, bool):  # before int: True is an int, too
        return value
    elif isinstance(value, int):
        if abs(value) <= MAX_INT:
            return value
        problems.append((full_key, f"a number beyond {MAX_INT}"))
    elif isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        problems.append((full_key, f"expected a finite number, got {value}"))
    else:
        problems.append((full_key, f"expected a plain value, got {type(value).__name__}"))
    return None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def run_problems(raw: Mapping[str, Any]) -> tuple[RunConfig | None, list[Problem]]:
    """Check a raw configuration against the schema (types are not converted, except list -> tuple, int -> float)."""
    try:
        # By way of JSON: pydantic's strict mode accepts a list for a tuple only there.
        return RunConfig.model_validate_json(json.dumps(raw), strict=True), []
    except ValidationError as error:
        return None, _problems(error, raw)


MOST_NAME = 200
"""Bytes of a run's name: file systems allow 255, and some names are made longer."""


def place_problems(name: str, out: str) -> list[Problem]:
    """Check where a run would be written: its name is the name of one folder in `out`."""
    problems: list[Problem] = []
    allowed = f"a name of one folder, up to {MOST_NAME} bytes, without / \\ : and control characters"
    long = len(name.encode("utf-8", "surrogatepass")) > MOST_NAME
    if long or not name.strip(" .") or set(name) & set("/\\:") or not name.isprintable():
        shown = ascii(name[:40])
        problems.append((("name",), f"expected {allowed}, got {shown}; out=DIR says in which folder it lies"))
    if not out or "\0" in out:
        problems.append((("out",), "expected the name of a folder, without a NUL character"))
    return problems


def train_problems(train: TrainConfig) -> list[Problem]:
    """Check settings of the optimisation that are right one by one and impossible together."""
    problems: list[Problem] = []
    if train.optimizer == "sgd" and train.nesterov and not train.momentum:
        text = "needs train.momentum > 0 (give a momentum, or train.nesterov=false)"
        problems.append((("train", "nesterov"), text))
    if train.warmup and train.warmup_share:
        text = "and train.warmup both say how long the warm-up is; give one of them"
        problems.append((("train", "warmup_share"), text))
    if train.batch % train.accumulate:
        text = f"{train.batch} images per batch cannot be cut into {train.accumulate} equal parts; choose a divisor"
        problems.append((("train", "accumulate"), text))
    return problems


def data_problems(data: DataConfig) -> list[Problem]:
    """Check settings of the augmentation that are right one by one and impossible together."""
    problems: list[Problem] = []
    for key in ("scale_range", "brightness", "contrast", "saturation", "hue", "blur"):
        found = getattr(data, key)
        if found is not None and found[0] > found[1]:
            text = f"expected a range, the smaller number first, got [{found[0]:g}, {found[1]:g}]"
            problems.append((("data", key), text))
    if data.transform == "resize" and data.scale_range is not None:
        text = "scales before a crop, and data.transform=resize does not crop; leave it out, or set data.transform=crop"
        problems.append((("data", "scale_range"), text))
    if data.transform == "resize" and data.rotate and data.size[0] != data.size[1]:
        text = (
            f"turned images of {data.size[0]}x{data.size[1]} pixels do not fit one batch; "
            "make data.size square, or set data.transform=crop"
        )
        problems.append((("data", "rotate"), text))
    return problems


def memory_problems(config: RunConfig) -> list[Problem]:
    """Check settings of the memory that are right one by one and impossible together."""
    memory, default = config.scenario.memory, MemoryConfig()
    problems: list[Problem] = []

    def tell(key: str, text: str) -> None:
        problems.append((("scenario", "memory", key), text))

    if not memory.size:
        for key in MemoryConfig.model_fields:
            if getattr(memory, key) != getattr(default, key):
                tell(
                    key,
                    "needs scenario.memory.size > 0 (images to keep); leave it out where there is no memory",
                )
        return problems
    if memory.mix == "append" and memory.share != default.share:
        tell(
            "share",
            "is of mix=replace; with mix=append all images of the memory are trained like the step's own",
        )
    if memory.mix == "replace" and int(config.train.batch * memory.share + 1e-9) == 0:
        least = math.ceil(1 / memory.share)
        tell(
            "share",
            f"{memory.share:g} of {config.train.batch} images is less than one; take train.batch >= {least}",
        )
    if (memory.selection == "list") != (memory.file is not None):
        tell(
            "file", "goes with selection=list, which names the images to keep in a file; give both or neither"
        )
    if memory.pseudo_network != "trained" and memory.pseudo is None:
        tell(
            "pseudo_network", "needs scenario.memory.pseudo, the score that its classes need; give one (0.7)"
        )
    for key, why in (
        ("joint", "one step teaches everything, so nothing is left for a later one"),
        ("single", "every step starts from scratch"),
    ):
        if getattr(config.scenario, key):
            tell("size", f"scenario.{key}: {why}; leave the memory out")
    return problems


def _problems(error: ValidationError, raw: Mapping[str, Any]) -> list[Problem]:
    found: dict[FullKey, str] = {}
    for item in error.errors(include_url=False):
        full_key, field, section = _locate(item["loc"])
        if full_key in found:  # a union reports a problem for each of its members
            continue
        if item["type"] == "extra_forbidden":
            name = str(full_key[-1])
            above = key_text(full_key[:-1]) + "." if full_key[:-1] else ""
            hint = ""
            if len(found) < MOST_LISTED:  # those beyond are not shown
                hint = near_miss(name, section.model_fields, below=above) or _elsewhere(name)
            found[full_key] = f"unknown key{hint}"
        elif item["type"] == "missing" and field is not None and len(full_key) == len(item["loc"]):
            named = _value(raw, full_key[:-2])
            others = [key for key in named if key != full_key[-2]] if isinstance(named, Mapping) else []
            hint = near_miss(str(full_key[-2]), others)  # a domain without data may be another one misspelt
            found[full_key] = f"missing; expected {expectation(field.annotation, field.metadata)}{hint}"
        elif field is None:
            found[full_key] = f"expected keys and values, got {shown(_value(raw, full_key))}"
        else:
            value = _value(raw, full_key)
            hint = near_miss(value, choices(field.annotation)) if isinstance(value, str) else ""
            found[full_key] = (
                f"expected {expectation(field.annotation, field.metadata)}, got {shown(value)}{hint}"
            )
    return list(found.items())


def _locate(loc: tuple[int | str, ...]) -> tuple[FullKey, FieldInfo | None, type[BaseModel]]:
    """Cut an error's location at the deepest key of the schema."""
    section: type[BaseModel] = RunConfig
    depth = 0
    while depth < len(loc):
        field = section.model_fields.get(str(loc[depth]))
        if field is None:
            return loc[: depth + 1], None, section
        inner, several = section_in(field.annotation)
        depth += 1
        if inner is None or (several and depth == len(loc)):
            return loc[:depth], field, section
        section = inner
        depth += several  # the name or number of one of several sections
    return loc, None, section


def section_in(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section a field holds, and whether it holds several: by name (domains) or as a list (steps)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for part in get_args(annotation) if is_union(annotation) else (annotation,):
        inner = get_args(part)[-1:] if get_origin(part) in (dict, list) else ()
        if inner and isinstance(inner[0], type) and issubclass(inner[0], BaseModel):
            return inner[0], True
    return None, False


def key_text(full_key: FullKey) -> str:
    """A key as it is written on the command line and in messages: data.root, scenario.steps[0].domain."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in full_key)
    return text.removeprefix(".")


def _elsewhere(name: str) -> str:
    """Suggest the dotted key when the name belongs to another section."""
    for section, field in RunConfig.model_fields.items():
        inner = getattr(field.annotation, "model_fields", {})
        if name in inner:
            return f"; did you mean '{section}.{name}'?"
    return ""


def _value(raw: Any, full_key: FullKey) -> Any:
    for key in full_key:
        if isinstance(raw, Mapping):
            raw = raw.get(str(key))
        elif isinstance(raw, list) and isinstance(key, int) and key < len(raw):
            raw = raw[key]
        else:
            return None
    return raw


def shown(value: Any) -> str:
    """A value for a message, at most 60 characters."""
    text = (
        {None: "null", True: "true", False: "false"}.get(value)
        if value is None or isinstance(value, bool)
        else None
    )
    if text is None:
        try:
            text = repr(value)
        except ValueError:  # an int too long to print
            text = "a very long number"
    return text if len(text) <= 60 else text[:57] + "..."


def expectation(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """Say in words what a field accepts: "int >= 1", "one of 'bn', 'abn'", "number > 0 or null"."""
    if get_origin(annotation) is Annotated:
        annotation, *extras = get_args(annotation)
        metadata = [limit for extra in extras for limit in getattr(extra, "metadata", [extra])]
    parts = list(get_args(annotation)) if is_union(annotation) else [annotation]
    words = list(dict.fromkeys(_word(part) for part in parts))
    bounds = [
        f"{sign} {getattr(m, name)}" for m in metadata for name, sign in BOUNDS.items() if hasattr(m, name)
    ]
    if bounds:
        words[0] = f"{words[0]} {' and '.join(bounds)}"
    return " or ".join(words)


def is_union(annotation: Any) -> bool:
    """Tell whether an annotation is X | Y."""
    return get_origin(annotation) in (typing.Union, types.UnionType)


def _word(annotation: Any) -> str:
    simple = {int: "int", float: "number", bool: "true or false", str: "text", type(None): "null"}
    if annotation in simple:
        return simple[annotation]
    arguments = get_args(annotation)
    match get_origin(annotation):
        case typing.Literal:
            return "one of " + ", ".join(repr(choice) for choice in arguments)
        case origin if origin is list:
            return f"list of {expectation(arguments[0])}" if arguments else "list"
        case origin if origin is tuple:
            if ... in arguments:
                return "list of values"
            return f"list of {len(arguments)} {expectation(arguments[0]).replace('number', 'numbers')}"
        case origin if origin is dict or annotation is dict:
            return "keys and values"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"{{{', '.join(f'{name}: ...' for name in annotation.model_fields)}}}"
    return getattr(annotation, "__name__", str(annotation))


def choices(annotation: Any) -> list[str]:
    """The texts a closed choice accepts."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return [choice for choice in get_args(annotation) if isinstance(choice, str)]
    return [text for part in get_args(annotation) for text in choices(part)] if is_union(annotation) else []


def accepts_text_only(annotation: Any) -> bool:
    """True for fields where `50` or `1e3` must be read as text."""
    parts = set(get_args(annotation)) if is_union(annotation) else {annotation}
    return str in parts and not parts & {int, float, bool}


# ---------------------------------------------------------------- the method's hyper-parameters


def method_problems(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Check a raw method section against the class it names.

    Returns:
        The section with every hyper-parameter filled in, and the problems.
    """
    name = raw.get("name", "ft")
    if not isinstance(name, str):
        return dict(raw), []  # the schema tells
    try:
        options = method_options(name)
    except ConfigError as error:
        return dict(raw), [(("method", "name"), str(error).removeprefix("method.name: "))]
    problems: list[Problem] = []
    full: dict[str, Any] = {"name": name}
    for key, option in options.items():
        if key in raw:
            full[key], problem = _checked(option, raw[key])
            problems += [(("method", key), problem)] if problem else []
        elif option.default is dataclasses.MISSING:
            problems.append((("method", key), f"needed by '{name}': {expectation(option.annotation)}"))
        else:
            full[key] = option.default
    for key in raw.keys() - options.keys() - {"name"}:
        hint = near_miss(key, options, below="method.") or (
            f" ('{name}' has {', '.join(options)})" if options else ""
        )
        problems.append((("method", key), f"unknown key{hint}"))
    return plain(full, problems, ("method",)), problems


def _checked(option: Option, value: Any) -> tuple[Any, str]:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(
            option.annotation, config=ConfigDict(strict=True, allow_inf_nan=False)
        )
        return adapter.validate_json(json.dumps(value)), ""
    except PydanticUserError:
        return value, ""  # a type of its own: the method checks it
    except ValidationError:
        hint = near_miss(value, choices(option.annotation)) if isinstance(value, str) else ""
        return value, f"expected {expectation(option.annotation)}, got {shown(value)}{hint}"
