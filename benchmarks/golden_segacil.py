"""Compares SegACIL with the numbers of the authors' code: the recursion, and whole training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.golden_checks import EXACT, Row, Tally
from benchmarks.golden_replay import BRANCH, Comparison
from benchmarks.golden_tiny import TinyRun, set_weights, tiny_network
from everseg.config.fields import TrainConfig
from everseg.engine.one_pass import take_in
from everseg.engine.optim import check_param_groups, learning_rate, make_optimizer, set_learning_rate
from everseg.engine.step import train_batch
from everseg.losses import ridge
from everseg.losses.prototypes import label_at
from everseg.losses.reading import read_ids
from everseg.methods.acil import ACIL
from everseg.methods.base import StepContext
from everseg.methods.switches import begin, finish
from everseg.models.model import SegmentationModel
from everseg.scenarios.steps import Step
from everseg.types import Batch

LOSSES_GAMMA = 0.5
"""Gamma of `segacil_losses_*`, which the files do not hold."""
RATES = TrainConfig(lr=0.01, min_lr=1e-6)
"""Of the first step, whatever the command says; the body has a tenth of it."""
ILL_CONDITIONED = 1e-5
"""Limit of a run whose gamma is below 0.1: the authors' own code repeats its weights to 3e-6 there, with two threads
instead of one."""


def rename(key: str) -> str:
    """Their name of a tensor behind the ASPP, without "classifier.", -> ours."""
    module, layer, *_, leaf = key.split(".")
    if module == "head_pre":
        return f"decoder.{('last_conv', 'last_norm')[int(layer)]}.{leaf}"
    return f"heads.{BRANCH}.classifiers.0.{leaf}"


def limit_segacil(folder: Path, stem: str, quantity: str) -> float:
    """The limit of one quantity of a file."""
    solved = quantity.startswith("classifier") or quantity in ("confusion counts",)
    return ILL_CONDITIONED if solved and TinyRun(folder, stem).meta["gamma"] < 0.1 else EXACT


def replay_segacil(folder: Path, stem: str) -> dict[str, Comparison]:
    """Do one `train_segacil*.npz` again, in the authors' form.

    Returns:
        Quantity -> values compared and largest relative difference: of scalars to each value, of tensors to the
        largest value of the tensor; of labels and confusion counts the share that differs.
    """
    run = TinyRun(folder, stem)
    method = ACIL(
        features=run.meta["buffer"], gamma=run.meta["gamma"], threshold=run.meta["thresh"],
        pseudo="sigmoid" if run.meta["pseudo"] else "none", unsure="background", teacher="live", every_image=False,
        balance=0.0,
    )  # fmt: skip
    model = tiny_network(last_conv=True)
    for index in range(len(run.groups)):
        _replay_step(run, method, model, index)
    return run.found


def _replay_step(run: TinyRun, method: ACIL, model: SegmentationModel, index: int) -> None:
    protocol = {"overlap": "overlapped"}.get(run.meta["setting"], run.meta["setting"])
    step = run.step(index, protocol)
    method.prepare_model(model, step)
    model.double()
    if index == 0:
        start = run.stored("step0/start/")
        set_weights(model, {key: _as_convolution(key, value) for key, value in start.items()}, rename)
        method.expansion = torch.from_numpy(run.golden["buffer_weight"])
    ctx = StepContext(step=step, model=model, module=model, teacher=None)
    begin(method, ctx)
    if method.trains(step):
        _train(run, method, model, ctx)
    at = "align/" if index == 0 else f"step{index}/"
    _pass(run, method, model, ctx, at)
    finish(method, ctx)
    if f"{at}test_cm" in run.golden:
        # That of the alignment, which comes first in the second step, counts the classes of that step.
        model.eval()
        counts = run.confusion(lambda image, _: _predict(model, image), max(index, 1), current=False)
        run.same("confusion counts", counts, run.golden[f"{at}test_cm"])


def _train(run: TinyRun, method: ACIL, model: SegmentationModel, ctx: StepContext) -> None:
    """The first step's iterations with gradients."""
    order = run.golden["step0/order"]
    groups = method.param_groups(model, ctx.step)
    check_param_groups(model, groups)
    optimizer = make_optimizer(groups, RATES, lr=RATES.lr)
    model.train()
    for i, which in enumerate(order):
        set_learning_rate(optimizer, learning_rate(RATES, RATES.lr, i, len(order)))
        logged = train_batch(method, _batch(run, which, ctx.step, "step0/labels", i), ctx, optimizer)
        run.compare("loss", sum(logged.values()), run.golden["step0/loss"][i])
    model.eval()
    state = model.state_dict()
    final = {key: _as_convolution(key, value) for key, value in run.stored("step0/final/").items()}
    run.golden |= {f"final/{key}": value for key, value in final.items()}
    run.compare_weights("weights of the first step", model, "final/", rename)
    assert state


