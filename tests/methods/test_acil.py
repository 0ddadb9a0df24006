"""acil: the joint ridge regression in any order, sound labels of old classes, a frozen network, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from everseg.engine.one_pass import take_in
from everseg.errors import ConfigError
from everseg.methods import switches
from everseg.methods.acil import ACIL
from everseg.methods.base import StepContext
from everseg.models.build import from_description
from everseg.types import Batch, SegOutput
from saying import must_say

WIDTH, GAMMA = 20, 0.5


def small(**options) -> ACIL:
    return ACIL(**{"features": WIDTH, "gamma": GAMMA, "pseudo": "none", "balance": 0.0, **options})


def joint(model, seen: list[Batch], classes: int) -> np.ndarray:
    """The ridge regression over all pixels at once, by numpy's least squares."""
    expansion = model.head("a").expansion.weight[..., 0, 0].double().numpy()
    rows, targets = [np.sqrt(GAMMA) * np.eye(WIDTH)], [np.zeros((WIDTH, classes))]
    for batch in seen:
        with torch.no_grad():
            maps = model(batch.image, ("a",))["a"].features["decoder"].double()
        height, width = maps.shape[2:]
        label = batch.label[:, :: batch.label.shape[1] // height, :: batch.label.shape[2] // width].numpy()
        for image, truth in zip(maps.numpy(), label, strict=True):
            cells = image.reshape(image.shape[0], -1).T
            known = truth.ravel() != 255
            rows.append(np.maximum(cells[known] @ expansion.T, 0))
            targets.append(np.eye(classes)[truth.ravel()[known]])
    return np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets), rcond=None)[0].T


def weights(model) -> Tensor:
    return torch.cat([classifier.weight[..., 0, 0] for classifier in model.head("a").classifiers])


def error(model, expected: np.ndarray) -> float:
    return float(np.abs(weights(model).numpy() - expected).max() / np.abs(expected).max())


def context(model, step) -> StepContext:
    return StepContext(step=step, model=model, module=model, teacher=None)


def with_images(toy, model, method: ACIL, step, images: list[Batch]) -> None:
    """A later step, as the engine makes it."""
    method.prepare_model(model, step)
    model.double().eval()
    ctx = context(model, step)
    switches.begin(method, ctx)
    for batch in images:
        take_in(method, batch, ctx)
    switches.finish(method, ctx)


@pytest.mark.parametrize("seed", [0, 1])
def test_after_fifty_steps_it_is_the_joint_regression(toy, seed):
    """One class a step, in a random order of the images; the largest relative difference is below 1e-8."""
    toy.side = 64  # maps of 4 x 4 cells
    model, method = toy.model().double(), small()
    first = toy.step(0, {"a": (3,)}, {"a": 3}, "a")
    generator = torch.Generator().manual_seed(seed)

    def images(step, count: int) -> list[Batch]:
        old, new = step.num_old("a"), step.spaces["a"].num_classes
        made = []
        for _ in range(count):
            label = torch.randint(old - 1, new, (2, 64, 64), generator=generator)
            label[label < old] = 0
            label[:, :8] = 255
            made.append(Batch(torch.randn(2, 3, 64, 64, generator=generator).double(), label, "a"))
        return made

    seen = images(first, 3)
    method.prepare_model(model, first)
    model.double().train()
    ctx = context(model, first)
    switches.begin(method, ctx)
    model.eval()
    for batch in seen:
        take_in(method, batch, ctx)
    switches.finish(method, ctx)
    for index in range(1, 50):
        step = toy.step(index, {"a": (3, *[1] * index)}, {"a": 1}, "a")
        new = images(step, 2)
        with_images(toy, model, method, step, [new[i] for i in torch.randperm(2, generator=generator)])
        seen += new
    order = torch.randperm(len(seen), generator=generator).tolist()
    expected = joint(model, [seen[i] for i in order], 52)
    assert error(model, expected) < 1e-8


def test_the_network_is_trained_in_the_first_step_only(toy):
    model, method = toy.model(), small()
    toy.train(method, model, toy.steps[0])
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("heads")}
    expansion = model.head("a").expansion.weight.clone()
    toy.train(method, model, toy.steps[1])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key in before)
    assert torch.equal(model.head("a").expansion.weight, expansion)
    assert not any(weight.requires_grad for weight in model.parameters())


def test_models_are_rebuilt_from_their_description(toy):
    model, method = toy.model(), small()
    toy.train(method, model)
    again = from_description(model.describe())
    again.load_state_dict(model.state_dict())
    image = toy.batches(toy.steps[1])[0].image
    with torch.no_grad():
        assert torch.equal(again.eval()(image, ("a",))["a"].logits, model.eval()(image, ("a",))["a"].logits)


