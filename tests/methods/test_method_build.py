"""Methods from a configuration, and their help texts."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from pydantic import BaseModel

from everseg import registry
from everseg.config.fields import DomainConfig, MethodConfig, RunConfig, StepConfig
from everseg.config.helps import attribute_docs
from everseg.config.hyperparameters import class_options, method_options
from everseg.errors import ConfigError
from everseg.methods.build import build_method
from everseg.methods.mib import MiB


def test_hyperparameters_reach_the_method():
    method = build_method(MethodConfig(name="mib", kd_weight=100, unbiased_ce=False))
    assert isinstance(method, MiB)
    assert (method.kd_weight, method.unbiased_ce, method.alpha) == (100.0, False, 1.0)
    assert isinstance(method.kd_weight, float)


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        build_method(MethodConfig(name="mib", kd_wieght=3, alpha="a", bce=1, kd_weight=-1))
    assert sorted(caught.value.problems) == [
        "method.alpha: expected number > 0, got 'a'",
        "method.bce: expected true or false, got 1",
        "method.kd_weight: expected number >= 0, got -1",
        "method.kd_wieght: unknown key; did you mean 'method.kd_weight'?",
    ]


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), None, [1.0]])
def test_weight_must_be_a_finite_number(value):
    with pytest.raises(ConfigError, match=r"method\.weight: expected number >= 0"):
        build_method(MethodConfig(name="ewc", weight=value))


def test_unknown_choice_names_the_choices():
    with pytest.raises(ConfigError, match="expected one of 'combined', 'disjoint', got 'both'"):
        build_method(MethodConfig(name="lwf-mc", form="both"))


def test_unknown_key_without_near_miss_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"method\.temperature: unknown key \('ft' has bce, freeze_encoder"):
        build_method(MethodConfig(name="ft", temperature=2))


def test_own_method_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "from everseg.methods.ft import FineTuning\n"
        "@dataclass(kw_only=True)\n"
        "class Mine(FineTuning):\n"
        "    strength: float\n"
        '    """How strong (paper: 3)."""\n'
        "class Other: ...\n"
    )
    assert build_method(MethodConfig(name=f"{file}:Mine", strength=2)).strength == 2.0
    with pytest.raises(ConfigError, match=r"method\.strength: needed by"):
        build_method(MethodConfig(name=f"{file}:Mine"))
    with pytest.raises(ConfigError, match="not a subclass"):
        build_method(MethodConfig(name=f"{file}:Other"))
    assert method_options(f"{file}:Mine")["strength"].help == "How strong (paper: 3)."


def test_every_field_of_every_method_has_a_help_text():
    for name in registry.names("method"):
        for parameter in method_options(name).values():
            assert parameter.help, f"{name}.{parameter.name}"


def test_own_fields_come_before_those_of_every_method():
    names = list(method_options("mib"))
    assert names.index("kd_weight") < names.index("freeze_encoder")
    assert (names[0], method_options("mib")["kd_weight"].default) == ("kd_weight", 10.0)


def test_the_help_of_a_field_is_the_text_below_it_and_the_nearest_class_wins(tmp_path: Path) -> None:
    file = tmp_path / "helps.py"
    file.write_text(
        "from everseg.methods.mib import MiB\n"
        "from dataclasses import dataclass\n"
        "@dataclass(kw_only=True)\n"
        "class Mine(MiB):\n"
        "    strength: float = 1.0\n"
        "    bare: int = 0\n"
        "    kd_weight: float = 3.0\n"
        '    """Another weight,\n    told anew."""\n'
    )
    options = method_options(f"{file}:Mine")
    assert options["kd_weight"].help == "Another weight, told anew."
    assert options["freeze_encoder"].help == method_options("ft")["freeze_encoder"].help
    assert (options["strength"].help, options["bare"].help) == ("", "")


def test_a_class_without_source_has_its_fields_without_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("typed_in")
    monkeypatch.setitem(sys.modules, "typed_in", module)
    exec(
        "from dataclasses import dataclass\nfrom everseg.methods.ft import FineTuning\n"
        "@dataclass(kw_only=True)\nclass Mine(FineTuning):\n    strength: float = 2.0\n    'How strong.'\n",
        vars(module),
    )
    option = class_options(module.Mine)["strength"]
    assert (option.default, option.help) == (2.0, "")


def test_every_setting_has_a_help_text() -> None:
    for section in (
        *(field.annotation for field in RunConfig.model_fields.values()),
        DomainConfig,
        StepConfig,
    ):
        if isinstance(section, type) and issubclass(section, BaseModel):
            assert set(section.model_fields) == set(attribute_docs(section)), section.__name__
