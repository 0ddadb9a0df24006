"""Riemannian Walk: Fisher information and path score together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from everseg.methods.importance import ImportancePenalty
from everseg.methods.terms import Weight


@dataclass(kw_only=True)
class RW(ImportancePenalty):
    """Importance = EWC's Fisher information plus a weight's gain in loss per distance in Fisher's metric.

    Source: Chaudhry et al., ECCV 2018, eq. 9-10, with the values of Cermelli et al., CVPR 2020. Each of the two is
    normalised on its own. The authors' checkpoint loses the running score and its snapshot; here they are kept.
    """

    # "path" is the paper's word for the way of a weight through parameter space. It is a key of stored checkpoints.
    per_step: ClassVar[tuple[str, ...]] = ("path", "previous")

    weight: Weight = 100.0
    """Weight of the penalty (paper's code: 100)."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of the newest squared gradient in the Fisher average (paper's code: 0.9)."""
    period: Annotated[int, Field(ge=1)] = 10
    """Iterations between two updates of the path score (paper's code: 10)."""

    def importance(self, name):
        fisher = self.stats.get("fisher", {}).get(name)
        if fisher is None:
            return None
        score = self.stats.get("score", {}).get(name)
        pull = self.normalised(fisher)
        return pull if score is None else pull + self.normalised(score)

    def start(self, name, theta):
        self.stats.setdefault("fisher", {}).setdefault(name, torch.ones_like(theta))
        self.stats["path"][name] = torch.zeros_like(theta)

    def observe(self, name, theta, grad):
        fisher, previous = self.stats["fisher"], self.stats["previous"]
        if self.iteration % self.period == 0:
            if name in previous:
                # Loss gained (first order) per half squared distance in Fisher's metric; 1e-8 keeps it finite.
                moved = theta - previous[name]
                gained = -grad * moved
                self.stats["path"][name] += gained / (0.5 * fisher[name] * moved.square() + 1e-8)
            previous[name] = theta.clone()
        fisher[name] = self.alpha * grad.square() + (1 - self.alpha) * fisher[name]

    def finish(self, name, theta):
        if name not in self.stats["previous"]:  # never had a gradient in this step
            return
        scores = self.stats.setdefault("score", {})
        score = self.stats["path"][name].clamp(min=0)
        # Half of the old score and half of the new one, so earlier steps fade.
        scores[name] = 0.5 * (score + scores[name]) if name in scores else score
