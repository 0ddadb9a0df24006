"""Compares RCIL with the numbers of its authors' code: the functions, and the training runs in float64.

`rcil_losses_*.npz` hold terms and merged convolutions, `train_rcil_*.npz` whole runs, merged before each later step.
Seeds, tasks, factors and weights are read from the files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.golden_checks import Row, Tally
from benchmarks.golden_replay import (
    Case,
    Comparison,
    _initial_model,
    _set_weights,
    _steps,
    difference,
    epoch_order,
    first_seed,
    generated_weight,
    original_names,
    step_batches,
)
from everseg.config.fields import TrainConfig
from everseg.engine.optim import learning_rate, make_optimizer, set_learning_rate
from everseg.engine.step import train_batch
from everseg.losses import (
    cross_entropy,
    pooled_cube_distillation,
    unbiased_cross_entropy,
    unbiased_distillation,
)
from everseg.methods.base import StepContext
from everseg.methods.rcil import RCIL
from everseg.models.blocks import NORM_EPS, AbsBatchNorm, BatchNorm
from everseg.models.build import deeplabv3, from_description
from everseg.models.compensation import MERGE, Compensated, Unit, combine, compensated
from everseg.models.model import SegmentationModel, frozen_copy
from everseg.scenarios.steps import Step

FACTORS = {
    "voc": ((0.01, 0.0005), (0.01, 0.0005)),
    "cityscape": ((0.01, 0.0005), (0.01, 0.0005)),
    "ade": ((5e-6, 5e-7), (5e-6, 5e-7)),
    "cityscapes_domain": ((5e-4, 1e-4), (1e-4, 0.0)),
}
"""Data set -> factors of the spatial and of the channel term: of every map but the last, and of the last one."""
DOMAIN = "cityscapes_domain"
"""New domains with the same classes: plain cross-entropy, no distillation of outputs, no growth factor."""


def check_rcil(path: Path) -> list[Row]:
    """Terms and their gradients on every data set's factors; merged convolutions."""
    arrays, tally = dict(np.load(path)), Tally(path.name)
    for name in FACTORS:
        if f"{name}/loss" in arrays:
            _check_terms(arrays, name, tally)
    if "big/pod_loss" in arrays:
        student, teacher = _maps(arrays, "big/")
        spatial, channel = FACTORS["voc"]
        cube = pooled_cube_distillation([*student.values()], teacher, spatial=spatial, channel=channel)
        total = _growth(arrays) * sum(cube)
        total.backward()
        tally.add("large maps", total, arrays["big/pod_loss"])
        _check_gradients(arrays, "big/", student, tally)
    if "merge/weight" in arrays:
        _check_merge(arrays, tally)
    return tally.rows()


def _maps(arrays: dict[str, np.ndarray], at: str = "") -> tuple[dict[str, Tensor], list[Tensor]]:
    stages = sorted(k.removeprefix(at) for k in arrays if k.startswith(f"{at}att"))
    names = [*stages, "feat", "small"]
    student = {n: torch.from_numpy(arrays[at + n]).double().requires_grad_() for n in names}
    return student, [torch.from_numpy(arrays[f"{at}old_{n}"]).double() for n in names]


def _growth(arrays: dict[str, np.ndarray]) -> float:
    old, new = int(arrays["K"]), int(arrays["N"])
    return math.sqrt((old + new) / new)


def _check_terms(arrays: dict[str, np.ndarray], name: str, tally: Tally) -> None:
    student, teacher = _maps(arrays)
    logits = torch.from_numpy(arrays["logits"]).double().requires_grad_()
    old, labels = torch.from_numpy(arrays["old_logits"]).double(), torch.from_numpy(arrays["labels"]).long()
    known, growth = int(arrays["K"]), _growth(arrays)
    given = list(student.values())
    if name == DOMAIN:
        given[-1], growth = given[-1][:, :known], 1.0
        domain = torch.where(labels == 255, labels, labels % known)
        ce, kd = cross_entropy(logits[:, :known], domain), torch.zeros(())
    else:
        ce = unbiased_cross_entropy(logits, labels, num_old=known)
        kd = 100 * unbiased_distillation(logits, old)
    spatial, channel = FACTORS[name]
    cube = pooled_cube_distillation(given, teacher, spatial=spatial, channel=channel)
    total = ce + kd + growth * sum(cube)
    total.backward()
    for key, value in (
        ("loss", ce),
        ("lkd", kd),
        ("spatial", growth * cube.spatial),
        ("channel", growth * cube.channel),
        ("pod_loss", growth * sum(cube)),
        ("loss_tot", total),
    ):
        if f"{name}/{key}" in arrays:
            tally.add(key, value, arrays[f"{name}/{key}"])
    _check_gradients(arrays, f"{name}/", {"z": logits, **student}, tally)


