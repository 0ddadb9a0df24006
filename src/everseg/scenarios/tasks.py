"""Translate task names to the raw ids taught in each step."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

import yaml

from everseg.display import counted
from everseg.errors import ConfigError
from everseg.files import whole_number
from everseg.labels import RawLabels, spelling

Groups = tuple[tuple[int, ...], ...]
"""groups[s] = raw ids taught in step s, without background."""

_NAME = re.compile(r"(?P<sizes>offline|[1-9]\d*(?:-[1-9]\d*)*)(?P<single>s?)(?P<order>[abc]?)")


@functools.cache
def _tables() -> dict[str, Any]:
    text = resources.files("everseg.scenarios").joinpath("tables/tasks.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def known_tasks(dataset_name: str) -> tuple[str, ...]:
    """Task names in use for a data set; any other `N-M` that fits its classes works too."""
    return tuple(_tables().get(dataset_name, {}).get("tasks", ()))


def known_orders(dataset_name: str) -> tuple[str, ...]:
    """Suffixes of the published class orders of a data set, beside the ascending one."""
    return tuple(_tables().get(dataset_name, {}).get("orders", ()))


def canonical_task(task: str, dataset_name: str) -> str:
    """Return the name under which the table knows a task: 15-1 -> 15-5s, 50-50 -> 50; others stay as they are.

    Two names mean the same task if they cut the same order into steps of the same sizes.
    """
    total = _tables().get(dataset_name, {}).get("classes", 0)
    wanted = _shape(task, total)
    if wanted is None:
        return task
    return next((name for name in known_tasks(dataset_name) if _shape(name, total) == wanted), task)


def task_groups(
    task: str | Sequence[Sequence[int | str]],
    labels: RawLabels,
    dataset_name: str,
    order: Sequence[int | str] | None = None,
) -> Groups:
    """Resolve a task to the raw ids taught in each step, without background.

    Args:
        task: one of
            "offline": all classes in one step;
            "N-M": N classes, then M in every further step, fitting exactly (15-5, 10-1, 6-5);
            "N-M-K...": steps of exactly these sizes (10-5-5);
            "M": M in every step (50 = 50-50-50 on 150 classes);
            "N-Ms": N classes, then M one by one (15-5s = 15-1);
            each of them with a suffix b or c for a published class order (100-50b);
            or explicit steps: lists of class names or raw ids.
        labels: the data set's classes.
        dataset_name: the data set whose published orders the suffixes mean.
        order: class order that a task name cuts (all classes once, names or raw ids, no background); default
            ascending. With it the classes of a step stand in this order; otherwise they are ascending.

    Raises:
        ConfigError: the name is not understood or does not fit the classes (the message lists names that do), or a
            class is unknown, missing, repeated, the background or void.
    """
    if not isinstance(task, str):
        return _explicit(task, labels, dataset_name)
    match = _NAME.fullmatch(task)
    if match is None:
        raise ConfigError(
            f"scenario.task: '{task}' is not a task; known for {dataset_name}: {_listed(dataset_name)}; "
            f"any N-M (N classes, then M per step) that fits {counted(len(labels.classes), 'class')}; "
            "or explicit steps such as [[road, sky], [car]]"
        )
    suffix = match["order"]
    if suffix and order is not None:
        raise ConfigError(
            f"scenario.order: task '{task}' already fixes a class order by its suffix '{suffix}'"
        )
    sizes = _sizes(match, len(labels.classes))
    if sizes is None:
        raise ConfigError(_does_not_fit(task, dataset_name, len(labels.classes)))
    ids = _published_order(suffix, labels, dataset_name) if order is None else _own_order(order, labels)
    # Cut the order into steps. Within a step of a published order the ids ascend, as in the authors' tables.
    starts = [sum(sizes[:s]) for s in range(len(sizes))]
    groups = [ids[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    return tuple(tuple(sorted(group) if order is None else group) for group in groups)


def _sizes(match: re.Match[str], total: int) -> tuple[int, ...] | None:
    """Classes per step; None if the name does not fit `total` classes."""
    if match["sizes"] == "offline":
        return None if match["single"] or total < 1 else (total,)
    numbers = [int(number) for number in match["sizes"].split("-")]
    # N-Ms: M steps of one class. N-M: M classes in every further step. M alone is M-M: first and each are one number.
    if match["single"]:
        return (numbers[0], *[1] * numbers[1]) if len(numbers) == 2 and sum(numbers) == total else None
    if len(numbers) > 2:
        return tuple(numbers) if sum(numbers) == total else None
    first, each = numbers[0], numbers[-1]
    rest = total - first
    if rest < each or rest % each:
        return None
    return (first, *[each] * (rest // each))


def _shape(task: str, total: int) -> tuple[str, tuple[int, ...]] | None:
    """Order and sizes that a name stands for; equal for names of the same task. "a" is the ascending order."""
    match = _NAME.fullmatch(task)
    sizes = _sizes(match, total) if match else None
    return (match["order"].replace("a", ""), sizes) if match and sizes else None


def _listed(dataset_name: str) -> str:
    return ", ".join(known_tasks(dataset_name)) or "offline"


def _does_not_fit(task: str, dataset_name: str, total: int) -> str:
    numbers = [int(number) for number in re.findall(r"\d+", task)] or [total]
    first, each = numbers[0], numbers[-1]
    # All N-M that fit, those nearest to the numbers asked for first.
    fits = [(n, m) for n in range(1, total) for m in range(1, total - n + 1) if (total - n) % m == 0]
    fits.sort(key=lambda nm: (abs(nm[0] - first) + abs(nm[1] - each), nm))
    near = ", ".join(f"{n}-{m}" for n, m in fits[:4]) or "offline"
    return (
        f"scenario.task: '{task}' does not cut the {total} classes of {dataset_name} (background not counted) "
        f"into whole steps: N-M needs N + k*M = {total}; possible near it: {near}"
    )


def _published_order(suffix: str, labels: RawLabels, dataset_name: str) -> list[int]:
    if suffix in ("", "a"):
        return list(labels.classes)
    orders = _tables().get(dataset_name, {}).get("orders", {})
    if suffix not in orders:
        raise ConfigError(
            f"scenario.task: no published class order '{suffix}' for {dataset_name} "
            f"(known: {', '.join(orders) or 'none'}); give scenario.order instead"
        )
    if sorted(orders[suffix]) != list(labels.classes):
        raise ConfigError(
            f"scenario.task: the published class order '{suffix}' of {dataset_name} has "
            f"{counted(len(orders[suffix]), 'class')}, this data set {len(labels.classes)} others; give "
            "scenario.order instead"
        )
    return list(orders[suffix])


def _own_order(order: Sequence[int | str], labels: RawLabels) -> list[int]:
    ids, problems = resolve_classes(order, labels, "scenario.order")
    missing = [labels.names[i] for i in labels.classes if i not in ids]
    if missing and not problems:
        problems.append(f"scenario.order: every class must be named once; missing: {', '.join(missing)}")
    if problems:
        raise ConfigError(problems)
    return ids


def _explicit(task: Sequence[Sequence[int | str]], labels: RawLabels, dataset_name: str) -> Groups:
    if not task:
        raise ConfigError(f"scenario.task: no steps given; known tasks: {_listed(dataset_name)}")
    groups, problems = [], []
    for step, group in enumerate(task):
        ids, wrong = resolve_classes(group, labels, f"scenario.task, step {step}")
        if not group:
            wrong.append(f"scenario.task, step {step}: teaches no class")
        groups.append(tuple(ids))
        problems += wrong
    taught = [i for group in groups for i in group]
    # Across steps; repetitions within a step are reported by `resolve_classes` already.
    twice = sorted({i for i in taught if taught.count(i) > 1})
    if twice and not any("repeated" in problem for problem in problems):
        names = ", ".join(labels.names[i] for i in twice)
        problems.append(f"scenario.task: taught in more than one step: {names}")
    if problems:
        raise ConfigError(problems)
    return tuple(groups)


def resolve_classes(items: Iterable[int | str], labels: RawLabels, where: str) -> tuple[list[int], list[str]]:
    """Turn class names (in any spelling, see `everseg.labels.spelling`) or raw ids into raw ids.

    Args:
        where: key they were given under, for messages.

    Returns:
        The raw ids found, in the order given, and the problems: unknown, repeated, background or void.
    """
    by_name = {spelling(name): raw for raw, name in labels.names.items()}
    ids: list[int] = []
    problems: list[str] = []
    for item in items:
        # A name goes before a number: a class may be called "7".
        raw = by_name.get(spelling(item)) if isinstance(item, str) else item
        if raw is None and isinstance(item, str):
            raw = whole_number(item)
        if raw is not None and raw == labels.background:
            problems.append(f"{where}: '{item}' is the background, which every step has; leave it out")
        elif raw is not None and raw in labels.void:
            problems.append(f"{where}: {item} is void (not annotated) and cannot be taught")
        elif raw is None or raw not in labels.names:
            known = ", ".join(f"{i} {labels.names[i]}" for i in labels.classes)
            problems.append(f"{where}: unknown class '{item}'; classes: {known}")
        elif raw in ids:
            problems.append(f"{where}: class '{labels.names[raw]}' is repeated")
        else:
            ids.append(raw)
    return ids, problems
