"""Replays training runs of the methods' original code, files `train_<method>*.npz`, in float64.

What a file does not hold follows from its kind: runs of two steps are task `tiny`, longer ones `tiny3`; a run without
`step0/` starts from the end of MiB's first step; initial weights are generated from a seed, which is found by its first
classifier.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.golden_checks import EXACT
from benchmarks.golden_replay import (
    BATCH,
    RATES,
    Comparison,
    _steps,
    difference,
    epoch_order,
    first_seed,
    generated_weight,
    original_names,
    step_batches,
    tensors,
)
from everseg.engine.optim import check_param_groups, learning_rate, make_optimizer, set_learning_rate
from everseg.engine.step import train_batch
from everseg.interop import mib
from everseg.methods.base import Method, StepContext
from everseg.methods.switches import begin, finish
from everseg.models.build import deeplabv3
from everseg.models.model import SegmentationModel, frozen_copy
from everseg.types import Batch

SEEDS = {"A": 777, "B": 782}
"""Set of a file -> seed of its weights, where the file holds no first classifier that tells it."""
Logged = Callable[[dict[str, float], Method], dict[str, float]]
"""Our terms of an iteration -> the same under the file's names."""


class RunReplay:
    """One file, trained again.

    Args:
        folder: holds the file and `train_mib_common.npz`.
        stem: the file's name without `.npz`.
        method: with the file's options.
        logged: renames the terms.
        protocol: of the run's data.
    """

    def __init__(
        self, folder: Path, stem: str, method: Method, logged: Logged, protocol: str = "overlapped"
    ) -> None:
        self.protocol = protocol
        self.golden, self.common = np.load(folder / f"{stem}.npz"), np.load(folder / "train_mib_common.npz")
        self.method, self.logged = method, logged
        self.found: dict[str, Comparison] = {}
        last = max(
            int(k.split("/")[0].removeprefix("step")) for k in self.golden.files if k.startswith("step")
        )
        self.task = "tiny" if last == 1 else "tiny3"
        self.prefix = "module." if str(self.golden[f"step{last}/names"][0]).startswith("module.") else ""
        first = {
            k.removeprefix("step0/init/"): self.golden[k] for k in self.golden.files if "step0/init/" in k
        }
        self.seed = (
            first_seed(first)
            if first
            else next((SEEDS[p] for p in stem.split("_") if p in SEEDS), SEEDS["A"])
        )
        start = {k.removeprefix("init/"): self.common[k] for k in self.common.files if k.startswith("init/")}
        options = mib.load(tensors(start), norm="abn").description["options"]
        self.model: SegmentationModel = deeplabv3(**options).double()
        self.starts_later = "step0/loss_tot" not in self.golden.files
        self.earlier = np.load(folder / "train_mib_MiB.npz") if self.starts_later else None

    def run(self) -> dict[str, Comparison]:
        """Train all steps; quantity -> values compared and largest relative difference."""
        for step in _steps(self.task):
            step = dataclasses.replace(step, protocol=self.protocol)
            if step.index == 0 and self.earlier is not None:
                self.method.prepare_model(self.model, step)
                self.model.double()
                self._set({k.removeprefix("step0/final/"): self.earlier[k] for k in self.earlier.files})
            else:
                self._step(step)
        return self.found

    def compare(self, quantity: str, ours: Any, theirs: Any, scale: Any = None) -> None:
        """Count one comparison; the default scale is theirs, element by element."""
        entry = self.found.setdefault(quantity, Comparison())
        entry.count += np.size(theirs)
        entry.largest = max(entry.largest, difference(ours, theirs, scale))

    def whole(self, quantity: str, ours: Any, theirs: Any) -> None:
        """Compare two arrays, relative to the largest value of theirs."""
        self.compare(quantity, ours, theirs, np.abs(theirs).max(initial=0.0))

    def _names(self) -> dict[str, str]:
        return original_names(self.model, self.prefix)

    def _set(self, values: dict[str, np.ndarray]) -> None:
        """Set every weight that is given, under names with or without "module."."""
        given = {name.removeprefix("module."): value for name, value in values.items()}
        state = self.model.state_dict()
        for name, original in self._names().items():
            value = given.get(original.removeprefix("module."))
            if value is not None:
                state[name].copy_(torch.from_numpy(value))

    def _generate(self, only: str = "") -> None:
        """Generate the weights whose name contains `only`: gain 4 in body and head, 1 in the classifiers."""
        state = self.model.state_dict()
        for name, original in self._names().items():
            short = original.removeprefix("module.")
            if only in short:
                gain = 1.0 if short.startswith("cls.") else 4.0
                value = generated_weight(short, tuple(state[name].shape), self.seed, gain)
                state[name].copy_(torch.from_numpy(value))

    def _step(self, step: Any) -> None:
        golden, at, k, method, model = self.golden, f"step{step.index}/", step.index, self.method, self.model
        teacher = frozen_copy(model) if method.needs_teacher and k else None
        method.prepare_model(model, step)
        model.double()
        if k == 0:
            self._generate()
        elif not getattr(method, "init_background", False):
            self._generate(f"cls.{k}.")
        names = self._names()
        given = {n.removeprefix(f"{at}init/"): golden[n] for n in golden.files if n.startswith(f"{at}init/")}
        if k and not getattr(method, "init_background", False):  # random in the original
            self._set({name: value for name, value in given.items() if f"cls.{k}." in name})
        ours = {names[name]: value for name, value in model.state_dict().items() if name in names}
        for name, value in given.items():
            self.whole("initial classifiers", ours[name], value)
        groups = method.param_groups(model, step)
        check_param_groups(model, groups)
        base = float(golden[f"{at}lr"][0, 0])
        optimizer = make_optimizer(groups, RATES, lr=base)
        ctx = StepContext(step=step, model=model, module=model, teacher=teacher)
        begin(method, ctx)
        model.train()
        batches = self._batches(k, len(golden[f"{at}lr"]))
        for i, batch in enumerate(batches):
            lr = learning_rate(RATES, base, i, len(batches))
            set_learning_rate(optimizer, lr)
            self.compare("learning rate", lr, golden[f"{at}lr"][i, 0])
            terms = {name: float(value) for name, value in train_batch(method, batch, ctx, optimizer).items()}
            for name, value in (self.logged(terms, method) | {"loss_tot": sum(terms.values())}).items():
                if at + name in golden.files and (value != 0 or golden[at + name][i] != 0):
                    self.compare(name, value, golden[at + name][i])
            self._compare_norms(at, i, names)
        finish(method, ctx)
        self._compare_weights(at, names)
        self.compare_state(at)

    def _batches(self, step: int, iterations: int) -> list[Batch]:
        """As many as the file has iterations, an epoch after the other."""
        folder = "tiny" if self.task == "tiny3" and step == 0 else self.task
        images = len(self.common[f"{folder}/step{step}/train/labels"])
        found: list[Batch] = []
        while len(found) < iterations:
            order = epoch_order(images, len(found) * BATCH // images)
            found += step_batches(self.common, self.task, step, order)
        return found

    def compare_state(self, at: str) -> None:
        """Compare what the method keeps, at the end of a step."""

    def _compare_norms(self, at: str, i: int, names: dict[str, str]) -> None:
        rows = self.golden[f"{at}names"].tolist()
        theirs = self.golden[f"{at}gradnorm"][i]
        largest = np.linalg.norm(theirs[theirs >= 0])
        for name, weight in self.model.named_parameters():
            row = rows.index(names[name])
            self.compare("weight norms", weight.detach().norm(), self.golden[f"{at}pnorm"][i, row])
            if weight.requires_grad or theirs[row] >= 0:
                ours = 0.0 if weight.grad is None else weight.grad.norm()
                self.compare("gradient norms, of the total", ours, theirs[row], largest)
                self.compare("gradient norms", ours, theirs[row])

    def _compare_weights(self, at: str, names: dict[str, str]) -> None:
        keys = self.golden[f"{at}final_keys"].tolist()
        for name, value in self.model.state_dict().items():
            if name not in names:
                continue
            key = f"{at}final/{names[name]}"
            if key in self.golden.files:
                self.whole("final weights", value, self.golden[key])
            total, norm = self.golden[f"{at}final_sum_norm"][keys.index(names[name])]
            self.compare("final norms", value.norm(), norm)
            self.compare("final sums", value.sum(), total, norm * np.sqrt(value.numel()))


def limit(folder: Path, stem: str, quantity: str) -> float:
    """Largest relative difference that counts as agreement.

    In the third step rounding has grown: images scaled by 1 + 2e-16 move SDR's losses by 6e-9, its weights by 2e-8, and
    the smallest of its gradient norms, each relative to itself, by 7e-7.
    """
    if "step2/loss_tot" not in np.load(folder / f"{stem}.npz").files or quantity == "counts":
        return EXACT
    return 1e-5 if quantity == "gradient norms" else 1e-7
