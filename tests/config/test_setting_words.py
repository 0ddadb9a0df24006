"""What settings are called in sentences: every key that can differ has words, and no two have the same."""

from __future__ import annotations

import re
import types
import typing
from typing import Any

import pytest
from pydantic import BaseModel

from everseg import registry
from everseg.config.fields import DomainConfig, RunConfig
from everseg.config.hyperparameters import method_options
from everseg.config.words import NAMES, WITHOUT, name, said


def keys(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the configuration, with its type; sections have none of their own."""
    found: dict[str, Any] = {}
    for field, about in model.model_fields.items():
        inner = about.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= keys(inner, f"{prefix}{field}.")
        else:
            found[f"{prefix}{field}"] = inner
    return found


def every_key() -> dict[str, Any]:
    """Those of the run, of a domain, and of every method that everseg has."""
    options = {
        f"method.{option.name}": option.annotation
        for method in registry.names("method")
        for option in method_options(method).values()
    }
    return {**keys(RunConfig), **{f"data.{key}": kind for key, kind in keys(DomainConfig).items()}, **options}


KEYS = every_key()
WHOLE = {"scenario.memory", "train.lr_factors"}
"""Sections that a configuration compares as one value."""


NOTHING = {
    "data.brightness", "data.contrast", "data.saturation", "data.hue", "data.blur", "data.scale_range", "data.root",
    "scenario.bundle", "scenario.like", "scenario.memory.file", "scenario.single_task",
    "train.layer_decay", "train.ema", "train.max_time", "train.max_iterations", "method.pod_logits_weight",
}  # fmt: skip
"""Settings whose null means that there is no such thing."""


def test_every_setting_has_words_of_its_own() -> None:
    assert sorted({*KEYS} - {*NAMES}) == [], "give them words"
    assert sorted({*NAMES} - {*KEYS} - WHOLE) == [], "no such settings"
    assert len({*NAMES.values()}) == len(NAMES), "two settings with the same words"
    long = {
        key: words for key, words in NAMES.items() if len(words) > 40 or re.search(r"[_.](?!\.|\d)", words)
    }
    assert long == {}, "short words, no key"


def test_every_setting_that_may_be_null_says_what_that_means() -> None:
    nullable = {key for key, kind in KEYS.items() if types.NoneType in typing.get_args(kind)}
    assert sorted(nullable - {*WITHOUT} - NOTHING) == [], "what does its null mean?"
    assert sorted(({*WITHOUT} | NOTHING) - nullable) == [], "these are never null"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train.lr_next", 0.5, "later learning rate 0.5"),
        ("train.lr_next", None, "later learning rate as the first"),
        ("train.nesterov", False, "without Nesterov momentum"),
        ("scenario.memory.size", 7, "memory of 7 images"),
        ("scenario.memory.size", 0, "no memory"),
        ("model.name", "erfnet", "erfnet"),
        ("model.options.head_channels", 64, "head channels 64"),
        ("data.domains.day.options", {"fold": 1}, 'options of the reader of day {"fold": 1}'),
        ("data.domains.day.dataset", "camvid", "data set of day camvid"),
        ("method.my_own", 3, "my own 3"),
    ],
)
def test_a_setting_in_a_sentence(key: str, value: Any, words: str) -> None:
    assert said(key, value) == words


def test_names_of_domains_stand_behind() -> None:
    assert name("data.domains.day.rename") == "renamed classes of day"
