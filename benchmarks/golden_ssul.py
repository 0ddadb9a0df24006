"""Compares SSUL, with and without memory, with the numbers of the authors' code: functions and training runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.golden_checks import Row, Tally
from benchmarks.golden_memory import MEMORY_THRESHOLD, chosen_records, ssul_record
from benchmarks.golden_replay import BRANCH, Comparison
from benchmarks.golden_tiny import WIDTH, TinyRun, set_weights, tiny_network
from everseg.config.fields import TrainConfig
from everseg.engine.optim import check_param_groups, learning_rate, make_optimizer, set_learning_rate
from everseg.engine.step import train_batch
from everseg.labels import IGNORED
from everseg.losses import Term, binary_cross_entropy, pixelwise_losses, upsample
from everseg.losses.reading import read_ids
from everseg.methods.base import Method, StepContext
from everseg.methods.ssul import SSUL
from everseg.methods.switches import begin, finish
from everseg.methods.unknown import joined
from everseg.models.model import SegmentationModel, frozen_copy
from everseg.types import Batch, SegOutput

FIRST = 0.01
"""Learning rate of the first step's head, whatever the command says; the body has a tenth of it."""
FLOOR = 1e-6
"""Least rate of their poly schedule."""
_LAYERS = {"0": "conv", "1": "norm", "3": "classifier"}


def rename(key: str) -> str:
    """Their name of a tensor of the heads -> ours: head 0 is the unknown, 1 the background, 2 + k of task k."""
    _, head, layer, leaf = key.split(".")
    number = int(head)
    part = f"others.{('unknown', 'background')[number]}" if number < 2 else f"classifiers.{number - 2}"
    return f"heads.{BRANCH}.{part}.{_LAYERS[layer]}.{leaf}"


def replay_ssul(folder: Path, stem: str) -> dict[str, Comparison]:
    """Train one `train_ssul*.npz` again, in the authors' form.

    Returns:
        Quantity -> values compared and largest relative difference: of scalars to each value, of tensors to the
        largest value of the tensor; of labels, confusion counts and the memory the share that differs.
    """
    run = TinyRun(folder, stem)
    schedule = run.meta["policy"]
    warm = {"warmup_share": 0.1, "warmup_from": 0.001} if schedule == "warm_poly" else {"min_lr": FLOOR}
    train = TrainConfig(lr=FIRST, lr_next=run.meta["lr"], **warm)
    method = SSUL(threshold=run.meta["thresh"], head_width=WIDTH, memory_offset="official")
    model = tiny_network()
    for index in range(len(run.groups)):
        if f"step{index}/loss" in run.golden:
            _replay_step(run, method, model, index, train)
    return run.found


def _replay_step(
    run: TinyRun, method: SSUL, model: SegmentationModel, index: int, train: TrainConfig
) -> None:
    at, step = f"step{index}/", run.step(index)
    teacher = frozen_copy(model) if index else None
    method.prepare_model(model, step)
    model.double()
    if index == 0:
        set_weights(model, run.stored(f"{at}start/"), rename)
    else:
        run.compare_weights("weights at the start", model, f"{at}start/", rename)
    groups = method.param_groups(model, step)
    check_param_groups(model, groups)
    base = train.lr if index == 0 else train.lr_next
    assert base is not None
    optimizer = make_optimizer(groups, train, lr=base)
    ctx = StepContext(step=step, model=model, module=model, teacher=teacher)
    begin(method, ctx)
    model.train()
    total = len(run.golden[f"{at}loss"])
    for i in range(total):
        batch = _batch(run, index, i)
        set_learning_rate(optimizer, learning_rate(train, base, i, total))
        _compare_rates(run, optimizer, index, run.golden[f"{at}lr"][i])
        with torch.no_grad():
            label = method.targets(batch, len(run.seen(index)), ctx.teach(batch))
        run.same("targets", label, run.golden[f"{at}targets"][i])
        outputs: list[SegOutput] = []
        watch = model.register_forward_hook(lambda _, given, found: outputs.append(found[BRANCH]))  # noqa: B023
        logged = train_batch(method, batch, ctx, optimizer)
        watch.remove()
        run.compare("loss", logged["bce"], run.golden[f"{at}loss"][i])
        _compare_logits(run, joined(outputs[0]), at, i)
        run.compare_gradients(model, at, i, rename)
    finish(method, ctx)
    run.compare_weights("final weights", model, f"{at}final/", rename)
    _compare_confusion(run, model, index)
    compare_memory(run, method, ctx)


def _batch(run: TinyRun, index: int, i: int) -> Batch:
    """The batch of an iteration: the step's images, some of them overwritten by images of the memory."""
    at = f"step{index}/"
    which = run.golden[f"{at}train_idx"][i].copy()
    label = run.labels(which, run.groups[index])
    memory = None
    saliency = torch.from_numpy(run.golden["data/saliency"])
    own = Batch(run.images[which], label, BRANCH, extra={"saliency": saliency[which]})
    run.same(
        "labels",
        SSUL(unknown="salient").targets(own, len(run.seen(index)), None),
        run.golden[f"{at}train_labels"][i],
    )
    if f"{at}mem_idx" in run.golden:
        stored, places = run.golden[f"{at}mem_idx"][i], run.golden[f"{at}rand_index"][i]
        labelled = run.labels(stored, run.seen(index))
        run.same("labels of the memory", labelled, run.golden[f"{at}mem_labels"][i])
        which[places], label[places] = stored[places], labelled[places]
        memory = torch.zeros(len(which), dtype=torch.bool)
        memory[places] = True
    return Batch(run.images[which], label, BRANCH, extra={"saliency": saliency[which]}, memory=memory)


