"""Path Integral, also known as Synaptic Intelligence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from everseg.methods.importance import ImportancePenalty
from everseg.methods.terms import Weight


@dataclass(kw_only=True)
class PI(ImportancePenalty):
    """Importance = how much a weight's way through the step lowered the loss, per squared distance it went.

    Source: Zenke et al., ICML 2017, eq. 4-5, with the values of Cermelli et al., CVPR 2020. As in the authors'
    code the very last update of a step is not counted, and scores add up over steps. A weight that hardly moved
    gets a huge score (the distance is guarded by 1e-20), so without normalisation the penalty explodes.
    """

    per_step: ClassVar[tuple[str, ...]] = ("delta", "previous")

    weight: Weight = 500.0
    """Weight of the penalty (paper's code: 500)."""

    def importance(self, name):
        score = self.stats.get("score", {}).get(name)
        return None if score is None else self.normalised(score)

    def start(self, name, theta):
        self.stats["delta"][name] = torch.zeros_like(theta)

    def observe(self, name, theta, grad):
        # -grad * movement is the loss that the last update gained, to first order. The movement is known only one
        # iteration later, so the gradient is the one at its end.
        previous = self.stats["previous"].get(name)
        if previous is not None:
            self.stats["delta"][name] += grad * (previous - theta)
        self.stats["previous"][name] = theta.clone()

    def finish(self, name, theta):
        moved = (theta - self.stats["old"][name]).square()
        # Negative scores would push weights away from their old values.
        score = (self.stats["delta"][name] / (moved + 1e-20)).clamp(min=0)
        scores = self.stats.setdefault("score", {})
        scores[name] = score + scores[name] if name in scores else score
