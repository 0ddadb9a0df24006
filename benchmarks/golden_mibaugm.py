"""Compares MiB with a memory (MiB-AugM) with the numbers of the authors' code: functions and training runs.

Which images the memory keeps, and the partition of the data, are compared in `golden_memory`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.golden_checks import Row, Tally
from benchmarks.golden_replay import BRANCH, Comparison
from benchmarks.golden_tiny import TinyRun, as_theirs, set_weights, tiny_network
from everseg import losses
from everseg.config.fields import TrainConfig
from everseg.engine.optim import check_param_groups, learning_rate, make_optimizer, set_learning_rate
from everseg.engine.step import train_batch
from everseg.labels import IGNORED
from everseg.methods import switches
from everseg.methods.base import StepContext
from everseg.methods.mib import MiB
from everseg.models.model import SegmentationModel, frozen_copy
from everseg.types import Batch

_LAST = {"0": "last_conv", "1": "last_norm"}


def rename(key: str) -> str:
    """Their name of a tensor of the last convolution or of the classifiers -> ours."""
    parts = key.split(".")
    if key.startswith("aspp.last_conv."):
        return f"decoder.{_LAST[parts[2]]}.{parts[3]}"
    return f"heads.{BRANCH}.classifiers.{parts[1]}.{parts[2]}"


def replay_mibaugm(folder: Path, stem: str) -> dict[str, Comparison]:
    """Train one `train_mibaugm*.npz` again, in the authors' form.

    Returns:
        Quantity -> values compared and largest relative difference: of scalars to each value, of tensors to the
        largest value of the tensor; of labels and confusion counts the share that differs.
    """
    run = TinyRun(folder, stem)
    method = MiB(
        kd_weight=run.meta["cfg"][-1]["hyperparameter"]["unkd"], later_rate=10.0, decay_encoder=False,
        memory_void="background", freeze_norm=True,
    )  # fmt: skip
    model = tiny_network(run.meta.get("stride", 2), last_conv=True)
    for index in range(len(run.groups)):
        _replay_step(run, method, model, index)
    return run.found


def _replay_step(run: TinyRun, method: MiB, model: SegmentationModel, index: int) -> None:
    at, step = f"step{index}/", run.step(index)
    teacher = frozen_copy(model) if index else None
    method.prepare_model(model, step)
    model.double()
    if index:
        run.compare_weights("weights at the start", model, f"{at}start/", rename)
    else:
        set_weights(model, run.stored(f"{at}start/"), rename)
    given = run.meta["cfg"][index]["optimizer"]["args"]
    train = TrainConfig(lr=given["lr"], weight_decay=given["weight_decay"])
    groups = method.param_groups(model, step)
    check_param_groups(model, groups)
    optimizer = make_optimizer(groups, train, lr=train.lr)
    ctx = StepContext(step=step, model=model, module=model, teacher=teacher)
    switches.begin(method, ctx)
    model.train()
    total = len(run.golden[f"{at}order"])
    for i in range(total):
        set_learning_rate(optimizer, learning_rate(train, train.lr, i, total))
        rates = [group["lr"] for group in optimizer.param_groups]
        run.compare("learning rate", rates if index else rates * 3, run.golden[f"{at}lr"][i])
        logged = train_batch(method, _batch(run, index, i), ctx, optimizer)
        _compare_terms(run, method, {name: float(value) for name, value in logged.items()}, at, i)
        _compare_gradients(run, model, at, i)
    switches.finish(method, ctx)
    run.compare_weights("final weights", model, f"{at}final/", rename)
    run.same("confusion counts", _confusion(run, model, index), run.golden[f"{at}test_cm"])


def _batch(run: TinyRun, index: int, i: int) -> Batch:
    """The batch of an iteration: some positions of the step's batch, and the others of one of the memory."""
    at = f"step{index}/"
    which = run.golden[f"{at}order"][i]
    label = run.labels(which, run.groups[index])
    run.same("labels", label, run.golden[f"{at}labels"][i])
    images = run.images[torch.from_numpy(which)]
    if f"{at}mem_order" not in run.golden:
        return Batch(images, label, BRANCH)
    stored = torch.from_numpy(run.golden[f"{at}mem_order"][i])
    labelled = torch.from_numpy(run.golden[f"{at}mem_labels"][i]).long()
    memory = torch.zeros(len(which), dtype=torch.bool)
    memory[torch.from_numpy(run.golden[f"{at}rand_index"][i])] = True
    images, label = images.clone(), label.clone()
    images[memory], label[memory] = run.images[stored][memory], labelled[memory]
    return Batch(images, label, BRANCH, memory=memory)


