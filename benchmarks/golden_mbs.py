"""Compares MBS's losses and training runs with the numbers of the authors' code.

The files' network is a stand-in for a vision transformer: cells of 8 x 8 pixels, whose tokens are moved by the mean of
the cells instead of attention. It is built here from everseg's own parts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.golden_checks import EXACT, Row, Tally
from benchmarks.golden_replay import BRANCH, Comparison, difference
from everseg import losses, metrics
from everseg.config.fields import TrainConfig
from everseg.engine.optim import check_param_groups, make_optimizer
from everseg.engine.step import train_batch
from everseg.labels import IGNORED, LabelSpace
from everseg.methods import switches
from everseg.methods.base import StepContext
from everseg.methods.mbs import MBS
from everseg.models.model import SegmentationModel, frozen_copy
from everseg.models.token_head import TokenHead
from everseg.scenarios.steps import Source, Step
from everseg.types import IMAGENET_MEAN, IMAGENET_STD, Batch

CELL, WIDTH, SCALE = 8, 8, 4.0
SINGLE = 1e-6
"""Limit of the first step's total, which the original holds in float32."""


class _Cells(nn.Module):
    """The stand-in's encoder: means over cells, a linear layer, a norm, tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.encnorm = nn.Linear(3, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        cells = F.avg_pool2d(image, CELL).movedim(1, 3)
        return {"layer1": torch.tanh(self.encnorm(self.enc(cells))).movedim(3, 1)}


class _Same(nn.Module):
    out_channels = WIDTH

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return features["encoder"]


class _StandIn(TokenHead):
    """everseg's head with tokens, its blocks replaced by the mean of the cells."""

    def __init__(self) -> None:
        super().__init__(WIDTH, layers=0, dropout=0.0)
        del self.last_norm, self.patch_projection, self.class_projection
        self.mix, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        del self.mask_scale
        self.mask_scale = SCALE  # type: ignore[assignment]

    def refine(self, cells: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return cells, tokens + self.mix(cells.mean(dim=1, keepdim=True))

    def project(self, cells: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return cells, self.out(tokens)


def replay_mbs(folder: Path, stem: str) -> dict[str, Comparison]:
    """Train one `train_mbs*.npz` again, in the authors' form.

    Returns:
        Quantity -> values compared and largest relative difference; of scalars to each value, of tensors to the
        largest value of the tensor.
    """
    return _Replay(folder, stem).run()


class _Replay:
    def __init__(self, folder: Path, stem: str) -> None:
        self.golden = np.load(folder / f"{stem}.npz")
        self.meta = json.loads(str(self.golden["meta"]))
        tasks = json.loads(str(self.golden["tasks"]))
        self.tasks = [list(tasks[key]) for key in sorted(tasks, key=int)]
        self.method = MBS(threshold=self.meta["thresh"], kd_weight=self.meta["distill"])
        self.model = SegmentationModel(_Cells(), _Same(), make_head=_StandIn).double()
        self.found: dict[str, Comparison] = {}

    def compare(self, quantity: str, ours: Any, theirs: Any, scale: Any = None) -> None:
        entry = self.found.setdefault(quantity, Comparison())
        entry.count += np.size(theirs)
        entry.largest = max(entry.largest, difference(ours, theirs, scale))

    def whole(self, quantity: str, ours: Any, theirs: Any) -> None:
        ours = ours.detach().numpy() if isinstance(ours, Tensor) else ours
        self.compare(quantity, ours, theirs, np.abs(np.asarray(theirs, np.float64)).max(initial=0.0))

    def run(self) -> dict[str, Comparison]:
        for step in self._steps():
            self._step(step)
        return self.found

    def _steps(self) -> Iterator[Step]:
        groups: list[tuple[int, ...]] = []
        for index, task in enumerate(self.tasks):
            first = sum(map(len, groups))
            groups.append(tuple(range(first, first + len(task))))
            space = LabelSpace(tuple(groups), tuple(f"class {i}" for i in range(first + len(task))))
            source = Source(BRANCH, "golden", "train", (), bytes(range(256)))
            yield Step(index, (source,), (), {BRANCH: space}, {BRANCH: len(task)})

    def _named(self) -> dict[str, Tensor]:
        """Our weights under the file's names; the background's token stands alone there."""
        head = self.model.head(BRANCH)
        tokens: list[Tensor] = [part.weight[None] for part in head.classifiers]  # type: ignore[misc, index]
        tokens[:1] = [tokens[0][:, :1], tokens[0][:, 1:]]
        named = {name: value for name, value in self.model.encoder.named_parameters()}
        for part in ("mix", "out"):
            named |= {
                f"decoder.{part}.{leaf}": value for leaf, value in getattr(head, part).named_parameters()
            }
        return named | {f"decoder.cls_emb.{i}": value for i, value in enumerate(tokens) if value.numel()}

    def _step(self, step: Step) -> None:
        golden, at, k, method, model = self.golden, f"step{step.index}/", step.index, self.method, self.model
        teacher = frozen_copy(model) if k else None
        method.prepare_model(model, step)
        model.double()
        for name, value in self._named().items():
            theirs = golden[f"{at}start/{name}"]
            if k:
                self.whole("weights at a step's start", value, theirs)
            value.data.copy_(torch.from_numpy(theirs))
        # The rate of every iteration is the first: no schedule.
        base = self.meta["lr"] * (self.meta["inc_lr"] if k else 1.0)
        train = TrainConfig(
            lr=base, schedule="constant", momentum=0.9, nesterov=True, weight_decay=self.meta["wd"]
        )
        groups = method.param_groups(model, step)
        check_param_groups(model, groups)
        optimizer = make_optimizer(groups, train, lr=base)
        ctx = StepContext(step=step, model=model, module=model, teacher=teacher)
        switches.begin(method, ctx)
        model.train()
        for i, rows in enumerate(golden[f"{at}order"]):
            self.compare("learning rate", np.full_like(golden[f"{at}lr"][i], base), golden[f"{at}lr"][i])
            label = torch.from_numpy(golden[f"{at}labels"][i]).long()
            self.compare("label maps", self._labels(golden["data/labels"][rows], step), label.numpy(), 255.0)
            batch = Batch(self._images(rows), label, BRANCH)
            if teacher is not None:
                self._compare_targets(batch, ctx, golden[f"{at}targets"][i])
            logged = {name: float(v) for name, v in train_batch(method, batch, ctx, optimizer).items()}
            self._compare_terms(logged, at, i)
        switches.finish(method, ctx)
        for name, value in self._named().items():
            self.whole("final weights", value, golden[f"{at}final/{name}"])
        self._evaluate(step)

    def _images(self, rows: np.ndarray) -> Tensor:
        # Normalised in float32, then cast, as the files' loader does.
        images = torch.from_numpy(self.golden["data/images"][rows]).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return ((images - mean) / std).double()

    def _labels(self, raw: np.ndarray, step: Step, *, seen: bool = False) -> np.ndarray:
        """Raw ids to train ids: the current classes alone, or all seen ones with the rest ignored."""
        table = np.full(256, IGNORED if seen else 0)
        table[255], table[0] = IGNORED, 0
        order = [raw_id for task in self.tasks[: step.index + 1] for raw_id in task]
        first = 0 if seen else sum(map(len, self.tasks[: step.index]))
        for train_id, raw_id in enumerate(order):
            if raw_id and train_id >= first:
                table[raw_id] = train_id
        return table[raw]

    def _compare_targets(self, batch: Batch, ctx: StepContext, theirs: np.ndarray) -> None:
        teacher = ctx.teach(batch)
        assert teacher is not None
        number = ctx.step.spaces[BRANCH].num_classes
        found = losses.completed_labels(
            teacher.logits, batch.label, threshold=self.meta["thresh"], num_classes=number, activation="softmax"
        )
        found = losses.without_doubted(teacher.logits, found, num_classes=number)
        self.compare("pseudo-labels", found.numpy(), theirs, 255.0)

    def _compare_terms(self, logged: dict[str, float], at: str, i: int) -> None:
        golden = self.golden
        self.compare("ce", logged["ce"], golden[f"{at}term/ce"][i])
        total = "total" if "kd" in logged else "total of the first step"
        self.compare(total, sum(logged.values()), golden[f"{at}term/total"][i])
        if "kd" not in logged:
            return
        # The file's list of feature distances alternates between cells and classes.
        theirs = golden[f"{at}term/fd"][2 * i : 2 * i + 2]
        for name, value, weight in zip(("feature", "class"), theirs, (1.0, 1.0), strict=True):
            if abs(logged[name]) > 1e-25 or value:  # student and teacher are the same but for rounding
                self.compare(name, logged[name] / weight, value)
        self.compare("kd", logged["kd"] / self.method.kd_weight, golden[f"{at}term/od"][i])
        self.compare("token", logged["token"], golden[f"{at}term/ortho"][i])

    def _evaluate(self, step: Step) -> None:
        """Confusion matrices: of the test images that show a current class, and of all."""
        raw = self.golden["data/labels"]
        rows = np.arange(int(self.golden["data/n_train"]), len(raw))
        shown = [row for row in rows if np.isin(raw[row], [c for c in self.tasks[step.index] if c]).any()]
        number = step.spaces[BRANCH].num_classes
        self.model.eval()
        for which, (chosen, seen) in enumerate(((shown, False), (rows, True))):
            matrix = metrics.ConfusionMatrix(number)
            for row in chosen:
                one = np.array([row])
                with torch.no_grad():
                    logits = self.model(self._images(one))[BRANCH].logits
                found = losses.upsample(logits, raw.shape[1:]).argmax(dim=1)
                matrix.update(found, torch.from_numpy(self._labels(raw[one], step, seen=seen)))
            theirs = self.golden[f"step{step.index}/cm"][which]
            self.compare("confusion matrices", np.asarray(matrix.counts), theirs, max(theirs.max(), 1.0))


def limit(quantity: str) -> float:
    """Largest relative difference that counts as agreement; labels and counts must be the same."""
    if quantity in ("pseudo-labels", "label maps", "confusion matrices"):
        return 0.0
    return SINGLE if quantity == "total of the first step" else EXACT


def check_mbs(folder: Path) -> list[Row]:
    """Losses, gradients and weights of every `mbs_losses_*.npz`."""
    return [row for path in sorted(folder.glob("mbs_losses_*.npz")) for row in _check_file(path)]


def _check_file(path: Path) -> list[Row]:
    tally = Tally(path.name)
    arrays = {name: torch.from_numpy(value) for name, value in np.load(path).items()}
    old, label = arrays["old_logits"], arrays["labels"]
    number, first = arrays["logits"].shape[1], int(arrays["new_classes"].min())

    def maps(patches: Tensor) -> Tensor:  # (B, 1, N, D) as a map of one row
        return patches.movedim(3, 1)

    weight = arrays["weights"][:, None]
    for name, given, loss in (
        ("od", "logits", lambda x: losses.moved_distillation(x, label, old)),
        ("kd_baseline", "logits", lambda x: losses.distillation(x, old)),
        ("afd", "patches", lambda x: losses.weighted_feature_distance(
            maps(x), maps(arrays["patches_old"]), weight)),
        ("fd_plain", "patches", lambda x: losses.feature_distillation(x, arrays["patches_old"])),
        ("ortho", "class_tokens", lambda x: losses.token_orthogonality(x, first)),
    ):  # fmt: skip
        x = arrays[given].clone().requires_grad_()
        value = loss(x)
        value.backward()
        tally.add(f"{name}, value", value, arrays[f"{name}/out"].numpy())
        tally.add(f"{name}, gradient", x.grad, arrays[f"{name}/grad_{given}"].numpy())
    cells = arrays["labels_patch"].long()
    share = losses.old_share(arrays["old_masks"], cells, num_classes=number)
    tally.add("weights of cells", share, arrays["scoremap"].numpy())
    return tally.rows()
