"""A tiny model and generated batches, trained exactly as the engine does it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from attentive_model import attentive
from token_model import tokens
from torch import Tensor

from everseg.config.fields import TrainConfig
from everseg.engine.one_pass import take_in
from everseg.engine.optim import check_param_groups, make_optimizer, set_learning_rate
from everseg.engine.step import train_batch
from everseg.labels import LabelSpace
from everseg.methods import switches
from everseg.methods.base import Method, StepContext, Tuning
from everseg.models.build import deeplabv3
from everseg.models.heads import last_layer
from everseg.models.model import SegmentationModel, frozen_copy
from everseg.scenarios.steps import Source, Step, with_outlook
from everseg.types import Batch

TRAIN = TrainConfig(lr=0.05, lr_next=0.05)


NETWORKS = {"sats": attentive, "mbs": tokens}
"""Method -> the network that it needs."""
NEEDS_OF_MODEL: dict[str, dict[str, Any]] = {"rcil": {"compensation": True}}
"""Method -> options of the network that it asks for."""


def model_for_tests(**options: Any) -> SegmentationModel:
    return deeplabv3(
        blocks=(1, 1, 1, 1), bottleneck=False, stem=4, widths=(4, 4, 6, 8), stem_pool=False, hidden=4,
        out_channels=6, rates=(1, 2, 3), **options,
    )  # fmt: skip


def make_step(
    index: int, sizes: Mapping[str, tuple[int, ...]], grows: Mapping[str, int], branch: str
) -> Step:
    """A step after which each branch has grown by `sizes`."""
    spaces = {}
    for name, growth in sizes.items():
        ids = iter(range(sum(growth)))
        groups = tuple(tuple(next(ids) for _ in range(n)) for n in growth)
        spaces[name] = LabelSpace(groups, tuple(f"{name}-{i}" for i in range(sum(growth))))
    return Step(index, (Source(branch, "toy", "train", (), bytes(range(256))),), (), spaces, grows)


CLASSES = with_outlook([make_step(0, {"a": (3,)}, {"a": 3}, "a"), make_step(1, {"a": (3, 2)}, {"a": 2}, "a")])
"""Class-incremental: 3 classes, then 2 more."""
DOMAINS = (
    make_step(0, {"a": (3,)}, {"a": 3}, "a"),
    make_step(1, {"a": (3,), "b": (4,)}, {"b": 4}, "b"),
    make_step(2, {"a": (3,), "b": (4,), "c": (2,)}, {"c": 2}, "c"),
    make_step(3, {"a": (3, 2), "b": (4,), "c": (2,)}, {"a": 2}, "a"),
)
"""Mixed: three domains, then 2 more classes of the first."""


def batches(step: Step, count: int = 3, side: int = 16) -> list[Batch]:
    """Images and labels as the step would see them: old classes are background, some pixels ignored."""
    generator = torch.Generator().manual_seed(100 + step.index)
    maps = torch.Generator().manual_seed(
        200 + step.index
    )  # apart, so that images and labels stay what they were
    branch = step.branch
    old, total = step.num_old(branch), step.spaces[branch].num_classes
    found = []
    for _ in range(count):
        image = torch.randn(2, 3, side, side, generator=generator)
        first = old if old < total else 1
        label = torch.randint(first - bool(old), total, (2, side, side), generator=generator)
        if old:
            label[label < first] = 0
        label[:, :2] = 255
        saliency = torch.rand(2, side, side, generator=maps) < 0.5
        proposals = torch.randint(0, 6, (2, side, side), generator=maps)
        proposals = proposals.masked_fill(proposals == 5, 255)
        extra = {"saliency": saliency.long(), "proposals": proposals}
        found.append(Batch(image, label, branch, extra=extra))
    return found


@dataclass
class Run:
    """One step in the making."""

    method: Method
    model: SegmentationModel
    step: Step
    teacher: SegmentationModel | None
    ctx: StepContext
    optimizer: torch.optim.Optimizer | None
    """None in a step without gradients."""
    terms: list[dict[str, Tensor]] = field(default_factory=list)

    def take(self, *batches: Batch) -> Run:
        for batch in batches:
            # The engine seeds every iteration by its number; here its images stand for it.
            torch.manual_seed(zlib.crc32(batch.image.numpy().tobytes()))
            if self.optimizer is None:  # a step without gradients
                self.model.eval()
                self.terms.append(take_in(self.method, batch, self.ctx))
            else:
                self.terms.append(train_batch(self.method, batch, self.ctx, self.optimizer))
        return self

    def finish(self, *batches: Batch) -> Run:
        """What the engine does after the iterations: the pass over the images, if there is one, and the end."""
        if self.method.accumulates(self.step) is not None and self.optimizer is not None:
            self.model.eval()
            for batch in batches:
                take_in(self.method, batch, self.ctx)
        switches.finish(self.method, self.ctx)
        return self


def tune(ctx: StepContext, tuning: Tuning) -> None:
    """Carry out `ctx.tune` over the step's batches, without checkpoints."""
    given = batches(ctx.step) * tuning.epochs
    optimizer = make_optimizer([{"params": tuning.parameters.values()}], TRAIN, lr=0.05)
    for i, batch in enumerate(given):
        set_learning_rate(optimizer, 0.05 * tuning.lr_scale * tuning.rate(i, len(given)))
        train_batch(tuning, batch, ctx, optimizer)


class Toy:
    """What the tests of methods share."""

    steps = CLASSES
    domains = DOMAINS
    step = staticmethod(make_step)
    side = 16
    """Rows and columns of the images; the network's maps have a sixteenth of it."""
    teacher_sees = 0.0
    """Added to the teacher's logit of class 1, an old class that it would not see in noise."""

    def batches(self, step: Step, count: int = 3) -> list[Batch]:
        return batches(step, count, self.side)

    def model(self, method: str = "") -> SegmentationModel:
        """A network that the method can train."""
        torch.manual_seed(1)
        if method in NETWORKS:
            return NETWORKS[method]()
        return model_for_tests(**NEEDS_OF_MODEL.get(method, {}))

    def begin(self, method: Method, model: SegmentationModel, step: Step, *, begin: bool = True) -> Run:
        """Prepare a step as the engine does; `begin=False` where its state is restored instead."""
        torch.manual_seed(10 + step.index)
        model.zero_grad(set_to_none=True)  # the engine reads the model from disk
        teacher = frozen_copy(model) if method.needs_teacher and step.index else None
        if teacher is not None and self.teacher_sees:
            last_layer(teacher.head(step.branch).classifiers[0]).bias[1] += self.teacher_sees
        method.prepare_model(model, step)
        optimizer = None
        if method.trains(step):
            groups = method.param_groups(model, step)
            check_param_groups(model, groups)
            optimizer = make_optimizer(groups, TRAIN, lr=0.05)
        ctx = StepContext(
            step=step,
            model=model,
            module=model,
            teacher=teacher,
            tuner=tune,
            epoch_batches=lambda: iter(self.batches(step)),
        )
        if begin:
            switches.begin(method, ctx)
        model.train()
        return Run(method, model, step, teacher, ctx, optimizer)

    def train(self, method: Method, model: SegmentationModel, *steps: Step) -> Run:
        """Train whole steps; returns the last one."""
        for step in steps or self.steps:
            run = self.begin(method, model, step).take(*self.batches(step)).finish(*self.batches(step))
        return run


@pytest.fixture
def toy() -> Toy:
    return Toy()


def snapshot(*states: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()} for state in states]
