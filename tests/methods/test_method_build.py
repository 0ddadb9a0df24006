"""Methods from a configuration, and their help texts."""

from __future__ import annotations

import pytest

from everseg import registry
from everseg.config.fields import MethodConfig
from everseg.config.hyperparameters import UnreadableError, class_options, method_options, written_options
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


@pytest.mark.parametrize("name", registry.BUILTIN["method"])
def test_hyper_parameters_read_from_the_source_are_those_of_the_class(name: str) -> None:
    """Order, types, bounds, defaults and help; reading them imports nothing."""
    written = written_options(registry.BUILTIN["method"][name])
    assert repr(list(written.values())) == repr(
        list(class_options(registry.resolve("method", name)).values())
    )


@pytest.mark.parametrize(
    "address", ["", "somewhere.else:Mine", "everseg.methods.mib:Nothing", "everseg.methods.none:MiB"]
)
def test_a_class_whose_source_does_not_tell_is_imported(address: str) -> None:
    with pytest.raises(UnreadableError):
        written_options(address)