def _check_gradients(arrays: dict[str, np.ndarray], at: str, inputs: dict[str, Tensor], tally: Tally) -> None:
    for name, tensor in inputs.items():
        assert tensor.grad is not None
        if f"{at}grad/{name}" in arrays:
            tally.add("gradients", tensor.grad, arrays[f"{at}grad/{name}"])
        if f"{at}grad/{name}_norm" in arrays:
            tally.add("gradient norms", tensor.grad.norm(), arrays[f"{at}grad/{name}_norm"])


class _Unit(Compensated):
    """One convolution and its norm, with the new ones beside them."""

    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        out, channels, size, _ = weight.shape
        self.conv = nn.Conv2d(channels, out, size, padding=2, dilation=2, bias=False)
        self.bn = AbsBatchNorm(out, NORM_EPS)
        self.compensate(Unit(("conv",), "bn"))

    def forward(self, x: Tensor) -> Tensor:
        old = self.bn(self.conv(x))
        return combine(old, self.get_submodule("bn_new")(self.get_submodule("conv_new")(x)))


def _check_merge(arrays: dict[str, np.ndarray], tally: Tally) -> None:
    given = {
        k.removeprefix("merge/"): torch.from_numpy(v).double() for k, v in arrays.items() if "merge/" in k
    }
    names = {"old_conv": "conv", "new_conv": "conv_new", "old_bn": "bn", "new_bn": "bn_new"}
    for first in (False, True):
        unit = _Unit(arrays["merge/old_conv/weight"]).double().eval()
        if not first:
            unit.conv.bias = nn.Parameter(torch.zeros_like(given["bias"]))
        state = {
            f"{ours}.{key.partition('/')[2]}": value
            for theirs, ours in names.items()
            for key, value in given.items()
            if key.startswith(f"{theirs}/") and not (first and key == "old_conv/bias")
        }
        missing = unit.load_state_dict(state, strict=False)
        assert not missing.unexpected_keys
        with torch.no_grad():
            before = unit(given["x"])
            unit.restructure(MERGE)
            at = "first_step_" if first else ""
            tally.add("merged convolution", unit.conv.weight, arrays[f"merge/{at}weight"])
            tally.add("merged convolution", unit.conv.bias, arrays[f"merge/{at}bias"])
            if not first:
                tally.add("function before the merge", before, arrays["merge/before_eval"])
                tally.add("function after the merge", unit.conv(given["x"]), arrays["merge/before_eval"])


def replay_rcil(folder: Path, file_stem: str) -> dict[str, Comparison]:
    """Train one run again, all its steps from the generator's weights, and compare it with its file.

    As in the authors' programs, each step starts from the model as it is read back from disk.

    Returns:
        Quantity -> values compared and largest relative difference, as `golden_replay.replay` does.
    """
    common, golden = np.load(folder / "train_mib_common.npz"), np.load(folder / f"{file_stem}.npz")
    found: dict[str, Comparison] = {}

    def compare(quantity: str, ours: Any, theirs: Any, scale: Any = None) -> None:
        entry = found.setdefault(quantity, Comparison())
        entry.count += np.size(theirs)
        entry.largest = max(entry.largest, difference(ours, theirs, scale))

    seed = first_seed({"cls.0.weight": golden["step0/init/module.cls.0.weight"]})
    meta = [json.loads(str(golden[f"{step}/meta"])) for step in _stored_steps(golden)]
    start = {k.removeprefix("init/"): common[k] for k in common.files if k.startswith("init/")}
    like = _initial_model(Case(RCIL, norm="iabn"), start).description["options"]
    model = deeplabv3(**like | {"compensation": True}).double()
    for step, options in zip(_steps(meta[0]["task"]), meta, strict=False):
        if step.index:
            model = _read_back(model)
        _replay_step(model, step, options, seed, common, golden, compare)
    return found


def _stored_steps(golden: Any) -> Iterator[str]:
    yield from sorted({key.partition("/")[0] for key in golden.files})


def _read_back(model: SegmentationModel) -> SegmentationModel:
    read = from_description(model.describe()).double()
    read.load_state_dict(model.state_dict(), strict=True)
    return read


