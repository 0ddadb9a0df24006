"""Replays the training runs of NeST's original code with everseg's methods, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.golden_ewf import method_of
from benchmarks.golden_replay import BRANCH, Comparison, original_names
from benchmarks.golden_runs import Options, RunReplay
from everseg.config.fields import TrainConfig
from everseg.engine.optim import make_optimizer, set_learning_rate
from everseg.engine.step import train_batch
from everseg.methods.base import Method, StepContext, Tuning
from everseg.methods.pretuning import Pretuning

PARAMETERS = {
    "weight_old": "channels",
    "weight_new": "mixture",
    "new_bias": "bias",
    "weight_old_bg": "background_channels",
    "weight_new_bg": "background_mixture",
}
"""The files' name of a weight of the pre-tuning -> ours."""


def replay_nest(folder: Path, file_stem: str) -> dict[str, Comparison]:
    """Train one run again and compare it with its file; see `RunReplay.run`."""
    return NestRun(folder, file_stem).run()


class NestRun(RunReplay):
    """A stored run with a pre-tuning before each later step."""

    def __init__(self, folder: Path, file_stem: str) -> None:
        super().__init__(folder, file_stem, method_of)

    def begin(self, method: Method, ctx: StepContext, options: Options) -> None:
        """Compare the pre-tuning, then begin the step as its method does."""
        if options.get("warm_up") and ctx.step.index:
            ctx.tuner = self.tuner(options)
            self.pretune(ctx, options)
        method.begin_step(ctx)

    def pretune(self, ctx: StepContext, options: Options) -> None:
        """The parts of `everseg.methods.pretuning.pretune`, each compared."""
        at = f"step{ctx.step.index}/"
        work = Pretuning(
            ctx,
            BRANCH,
            kd_weight=float(options["unkd_in_warm_factor"]) if options["unkd_in_warm"] else 0.0,
            unbiased_ce=options["unce_in_warm"],
        )
        with torch.no_grad():  # random in the original too
            work.bias.copy_(torch.from_numpy(self.golden[f"{at}new_bias_start"]))
        similarity = work.similarity()
        self._array("similarity", similarity, f"{at}bucket")
        work.start(similarity)
        self._array("transform at the start", work.mixture, f"{at}transform_start")
        work.tune(options["warm_epochs"], options["warm_lr_scale"])
        for theirs, ours in PARAMETERS.items():
            self._array("transform at the end", work.parameters[ours], f"{at}warm_end/{theirs}")
        names = {ours: name for name, ours in original_names(self.model, "").items()}
        state = self.model.state_dict()
        for key in self.stored(f"{at}warm_end/"):
            if key in names:
                self._array(
                    "running statistics after the pre-tuning", state[names[key]], f"{at}warm_end/{key}"
                )
        work.finish()
        state = self.model.state_dict()
        for key in self.stored(f"{at}after_init/"):
            self._array("classifiers at the start", state[names[key]], f"{at}after_init/{key}")

    def tuner(self, options: Options) -> Any:
        """Carry out `StepContext.tune` over the file's own batches, comparing every iteration."""

        def tune(ctx: StepContext, tuning: Tuning) -> None:
            at = f"step{ctx.step.index}/warm_up/"
            batches = self.batches(ctx.step, len(self.golden[f"{at}lr"]))
            lr = options["lr"] * tuning.lr_scale
            train = TrainConfig(momentum=tuning.momentum, weight_decay=tuning.weight_decay)
            optimizer = make_optimizer([{"params": tuning.parameters.values()}], train, lr=lr)
            rows = self.golden[f"{at}names"].tolist()
            for i, batch in enumerate(batches):
                rate = lr * tuning.rate(i, len(batches))
                set_learning_rate(optimizer, rate)
                self.compare("learning rate", rate, self.golden[f"{at}lr"][i, 0])
                logged = train_batch(tuning, batch, ctx, optimizer)
                total = self.golden[f"{at}loss_tot"][i]
                self.compare("loss of the pre-tuning", float(sum(logged.values())), total)
                for theirs, ours in PARAMETERS.items():
                    row, weight = rows.index(f"module.{theirs}"), tuning.parameters[ours]
                    self.compare("weight norms", weight.norm(), self.golden[f"{at}pnorm"][i, row])
                    self.compare("gradient norms", weight.grad.norm(), self.golden[f"{at}gradnorm"][i, row])

        return tune

    def _array(self, quantity: str, ours: Tensor, key: str) -> None:
        theirs = self.golden[key]
        self.compare(quantity, ours, theirs, np.abs(theirs).max())
