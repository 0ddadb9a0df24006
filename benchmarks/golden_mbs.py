"""Compares MBS's losses and training runs with the numbers of the authors' code.

The files' network is a stand-in for a vision transformer: cells of 8 x 8 pixels, whose tokens are moved by the mean of
the cells instead of attention. It is built here from everseg's own parts.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.golden_checks import Row, Tally
from benchmarks.golden_replay import BRANCH, Comparison
from benchmarks.golden_tiny import TinyRun
from everseg import losses
from everseg.config.fields import TrainConfig
from everseg.engine.optim import check_param_groups, learning_rate, make_optimizer
from everseg.engine.step import train_batch
from everseg.methods import switches
from everseg.methods.base import StepContext
from everseg.methods.mbs import MBS
from everseg.models.model import SegmentationModel, frozen_copy
from everseg.models.token_head import TokenHead
from everseg.types import Batch

CELL, WIDTH, SCALE = 8, 8, 4.0


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
    """Train one `train_mbs*.npz` again.

    Returns:
        Quantity -> values compared and largest relative difference: of scalars to each value, of tensors to the
        largest value of the tensor; of labels and confusion counts the share that differs.
    """
    run = TinyRun(folder, stem)
    method = MBS(threshold=run.meta["thresh"], kd_weight=run.meta["distill"])
    model = SegmentationModel(_Cells(), _Same(), make_head=_StandIn).double()
    for index in range(len(run.groups)):
        _replay_step(run, method, model, index)
    return run.found


def _named(model: SegmentationModel) -> dict[str, Tensor]:
    """Our weights under the file's names; the background's token stands alone there."""
    head = model.head(BRANCH)
    tokens: list[Tensor] = [part.weight[None] for part in head.classifiers]  # type: ignore[misc, index]
    tokens[:1] = [tokens[0][:, :1], tokens[0][:, 1:]]
    named: dict[str, Tensor] = dict(model.encoder.named_parameters())
    for part in ("mix", "out"):
        named |= {f"decoder.{part}.{leaf}": value for leaf, value in getattr(head, part).named_parameters()}
    return named | {f"decoder.cls_emb.{i}": value for i, value in enumerate(tokens) if value.numel()}


def _replay_step(run: TinyRun, method: MBS, model: SegmentationModel, index: int) -> None:
    at, step = f"step{index}/", run.step(index)
    teacher = frozen_copy(model) if index else None
    method.prepare_model(model, step)
    model.double()
    for name, value in _named(model).items():
        theirs = run.golden[f"{at}start/{name}"]
        if index:
            run.whole("weights at the start", value, theirs)
        value.data.copy_(torch.from_numpy(theirs))
    base = run.meta["lr"] * (run.meta["inc_lr"] if index else 1.0)
    train = TrainConfig(lr=base, schedule="constant", weight_decay=run.meta["wd"])
    groups = method.param_groups(model, step)
    check_param_groups(model, groups)
    optimizer = make_optimizer(groups, train, lr=base)
    ctx = StepContext(step=step, model=model, module=model, teacher=teacher)
    switches.begin(method, ctx)
    model.train()
    for i, which in enumerate(run.golden[f"{at}order"]):
        rates = run.golden[f"{at}lr"][i]  # three groups, one rate
        run.compare("learning rate", np.full_like(rates, learning_rate(train, base, i, 1)), rates)
        label = run.labels(which, run.groups[index])
        run.same("labels", label, run.golden[f"{at}labels"][i])
        batch = Batch(run.images[torch.from_numpy(which)], label, BRANCH)
        targets = method.targets(batch, ctx, ctx.teach(batch))
        run.same("targets", targets, run.golden[f"{at}targets"][i])
        logged = train_batch(method, batch, ctx, optimizer)
        _compare_terms(run, method, {name: float(value) for name, value in logged.items()}, at, i)
    switches.finish(method, ctx)
    for name, value in _named(model).items():
        run.whole("final weights", value, run.golden[f"{at}final/{name}"])
    model.eval()
    for number, current in enumerate((True, False)):
        counts = run.confusion(partial(_predict, model), index, current=current)
        run.same("confusion counts", counts, run.golden[f"{at}cm"][number])


@torch.no_grad()
def _predict(model: SegmentationModel, image: Tensor, _number: int) -> Tensor:
    return losses.upsample(model(image)[BRANCH].logits, image.shape[2:]).argmax(dim=1)


def _compare_terms(run: TinyRun, method: MBS, logged: dict[str, float], at: str, i: int) -> None:
    run.compare("ce", logged["ce"], run.golden[f"{at}term/ce"][i])
    total = sum(logged.values())
    if "kd" not in logged:  # the original holds the total of the first step in float32
        run.compare("total", np.float32(total), run.golden[f"{at}term/total"][i])
        return
    run.compare("total", total, run.golden[f"{at}term/total"][i])
    # The file's list of feature distances alternates between cells and classes. In the first iteration student and
    # teacher are the same but for rounding.
    for name, theirs in zip(("feature", "class"), run.golden[f"{at}term/fd"][2 * i : 2 * i + 2], strict=True):
        run.compare(name, logged[name], theirs, theirs if i else 1.0)
    run.compare("kd", logged["kd"] / method.kd_weight, run.golden[f"{at}term/od"][i])
    run.compare("token", logged["token"], run.golden[f"{at}term/ortho"][i])


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
