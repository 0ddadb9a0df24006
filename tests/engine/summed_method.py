"""A method, as a plug-in file, whose later steps have no gradients: classifiers are means of features by class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from everseg.methods.base import Pass
from everseg.methods.ft import FineTuning


@dataclass(kw_only=True)
class Summed(FineTuning):
    """The nearest class mean, over everything that was labelled so far; the first step trains the network first."""

    crops: bool = True
    every_image: bool = True
    batch: int | None = 3

    def __post_init__(self):
        self.total = torch.zeros(0, 0, dtype=torch.float64)
        self.count = torch.zeros(0, dtype=torch.float64)

    def prepare_model(self, model, step):
        super().prepare_model(model, step)
        if not self.trains(step):
            heads = {branch: len(model.head(branch).classifiers) for branch in model.branches}
            model.freeze(encoder=True, norm=True, decoder=True, heads=heads)

    def trains(self, step):
        return step.is_first

    def accumulates(self, step):
        return Pass(crops=self.crops, every_image=self.every_image, batch=self.batch)

    def begin_step(self, ctx):
        new = ctx.step.grows[ctx.step.branch]
        width = ctx.module.decoder.out_channels
        self.total = torch.cat([self.total.view(-1, width), self.total.new_zeros(new, width)])
        self.count = torch.cat([self.count, self.count.new_zeros(new)])

    def accumulate(self, batch, ctx):
        assert not torch.is_grad_enabled()
        assert not ctx.module.training
        features = ctx.student(batch).features["decoder"].double()
        label = F.interpolate(batch.label[:, None].double(), features.shape[2:], mode="nearest")[:, 0].long()
        known = label < len(self.count)
        chosen = features.movedim(1, -1)[known]
        self.total.index_add_(0, label[known], chosen)
        self.count += torch.bincount(label[known], minlength=len(self.count))
        return {"cells": known.sum(), "noise": torch.rand(())}

    def sums(self):
        return {"total": self.total, "count": self.count}

    @torch.no_grad()
    def finish_model(self, ctx):
        means = self.total / self.count.clamp(min=1)[:, None]
        head = ctx.module.head(ctx.step.branch)
        for own, size in zip(means.split(head.sizes), head.classifiers, strict=True):
            size.weight.copy_(own[..., None, None])
            size.bias.copy_(-own.square().sum(1) / 2)

    def state_dict(self):
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state):
        self.total, self.count = state["total"].clone(), state["count"].clone()
