"""Compares RCIL with the numbers of its authors' code: the functions, and the training runs in float64.

`rcil_losses_*.npz` hold terms and merged convolutions, `train_rcil_*.npz` whole runs, merged before each later step.
Seeds, tasks, factors and weights are read from the files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.golden_checks import Row, Tally
from benchmarks.golden_replay import Comparison
from benchmarks.golden_runs import Options, RunReplay
from everseg.losses import (
    cross_entropy,
    pooled_cube_distillation,
    unbiased_cross_entropy,
    unbiased_distillation,
)
from everseg.methods.base import Method
from everseg.methods.rcil import RCIL
from everseg.models.blocks import NORM_EPS, AbsBatchNorm, BatchNorm
from everseg.models.build import from_description
from everseg.models.compensation import MERGE, Compensated, Unit, combine, compensated
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
    """Train one run again, all its steps from the generator's weights, and compare it with its file."""
    return _Replay(folder, file_stem, method_of).run()


def method_of(options: Options) -> RCIL:
    """RCIL with the options of an original run, as its `meta` stores them."""
    spatial, channel = FACTORS[options["dataset"]]
    return RCIL(
        kd_weight=options["loss_kd"], alpha=options["alpha"],
        spatial_weight=spatial[0], spatial_logits_weight=spatial[1],
        channel_weight=channel[0], channel_decoder_weight=channel[1],
        init_background="all" if options["dataset"] == DOMAIN else "weights",
    )  # fmt: skip


class _Replay(RunReplay):
    norm = "iabn"
    options_of_model: ClassVar[Mapping[str, Any]] = {"compensation": True}
    # The stem has no activation, so its norm's bias is undone later: its gradient is zero but for rounding.
    rounding = 1e-10

    def before_step(self, step: Step) -> None:
        """As in the authors' programs, each step starts from the model as it is read back from disk."""
        if step.index:
            read = from_description(self.model.describe()).double()
            read.load_state_dict(self.model.state_dict(), strict=True)
            self.model = read
        # The replayed code ran with norms written in Python, with this number in full; ours is in-place ABN's float32.
        for module in self.model.modules():
            if isinstance(module, BatchNorm):
                module.eps = NORM_EPS

    def drawn(self, method: Method, step: Step) -> str:
        biases_only = step.index and getattr(method, "init_background", "") == "weights"
        return f"cls.{step.index}.bias" if biases_only else super().drawn(method, step)

    def before_iteration(self, step: Step, i: int) -> None:
        draws = iter(torch.from_numpy(self.golden[f"step{step.index}/drop_r"][i]))
        for unit in compensated(self.model):
            unit.draw = lambda channels, like, draws=draws: torch.stack(
                [next(draws) for _ in range(channels)]
            )