def _pass(run: TinyRun, method: ACIL, model: SegmentationModel, ctx: StepContext, at: str) -> None:
    model.eval()
    for i, which in enumerate(run.golden[f"{at}order"]):
        batch = _batch(run, which, ctx.step, f"{at}labels", i)
        with torch.no_grad():
            out = ctx.student(batch)
            features = out.features["decoder"]
            fitted = label_at(method.labels(out, batch, ctx), features.shape[2:])
            run.same("labels that are fitted", fitted, run.golden[f"{at}fit_labels"][i])
            if i == 0:
                x = ridge.expanded(
                    features.movedim(1, -1).flatten(0, 2), torch.from_numpy(run.golden["buffer_weight"])
                )
                run.compare("random features", [x.sum(), x.square().sum()], run.golden[f"{at}X0_sum"])
        take_in(method, batch, ctx)
        weights = ridge.ridge_weights(method.gram, method.cross, method.gamma)
        theirs = run.golden[f"{at}W/{i}"]
        number = theirs.shape[1]  # theirs grows as classes are met: columns beyond are zero here
        run.whole("classifier after each batch", weights[:, :number], theirs)
        run.compare("columns of classes not met", weights[:, number:].abs().sum(), 0.0, 1.0)
        inverse = ridge.ridge_inverse(method.gram, method.gamma)
        run.whole("inverse after each batch", inverse, run.golden[f"{at}R/{i}"])


def _batch(run: TinyRun, which: np.ndarray, step: Step, labels: str, i: int) -> Batch:
    """The images of a batch, with the labels that the run's setting shows."""
    groups = (
        run.groups[: step.index + 1]
        if step.protocol == "sequential"
        else run.groups[step.index : step.index + 1]
    )
    found = run.labels(which, [raw for group in groups for raw in group])
    run.same("labels", found, run.golden[labels][i])
    return Batch(run.images[torch.from_numpy(which)], found, BRANCH)


def _as_convolution(key: str, value: np.ndarray) -> np.ndarray:
    """Their classifier is a linear layer; ours a 1x1 convolution."""
    return value[:, :, None, None] if key.endswith("head.0.weight") else value


@torch.no_grad()
def _predict(model: SegmentationModel, image: Tensor) -> Tensor:
    return read_ids(model(image, (BRANCH,))[BRANCH], model.readout, image.shape[2:])


def check_segacil(folder: Path) -> list[Row]:
    """The recursion of every `segacil_losses_*.npz` against the solution from sums."""
    return [row for path in sorted(folder.glob("segacil_losses_*.npz")) for row in _check_file(path)]


def _check_file(path: Path) -> list[Row]:
    arrays, tally = dict(np.load(path)), Tally(path.name)
    for part in ("rls", "arm", "rls_bias"):
        _check_recursion(arrays, part, tally)
    weight, given = (torch.from_numpy(arrays[f"buffer/{name}"]) for name in ("weight", "in"))
    tally.add("random features", ridge.expanded(given, weight), arrays["buffer/out"])
    return tally.rows()


def _check_recursion(arrays: dict[str, Any], part: str, tally: Tally) -> None:
    """A part's batches in order; "rls_bias" has a constant feature, the last one."""
    number = sum(name.startswith(f"{part}/X/") for name in arrays)
    size = arrays[f"{part}/X/0"].shape[-1] + (part == "rls_bias")
    gram, cross = torch.zeros(size, size).double(), torch.zeros(size, 0).double()
    for i in range(number):
        x = torch.from_numpy(arrays[f"{part}/X/{i}"]).flatten(0, -2)
        y = torch.from_numpy(arrays[f"{part}/y/{i}"]).flatten()
        if part == "rls_bias":
            x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        x, y = x[y != 255], y[y != 255]
        more = max(0, int(y.max()) + 1 - cross.shape[1])
        cross = torch.cat([cross, cross.new_zeros(size, more)], dim=1)
        ridge.add_pixels(gram, cross, x, y)
        if f"{part}/R/{i}" in arrays:
            tally.add(f"{part}, inverse", ridge.ridge_inverse(gram, LOSSES_GAMMA), arrays[f"{part}/R/{i}"])
            tally.add(
                f"{part}, weights", ridge.ridge_weights(gram, cross, LOSSES_GAMMA), arrays[f"{part}/W/{i}"]
            )
    if f"{part}/W_final" in arrays:
        tally.add(
            f"{part}, weights", ridge.ridge_weights(gram, cross, LOSSES_GAMMA), arrays[f"{part}/W_final"]
        )
