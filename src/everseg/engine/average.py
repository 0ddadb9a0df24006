"""The moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from everseg.models.model import SegmentationModel


class MovingAverage:
    """An exponential moving average over iterations: average = decay * average + (1 - decay) * weights.

    It covers the model's whole state. Numbers of floating point are averaged: weights, also frozen ones (which stay
    exactly what they are), and the running statistics of norms. Integers, such as counts of batches, are copied.

    Args:
        model: where the average starts: the model at the beginning of a step.
        decay: share of the old average, between 0 and 1.
        state: an average to continue from instead, as `values` gave it.

    Source: Polyak and Juditsky, 1992, in the form of Tarvainen and Valpola, "Mean teachers", NeurIPS 2017.
    """

    def __init__(self, model: nn.Module, decay: float, state: Mapping[str, Tensor] | None = None) -> None:
        self.decay = decay
        # A clone keeps the layout of its tensor, which the element-wise updates below need for their speed.
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}
        """Name as in the model's `state_dict` -> value."""
        for name, value in (state or {}).items():
            self.values[name].copy_(value)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of one more iteration."""
        averages, weights = [], []
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                averages.append(self.values[name])
                weights.append(value)
            else:
                self.values[name].copy_(value)
        # As start + (1 - decay) * (end - start): of two equal values the average is exactly that value.
        torch._foreach_lerp_(averages, weights, 1 - self.decay)

    @torch.no_grad()
    def take_over(self, model: SegmentationModel, accelerator: Accelerator) -> dict[str, Tensor]:
        """Put the average into a model.

        All processes take the average of the first one: their running statistics may differ until the next forward
        pass, and only the first one's are stored.

        Returns:
            The model's state from before, copied.
        """
        raw = {}
        for name, value in model.state_dict().items():
            raw[name] = value.detach().clone()
            if accelerator.num_processes > 1:
                torch.distributed.broadcast(self.values[name], 0)
            value.copy_(self.values[name])
        return raw
