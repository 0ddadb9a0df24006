"""Replays the training runs of EWF's original code, and its fusion by threshold, with everseg's methods in float64.

`FamilyRun` also replays the other runs of that family whose files are laid out in the same way.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.golden_checks import Row, Tally
from benchmarks.golden_plop import plop_options
from benchmarks.golden_replay import (
    Comparison,
    difference,
    epoch_order,
    first_seed,
    generated_weight,
    original_names,
    step_batches,
    tensors,
)
from benchmarks.golden_replay import _set_weights as set_weights
from benchmarks.golden_replay import _steps as steps_of
from everseg.config.fields import TrainConfig
from everseg.engine.optim import learning_rate, make_optimizer, set_learning_rate
from everseg.engine.step import train_batch
from everseg.interop import mib
from everseg.methods import switches
from everseg.methods.base import Method, StepContext
from everseg.methods.fusion import fuse, new_share
from everseg.methods.mib import MiB
from everseg.methods.plop import PLOP
from everseg.models.build import deeplabv3
from everseg.models.model import frozen_copy
from everseg.scenarios.steps import Step
from everseg.types import Batch

TERMS = {"ce": "loss", "kd": "lkd", "pod": "pod_loss"}
"""Our name of a term -> the files' name of its weighted value."""
THRESHOLD_SHARE = 0.45


def replay_ewf(folder: Path, file_stem: str) -> dict[str, Comparison]:
    """Train one run again and compare it with its file; see `FamilyRun.replay`."""
    return FamilyRun(folder, file_stem).replay()


def check_ewf(folder: Path) -> list[Row]:
    """The fusion by threshold in every `ewf_threshold_*.npz`: the cut and the fused weights.

    The weights that are fused stand in `train_ewf_*.npz` and `train_mib_MiB.npz`.
    """
    rows = []
    for path in sorted(folder.glob("ewf_threshold_*.npz")):
        golden, tally = np.load(path), Tally(path.name)
        run = FamilyRun(folder, path.stem.replace("ewf_threshold", "train_ewf"))
        step = run.steps[run.first]
        run.model.grow(step.grows)
        run.model.double()
        names = original_names(run.model)
        set_weights(run.model, names, run.stored(f"step{step.index}/prefusion/"))
        elements = sum(t.numel() for t in run.previous.state_dict().values() if t.is_floating_point())
        tally.add("elements", elements, golden["n_elements"], 0.0)
        cut = fuse(run.model, run.previous, new_share(step), THRESHOLD_SHARE)
        tally.add("cut", cut, golden["cut"])
        state = {names[name]: value for name, value in run.model.state_dict().items() if name in names}
        for key in golden.files:
            if key.startswith("final/"):
                tally.add("fused weights", state[key.removeprefix("final/")], golden[key])
        for key, (total, norm) in zip(golden["keys"].tolist(), golden["sum_norm"], strict=True):
            value = state[key]
            tally.note("sums", difference(value.sum(), total, norm * value.numel() ** 0.5))
            tally.note("norms", difference(value.norm(), norm))
        rows += tally.rows()
    return rows


