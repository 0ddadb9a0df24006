"""Compares BARM with the numbers of the authors' code: its head and whole training runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.golden_checks import Row, Tally
from benchmarks.golden_replay import BRANCH, Comparison
from benchmarks.golden_tiny import WIDTH, TinyRun, as_theirs, set_weights, tiny_network
from everseg.config.fields import TrainConfig
from everseg.engine.optim import check_param_groups, learning_rate, make_optimizer, set_learning_rate
from everseg.engine.step import train_batch
from everseg.losses import adapted_logits
from everseg.losses.reading import read_ids
from everseg.losses.readout import with_residual
from everseg.methods.barm import BARM, RESIDUAL
from everseg.methods.base import StepContext
from everseg.methods.switches import begin, finish
from everseg.models.heads import Head, last_layer
from everseg.models.model import SegmentationModel, frozen_copy
from everseg.types import Batch

FIRST = 0.01
"""Learning rate of the first step, whatever the command says; the body has a tenth of it."""
DECODER, OLD = 1e-3, 1e-4
"""Rates of later steps that the command does not change: ASPP's; the body's, the old heads' and ears'."""
FLOOR = 1e-6
"""Least rate of their poly schedule."""
TERMS = {"std": "bce", "tri": "triplet", "tunnel": "features", "gkd": "kd", "bga_ce": "residual"}
"""Their name of a term -> ours. Ours have their weights."""
_LAYERS = {"0": "conv", "1": "norm"}
_ASPP = "classifier.aspp.convs.0.0.weight"
"""A tensor that every iteration changes."""


def rename(key: str) -> str:
    """Their name of a tensor of the heads -> ours: `head_pre` and the ears are the trunks of ours."""
    part, *rest = key.split(".")
    number = 0 if part == "head_pre" else int(rest.pop(0)) + (part == "ear")
    layer = "classifier" if part == "head" else _LAYERS[rest.pop(0)]
    return f"heads.{BRANCH}.classifiers.{number}.{layer}.{rest[0]}"


def is_drawn(key: str, index: int) -> bool:
    """Whether a tensor at the start of a later step was drawn for the file: the new head, the statistics of its ear."""
    short = key.removeprefix("classifier.")
    return short.startswith(f"head.{index}.") or short.startswith(f"ear.{index - 1}.1.running")


def method_of(lr: float, index: int, **options: float) -> BARM:
    """The authors' form in one step; its factors give their rates."""
    rates = {} if index == 0 else {"decoder_rate": DECODER / lr, "old_rate": OLD / lr}
    return BARM(head_width=WIDTH, ear_statistics="fresh", empty_background="nan", **rates, **options)


def replay_barm(folder: Path, stem: str) -> dict[str, Comparison]:
    """Train one `train_barm*.npz` again.

    Returns:
        Quantity -> values compared and largest relative difference: of scalars to each value, of tensors to the
        largest value of the tensor; of labels and confusion counts the share that differs.
    """
    run = TinyRun(folder, stem)
    train = TrainConfig(lr=FIRST, lr_next=run.meta["lr"], min_lr=FLOOR)
    model = tiny_network()
    for index in range(len(run.groups)):
        if f"step{index}/order" in run.golden:
            _replay_step(run, model, index, train)
    return run.found


def _replay_step(run: TinyRun, model: SegmentationModel, index: int, train: TrainConfig) -> None:
    at, step = f"step{index}/", run.step(index)
    base = train.lr if index == 0 else train.lr_next
    assert base is not None
    method = method_of(base, index, threshold=run.meta["thresh"])
    teacher = frozen_copy(model) if index else None
    method.prepare_model(model, step)
    model.double()
    start = run.stored(f"{at}start/")
    if index:
        set_weights(model, {key: v for key, v in start.items() if is_drawn(key, index)}, rename)
        run.compare_weights("weights at the start", model, f"{at}start/", rename)
    else:
        set_weights(model, start, rename)
    groups = method.param_groups(model, step)
    check_param_groups(model, groups)
    optimizer = make_optimizer(groups, train, lr=base)
    ctx = StepContext(step=step, model=model, module=model, teacher=teacher)
    begin(method, ctx)
    model.train()
    total = len(run.golden[f"{at}order"])
    history = []
    for i in range(total):
        batch = _batch(run, index, i)
        set_learning_rate(optimizer, learning_rate(train, base, i, total))
        _compare_rates(run, [group["lr"] for group in optimizer.param_groups], run.golden[f"{at}lr"][i])
        with torch.no_grad():
            label = method.targets(batch, len(run.seen(index)), ctx.teach(batch))
        run.same("targets", label, run.golden[f"{at}targets"][i])
        logged = train_batch(method, batch, ctx, optimizer)
        _compare_terms(run, method, logged, at, i)
        run.compare_gradients(model, at, i, rename)
        if index == 0:
            history.append({key: value.clone() for key, value in model.state_dict().items()})
    finish(method, ctx)
    if index == 0:
        model.load_state_dict(_nearest(run, history, f"{at}final/"))
    run.compare_weights("final weights", model, f"{at}final/", rename)
    if index == 0 and f"step1/start/{_ASPP}" in run.golden:
        model.load_state_dict(_nearest(run, history, "step1/start/"))
    _compare_confusion(run, model, index)


