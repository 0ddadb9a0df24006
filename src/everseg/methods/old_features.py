"""STAR's memory without images: what is kept of every class's features, and what a later step draws from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from everseg.losses import completed_labels
from everseg.losses.prototypes import label_at
from everseg.losses.repair import Moments, drawn_features
from everseg.methods.base import StepContext
from everseg.types import Batch

_OVERLAP = 0.5
"""What the authors subtract from the missing share of the background where images may hold old classes."""


@dataclass(frozen=True)
class Kept:
    """Of the C - 1 classes learnt so far, in float64."""

    prototypes: Tensor
    """(C - 1, D), of norm 1."""
    noise: Tensor
    """(C - 1, D), spread of the directions."""
    mean: Tensor
    """(C - 1,), of the features' norms."""
    deviation: Tensor
    """(C - 1,), of them."""
    number: Tensor
    """(C,), cells of each class in the step that taught it; entry 0 is the background."""


@dataclass(frozen=True)
class Plan:
    """What a step adds to each of its iterations. Plain numbers: reading a tensor would wait for the device."""

    drawn: tuple[int, ...]
    """Features of each of the K - 1 old classes."""
    cells: float
    """Cells of an iteration's batch, over all processes."""
    background: float
    """How many times its background counts once more."""
    open: float
    """Cells of an epoch that are background for the teacher too."""

    @property
    def share(self) -> float:
        """Features drawn per cell."""
        return sum(self.drawn) / self.cells if self.cells else 0.0


class OldFeatures:
    """The statistics of every class between steps, and the plan of the present one."""

    def __init__(self) -> None:
        self.kept: Kept | None = None
        self.plan: Plan | None = None

    def draw(self, like: Tensor) -> Tensor:
        """Draw an iteration's features of old classes, (1, D, n, 1), in type and device of another tensor."""
        assert self.kept is not None
        assert self.plan is not None
        of = [old for old, number in enumerate(self.plan.drawn) for _ in range(number)]
        kept = self.kept
        rows = (part.to(like) for part in (kept.prototypes, kept.noise, kept.mean, kept.deviation))
        return drawn_features(torch.tensor(of, device=like.device), *rows)

    def make_plan(self, ctx: StepContext, old_logit: float, decay: float) -> None:
        """Count what the teacher sees in an epoch of the step's images, and plan what is missing.

        Args:
            old_logit: as for `old_labels`.
            decay: share of the old background that each new class takes away.
        """
        assert self.kept is not None
        branch = ctx.step.branch
        old = ctx.step.num_old(branch)
        counts = torch.zeros(old + 1, dtype=torch.float64)
        iterations = 0
        for batch in ctx.epoch_batches():
            teacher = ctx.teach(batch)
            assert teacher is not None
            label = old_labels(teacher.logits, batch.label, ctx.step.spaces[branch].num_classes, old_logit)
            cells = label_at(label, teacher.logits.shape[2:], centred=True)
            counts += torch.bincount(cells.clamp(max=old).flatten(), minlength=old + 1).cpu()
            iterations += 1
        seen = ctx.all_reduce(counts.to(self.kept.number.device)).tolist()
        number, new = self.kept.number.tolist(), ctx.step.grows[branch]
        # Under "disjoint" the images hold no old class, so nothing that is seen takes the place of what is drawn.
        known = ctx.step.protocol != "disjoint"
        missing = [there - known * here for there, here in zip(number[1:], seen[1:old], strict=True)]
        drawn = tuple(int(max(cells, 0.0) / max(iterations, 1)) for cells in missing)
        ratio = number[0] * (1 - decay * new) / seen[0] - _OVERLAP * known if seen[0] else 0.0
        self.plan = Plan(drawn, sum(seen) / max(iterations, 1), max(ratio, 0.0), seen[0])

    def keep(self, moments: Moments, spread: Moments, first: int, *, authors: bool) -> None:
        """Take in the classes that a step has taught.

        Args:
            moments: of all C classes, over the step's images.
            spread: the same, of the images that the noise is measured on.
            first: first class that the step has taught.
            authors: measure the noise around the prototypes that stand at the new classes' places in a list of the
                new ones, which are other classes' from the second step on.
        """
        own, (mean, deviation) = moments.prototypes(), moments.norms()
        before = self.kept
        rows = own[first:] if before is None else torch.cat([before.prototypes.to(own), own[first:]])
        around = own.clone()
        if authors:
            around[first:] = rows[: len(own) - first]
        noise = spread.noise(around)[first:]
        number = moments.count
        if before is None:
            self.kept = Kept(rows, noise, mean[first:], deviation[first:], number)
            return
        assert self.plan is not None
        background = number.new_tensor([self.plan.open * (1 + self.plan.background)])
        self.kept = Kept(
            rows,
            torch.cat([before.noise.to(own), noise]),
            torch.cat([before.mean.to(own), mean[first:]]),
            torch.cat([before.deviation.to(own), deviation[first:]]),
            torch.cat([background, before.number.to(own)[1:], number[first:]]),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a restart and the next step need, as flat tensors."""
        kept = {} if self.kept is None else vars(self.kept)
        plan = {} if self.plan is None else vars(self.plan)
        return {f"kept/{name}": value.contiguous() for name, value in kept.items()} | {
            f"plan/{name}": torch.tensor(value, dtype=torch.float64) for name, value in plan.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        kept, plan = (
            {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
            for part in ("kept/", "plan/")
        )
        self.kept = Kept(**{name: value.clone() for name, value in kept.items()}) if kept else None
        self.plan = None
        if plan:
            drawn = tuple(int(number) for number in plan.pop("drawn").tolist())
            self.plan = Plan(drawn, **{name: value.item() for name, value in plan.items()})


def old_labels(logits: Tensor, label: Tensor, num_classes: int, least: float) -> Tensor:
    """Fill background pixels with the old class that the teacher sees there, (B, H, W).

    Args:
        logits: the teacher's, (B, K, h, w), with 0 as the background's.
        label: (B, H, W).
        num_classes: C.
        least: logit from which on a class is seen.
    """
    return completed_labels(logits, label, num_classes=num_classes, threshold=least, activation="none")


@torch.no_grad()
def moments_of(ctx: StepContext, batches: Iterable[Batch]) -> Moments:
    """Sum the moments of every class over some batches and all processes, by the student in eval mode."""
    branch, module = ctx.step.branch, ctx.module
    training = module.training
    module.eval()
    total: Moments | None = None
    for batch in batches:
        with ctx.autocast():
            features = module(batch.image, (branch,))[branch].features["decoder"]
        label = label_at(batch.label, features.shape[2:], centred=True)
        found = Moments.of(features, label, ctx.step.spaces[branch].num_classes)
        total = found if total is None else total + found
    module.train(training)
    assert total is not None
    return Moments(ctx.all_reduce(total.packed))
