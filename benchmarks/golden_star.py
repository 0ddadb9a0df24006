"""Compares STAR with the numbers of the authors' code: functions and training runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.golden_checks import EXACT, Row, Tally
from benchmarks.golden_dkd import SigmoidRun, check_positives, check_value
from benchmarks.golden_replay import BRANCH, Comparison
from benchmarks.golden_tiny import set_weights
from everseg.losses.prototypes import label_at
from everseg.losses.repair import Moments, class_shares, masked_feature_distillation, prototype_contrast
from everseg.methods import switches
from everseg.methods.base import StepContext
from everseg.methods.old_features import moments_of, old_labels
from everseg.methods.star import STAR
from everseg.types import Batch

Which = tuple[int, ...]
SINGLE = 1e-6
"""Limit in training runs: the original keeps its statistics of features in float32, ours are in float64."""
SMALLEST = 1e-5
"""The same, of each gradient's norm relative to itself."""


class _Replay(SigmoidRun):
    """One file.

    The original passes over its images three more times: before a step, to count what the teacher sees, and twice after
    it, for prototypes and for noise. Each pass leaves out what does not fill a batch, and the file does not say which
    images these were. They are found: those without which the pass gives the file's numbers.
    """

    auxiliary = False

    def __post_init__(self) -> None:
        super().__post_init__()
        own = [self.setting(index)["hyperparameter"] for index in range(len(self.groups))]
        self.method: STAR = STAR(
            pos_weight=own[0]["pos_weight"],
            feature_weight=own[-1]["pkd"],
            contrast_weight=own[-1]["cont"],
            noise="authors",
            unlabelled="negative",
        )
        self.index = 0

    def start(self, index: int) -> None:
        self.index = index
        if index:  # the new classifier is random
            prefix = f"step{index}/start/"
            set_weights(
                self.model,
                {k: v for k, v in self.stored(prefix).items() if f"cls.{index}." in k},
                self.rename,
            )
        super().start(index)

    def begin(self, ctx: StepContext) -> None:
        if not self.index:
            switches.begin(self.method, ctx)
            return
        at, size = f"step{self.index}/proto/", self.meta["bs"]
        images, theirs = self._images(), self.golden[f"{at}pred_numbers"]
        each = [self._seen(ctx, image) for image in images]
        kept = self._found(images, lambda which: float(np.abs(sum(each[n] for n in which) - theirs).sum()))
        chunks = [kept[n : n + size] for n in range(0, len(kept), size)]
        ctx.epoch_batches = lambda: (_joined([images[n] for n in chunk]) for chunk in chunks)
        self.method.background_decay = self._decay(at)
        switches.begin(self.method, ctx)
        plan = self.method.old.plan
        assert plan is not None
        self.compare("background cells", plan.open, theirs[0])
        self.same("features drawn", plan.drawn, self.golden[f"{at}per_iter_prev_number"])
        self.compare("factor of the background", plan.background, self.golden[f"{at}extra_bg_ratio"])

    def _decay(self, at: str) -> float:
        """The share of the background that a new class takes in this file: 0.01, or 0 where that explains it."""
        before, seen = (
            float(self.golden[name][0])
            for name in (f"step{self.index - 1}/proto/numbers", f"{at}pred_numbers")
        )
        plain = before / max(seen, 1) - (0.5 if self.meta.get("overlap", True) else 0.0)
        return 0.0 if np.isclose(float(self.golden[f"{at}extra_bg_ratio"]), plain, rtol=1e-5) else 0.01

    def before_iteration(self, iteration: int) -> None:
        at = f"step{self.index}/"
        if f"{at}fake_features/{iteration}" in self.golden:
            given = torch.from_numpy(self.golden[f"{at}fake_features/{iteration}"])
            self.method.old.draw = lambda like: given  # type: ignore[method-assign]

    def logged(self, terms: Mapping[str, Tensor], index: int) -> dict[str, Any]:
        own = [terms[name] for name in ("mbce", "drawn", "background") if name in terms]
        found: dict[str, Any] = {"loss": sum(terms.values()), "loss_mbce": sum(own)}
        return found | ({"loss_pkd": terms["features"], "loss_cont": terms["contrast"]} if index else {})

    def finish(self, ctx: StepContext) -> None:
        at, first = f"step{self.index}/proto/", max(ctx.step.num_old(BRANCH), 1)
        images = self._images()
        each = [moments_of(ctx, [image]).packed for image in images]
        told = first if self.index else 0  # a later step counts its new classes alone
        numbers, rows = self.golden[f"{at}numbers"][told:], self.golden[f"{at}prototypes"][first - 1 :]

        def moments(which: Which) -> Moments:
            return Moments(torch.stack([each[n] for n in which]).sum(dim=0))

        def unlike(which: Which) -> float:
            found = moments(which)
            wrong = np.abs(found.count.numpy()[told:] - numbers).sum()
            return float(wrong + np.abs(found.prototypes()[first:].numpy() - rows).max())

        def kept(which: Which) -> Any:
            old = copy.copy(self.method.old)
            old.keep(one, moments(which), first, authors=self.method.noise == "authors")
            return old

        one = moments(self._found(images, unlike))
        noise = self.golden[f"{at}noise"]
        other = self._found(images, lambda which: float(np.abs(kept(which).kept.noise.numpy() - noise).max()))
        self.method.old = kept(other)
        self.method.old.plan = None
        vars(self.method.old).pop("draw", None)
        mine = self.method.old.kept
        assert mine is not None
        self.whole("prototypes", mine.prototypes, self.golden[f"{at}prototypes"])
        norms = torch.stack([mine.mean, mine.deviation])
        self.whole("norms of features", norms, self.golden[f"{at}norm_mean_and_std"])
        self.whole("noise", mine.noise, noise)
        self.whole("cells", mine.number, self.golden[f"{at}numbers"])

    def _images(self) -> list[Batch]:
        """The images that the step may train on, one by one."""
        now, seen = set(self.groups[self.index]) - {0}, {*self.seen(self.index), 0, 255}
        found = []
        for number in range(self.num_train):
            raw = set(self.raw[number].unique().tolist())
            if raw & now and (self.meta.get("overlap", True) or raw <= seen):
                which = np.array([number])
                found.append(Batch(self.images[which], self.labels(which, self.groups[self.index]), BRANCH))
        return found

    def _found(self, images: list[Batch], unlike: Callable[[Which], float]) -> Which:
        """The images of a pass: as many as an epoch has, and those that agree best with the file."""
        number = len(self.golden[f"step{self.index}/order"]) // self.meta["epochs"] * self.meta["bs"]
        return min(combinations(range(len(images)), min(number, len(images))), key=unlike)

    def _seen(self, ctx: StepContext, image: Batch) -> np.ndarray:
        """Cells of an image by the old class that the teacher sees, 0 where none."""
        teacher = ctx.teach(image)
        assert teacher is not None
        label = old_labels(teacher.logits, image.label, len(self.seen(self.index)), self.method.old_logit)
        cells = label_at(label, teacher.logits.shape[2:], centred=True).flatten().numpy()
        return np.bincount(cells, minlength=256)[: len(self.seen(self.index - 1))]


