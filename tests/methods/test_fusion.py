"""The fusion of a step's weights with those of the step before, against numpy, and as a switch of any method."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from everseg.errors import ConfigError
from everseg.labels import LabelSpace
from everseg.methods import switches
from everseg.methods.ewf import EWF
from everseg.methods.ft import FineTuning
from everseg.methods.fusion import fuse, new_share, unfit_for_fusion
from everseg.methods.lwf import LwF
from everseg.methods.mib import MiB
from everseg.models.model import frozen_copy
from everseg.scenarios.steps import Source, Step

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.golden_checks import EXACT  # noqa: E402
from benchmarks.golden_ewf import check_ewf, replay_ewf  # noqa: E402

from saying import must_say  # noqa: E402

FOLDER = ROOT.parent / "shared" / "golden"
STEMS = sorted(path.stem for path in FOLDER.glob("train_ewf_*.npz")) if FOLDER.is_dir() else []


def arrays(model) -> dict[str, np.ndarray]:
    return {name: value.double().numpy().copy() for name, value in model.state_dict().items()}


def two_models(toy):
    """A model, and what training and growth have made of it."""
    model = toy.model()
    model.grow({"a": 3})
    old = frozen_copy(model)
    model.grow({"a": 2})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value += torch.randn(value.shape, generator=generator)
            else:
                value += 7
    return model, old


def test_every_shared_tensor_is_the_weighted_mean_and_the_new_one_stays(toy):
    model, old = two_models(toy)
    new, was = arrays(model), arrays(old)
    assert fuse(model, old, 0.4) == 0
    found = arrays(model)
    assert set(new) - set(was) == {
        "heads.a.classifiers.1.weight",
        "heads.a.classifiers.1.bias",
    }
    for name, value in new.items():
        whole = name.endswith("num_batches_tracked")
        expected = value if whole or name not in was else 0.6 * was[name] + 0.4 * value
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)
    assert any(name.endswith("running_var") for name in was)
    assert {name: value for name, value in arrays(old).items() if (value != was[name]).any()} == {}


@pytest.mark.parametrize("largest", [0.0, 0.1, 0.45, 1.0])
def test_only_what_changed_most_is_fused(toy, largest):
    model, old = two_models(toy)
    new, was = arrays(model), arrays(old)
    cut = fuse(model, old, 0.4, largest)
    found = arrays(model)
    names = [name for name in was if not name.endswith("num_batches_tracked")]
    changes = np.sort(np.concatenate([np.abs(new[name] - was[name]).ravel() for name in names]))[::-1]
    count = int(largest * len(changes))
    expected_cut = changes[count - 1] if count else math.inf
    assert cut == pytest.approx(expected_cut, rel=1e-6)
    fused = 0
    for name in names:
        moved = np.abs(new[name] - was[name]) > expected_cut * (1 - 1e-6)
        fused += int(moved.sum())
        expected = np.where(moved, 0.6 * was[name] + 0.4 * new[name], new[name])
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)
    assert fused == count


def test_what_did_not_change_stays_exactly(toy):
    model = toy.model()
    model.grow({"a": 3})
    old = frozen_copy(model)
    before = arrays(model)
    for largest in (None, 0.45):  # every change is 0, and so is the cut
        assert fuse(model, old, 0.3, largest) == 0
        for name, value in arrays(model).items():
            np.testing.assert_array_equal(value, before[name])


def test_share_of_the_new_weights(toy):
    def step(index: int, sizes: dict[str, tuple[int, ...]], grows: dict[str, int]) -> Step:
        spaces = {}
        for name, groups in sizes.items():
            ids = iter(range(sum(groups)))
            spaces[name] = LabelSpace(
                tuple(tuple(next(ids) for _ in range(n)) for n in groups),
                tuple(f"{name}{i}" for i in range(sum(groups))),
            )
        source = Source(next(iter(grows)), "toy", "train", (), bytes(256))
        return Step(index, (source,), (), spaces, grows)

    assert new_share(step(1, {"a": (16, 5)}, {"a": 5})) == math.sqrt(5 / 21)
    assert new_share(step(1, {"day": (19,), "dusk": (19,)}, {"dusk": 19})) == math.sqrt(0.5)
    same = step(2, {"a": (16, 5)}, {"a": 0})
    assert new_share(same) == 0
    assert unfit_for_fusion(same).startswith("step 2: method.fuse")
    assert switches.unfit(MiB(fuse="all"), [same]) == [unfit_for_fusion(same)]
    assert switches.unfit(MiB(), [same]) == []
    (problem,) = switches.unfit(MiB(fuse="all"), toy.steps[:1])
    must_say(problem, "method.fuse", "no later step", "method.fuse=none")
    assert switches.unfit(MiB(), toy.steps[:1]) == switches.unfit(MiB(fuse="all"), toy.steps) == []
    assert unfit_for_fusion(step(0, {"a": (16,)}, {"a": 16})) == ""


def test_another_structure_is_refused(toy):
    model, old = two_models(toy)
    model.changes.append("merge branches")
    with pytest.raises(ConfigError, match=r"method.fuse: .*\(merge branches\)"):
        fuse(model, old, 0.5)
    run = toy.begin(EWF(), toy.train(EWF(), toy.model(), toy.steps[0]).model, toy.steps[1], begin=False)
    run.model.changes.append("merge branches")
    with pytest.raises(ConfigError, match=r"method.fuse: .*\(merge branches\)"):
        switches.begin(run.method, run.ctx)


@pytest.mark.parametrize("method", [MiB, LwF, FineTuning])
def test_the_switch_fuses_after_any_method(toy, method):
    plain, fused = (
        toy.begin(m, toy.train(m, toy.model(), toy.steps[0]).model, toy.steps[1])
        for m in (method(), method(fuse="all"))
    )
    assert fused.teacher is not None
    for run in (plain, fused):
        run.take(*toy.batches(toy.steps[1]))
    trained, was = arrays(fused.model), arrays(fused.teacher)
    for name, value in arrays(plain.model).items():
        np.testing.assert_array_equal(trained[name], value, err_msg=name)
    switches.finish(fused.method, fused.ctx)
    share = math.sqrt(2 / 5)
    for name, value in arrays(fused.model).items():
        if name in was and not name.endswith("num_batches_tracked"):
            expected = (1 - share) * was[name] + share * trained[name]
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_first_step_is_not_fused(toy):
    run = toy.begin(EWF(), toy.model(), toy.steps[0])
    run.take(*toy.batches(toy.steps[0]))
    trained = arrays(run.model)
    switches.finish(run.method, run.ctx)
    for name, value in arrays(run.model).items():
        np.testing.assert_array_equal(value, trained[name])


def test_ewf_freezes_old_classifiers_after_the_background_has_made_room(toy):
    run = toy.begin(EWF(), toy.train(EWF(), toy.model(), toy.steps[0]).model, toy.steps[1])
    first = run.model.head("a").classifiers[0]
    assert not first.weight.requires_grad
    before = first.bias.detach().clone()
    assert before[0] != run.teacher.head("a").classifiers[0].bias[0]
    run.take(*toy.batches(toy.steps[1]))
    torch.testing.assert_close(first.bias.detach(), before, rtol=0, atol=0)


@pytest.mark.golden
@pytest.mark.parametrize("stem", STEMS)
def test_replay_agrees_with_the_original(golden, stem):
    found = replay_ewf(golden, stem)
    assert {k: v for k, v in found.items() if not v.largest <= EXACT} == {}
    assert {"loss", "lkd", "weights before the fusion", "final weights"} <= found.keys()


@pytest.mark.golden
def test_fusion_by_threshold_agrees_with_the_original(golden):
    rows = check_ewf(golden)
    assert [row for row in rows if not row.difference <= row.limit] == []
    assert {"cut", "fused weights", "elements"} <= {row.quantity for row in rows}


@pytest.mark.golden
def test_replay_notices_a_mistake(golden, monkeypatch):
    monkeypatch.setattr(switches, "new_share", lambda step: new_share(step) * 1.001)
    assert replay_ewf(golden, "train_ewf_A")["final weights"].largest > 1e-5
