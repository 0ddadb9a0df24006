"""The moving average of the weights: its numbers, and what a run does with it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy import settings

import everseg
from everseg.config.fields import ModelConfig
from everseg.engine import step as engine_step
from everseg.engine.average import MovingAverage
from everseg.models.build import build_model
from everseg.models.model import SegmentationModel

ALONE = SimpleNamespace(num_processes=1)


def tiny() -> SegmentationModel:
    torch.manual_seed(0)
    options = {"widths": [4, 4, 4, 4], "hidden": 4, "out_channels": 4}
    model = build_model(ModelConfig(name="deeplabv3-tiny", norm="bn", options=options))
    model.grow({"default": 2})
    return model


def averaged(states: list[dict[str, torch.Tensor]], decay: float) -> dict[str, np.ndarray]:
    """By hand, in float64: the weighted sum, written out; integers are the last ones."""
    found = {}
    for name, first in states[0].items():
        if not first.is_floating_point():
            found[name] = states[-1][name].numpy()
            continue
        later = len(states) - 1
        shares = [decay**later] + [(1 - decay) * decay ** (later - k) for k in range(1, later + 1)]
        assert sum(shares) == pytest.approx(1)
        found[name] = sum(
            share * state[name].double().numpy() for share, state in zip(shares, states, strict=True)
        )
    return found


def copy_of(model: SegmentationModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_it_is_the_weighted_sum_of_all_states_running_statistics_included():
    model = tiny().train()
    average = MovingAverage(model, 0.75)
    states = [copy_of(model)]
    for _ in range(4):
        with torch.no_grad():
            for weight in model.parameters():
                weight += torch.randn_like(weight)
            model(torch.randn(2, 3, 16, 16))
        average.update(model)
        states.append(copy_of(model))
    wanted = averaged(states, 0.75)
    assert any("running_var" in name for name in wanted)
    for name, value in average.values.items():
        np.testing.assert_allclose(value.numpy(), wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)
    raw = average.take_over(model, ALONE)
    assert all(torch.equal(value, states[-1][name]) for name, value in raw.items())
    assert all(torch.equal(value, average.values[name]) for name, value in model.state_dict().items())


def test_what_does_not_change_stays_exactly_what_it_is():
    model = tiny()
    average = MovingAverage(model, 0.9)
    for _ in range(7):
        average.update(model)
    assert all(torch.equal(value, average.values[name]) for name, value in model.state_dict().items())


def test_it_continues_from_a_stored_average_to_the_same_bits():
    model = tiny()
    one = MovingAverage(model, 0.6)
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn_like(weight)
    one.update(model)
    stored = {name: value.clone() for name, value in one.values.items()}
    other = MovingAverage(model, 0.6, stored)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1.1
    one.update(model), other.update(model)
    assert all(torch.equal(value, one.values[name]) for name, value in other.values.items())


def test_a_run_ends_tests_and_continues_with_the_average_and_keeps_the_raw_weights(tmp_path, monkeypatch):
    """The states of all iterations are caught, and averaged by hand."""
    states: dict[int, list[dict[str, torch.Tensor]]] = {}
    teachers = []
    plain = engine_step.train_batch

    def caught(method, batch, ctx, *given, **named):
        if ctx.step.index not in states:
            states[ctx.step.index] = [copy_of(ctx.module)]
            teachers.append(ctx.teacher)
        logged = plain(method, batch, ctx, *given, **named)
        states[ctx.step.index].append(copy_of(ctx.module))
        return logged

    monkeypatch.setattr(engine_step, "train_batch", caught)
    results = everseg.run(settings(tmp_path, train={"ema": 0.8}), quiet=True)
    for index, seen in states.items():
        final = Path(results.folder.final(index))
        kept, raw = load_file(final / "model.safetensors"), load_file(final / "raw.safetensors")
        assert kept.keys() == raw.keys() == seen[-1].keys()
        assert all(torch.equal(value, seen[-1][name]) for name, value in raw.items())
        for name, value in averaged(seen, 0.8).items():
            np.testing.assert_allclose(kept[name].numpy(), value, rtol=1e-4, atol=1e-5, err_msg=name)
        model = results.folder.load_final(index)[0]
        assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    # The next step learns from the average, and continues it.
    first = load_file(Path(results.folder.final(0)) / "model.safetensors")
    assert all(torch.equal(value, first[name]) for name, value in teachers[1].state_dict().items())
    begun = states[1][0]
    assert all(
        torch.equal(begun[name], value) for name, value in first.items() if not name.startswith("heads")
    )


def test_without_it_nothing_is_stored_beside_the_model(tmp_path):
    results = everseg.run(settings(tmp_path, train={"epochs": 1, "epochs_next": 1}), quiet=True)
    names = {path.name for path in Path(results.folder.final(1)).iterdir()}
    assert names == {"MANIFEST.json", "classes.json", "method_state.safetensors", "model.safetensors"}