def _replay_step(
    model: SegmentationModel,
    step: Step,
    options: dict[str, Any],
    seed: int,
    common: Any,
    golden: Any,
    compare: Callable[..., None],
) -> None:
    at, k = f"step{step.index}/", step.index
    # The replayed code ran with norms written in Python, with this number in full; ours is in-place ABN's float32.
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.eps = NORM_EPS
    spatial, channel = FACTORS[options["dataset"]]
    method = RCIL(
        kd_weight=options["loss_kd"], alpha=options["alpha"],
        spatial_weight=spatial[0], spatial_logits_weight=spatial[1],
        channel_weight=channel[0], channel_decoder_weight=channel[1],
        init_background="all" if options["dataset"] == DOMAIN else "weights",
    )  # fmt: skip
    teacher = frozen_copy(model) if k else None
    method.prepare_model(model, step)
    model.double()
    names = original_names(model)
    shapes = {name: tuple(model.state_dict()[name].shape) for name in names}
    if k == 0:
        values = {names[n]: _generated(names[n], shape, seed) for n, shape in shapes.items()}
        _set_weights(model, names, values)
    else:
        theirs = {n: f"module.cls.{k}.bias" for n in names if names[n] == f"module.cls.{k}.bias"}
        _set_weights(
            model, names, {v: _generated(v, shapes[n], seed) for n, v in theirs.items()}, partial=True
        )
    state = {names[name]: value for name, value in model.state_dict().items() if name in names}
    for part, quantity in (("init", "classifiers at the start"), ("merged", "merged units")):
        for key in golden.files:
            if key.startswith(f"{at}{part}/"):
                compare(
                    quantity, state[key.removeprefix(f"{at}{part}/")], golden[key], np.abs(golden[key]).max()
                )
    units = compensated(model)
    base = options["lr"]
    train = TrainConfig(
        lr=base, power=options["lr_power"], momentum=options["momentum"], weight_decay=options["weight_decay"]
    )
    optimizer = make_optimizer(method.param_groups(model, step), train, lr=base)
    ctx = StepContext(step=step, model=model, module=model, teacher=teacher)
    method.begin_step(ctx)
    model.train()
    folder = "tiny" if options["task"] == "tiny3" and k == 0 else options["task"]
    images = len(common[f"{folder}/step{k}/train/labels"])
    epochs = range(options["epochs"])
    batches = [b for e in epochs for b in step_batches(common, options["task"], k, epoch_order(images, e))]
    for i, batch in enumerate(batches):
        draws = iter(torch.from_numpy(golden[at + "drop_r"][i]))
        for unit in units:
            unit.draw = lambda channels, like, draws=draws: torch.stack(
                [next(draws) for _ in range(channels)]
            )
        compare("labels", batch.label, golden[at + "t_labels"][i], 1.0)
        lr = learning_rate(train, base, i, len(batches))
        set_learning_rate(optimizer, lr)
        compare("learning rate", lr, golden[at + "lr"][i][0])
        logged = {name: float(value) for name, value in train_batch(method, batch, ctx, optimizer).items()}
        ours = {
            "loss": logged["ce"],
            "lkd": logged.get("kd", 0.0),
            "pod_loss": logged.get("spatial", 0.0) + logged.get("channel", 0.0),
            "loss_tot": sum(logged.values()),
        }
        for term, value in ours.items():
            if value != 0 or golden[at + term][i] != 0:
                compare(term, value, golden[at + term][i])
        _compare_weights(model, names, golden, at, i, compare)
    method.end_step(ctx)
    state = {names[name]: value for name, value in model.state_dict().items() if name in names}
    for key, summary in zip(golden[at + "final_keys"].tolist(), golden[at + "final_sum_norm"], strict=True):
        value, scale = state[key], max(float(summary[1]) * math.sqrt(state[key].numel()), 1e-300)
        compare("final sums and norms", [float(value.sum()), float(value.norm())], summary, [scale, scale])
        if f"{at}final/{key}" in golden.files:
            theirs = golden[f"{at}final/{key}"]
            compare("final weights", value, theirs, max(np.abs(theirs).max(), 1e-300))


def _compare_weights(
    model: SegmentationModel,
    names: dict[str, str],
    golden: Any,
    at: str,
    iteration: int,
    compare: Callable[..., None],
) -> None:
    rows, theirs = golden[at + "names"].tolist(), golden[at + "gradnorm"][iteration]
    whole = float(np.linalg.norm(theirs[theirs > 0]))
    for name, weight in model.named_parameters():
        row = rows.index(names[name])
        compare(
            "weight norms",
            weight.detach().norm(),
            golden[at + "pnorm"][iteration, row],
            weight.detach().norm() or 1,
        )
        frozen = weight.grad is None
        compare("frozen weights", float(frozen), float(theirs[row] == -1), 1.0)
        if weight.grad is not None:
            gradient = float(weight.grad.norm())
            compare("gradient norms, of the total", gradient, theirs[row], whole)
            # Some are zero but for rounding: the stem has no activation, so its norm's bias is undone later.
            if theirs[row] > 1e-10 * whole:
                compare("gradient norms", gradient, theirs[row])


def _generated(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    name = name.removeprefix("module.")
    return generated_weight(name, shape, seed, 1.0 if name.startswith("cls.") else 4.0)