def _joined(images: list[Batch]) -> Batch:
    return Batch(torch.cat([one.image for one in images]), torch.cat([one.label for one in images]), BRANCH)


def replay_star(folder: Path, stem: str) -> dict[str, Comparison]:
    """Train one `train_star*.npz` again, in the authors' form, with the features that its file holds as drawn.

    Returns:
        Quantity -> values compared and largest relative difference: of scalars to each value, of tensors to the
        largest value of the tensor; of labels, confusion counts and numbers drawn the share that differs.
    """
    return _Replay(folder, stem).run()


def limit_star(folder: Path, stem: str, quantity: str) -> float:
    """Largest relative difference that counts as agreement."""
    exact = ("labels", "learning rate", "features drawn", "confusion counts", "background cells")
    return EXACT if quantity in exact else SMALLEST if quantity == "gradient norms" else SINGLE


def check_star(folder: Path) -> list[Row]:
    """Losses with gradients of every `star_losses_*.npz`."""
    return [row for path in sorted(folder.glob("star_losses_*.npz")) for row in _check_file(path)]


def _check_file(path: Path) -> list[Row]:
    arrays, tally = dict(np.load(path)), Tally(path.name)
    check_positives(arrays, tally)
    held, rows = (torch.from_numpy(arrays[name]) for name in ("features_old", "prev_prototypes"))
    region, label = (torch.from_numpy(arrays[name]).long() for name in ("pseudo_region", "labels_cont"))
    first = 1 + int(arrays["K_old_without_bg"])
    last = first + int(arrays["N_new"])

    def distance(x: Tensor) -> Tensor:
        mask = class_shares(region[:, 0], x.shape[2:], 1, 2)[:, 0]
        return masked_feature_distillation(x, held, mask)

    def contrast(x: Tensor) -> Tensor:
        return prototype_contrast(x, class_shares(label, x.shape[2:], first, last), rows)

    check_value(arrays, tally, "pkd", distance, wanted="features")
    check_value(arrays, tally, "cont", contrast, wanted="features")
    return tally.rows()
