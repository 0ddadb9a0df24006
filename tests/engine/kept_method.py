"""Methods, as a plug-in file, whose results do not hang on the number of processes, and that keep what they counted."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from everseg.methods.plop import PLOP
from everseg.methods.rcil import RCIL
from everseg.models.compensation import compensated


@dataclass(kw_only=True)
class KeptPLOP(PLOP):
    """The histograms that its thresholds come from, and the thresholds, stay in its state."""

    def __post_init__(self):
        super().__post_init__()
        self.kept = {}

    def begin_step(self, ctx):
        def summed(counts):
            self.kept["histogram"] = ctx.all_reduce(counts)
            return self.kept["histogram"]

        super().begin_step(dataclasses.replace(ctx, all_reduce=summed))
        self.kept |= {f"found/{branch}": value for branch, value in self.thresholds.items()}

    def state_dict(self):
        return super().state_dict() | self.kept

    def load_state_dict(self, state):
        super().load_state_dict({key: v for key, v in state.items() if key.startswith("thresholds/")})


@dataclass(kw_only=True)
class SteadyRCIL(RCIL):
    """Every unit takes the mean of both convolutions, where training draws one of them in each process."""

    def prepare_model(self, model, step):
        super().prepare_model(model, step)
        for unit in compensated(model):
            unit.draw = lambda channels, like: torch.full((channels,), 0.9, device=like.device)
