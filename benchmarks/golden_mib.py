"""Replays the training runs of MiB's original code, files `train_mib_*.npz`, in float64.

Inputs come from the files too: initial weights, images, labels, order of the images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.golden_replay import BRANCH, RATES, Comparison, step_batches
from benchmarks.golden_runs import Options, RunReplay
from everseg.config.fields import TrainConfig
from everseg.methods.base import Method
from everseg.methods.ewc import EWC
from everseg.methods.ft import FineTuning
from everseg.methods.ilt import ILT
from everseg.methods.lwf import LwF
from everseg.methods.lwf_mc import LwFMC
from everseg.methods.mib import MiB
from everseg.methods.pi import PI
from everseg.methods.rw import RW
from everseg.scenarios.steps import Step
from everseg.types import Batch


@dataclass(frozen=True)
class Case:
    """How one original run is expressed here."""

    method: Callable[[], Method]
    task: str = "tiny"
    norm: str = "abn"
    train: TrainConfig = RATES


CASES = {
    "FT": Case(FineTuning),
    "FT_BCE": Case(lambda: FineTuning(bce=True)),
    "LWF": Case(LwF),
    "LWF-MC": Case(LwFMC),
    "ICARL_disjoint": Case(lambda: LwFMC(form="disjoint")),
    "ICARL_disjoint_bkg": Case(lambda: LwFMC(form="disjoint", background_from_labels=True)),
    "ILT": Case(ILT),
    "ILT_de0.01": Case(lambda: ILT(feature_weight=0.01)),
    "ILT_wide": Case(lambda: ILT(feature_weight=0.01), task="wide"),
    "EWC": Case(EWC),
    "EWC_nonorm": Case(lambda: EWC(normalise=False)),
    "EWC_3step": Case(EWC, task="tiny3"),
    "RW": Case(RW),
    "RW_it2": Case(lambda: RW(period=2)),
    "RW_3step": Case(lambda: RW(period=2), task="tiny3"),
    "PI": Case(PI),
    "PI_3step": Case(PI, task="tiny3"),
    "MiB": Case(MiB),
    "MiB_3step": Case(MiB, task="tiny3"),
    "MiB_wide": Case(MiB, task="wide"),
    "MiB_iabn": Case(MiB, norm="iabn"),
    "MiB_2epochs": Case(MiB),
    "MiB_alpha2": Case(lambda: MiB(alpha=2.0)),
    "MiB_steplr": Case(
        MiB, train=TrainConfig(lr=0.01, lr_next=0.001, schedule="step", step_size=2, step_factor=0.5)
    ),
    # The authors' flags act from step 0 on, and `model.train()` sets the running statistics free again.
    "MiB_freeze": Case(lambda: MiB(freeze_encoder=True, freeze_from=0, frozen_statistics=False)),
    "MiB_fixbn": Case(lambda: MiB(freeze_norm=True, freeze_from=0, frozen_statistics=False)),
}
"""File name without `train_mib_` -> the same run here."""


def tags(folder: Path) -> list[str]:
    """List the runs that a folder holds."""
    found = (path.stem.removeprefix("train_mib_") for path in sorted(folder.glob("train_mib_*.npz")))
    return [tag for tag in found if tag != "common"]


def replay(folder: Path, tag: str) -> dict[str, Comparison]:
    """Train one run again and compare it with its file; see `RunReplay.run`.

    Raises:
        KeyError: a run that `CASES` does not describe.
    """
    return _Replay(folder, tag).run()


class _Replay(RunReplay):
    tells_frozen = False  # the original computes gradients of frozen weights, too, which nothing uses

    def __init__(self, folder: Path, tag: str) -> None:
        self.case = CASES[tag]
        self.norm = self.case.norm
        super().__init__(folder, f"train_mib_{tag}", lambda options: self.case.method())

    def start(self, step: Step) -> dict[str, np.ndarray]:
        if step.index:
            return super().start(step)
        return {k.removeprefix("init/"): self.common[k] for k in self.common.files if k.startswith("init/")}

    def train_config(self, step: Step, options: Options) -> TrainConfig:
        train = self.case.train
        later = step.index and train.lr_next is not None
        return train.model_copy(update={"lr": train.lr_next if later else train.lr})

    def batches(self, step: Step, number: int) -> list[Batch]:
        return step_batches(self.common, self.task, step.index, self.golden[f"step{step.index}/order"])

    def logged(self, terms: Mapping[str, float], method: Any, step: Step) -> dict[str, float]:
        """Without their weights."""
        old, combined = step.num_old(BRANCH), isinstance(method, LwFMC)
        return {
            "ce": terms.get("ce", 0.0) + terms.get("bce", 0.0),
            "lkd": 0.0 if combined else terms.get("kd", 0.0) / getattr(method, "kd_weight", 1.0),
            "lde": terms.get("feature", 0.0) / getattr(method, "feature_weight", 1.0),
            "icarl": terms.get("icarl", 0.0)
            + (terms.get("kd", 0.0) / (method.importance * old) if combined and old else 0.0),
            "reg": terms.get("penalty", 0.0) / getattr(method, "weight", 1.0),
        }

    def compare_state(self, step: Step, state: Mapping[str, Tensor]) -> None:
        """EWC's, RW's and PI's statistics: large tensors by sum, sum |.|, sum of squares, min and max."""
        names, at = self.names(), f"step{step.index}/reg_state/"
        here = {
            f"{key.partition('/')[0]}/{names[key.partition('/')[2]]}": v
            for key, v in state.items()
            if "/" in key
        }
        for key, theirs in self.stored(at).items():
            part, _, name = key.partition("/")
            quantity = part.removesuffix("_stats")
            ours = here[f"{'old' if quantity == 'starting_model' else quantity}/{name}"]
            if part == quantity:
                self.whole(f"statistic {quantity}", ours, theirs)
            else:
                _, absolute, squares, low, high = theirs
                summary = [ours.sum(), ours.abs().sum(), ours.square().sum(), ours.min(), ours.max()]
                largest = max(abs(low), abs(high))
                scale = [absolute, absolute, squares, largest, largest]
                self.compare(f"statistic {quantity}", [float(x) for x in summary], theirs, scale)
