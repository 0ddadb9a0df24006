"""Every method says what acts in its first step; where two say the same, weights and state are the same bytes."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import pytest
import safetensors.torch

from everseg import registry
from everseg.methods.base import Method, first_step_of
from everseg.methods.ft import FineTuning

METHODS = list(registry.BUILTIN["method"])
STATELESS = ["ft", "ilt", "lwf", "lwf-mc", "mib", "mdil", "mdil+mib"]
"""Methods with nothing of their own in the first step."""
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
    model, method = toy.model(), registry.resolve("method", name)(**options)
    toy.train(method, model, step)
    told = safetensors.torch.save(model.state_dict()) + safetensors.torch.save(method.state_dict())
    return hashlib.sha256(told + repr(model.describe()).encode()).hexdigest()


def test_methods_that_claim_the_same_first_step_train_it_to_the_same_bytes(toy):
    for step in (toy.steps[0], toy.domains[0]):
        groups: dict[str, set[str]] = {}
        for name, options in VARIANTS:
            claim = repr(first_step_of(registry.resolve("method", name)(**options)))
            groups.setdefault(claim, set()).add(trained(toy, name, options, step))
        assert all(len(members) == 1 for members in groups.values()), groups
        every = [digest for members in groups.values() for digest in members]
        assert len(set(every)) == len(every), "what does not share differs, so the comparison sees something"


@pytest.mark.parametrize("name", STATELESS)
def test_methods_that_claim_something_leave_no_state(toy, name):
    method = registry.resolve("method", name)()
    toy.train(method, toy.model(), toy.steps[0])
    assert method.state_dict() == {}


@pytest.mark.parametrize("name", METHODS)
def test_hyper_parameters_of_later_steps_do_not_keep_runs_from_sharing(name: str) -> None:
    cls = registry.resolve("method", name)
    plain = first_step_of(cls())
    tried = [f for f in dataclasses.fields(cls) if f.init and isinstance(f.default, (bool, float))]
    acting = {f.name for f in tried if first_step_of(cls(**{f.name: _other(f)})) != plain}
    if name in STATELESS:
        assert acting <= {"bce"}
        assert first_step_of(cls(freeze_encoder=True)) == plain
        assert first_step_of(cls(freeze_encoder=True, freeze_from=0)) != plain
    else:
        assert "weight" in acting, "what a method does not claim counts as acting"


def _other(field: dataclasses.Field) -> Any:
    return (not field.default) if isinstance(field.default, bool) else field.default * 0.5


def test_a_subclass_does_not_inherit_the_claim() -> None:
    @dataclasses.dataclass(kw_only=True)
    class Mine(FineTuning):
        def losses(self, batch, ctx):
            yield {}

    assert first_step_of(Mine()) != first_step_of(FineTuning())
    assert first_step_of(Mine()) == first_step_of(Mine())
    assert first_step_of(Mine(bce=True)) != first_step_of(Mine())
    assert Method().first_step() is None
