"""Compares MicroSeg with the numbers of the authors' code: the term of unseen classes, and training runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.golden_checks import Row, Tally
from benchmarks.golden_replay import BRANCH, Comparison
from benchmarks.golden_ssul import compare_memory
from benchmarks.golden_tiny import WIDTH, TinyRun, set_weights, tiny_network
from everseg.config.fields import TrainConfig
from everseg.engine.optim import check_param_groups, learning_rate, make_optimizer, set_learning_rate
from everseg.engine.step import train_batch
from everseg.losses.reading import read_ids
from everseg.losses.regions import cluster_separation
from everseg.methods.base import StepContext
from everseg.methods.microseg import MicroSeg
from everseg.methods.switches import begin, finish
from everseg.models.model import SegmentationModel, frozen_copy
from everseg.types import Batch

FLOOR = 1e-6
SLOW = (5, 6)
"""Columns of their later rates that belong to the background's dense head, which nothing trains then."""


def rename(key: str) -> str:
    """Their name of a tensor of the heads -> ours: head 0 is the unknown, 1 the background, 2 + k of task k."""
    kind, head, layer, leaf = key.split(".")
    number = int(head)
    part = f"others.{('unknown', 'background')[number]}" if number < 2 else f"classifiers.{number - 2}"
    if kind == "proposal_head":
        block, inside = divmod(int(layer), 3)
        place = "of_regions" if layer == "9" else f"blocks.{block}.{('conv', 'norm')[inside]}"
    else:
        place = "classifier" if kind == "head2" else ("conv", "norm")[int(layer)]
    return f"heads.{BRANCH}.{part}.{place}.{leaf}"


def replay_microseg(folder: Path, stem: str) -> dict[str, Comparison]:
    """Train one `train_microseg*.npz` again, in the authors' form.

    Returns:
        Quantity -> values compared and largest relative difference: of scalars to each value, of tensors to the
        largest value of the tensor; of labels and confusion counts the share that differs.
    """
    run = TinyRun(folder, stem)
    warm = (
        {"warmup_share": 0.1, "warmup_from": 0.001}
        if run.meta["policy"] == "warm_poly"
        else {"min_lr": FLOOR}
    )
    train = TrainConfig(lr=run.meta["lr"], **warm)
    slots = 1 + max(int(n) for n in np.unique(run.golden["data/proposals"]) if n < 255)
    clusters = len(run.golden["step0/start/classifier.head2.0.0.bias"])
    method = MicroSeg(
        threshold=run.meta["thresh"],
        head_width=WIDTH,
        memory_offset="official",
        proposals=slots,
        clusters=clusters,
    )
    model = tiny_network()
    for index in range(len(run.groups)):
        if f"step{index}/bce" in run.golden:
            _replay_step(run, method, model, index, train)
    return run.found


def _replay_step(
    run: TinyRun, method: MicroSeg, model: SegmentationModel, index: int, train: TrainConfig
) -> None:
    at, step = f"step{index}/", run.step(index)
    teacher = frozen_copy(model) if index else None
    method.prepare_model(model, step)
    model.double()
    start, newest = run.stored(f"{at}start/"), f".{index + 2}."
    if index:  # only what is new is random
        start = {key: value for key, value in start.items() if "head" in key and newest in key}
    set_weights(model, start, rename)
    run.compare_weights("weights at the start", model, f"{at}start/", rename)
    groups = method.param_groups(model, step)
    check_param_groups(model, groups)
    optimizer = make_optimizer(groups, train, lr=train.lr)
    ctx = StepContext(step=step, model=model, module=model, teacher=teacher)
    begin(method, ctx)
    model.train()
    total = len(run.golden[f"{at}bce"])
    for i in range(total):
        batch = _batch(run, index, i)
        set_learning_rate(optimizer, learning_rate(train, train.lr, i, total))
        rates, theirs = [group["lr"] for group in optimizer.param_groups], run.golden[f"{at}lr"][i]
        if index:
            theirs = np.delete(theirs, SLOW)
            rates = rates * len(theirs)
        run.compare("learning rate", rates, theirs)
        with torch.no_grad():
            label = method.targets(batch, len(run.seen(index)), ctx.teach(batch))
        run.same("targets", label, run.golden[f"{at}targets"][i])
        logged = train_batch(method, batch, ctx, optimizer)
        for name, value in logged.items():
            run.compare(name, value, run.golden[f"{at}{name}"][i])
        run.compare_gradients(model, at, i, rename)
    finish(method, ctx)
    run.compare_weights("final weights", model, f"{at}final/", rename)
    _compare_confusion(run, model, index)
    compare_memory(run, method, ctx)


def _batch(run: TinyRun, index: int, i: int) -> Batch:
    at = f"step{index}/"
    which = run.golden[f"{at}train_idx"][i].copy()
    label, memory = run.labels(which, run.groups[index]), None
    proposals = torch.from_numpy(run.golden["data/proposals"]).long()
    own = Batch(run.images[which], label, BRANCH)
    outputs = MicroSeg().targets(own, len(run.seen(index)), None)
    run.same("labels", outputs, run.golden[f"{at}train_labels"][i])
    if f"{at}mem_idx" in run.golden:
        stored, places = run.golden[f"{at}mem_idx"][i], run.golden[f"{at}rand_index"][i]
        labelled = run.labels(stored, run.seen(index))
        run.same("labels of the memory", labelled, run.golden[f"{at}mem_labels"][i])
        which[places], label[places] = stored[places], labelled[places]
        memory = torch.zeros(len(which), dtype=torch.bool)
        memory[places] = True
    return Batch(run.images[which], label, BRANCH, extra={"proposals": proposals[which]}, memory=memory)


@torch.no_grad()
def _compare_confusion(run: TinyRun, model: SegmentationModel, index: int) -> None:
    model.eval()
    proposals = torch.from_numpy(run.golden["data/proposals"]).long()

    def predict(image: torch.Tensor, number: int) -> torch.Tensor:
        output = model(image, (BRANCH,), extra={"proposals": proposals[number][None]})[BRANCH]
        return read_ids(output, model.readout, image.shape[2:])

    for name, current in (("val_cm", True), ("test_cm", False)):
        if f"step{index}/{name}" in run.golden:
            counts = run.confusion(predict, index, current=current)
            run.same("confusion counts", counts, run.golden[f"step{index}/{name}"][-1])


def check_microseg(folder: Path) -> list[Row]:
    """The term of unseen classes of every `microseg_losses_*.npz`."""
    rows = []
    for path in sorted(folder.glob("microseg_losses_*.npz")):
        arrays, tally = dict(np.load(path)), Tally(path.name)
        maps = torch.from_numpy(arrays["unknown_clusters"]).requires_grad_()
        height, width = maps.shape[2:]
        # Every pixel is a region of its own.
        regions = torch.arange(height * width).view(1, height, width).expand(len(maps), -1, -1)
        value = cluster_separation(maps.flatten(2).transpose(1, 2), regions)
        value.backward()
        tally.add("unseen, value", value, arrays["unseen_aug/out"])
        tally.add("unseen, gradient", maps.grad, arrays["unseen_aug/grad_clusters"])
        rows += tally.rows()
    return rows
