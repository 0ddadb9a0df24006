"""What acts in a first step is found by trial; where two methods do the same, weights and state are the same bytes."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import pytest
import safetensors.torch
import torch

from everseg import registry
from everseg.engine.sharing import behaviour
from everseg.methods.ft import FineTuning

METHODS = list(registry.BUILTIN["method"])
STATEFUL = ["ewc", "pi", "rw", "reminder", "sdr", "star", "acil"]
"""Methods that gather something in the first step; of a new method it is expected that it does not."""
NETWORK = "rcil"
"""The method whose network all of them are tried on: with every part that one may ask for."""
STATELESS = [name for name in METHODS if name not in STATEFUL]
"""Methods with nothing of their own in the first step."""
OF_FIRST_STEP = {
    "dkd": {"pos_weight", "auxiliary_weight"},
    "dft*": {"preallocate"},
    "ssul": {"encoder_rate"},
    "barm": {"encoder_rate"},
    "microseg": {"encoder_rate", "unseen_weight"},
}
"""What acts in the first step of methods whose first step is not that of fine-tuning."""
FROZEN = {"freeze_encoder": True, "freeze_from": 0}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in METHODS),
    *((name, {"bce": True}) for name in ("ft", "lwf", "ilt", "mib", "ewc")),
    *((name, FROZEN) for name in ("ft", "mib")),
    *((name, {"freeze_encoder": True}) for name in ("ft", "mdil")),
    ("ft", {"freeze_norm": True, "freeze_from": 0}),
    ("mib", {"kd_weight": 3.0, "alpha": 2.0, "unbiased_ce": False, "unbiased_kd": False, "init_background": False}),
    ("lwf", {"kd_weight": 3.0, "alpha": 2.0}),
    ("ilt", {"feature_weight": 3.0}),
    ("lwf-mc", {"form": "disjoint", "background_from_labels": True}),
    ("mdil", {"kd_weight": 3.0, "shared_lr_scale": 0.5, "kl": "probabilities", "teacher_statistics": "authors"}),
    ("mdil", {"updates": "two"}),
    ("mdil+mib", {"background_kd_weight": 1.0, "shared_lr_scale": 0.5}),
]  # fmt: skip


def trained(toy: Any, name: str, options: dict[str, Any], step: Any) -> str:
    """SHA-256 of the weights and the method's state after the first step."""
    model, method = toy.model(NETWORK), registry.resolve("method", name)(**options)
    toy.train(method, model, step)
    told = safetensors.torch.save(model.state_dict()) + safetensors.torch.save(method.state_dict())
    return hashlib.sha256(told + repr(model.describe()).encode()).hexdigest()


def test_methods_that_do_the_same_in_the_trial_train_a_first_step_to_the_same_bytes(toy):
    # Both say what is to come, which a method may reserve outputs for.
    for step in (toy.steps[0], dataclasses.replace(toy.domains[0], to_come={"a": (2,)})):
        groups: dict[str, set[str]] = {}
        for name, options in VARIANTS:
            claim = repr(behaviour(registry.resolve("method", name)(**options)))
            groups.setdefault(claim, set()).add(trained(toy, name, options, step))
        assert all(len(members) == 1 for members in groups.values()), groups
        every = [digest for members in groups.values() for digest in members]
        assert len(set(every)) == len(every), "what does not share differs, so the comparison sees something"


@pytest.mark.parametrize("name", STATELESS)
def test_methods_that_share_leave_no_state(toy, name):
    method = registry.resolve("method", name)()
    toy.train(method, toy.model(NETWORK), toy.steps[0])
    assert method.state_dict() == {}


@pytest.mark.parametrize("name", METHODS)
def test_hyper_parameters_of_later_steps_do_not_keep_runs_from_sharing(name: str) -> None:
    cls = registry.resolve("method", name)
    plain = behaviour(cls())
    tried = [f for f in dataclasses.fields(cls) if f.init and isinstance(f.default, (bool, float))]
    if name == "rcil":  # it refuses these
        tried = [f for f in tried if f.name not in ("freeze_encoder", "freeze_decoder")]
    acting = {f.name for f in tried if behaviour(cls(**{f.name: _other(f)})) != plain}
    if name in STATELESS:
        assert acting <= {"bce", "freeze_first_head"} | OF_FIRST_STEP.get(name, set())
        frozen = "freeze_norm" if name == "rcil" else "freeze_encoder"
        assert behaviour(cls(**{frozen: True})) == plain
        assert behaviour(cls(**{frozen: True}, freeze_from=0)) != plain
    else:
        assert any(field.endswith("weight") or field == "gamma" for field in acting), (
            "a method that keeps something shares with its like alone"
        )


def _other(field: dataclasses.Field) -> Any:
    return (not field.default) if isinstance(field.default, bool) else field.default * 0.5


def test_a_method_of_the_users_own_shares_with_itself_alone() -> None:
    @dataclasses.dataclass(kw_only=True)
    class Mine(FineTuning):
        def losses(self, batch, ctx):
            yield {}

    assert behaviour(Mine()) != behaviour(FineTuning())
    assert behaviour(Mine()) == behaviour(Mine())
    assert behaviour(Mine(bce=True)) != behaviour(Mine())


def test_the_trial_leaves_the_method_and_the_random_numbers_as_they_were() -> None:
    method = registry.resolve("method", "ewc")()
    before = method.state_dict()
    torch.manual_seed(7)
    behaviour(method)
    assert method.state_dict() == before
    assert torch.initial_seed() == 7
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))


def test_the_number_of_threads_is_no_part_of_it() -> None:
    one = behaviour(FineTuning())
    torch.set_num_threads(2)
    assert behaviour(FineTuning()) == one
    assert torch.get_num_threads() == 2


def test_gradients_of_zero_are_not_absent_ones() -> None:
    """Weight decay moves a weight whose gradient is 0, and leaves one without gradient alone."""
    cls = registry.resolve("method", "mdil")
    assert behaviour(cls(updates="two-legacy")) != behaviour(cls())
