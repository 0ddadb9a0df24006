"""Elastic Weight Consolidation with a running Fisher information."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from everseg.methods.importance import ImportancePenalty
from everseg.methods.terms import Weight


@dataclass(kw_only=True)
class EWC(ImportancePenalty):
    """Importance = moving average of the squared gradient of the batch's mean loss.

    Source: Kirkpatrick et al., PNAS 2017, in the online form of Chaudhry et al., ECCV 2018, with the values of
    Cermelli et al., CVPR 2020. It starts at ones and goes on, un-normalised, from step to step.
    """

    weight: Weight = 500.0
    """Weight of the penalty (paper's code: 500)."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of the newest squared gradient in the moving average (paper's code: 0.9)."""

    def importance(self, name):
        fisher = self.stats.get("fisher", {}).get(name)
        return None if fisher is None else self.normalised(fisher)

    # `setdefault`: the average of earlier steps goes on; only a new weight starts at ones.
    def start(self, name, theta):
        self.stats.setdefault("fisher", {}).setdefault(name, torch.ones_like(theta))

    def observe(self, name, theta, grad):
        fisher = self.stats["fisher"]
        fisher[name] = self.alpha * grad.square() + (1 - self.alpha) * fisher[name]