def _compare_rates(run: TinyRun, optimizer: torch.optim.Optimizer, index: int, theirs: np.ndarray) -> None:
    """Compare the groups' rates; theirs: body, classifier; later the newest head, unknown, background."""
    slow, rest = (group["lr"] for group in optimizer.param_groups)
    run.compare("learning rate", [slow, rest] if index == 0 else [rest, rest, slow], theirs)


def _compare_logits(run: TinyRun, logits: Tensor, at: str, i: int) -> None:
    full = upsample(logits.detach(), run.raw.shape[1:])
    run.compare("mean of the logits", full.abs().mean(), run.golden[f"{at}logits_absmean"][i])
    if i == 0:
        run.whole("logits", full[:, :, ::4, ::4], run.golden[f"{at}logits0"])


@torch.no_grad()
def compare_memory(run: TinyRun, method: Method, ctx: StepContext) -> None:
    """Compare which images a finished step keeps, and the records of them; from the second step on the model is asked.

    The memory before is theirs, so that one wrong choice does not hide the others.
    """
    index, step = ctx.step.index, f"step_{ctx.step.index + 1}"
    stored = json.loads(str(run.golden["memory_json"])) if "memory_json" in run.golden else {}
    if step not in stored:
        return
    size, names = int(run.meta["mem"]), [str(name) for name in run.golden["data/names"]]
    own = set(run.groups[index]) - {0}
    earlier = set(run.seen(index)) - own
    pool = stored[f"step_{index}"]["memory_candidates"][:size] if index else []
    ctx.module.eval()
    for number, line in enumerate(run.golden["data/train_cls"]):
        shown = {int(c) + 1 for c in str(line).split()[1:]}  # they count without the background
        if not shown & own or not (run.meta.get("overlap", True) or shown <= own | earlier):
            continue
        which = np.array([number])
        extra = {k: torch.from_numpy(run.golden[f"data/{k}"][which]).long() for k in method.needs_extra}
        batch = Batch(run.images[which], run.labels(which, run.groups[index]), BRANCH, extra=extra)
        label = method.memory_labels(batch, ctx, MEMORY_THRESHOLD["ssul"]) if index else batch.label
        outputs = torch.where(label == IGNORED, IGNORED, label + 1)
        pool.append(ssul_record(names[number], outputs[0].numpy()))
    kept = chosen_records(pool, range(1, len(run.seen(index))), size, 1)
    theirs = stored[step]["memory_candidates"][:size]
    run.found.setdefault("memory", Comparison())
    same = kept == theirs and sorted(r[0] for r in kept) == stored[step]["memory_list"]
    run.found["memory"].count += len(theirs)
    run.found["memory"].largest = max(run.found["memory"].largest, 0.0 if same else np.inf)


@torch.no_grad()
def _compare_confusion(run: TinyRun, model: SegmentationModel, index: int) -> None:
    model.eval()

    def predict(image: Tensor, number: int) -> Tensor:
        return read_ids(model(image, (BRANCH,))[BRANCH], model.readout, image.shape[2:])

    for name, current in (("val_cm", True), ("test_cm", False)):
        if f"step{index}/{name}" in run.golden:
            counts = run.confusion(predict, index, current=current)
            run.same("confusion counts", counts, run.golden[f"step{index}/{name}"][-1])


def check_ssul(folder: Path) -> list[Row]:
    """Loss, schedules and readout of every `ssul_losses_*.npz`."""
    return [row for path in sorted(folder.glob("ssul_losses_*.npz")) for row in _check_file(path)]


def _check_file(path: Path) -> list[Row]:
    arrays, tally = dict(np.load(path)), Tally(path.name)
    logits, labels = (torch.from_numpy(arrays[name]) for name in ("logits", "labels"))
    for at, scale in (("", 1.0), ("big/", 60.0)):
        for reduction in ("mean", "sum", "none"):
            name = f"{at}bce_{reduction}"
            if f"{name}/out" in arrays:
                x = (logits * scale).requires_grad_()
                value = binary_cross_entropy(x, labels, over="valid", reduction=reduction)
                value.sum().backward()
                tally.add(f"BCE, {reduction}", value, arrays[f"{name}/out"])
                tally.add("BCE, gradient", x.grad, arrays[f"{name}/grad_logits"])
        if f"{at}bce_mean/out" in arrays:
            x = (logits * scale).requires_grad_()
            banded = pixelwise_losses({"bce": Term(binary_cross_entropy, over="valid")}, x, labels, band=2)[
                "bce"
            ]
            banded.backward()
            tally.add("BCE in bands", banded, arrays[f"{at}bce_mean/out"])
            tally.add("BCE in bands, gradient", x.grad, arrays[f"{at}bce_mean/grad_logits"])
    total = len(arrays["lr_poly"])
    for name, more in (
        ("lr_poly", {"min_lr": FLOOR}),
        ("lr_warm_poly", {"warmup_share": 0.1, "warmup_from": 0.001}),
    ):
        train = TrainConfig(**more)
        optimizer = make_optimizer([{"params": [torch.nn.Parameter(torch.ones(1))]}], train, lr=0.01)
        rates = []
        for i in range(total):
            set_learning_rate(optimizer, learning_rate(train, 0.01, i, total))
            rates.append(optimizer.param_groups[0]["lr"])
        tally.add(name, np.array(rates), arrays[name])
    given = torch.from_numpy(arrays["merge/logits"])
    output = SegOutput(given[:, 1:], {}, {"unknown": given[:, :1]})
    ids = read_ids(output, SSUL().readout, given.shape[2:])
    tally.add("readout", ids, arrays["merge/pred"], 0.0)
    return tally.rows()
