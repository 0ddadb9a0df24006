"""Checks of a data set that a user's own code builds, made when it is opened; nothing is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from everseg.data.base import Dataset
from everseg.errors import ConfigError, some
from everseg.labels import IGNORED_WIDE, RawLabels

_METHODS = ("__len__", "id", "read", "read_mask", "fingerprint")
"""What `everseg.data.base.Split` asks for."""


def require_own(dataset: Dataset, where: str) -> None:
    """Check labels, splits and sample ids of a data set.

    Args:
        where: how the configuration names the data set.

    Raises:
        ConfigError: every problem: labels that are none, a split without one of the methods, an id that is no text or
            that several samples have.
    """
    problems = _labels(dataset.labels)
    if not isinstance(dataset.splits, Mapping):
        problems.append(f"splits: expected a mapping of names to splits, got {type(dataset.splits).__name__}")
    for name, split in dataset.splits.items() if isinstance(dataset.splits, Mapping) else ():
        missing = [method for method in _METHODS if not callable(getattr(split, method, None))]
        if missing:
            problems.append(
                f"split '{name}': {type(split).__name__} has no {', '.join(missing)} (everseg.data.base.Split says "
                "what each does)"
            )
            continue
        ids = [split.id(index) for index in range(len(split))]
        if wrong := [value for value in ids if not isinstance(value, str) or not value]:
            problems.append(
                f"split '{name}': ids must be texts, got {some([repr(value) for value in wrong], 3)} "
                f"({type(wrong[0]).__name__})"
            )
            continue
        twice = [f"'{value}' ({number} times)" for value, number in Counter(ids).items() if number > 1]
        if twice:
            problems.append(
                f"split '{name}': samples share an id, so lists and messages cannot tell them apart: {some(twice, 5)}; "
                "give every sample an id of its own, such as its path below the data folder"
            )
    if problems:
        raise ConfigError([f"data.dataset: '{where}': {problem}" for problem in problems])


def _labels(labels: object) -> list[str]:
    if not isinstance(labels, RawLabels):
        return [f"labels: expected RawLabels, got {type(labels).__name__}"]
    problems = []
    wrong = [
        raw for raw in (*labels.names, *labels.void) if type(raw) is not int or not 0 <= raw <= IGNORED_WIDE
    ]
    if wrong:
        problems.append(
            f"labels: ids must be whole numbers from 0 to 65535, got {some([*map(repr, wrong)], 5)}"
        )
    if both := [raw for raw in labels.void if raw in labels.names]:
        problems.append(
            f"labels: {some([*map(repr, both)], 5)} cannot be both a class and void; leave it out of one"
        )
    if labels.background is not None and labels.background not in labels.names:
        known = some([*map(repr, labels.names)], 8)
        problems.append(
            f"labels: background {labels.background!r} is not the id of a class; give one of {known}, or None"
        )
    return problems
