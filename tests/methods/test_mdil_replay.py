"""The original MDIL code's training runs, replayed in float64 by method `mdil` in the authors' form."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest

from everyday import some

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks import golden_mdil  # noqa: E402
from benchmarks.golden_checks import EXACT  # noqa: E402
from benchmarks.golden_mdil import LIMITS, authors_form, new_model, replay_step  # noqa: E402
from benchmarks.golden_mdil_checks import check_param_groups, check_transfer  # noqa: E402

from everseg.methods.mdil import MDIL  # noqa: E402
from everseg.models import erfnet  # noqa: E402
from everseg.scenarios.steps import Step  # noqa: E402

pytestmark = pytest.mark.golden
EVERYWHERE = {
    "ce",
    "learning rate",
    "weight norms",
    "gradient norms",
    "gradient sums",
    "which weights have no gradient",
    "final weights, sums and norms",
    "Adam's step counts",
    "validation loss",
    "validation mIoU",
}
WITH_TEACHER = {"kd, as logged", "kld per domain", "kld_corrected per domain", "teacher's mode"}


@pytest.fixture(scope="module")
def arrays(golden):
    return dict(np.load(golden / "train_mdil.npz"))


@pytest.fixture(scope="module")
def replay(golden, arrays):
    """Replay one step, from a copy of what the replayed step before left; the file's two forms part in step 3."""
    models, compared = {0: new_model()}, {}

    def run(number, method, form="legacy", suffix="", batches=None):
        model = copy.deepcopy(start(number))
        at = f"f64/{form}/step{number}{suffix}"
        return model, replay_step(golden, arrays, model, number, method, at, batches)

    def start(number):
        if number - 1 not in models:
            models[number - 1], compared[number - 1] = run(number - 1, authors_form("legacy"))
        return models[number - 1]

    def step(number, method=None, form="legacy", **options):
        if method is None and form == "legacy":
            start(number + 1)
            return compared[number]
        return run(number, method or authors_form(form), form, **options)[1]

    return step


def above(found):
    return {k: v.largest for k, v in found.items() if not v.largest <= LIMITS.get(k, EXACT)}


@pytest.mark.parametrize(
    ("number", "form"),
    some([(1, "legacy"), (2, "legacy"), (3, "legacy"), (3, "modern")], (1, "legacy"), (3, "modern")),
)
def test_replay_agrees_with_the_original(replay, number, form):
    found = replay(number, form=form)
    assert not above(found)
    assert found.keys() >= EVERYWHERE | (WITH_TEACHER if number > 1 else set())
    assert all(comparison.count for comparison in found.values())


def test_replay_agrees_where_the_distillation_weighs_much(replay):
    found = replay(2, authors_form("legacy", 50.0), suffix="_lambda50", batches=2)
    assert not above(found)
    assert found["kd, as logged"].count == 2


def first_batch(golden, name="train_mdil_wide"):
    """The first batch of the first step."""
    arrays = dict(np.load(golden / f"{name}.npz"))
    return replay_step(golden, arrays, new_model(), 1, authors_form("legacy"), "f64/legacy/step1", 1)


def test_replay_agrees_on_images_larger_than_any_dilation(golden):
    assert not above(first_batch(golden))


def test_forms_do_not_differ_in_the_first_two_steps(arrays):
    """So that one replay of these serves both."""
    for key, legacy in arrays.items():
        if key.startswith(("f64/legacy/step1/", "f64/legacy/step2/")) and legacy.dtype.kind != "U":
            modern = arrays.get(key.replace("legacy", "modern"))
            assert modern is None or np.array_equal(legacy, modern), key


@pytest.mark.parametrize("check", [check_transfer, check_param_groups])
def test_start_of_each_step_agrees_with_the_original(golden, check):
    rows = check(golden)
    assert rows
    assert not [row for row in rows if not row.difference <= row.limit]


def faithful(**changes):
    method = authors_form("legacy")
    for name, value in changes.items():
        setattr(method, name, value)
    return method


@pytest.mark.parametrize(
    ("number", "change", "quantity"),
    [
        (2, {"kl": "log"}, "kd, as logged"),
        (2, {"frozen_statistics": True}, "kld_corrected per domain"),
        (2, {"shared_lr_scale": 1.0}, "weight norms"),
        (2, {"kd_weight": 0.2}, "gradient norms"),
        (3, {"teacher_statistics": "running"}, "kld_corrected per domain"),
        (3, {"updates": "two"}, "weight norms"),
        (3, {"updates": "one"}, "gradient norms"),
    ],
)
def test_replay_notices_the_corrected_forms_in_the_first_batch(replay, number, change, quantity):
    found = replay(number, faithful(**change), batches=1)
    assert above(found)[quantity] > 1e-6


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("ERFNET_EPS", 1e-5),
        ("DILATIONS", (2, 4, 8, 8)),
        ("beside", lambda result, *_: result),  # no adapters
    ],
)
def test_replay_notices_another_network(golden, monkeypatch, name, wrong):
    monkeypatch.setattr(erfnet, name, wrong)
    assert above(first_batch(golden))["ce"] > 1e-6


def test_transfer_check_notices_a_domain_that_starts_afresh(golden, monkeypatch):
    monkeypatch.setattr(MDIL, "grow", lambda self, model, step: model.grow(step.grows))
    wrong = [row.quantity for row in check_transfer(golden) if row.difference > row.limit]
    assert wrong == ["copied tensors"]


def test_transfer_check_notices_copied_statistics(golden, monkeypatch):
    def grow(self: MDIL, model, step: Step) -> None:
        original(self, model, step)
        state = golden_mdil.original_state(model)
        for name, value in state.items():
            older = name.replace(f".{step.index}.running", f".{step.index - 1}.running")
            if step.index and older != name and "encoder" in name:
                value.copy_(state[older])

    original = MDIL.grow
    monkeypatch.setattr(MDIL, "grow", grow)
    wrong = [row.quantity for row in check_transfer(golden) if row.difference > row.limit]
    assert wrong == ["fresh statistics"]