def _nearest(run: TinyRun, history: list[dict[str, Tensor]], prefix: str) -> dict[str, Tensor]:
    """Find the weights of the first step that the file holds under a prefix.

    The authors go on from the epoch that was best on their validation images, which need not be the last one.
    """
    theirs = run.golden[f"{prefix}{_ASPP}"]

    def distance(state: dict[str, Tensor]) -> float:
        ours = as_theirs(state, _ASPP, rename)
        assert ours is not None
        return float(np.abs(ours.numpy() - theirs).max())

    return min(history, key=distance)


def _batch(run: TinyRun, index: int, i: int) -> Batch:
    at = f"step{index}/"
    which = run.golden[f"{at}order"][i]
    label = run.labels(which, run.groups[index])
    run.same("labels", label, run.golden[f"{at}labels"][i])
    return Batch(run.images[which], label, BRANCH)


def _compare_rates(run: TinyRun, ours: list[float], theirs: np.ndarray) -> None:
    """Compare the groups' rates; theirs: body, rest; later newest head and ear, ASPP, and four old ones."""
    if len(ours) == 3:
        old, decoder, new = ours
        ours = [new, new, decoder, *[old] * (len(theirs) - 3)]
    run.compare("learning rate", ours, theirs)


def _compare_terms(run: TinyRun, method: BARM, logged: dict[str, Tensor], at: str, i: int) -> None:
    """Compare every term without its weight, and their sum."""
    weights = {
        "triplet": method.triplet_weight,
        "features": method.feature_weight,
        "kd": method.kd_weight,
        "residual": method.residual_weight,
    }
    run.compare("total", sum(float(value) for value in logged.values()), run.golden[f"{at}term/total"][i])
    for name, ours in TERMS.items():
        if f"{at}term/{name}" not in run.golden:
            continue
        theirs = run.golden[f"{at}term/{name}"][i]
        value = float(logged[ours]) / weights.get(ours, 1.0)
        if name == "tunnel" and i == 0:
            # Teacher and student are the same but for rounding.
            run.compare("tunnel at the start (absolute)", value, theirs, 1.0)
        else:
            run.compare(name, value, theirs)


@torch.no_grad()
def _compare_confusion(run: TinyRun, model: SegmentationModel, index: int) -> None:
    model.eval()

    def predict(image: Tensor, number: int) -> Tensor:
        return read_ids(model(image, (BRANCH,))[BRANCH], model.readout, image.shape[2:])

    counts = run.confusion(predict, index, current=index == 0)
    run.same("confusion counts", counts, run.golden[f"step{index}/cm"])


def check_barm(folder: Path) -> list[Row]:
    """The head of every `barm_losses_*.npz`: both rules of the background, with gradients."""
    return [row for path in sorted(folder.glob("barm_losses_*.npz")) for row in _check_file(path)]


def _check_file(path: Path) -> list[Row]:
    arrays, tally = dict(np.load(path)), Tally(path.name)
    state = {k.removeprefix("state/"): v for k, v in arrays.items() if k.startswith("state/")}
    rows = [len(state[key]) for key in sorted(state) if key.startswith("head.") and key.endswith(".bias")]
    model = tiny_network()
    for k, number in enumerate(rows):
        one = Head(hidden=WIDTH, beside={RESIDUAL: 1} if k else {})
        model.grow({BRANCH: number - bool(k)}, heads={BRANCH: one})
    model.double().eval()
    set_weights(model, state, rename)
    features, cotangent = (torch.from_numpy(arrays[name]) for name in ("features", "cot"))
    head = model.head(BRANCH)
    for rule in ("train", "eval"):
        model.zero_grad()
        model.requires_grad_(True)
        found = head(model.decoder({"encoder": features}))
        # Their network cuts the background's gradient alone; old classes are cut by their trainer.
        if rule == "eval":
            logits = with_residual(found.logits, found.auxiliary[RESIDUAL])
        else:
            logits = adapted_logits(found.logits, found.auxiliary[RESIDUAL], num_old=1)
        (logits * cotangent).sum().backward()
        tally.add(f"logits, {rule}", logits, arrays[f"{rule}/logits"])
        at = 0
        for k, number in enumerate(rows):
            # Their head gives the background or the residual first, then its classes.
            own = [found.auxiliary[RESIDUAL][:, k - 1 : k]] if k else []
            classes = number - bool(k)
            own.append(found.logits[:, at : at + classes])
            at += classes
            tally.add(f"heads, {rule}", torch.cat(own, dim=1), arrays[f"{rule}/head{k}"])
            gradient = last_layer(head.parts[str(k)]).bias.grad
            tally.add(f"gradients, {rule}", gradient, arrays[f"{rule}/grad_head{k}_bias"])
    return tally.rows()