def _compare_terms(run: TinyRun, method: MiB, logged: dict[str, float], at: str, i: int) -> None:
    run.compare("loss", sum(logged.values()), run.golden[f"{at}term/loss"][i])
    # Theirs are means over the images of a part, ours over those of the batch, of which each part is one half.
    for theirs, ours, factor in (
        ("loss_unce", "ce", 2.0), ("loss_uncemem", "memory", 2.0), ("loss_unkd", "kd", 1 / method.kd_weight),
    ):  # fmt: skip
        if f"{at}term/{theirs}" in run.golden:
            run.compare(theirs, factor * logged[ours], run.golden[f"{at}term/{theirs}"][i])


def _compare_gradients(run: TinyRun, model: SegmentationModel, at: str, i: int) -> None:
    """Norms of the gradients of what is trained: those of frozen norms add up over the step in the original."""
    grads = {name: w.grad if w.requires_grad else None for name, w in model.named_parameters()}
    theirs = run.golden[f"{at}gradnorm"][i]
    for key, norm in zip(run.golden[f"{at}names"].tolist(), theirs, strict=True):
        ours = as_theirs(grads, key, rename)
        if ours is not None and norm > 1e-10 * np.linalg.norm(theirs):
            run.compare("gradient norms", ours.norm(), norm)


@torch.no_grad()
def _confusion(run: TinyRun, model: SegmentationModel, index: int) -> np.ndarray:
    """Counts of the test images that show a class seen so far; every other class is background."""
    model.eval()
    seen, number = run.seen(index), len(run.seen(index))
    counts = np.zeros((number, number))
    for image in range(run.num_train, len(run.raw)):
        if not (set(seen) - {0}) & set(run.raw[image].unique().tolist()):
            continue
        truth = run.labels(np.array([image]), seen)
        logits: Tensor = model(run.images[image][None])[BRANCH].logits
        found = losses.upsample(logits, truth.shape[1:]).argmax(dim=1)
        place = (truth * number + found)[truth != IGNORED]
        counts += torch.bincount(place, minlength=number**2).view(number, number).numpy()
    return counts


def check_mibaugm(folder: Path) -> list[Row]:
    """Losses and gradients of every `mibaugm_losses_*.npz`."""
    return [row for path in sorted(folder.glob("mibaugm_losses_*.npz")) for row in _check_file(path)]


def _check_file(path: Path) -> list[Row]:
    arrays, tally = {name: torch.from_numpy(value) for name, value in np.load(path).items()}, Tally(path.name)
    num_old, old = int(arrays["K"]), arrays["old_logits"]
    current, memory = arrays["labels_current"], arrays["labels_memory"]
    terms: dict[str, Callable[..., Tensor]] = {
        # Their class-level mean is over the pixels that are not ignored, their trainer's over all.
        "unce": lambda x, how: losses.unbiased_cross_entropy(
            x, current, num_old=num_old, over="valid", reduction=how
        ),
        "unce_mem": lambda x, how: losses.replayed_cross_entropy(
            x, memory, num_old=num_old, void="background", reduction=how
        ),
        "unkd": lambda x, how: losses.unbiased_distillation(x, old, reduction=how),
    }
    for name, term in terms.items():
        for how in ("mean", "none", "sum"):
            x = arrays["logits"].clone().requires_grad_()
            value = term(x, how)
            value.sum().backward()
            tally.add(f"{name}, {how}, value", value, arrays[f"{name}_{how}/out"].numpy())
            tally.add(f"{name}, {how}, gradient", x.grad, arrays[f"{name}_{how}/grad_logits"].numpy())
    return tally.rows()
