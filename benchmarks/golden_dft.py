"""Compares DFT and DFT* with training runs of the authors' code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.golden_replay import BRANCH, Comparison
from benchmarks.golden_tiny import WIDTH, Body, TinyRun
from everseg.config.fields import TrainConfig
from everseg.engine.optim import check_param_groups, learning_rate, make_optimizer, set_learning_rate
from everseg.engine.step import train_batch
from everseg.losses import upsample
from everseg.methods.base import Method, StepContext
from everseg.methods.dft import DFT, DFTStar, all_outputs
from everseg.methods.switches import begin, finish
from everseg.models.model import SegmentationModel
from everseg.scenarios.steps import Step, with_outlook
from everseg.types import Batch

MOMENTUM = 0.1
"""Of all norms."""
EVERY = 4
"""The files hold each fourth row and column of the logits of the test images."""


class _Decoder(nn.Module):
    """One 3x3 convolution, a norm and a ReLU."""

    out_channels = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(Body.out_channels, WIDTH, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(WIDTH, momentum=MOMENTUM)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.bn(self.conv(features["encoder"])).relu()


def replay_dft(folder: Path, stem: str) -> dict[str, Comparison]:
    """Train one `train_dft*.npz` again.

    Returns:
        Quantity -> values compared and largest relative difference: of scalars to each value, of tensors to the
        largest value of the tensor.
    """
    run = TinyRun(folder, stem)
    flags = run.meta["flags"]
    options: dict[str, Any] = {
        "preallocate": "--pre_allocate" in flags,
        "network": "frozen" if "--fix_backbone" in flags else "trained",
        "old_classifiers": "frozen" if "--fix_pre_cls" in flags else "trained",
    }
    method: Method = DFTStar(**options) if flags else DFT()
    model = SegmentationModel(Body(momentum=MOMENTUM), _Decoder(), {"name": "golden", "options": {}}).double()
    rates = run.meta["lrs"]
    steps = with_outlook([run.step(index) for index in range(len(run.groups))])
    for step in steps:
        train = TrainConfig(lr=rates[step.index])
        _replay_step(run, method, model, step, train)
    return run.found


def _names(model: SegmentationModel) -> dict[str, str]:
    """Our name of a weight or statistic -> theirs: classifiers are counted through, those to come last."""
    number = len(model.head(BRANCH).classifiers)
    found = {}
    for name in model.state_dict():
        part, _, rest = name.partition(".")
        if name.endswith("num_batches_tracked"):
            continue
        if part == "encoder":
            found[name] = f"body.b.{rest}"
        elif part == "decoder":
            found[name] = f"head.{rest}"
        else:
            kind, place, leaf = name.split(".")[-3:]
            found[name] = f"cls.{int(place) + (number if kind == 'future' else 0)}.{leaf}"
    return found


def _replay_step(
    run: TinyRun, method: Method, model: SegmentationModel, step: Step, train: TrainConfig
) -> None:
    at = f"step{step.index}/"
    method.prepare_model(model, step)
    model.double()
    names, start = _names(model), run.stored(f"{at}start/")
    first_new = f"heads.{BRANCH}.classifiers.{step.index}."
    state, reserved = model.state_dict(), getattr(method, "preallocate", False)
    for name, original in names.items():
        fresh = step.index == 0 or (not reserved and name.startswith(first_new))
        if fresh:  # drawn at random in the original, too
            state[name].copy_(torch.from_numpy(start[original]))
        run.whole("weights at the start", state[name], start[original])
    weights = dict(model.named_parameters())
    rows = run.golden[f"{at}names"].tolist()
    theirs = dict(zip(rows, run.golden[f"{at}trainable"].tolist(), strict=True))
    run.same(
        "what is trained",
        [w.requires_grad for w in weights.values()],
        np.array([theirs[names[n]] for n in weights]),
    )
    groups = method.param_groups(model, step)
    check_param_groups(model, groups)
    optimizer = make_optimizer(groups, train, lr=train.lr)
    ctx = StepContext(step=step, model=model, module=model, teacher=None)
    begin(method, ctx)
    model.train()
    order = run.golden[f"{at}order"]
    for i, which in enumerate(order):
        rate = learning_rate(train, train.lr, i, len(order))
        set_learning_rate(optimizer, rate)
        run.compare("learning rate", np.full(len(run.golden[f"{at}lr"][i]), rate), run.golden[f"{at}lr"][i])
        label = run.labels(which, run.groups[step.index])
        batch = Batch(run.images[torch.from_numpy(which)], label, BRANCH)
        logged = train_batch(method, batch, ctx, optimizer)
        run.compare("ce", sum(logged.values()), run.golden[f"{at}ce"][i])
        _compare_gradients(run, weights, names, rows, at, i)
    finish(method, ctx)
    final = run.stored(f"{at}final/")
    for name, original in names.items():
        run.whole("final weights", model.state_dict()[name], final[original])
    model.eval()
    with torch.no_grad():
        images = run.images[run.num_train :]
        logits = upsample(all_outputs(model(images, (BRANCH,))[BRANCH]), images.shape[2:])
    run.whole("logits of the test images", logits[:, :, ::EVERY, ::EVERY], run.golden[f"{at}test_logits_s4"])


def _compare_gradients(
    run: TinyRun, weights: dict[str, nn.Parameter], names: dict[str, str], rows: list[str], at: str, i: int
) -> None:
    theirs = run.golden[f"{at}gradnorm"][i]
    whole = float(np.linalg.norm(theirs[theirs >= 0]))
    for name, weight in weights.items():
        norm = theirs[rows.index(names[name])]
        ours = -1.0 if weight.grad is None or not weight.requires_grad else float(weight.grad.norm())
        run.compare("gradient norms, of the total", ours, norm, whole)
        if norm > 1e-10 * whole:
            run.compare("gradient norms", ours, norm)