def outputs(values: list[list[float]]) -> SegOutput:
    """One row of pixels; a row of values for each output."""
    return SegOutput(torch.tensor(values)[None, :, None], {})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # background, old class 1, old class 2, new class 3; pixels: sure, unsure, labelled new, ignored, background
        ({"pseudo": "value", "threshold": 0.5}, [1, 255, 3, 255, 0]),
        ({"pseudo": "value", "threshold": 0.5, "unsure": "background"}, [1, 0, 3, 255, 0]),
        ({"pseudo": "value", "threshold": 0.3}, [1, 2, 3, 255, 0]),
        ({"pseudo": "sigmoid", "threshold": 0.7, "unsure": "background"}, [0, 0, 3, 255, 0]),
        ({"pseudo": "sigmoid", "threshold": 0.65}, [1, 255, 3, 255, 0]),
        ({"pseudo": "none"}, [0, 0, 3, 255, 0]),
        ({"pseudo": "value", "teacher": "live", "every_image": False}, [1, 3, 3, 255, 0]),
    ],
)
def test_old_classes_are_labelled_where_the_model_can_be_believed(toy, options, expected):
    out = outputs(
        [
            [0.1, 0.2, 0.9, 0.1, 0.9],
            [0.8, 0.1, 0.8, 0.9, 0.2],
            [0.1, 0.4, 0.0, 0.1, 0.1],
            [0.2, 0.6, 0.1, 0.0, 0.0],
        ]
    )
    label = torch.tensor([[[0, 0, 3, 255, 0]]])
    step = toy.step(1, {"a": (3, 1)}, {"a": 1}, "a")
    method = small(**options)
    batch = Batch(torch.zeros(1, 3, 1, 5), label, "a")
    assert method.labels(out, batch, context(None, step)).tolist() == [[expected]]


def test_labels_that_show_old_classes_are_left_alone(toy):
    import dataclasses

    step = dataclasses.replace(toy.step(1, {"a": (3, 1)}, {"a": 1}, "a"), protocol="sequential")
    batch = Batch(torch.zeros(1, 3, 1, 1), torch.tensor([[[0]]]), "a")
    assert (
        small(pseudo="value").labels(outputs([[0.0], [0.9], [0.0], [0.0]]), batch, context(None, step)).item()
        == 0
    )


def test_the_authors_threshold_needs_an_output_that_regression_does_not_give(toy):
    """Targets are 0 and 1: their highest threshold, 0.9, is an output of 2.2."""
    toy.side = 64
    model, method = toy.model(), small()
    toy.train(method, model)
    with torch.no_grad():
        highest = max(
            float(model.eval()(b.image, ("a",))["a"].logits.max()) for b in toy.batches(toy.steps[1], 6)
        )
    assert highest < 2.2


def test_single_precision_between_steps_costs_little(toy):
    toy.side, found = 64, {}
    for precision in ("exact", "fast"):
        model, method = toy.model(), small(precision=precision)
        toy.train(method, model)
        found[precision] = weights(model), method.state_dict()
    exact, fast = found["exact"], found["fast"]
    assert not torch.equal(exact[0], fast[0])
    torch.testing.assert_close(fast[0], exact[0], rtol=1e-3, atol=1e-4)
    assert {fast[1][name].dtype for name in ("gram", "cross")} == {torch.float32}
    assert {exact[1][name].dtype for name in ("gram", "cross")} == {torch.float64}


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_state_within_a_pass_is_exact(toy, precision):
    """Whatever is stored between steps, a pass that was stopped continues with all digits."""
    toy.side, results = 64, []
    for stopped in (False, True):
        model, method = toy.model(), small(precision=precision)
        toy.train(method, model, toy.steps[0])
        run = toy.begin(method, model, toy.steps[1])
        first, *rest = toy.batches(toy.steps[1])
        run.take(first)
        if stopped:
            state = {key: value.clone() for key, value in method.state_dict().items()}
            method = small(precision=precision)
            method.load_state_dict(state)
            method.classes = 5  # as `prepare_model` leaves it
            run.method = method
        run.take(*rest).finish()
        results.append(weights(model).clone())
    assert torch.equal(*results)


HYPERPARAMETERS = {
    "features": 16,
    "gamma": 3.0,
    "bce": False,
    "encoder_rate": 1.0,
    "pseudo": "value",
    "precision": "fast",
}


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_every_hyperparameter_acts(toy, name):
    toy.side, found = 64, []
    for options in ({}, {name: HYPERPARAMETERS[name]}):
        model = toy.model()
        toy.train(small(**{"threshold": 0.2, **options}), model)
        found.append(weights(model))
    assert found[0].shape != found[1].shape or not torch.equal(*found)


def test_the_pass_is_what_the_settings_say(toy):
    made = small(crops=False, passes=2, every_image=False, pass_batch=5).accumulates(toy.steps[0])
    assert (made.crops, made.epochs, made.every_image, made.batch) == (False, 2, False, 5)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ("width", ("method.features", "20")),
        ("model", ("acil", "step 0")),
        ("domains", ("acil", "one domain")),
    ],
)
def test_what_cannot_be_is_refused(toy, change, facts):
    model, method = toy.model(), small()
    step = toy.steps[1]
    if change == "model":
        model.grow({"a": 3})
    else:
        toy.train(method, model, toy.steps[0])
    if change == "width":
        method = small(features=8)
    if change == "domains":
        step = toy.step(1, {"a": (3,), "b": (4,)}, {"b": 4}, "b")
    with pytest.raises(ConfigError) as told:
        method.prepare_model(model, step)
    must_say(told.value, *facts)


def test_a_live_teacher_needs_whole_batches():
    with pytest.raises(ValueError, match="every_image=false"):
        ACIL(teacher="live")


def test_too_small_a_gamma_is_told_by_its_name(toy, monkeypatch):
    def indefinite(gram, cross, gamma):
        raise ValueError(f"gamma: {gamma} is too small")

    monkeypatch.setattr("everseg.losses.ridge.ridge_weights", indefinite)
    model, method = toy.model(), small()
    with pytest.raises(ConfigError, match=r"method\.gamma"):
        toy.train(method, model)