class FamilyRun:
    """A stored run of MiB's network and losses, whatever surrounds them, and the state of its replay.

    Everything that differs from file to file is read from the file: task, steps, options, and the seed of the weights
    of step 0. A file without step 0 goes on from step 0 of `train_mib_MiB.npz`.
    """

    def __init__(self, folder: Path, file_stem: str) -> None:
        self.golden = np.load(folder / f"{file_stem}.npz")
        self.common = np.load(folder / "train_mib_common.npz")
        indices = sorted(
            {int(k[4]) for k in self.golden.files if k.startswith("step") and k.endswith("/meta")}
        )
        self.first = indices[0]
        self.task = self.options(indices[-1])["task"]
        self.steps = list(steps_of(self.task))[: indices[-1] + 1]
        self.found: dict[str, Comparison] = {}
        init = {k.removeprefix("init/"): self.common[k] for k in self.common.files if k.startswith("init/")}
        template = mib.load(tensors(init), norm=self.options(self.first)["norm_act"])
        self.model = deeplabv3(**template.description["options"]).double()
        if self.first:
            before = np.load(folder / "train_mib_MiB.npz")
            self.model.grow(self.steps[0].grows)
            self.model.double()
            given = {
                k.removeprefix("step0/final/"): before[k]
                for k in before.files
                if k.startswith("step0/final/")
            }
            set_weights(self.model, original_names(self.model), given)
        self.previous = frozen_copy(self.model)

    def options(self, step: int) -> dict[str, Any]:
        """The original's command line."""
        found = json.loads(str(self.golden[f"step{step}/meta"]))
        return found.get("opts", found)

    def stored(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays whose name begins so, by the rest of their name."""
        return {k.removeprefix(prefix): self.golden[k] for k in self.golden.files if k.startswith(prefix)}

    def compare(self, quantity: str, ours: Any, theirs: Any, scale: Any = None) -> None:
        """Count one comparison; the scale is `theirs`, element by element, or given."""
        entry = self.found.setdefault(quantity, Comparison())
        entry.count += np.size(theirs)
        ours = ours.detach().double().numpy() if isinstance(ours, torch.Tensor) else ours
        entry.largest = max(entry.largest, difference(ours, theirs, scale))

    def replay(self) -> dict[str, Comparison]:
        """Train all steps of the file.

        Returns:
            Quantity -> values compared and largest relative difference: of scalars element by element, of tensors
            the largest difference over the tensor's largest value.
        """
        for step in self.steps[self.first :]:
            self.train(step)
        return self.found

    def train(self, step: Step) -> None:
        """Train one step and compare everything that the file holds of it."""
        at, options = f"step{step.index}/", self.options(step.index)
        method = method_of(options)
        teacher = frozen_copy(self.model) if step.index else None
        self.previous = teacher or self.previous
        method.prepare_model(self.model, step)
        self.model.double()
        names = original_names(self.model)
        if step.index == 0:
            self._set_first(names)
        for key, value in self.stored(f"{at}init/").items():
            ours = {names[name]: tensor for name, tensor in self.model.state_dict().items() if name in names}
            self.compare("classifiers at the start", ours[key], value, np.abs(value).max())
        train = TrainConfig(
            lr=options["lr"],
            momentum=options["momentum"],
            weight_decay=options["weight_decay"],
            schedule=options["lr_policy"],
            power=options["lr_power"],
        )
        optimizer = make_optimizer(method.param_groups(self.model, step), train, lr=options["lr"])
        ctx = StepContext(
            step=step,
            model=self.model,
            module=self.model,
            teacher=teacher,
            epoch_batches=lambda: iter(self.batches(step, 0)),
        )
        self.begin(method, ctx, options)
        self.model.train()
        batches = [batch for epoch in range(options["epochs"]) for batch in self.batches(step, epoch)]
        for i, batch in enumerate(batches):
            lr = learning_rate(train, options["lr"], i, len(batches))
            set_learning_rate(optimizer, lr)
            self.compare("learning rate", lr, self.golden[f"{at}lr"][i, 0])
            logged = train_batch(method, batch, ctx, optimizer)
            self._compare_iteration(at, i, logged, names)
        before = self._finish(method, ctx, f"{at}prefusion/")
        self._compare_state("weights before the fusion", before, f"{at}prefusion/", names)
        self._compare_state("final weights", self.model.state_dict(), f"{at}final/", names)
        self._compare_sums(at, names)

    def begin(self, method: Method, ctx: StepContext, options: dict[str, Any]) -> None:
        """What comes before the first iteration."""
        switches.begin(method, ctx)

    def batches(self, step: Step, epoch: int) -> list[Batch]:
        """An epoch's batches in the original's order."""
        folder = "tiny" if self.task == "tiny3" and step.index == 0 else self.task
        count = len(self.common[f"{folder}/step{step.index}/train/labels"])
        return step_batches(self.common, self.task, step.index, epoch_order(count, epoch))

    def _set_first(self, names: dict[str, str]) -> None:
        """Give the network of step 0 its generated weights, of the seed that made the file's first classifier."""
        shapes = {names[name]: tuple(t.shape) for name, t in self.model.state_dict().items() if name in names}
        seed = first_seed(self.stored("step0/init/"))
        given = {}
        for name, shape in shapes.items():
            gain = 1.0 if ".cls." in f".{name}" else 4.0
            given[name] = generated_weight(name.removeprefix("module."), shape, seed, gain)
        set_weights(self.model, names, given)

    def _compare_iteration(
        self, at: str, i: int, logged: dict[str, torch.Tensor], names: dict[str, str]
    ) -> None:
        for term, theirs in TERMS.items():
            value, stored = float(logged.get(term, 0.0)), self.golden[f"{at}{theirs}"][i]
            if value != 0 or stored != 0:
                self.compare(f"{term}, weighted", value, stored)
        self.compare("total loss", float(sum(logged.values())), self.golden[f"{at}loss_tot"][i])
        rows = self.golden[f"{at}names"].tolist()
        for name, weight in self.model.named_parameters():
            row = rows.index(names[name])
            self.compare("weight norms", weight.norm(), self.golden[f"{at}pnorm"][i, row])
            if weight.grad is not None:
                self.compare("gradient norms", weight.grad.norm(), self.golden[f"{at}gradnorm"][i, row])

    def _finish(self, method: Method, ctx: StepContext, stored: str) -> dict[str, torch.Tensor]:
        """End the step; returns the weights from before."""
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        switches.finish(method, ctx)
        return before

    def _compare_state(
        self, quantity: str, state: dict[str, torch.Tensor], prefix: str, names: dict[str, str]
    ) -> None:
        stored = self.stored(prefix)
        for name, original in names.items():
            if original in stored:
                self.compare(quantity, state[name], stored[original], np.abs(stored[original]).max())

    def _compare_sums(self, at: str, names: dict[str, str]) -> None:
        state = {names[name]: value for name, value in self.model.state_dict().items() if name in names}
        keys = self.golden[f"{at}final_keys"].tolist()
        for key, (total, norm) in zip(keys, self.golden[f"{at}final_sum_norm"], strict=True):
            self.compare("sums of weights", state[key].sum(), total, norm * state[key].numel() ** 0.5)
            self.compare("norms of weights", state[key].norm(), norm)


def method_of(options: dict[str, Any], **more: Any) -> Method:
    """The method that a stored command line ran, with the switches of EWF."""
    switched: dict[str, Any] = dict(more)
    if options.get("fix_pre_cls"):
        switched["freeze_heads"] = "old"
    if options.get("warm_up"):
        switched["pretune"] = options["warm_epochs"]
    if options.get("weight_fusion"):
        switched["fuse"] = "changed" if options.get("threshold_choice") else "all"
        switched["fuse_changed"] = THRESHOLD_SHARE
    if options.get("pod") or options.get("pseudo"):
        found = plop_options(options)
        factor = options.get("pod_coef", 1.0)  # NeST's factor on both weights
        for weight in ("pod_weight", "pod_logits_weight"):
            found[weight] = found[weight] and factor * found[weight]
        return PLOP(**found, **switched)
    return MiB(
        kd_weight=float(options["loss_kd"]),
        unbiased_ce=options["unce"],
        unbiased_kd=options["unkd"],
        init_background=options["init_balanced"],
        **switched,
    )
