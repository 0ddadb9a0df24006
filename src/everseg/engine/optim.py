"""The optimiser, its learning rate, and its state under parameter names."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from everseg.config.fields import TrainConfig
from everseg.display import counted
from everseg.errors import CheckpointError, some

SHAPED = frozenset({"momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg"})
"""Entries of torch's optimisers that have the shape of their weight."""


def make_optimizer(groups: list[dict[str, Any]], train: TrainConfig, *, lr: float) -> torch.optim.Optimizer:
    """Build the optimiser: SGD with momentum and dampening 0, or Adam or AdamW with eps 1e-8.

    Weight decay is the same on every weight, unless a group has its own "weight_decay" (see
    `engine.param_groups`). SGD and Adam add it to the gradient: an L2 penalty. AdamW multiplies the weight by
    1 - lr * weight_decay before its update (Loshchilov and Hutter, ICLR 2019, as PyTorch has it). The update is torch's
    fused one, which can skip itself on the device (see `engine.finite.Guard`). Momentum starts at 0, which gives the
    same updates as starting with the first gradient.

    Args:
        groups: a method's `param_groups`; "lr_scale" multiplies the learning rate of the group.
        train: kind of optimiser, its constants, weight decay, and the least learning rate of a group.
        lr: learning rate of iteration 0.

    Raises:
        ValueError: no weight to train.
    """
    scaled = []
    for group in groups:
        scale = float(group.get("lr_scale", 1.0))
        # Only where it is set: the documents of other optimisers' states stay as they were.
        floor = {"min_lr": train.min_lr} if train.min_lr else {}
        scaled.append(
            {**group, **floor, "params": list(group["params"]), "lr_scale": scale, "lr": lr * scale}
        )
    if not any(group["params"] for group in scaled):
        raise ValueError("the method left no weight to train in this step")
    if train.optimizer != "sgd":
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[train.optimizer]
        return kind(scaled, lr=lr, betas=train.betas, weight_decay=train.weight_decay, fused=True)
    optimizer = torch.optim.SGD(
        scaled,
        lr=lr,
        momentum=train.momentum,
        nesterov=train.nesterov,
        dampening=0,
        weight_decay=train.weight_decay,
        fused=True,
    )
    # Torch's fused update leaves the first buffers undefined where it skips, and needs all of them at once. Hence they
    # are made here.
    if train.momentum:
        for group in scaled:
            for weight in group["params"]:
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def check_param_groups(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Check that every trainable weight of the model stands in exactly one group, and nothing else does.

    Raises:
        ValueError: names of the weights left out, given twice, frozen, or not of this model.
    """
    # By identity throughout: tensors compare by value and cannot be told apart by it.
    names = {id(p): name for name, p in model.named_parameters()}
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    groups = [{**group, "params": list(group["params"])} for group in groups]
    given = Counter(id(p) for group in groups for p in group["params"])
    shapes = {id(p): f"(unnamed, shape {tuple(p.shape)})" for group in groups for p in group["params"]}
    faults = {
        "in no group": [names[i] for i in names if i in trainable and i not in given],
        "in several groups": [names.get(i, shapes[i]) for i, count in given.items() if count > 1],
        "frozen, yet in a group": [names[i] for i in given if i in names and i not in trainable],
        "not weights of this model": [shapes[i] for i in given if i not in names],
    }
    problems = [f"{fault}: {some(found, 8)}" for fault, found in faults.items() if found]
    if problems:
        raise ValueError("param_groups must hold every trainable weight exactly once; " + "; ".join(problems))


def learning_rate(
    train: TrainConfig, base: float, iteration: int, total: int, epoch_length: int = 1
) -> float:
    """Compute the learning rate of one iteration of a step.

    Args:
        train: schedule, warm-up and their constants.
        base: learning rate that the schedule starts from.
        iteration: number of the iteration in the step, from 0.
        total: iterations of the step.
        epoch_length: iterations of an epoch, for `schedule_by` "epoch".

    Returns:
        poly: base * (1 - iteration / total) ** power, 0 from `total` on (MiB's code gives complex numbers there);
        by epoch the same of whole epochs (MDIL), the last one counting as whole if the step ends within it;
        step: base * step_factor ** (iteration // step_size), by epoch the same of whole epochs; constant: base.
        During the warm-up this value times `warmup_factor`.
    """
    lr = base * _schedule(train, iteration, total, epoch_length)
    factor = warmup_factor(train, iteration, total, epoch_length)
    return lr if factor == 1 else lr * factor


def _schedule(train: TrainConfig, iteration: int, total: int, epoch_length: int) -> float:
    if train.schedule_by == "epoch":
        # In whole epochs from here on, the total rounded up.
        iteration, total = iteration // epoch_length, -(-total // epoch_length)
    if train.schedule == "poly":
        return max(0.0, 1 - iteration / total) ** train.power
    if train.schedule == "step":
        return train.step_factor ** (iteration // train.step_size)
    return 1.0


def warmup_length(train: TrainConfig, total: int, epoch_length: int) -> float:
    """Count the iterations of a step's warm-up; as a share of the step they need not be whole."""
    if train.warmup_share:
        return train.warmup_share * total
    return train.warmup * (epoch_length if train.schedule_by == "epoch" else 1)


def warmup_factor(train: TrainConfig, iteration: int, total: int, epoch_length: int = 1) -> float:
    """Compute the warm-up's factor on the learning rate of one iteration.

    It rises with every iteration, also where the schedule falls by epoch. It multiplies the schedule, which begins with
    the step and not after the warm-up, as in the published configurations of SegFormer.

    Returns:
        from + (1 - from) * (iteration / length) ** power before iteration `length`, 1 from there on.
    """
    length = warmup_length(train, total, epoch_length)
    if iteration >= length:
        return 1.0
    return train.warmup_from + (1 - train.warmup_from) * (iteration / length) ** train.warmup_power


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every group the learning rate, times the group's "lr_scale"; at least its "min_lr"."""
    for group in optimizer.param_groups:
        group["lr"] = max(value * group.get("lr_scale", 1.0), group.get("min_lr", 0.0))


def optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an optimiser's whole state, keyed by parameter name.

    Returns:
        Tensors under "<entry>/<parameter name>" (not copied), and a JSON document with everything else.

    Raises:
        ValueError: the optimiser holds a weight that is not the model's.
    """
    names = _names_by_position(optimizer, model)
    packed = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for position, entries in packed["state"].items():
        name = names[position]
        scalars[name] = {key: value for key, value in entries.items() if not isinstance(value, Tensor)}
        tensors |= {f"{key}/{name}": value for key, value in entries.items() if isinstance(value, Tensor)}
    groups = [
        {key: _plain(value) for key, value in group.items() if key != "params"}
        | {"params": [names[position] for position in group["params"]]}
        for group in packed["param_groups"]
    ]
    return tensors, {"class": _class_name(optimizer), "groups": groups, "scalars": scalars}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    document: Mapping[str, Any],
) -> None:
    """Restore what `optimizer_state` returned, into an optimiser built for the same step.

    Raises:
        CheckpointError: another optimiser, other weights, or other shapes; the optimiser is left unchanged.
    """
    names = _names_by_position(optimizer, model)
    here = [[names[i] for i in group["params"]] for group in optimizer.state_dict()["param_groups"]]
    saved = [group["params"] for group in document["groups"]]
    _check_fit(optimizer, model, tensors, document, here, saved)
    _check_options(document["groups"], optimizer.state_dict()["param_groups"])
    positions = {name: position for position, name in names.items()}
    weights = dict(model.named_parameters())
    state: dict[int, dict[str, Any]] = {
        positions[name]: dict(entries) for name, entries in document["scalars"].items()
    }
    for key, value in tensors.items():
        entry, _, name = key.partition("/")
        # Fused updates walk weight and state in the order of memory, so the state needs its weight's layout.
        if entry in SHAPED:
            value = torch.empty_like(weights[name], dtype=value.dtype).copy_(value)
        state.setdefault(positions[name], {})[entry] = value.clone()
    current = optimizer.state_dict()["param_groups"]
    # Options come from the file, parameters from this optimiser. JSON has no tuples: Adam's betas become one again.
    groups = []
    for old, group in zip(document["groups"], current, strict=True):
        options = {key: tuple(v) if isinstance(group.get(key), tuple) else v for key, v in old.items()}
        groups.append({**group, **options, "params": group["params"]})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _check_fit(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    document: Mapping[str, Any],
    here: list[list[str]],
    saved: list[list[str]],
) -> None:
    if document["class"] != _class_name(optimizer):
        raise CheckpointError(
            f"the saved state of the optimiser is of {document['class']}, and this run uses {_class_name(optimizer)}"
        )
    if saved != here:
        known, wanted = {n for group in saved for n in group}, {n for group in here for n in group}
        parts = [
            f"{label}: {some(sorted(found), 8)}"
            for label, found in (("only in the file", known - wanted), ("only in the model", wanted - known))
            if found
        ]
        raise CheckpointError(
            "the saved state of the optimiser belongs to other weights or groups of them"
            + "".join(f"; {part}" for part in parts)
        )
    shapes = {name: p.shape for name, p in model.named_parameters()}
    wrong = []
    for key, value in tensors.items():
        name = key.partition("/")[2]
        if name not in shapes or (key.partition("/")[0] in SHAPED and value.shape != shapes[name]):
            wrong.append(key)
    if wrong:
        raise CheckpointError(f"the saved state of the optimiser does not fit the model: {some(wrong, 8)}")


_HOW = ("foreach", "fused")
"""Options that say how to compute, not what; they depend on the machine."""


def _check_options(saved: list[dict[str, Any]], here: list[dict[str, Any]]) -> None:
    """See that rates and decays are the kinds of values that this optimiser computes with."""
    wrong = {
        key
        for old, group in zip(saved, here, strict=True)
        for key, value in old.items()
        if key in group
        and key != "params"
        and not (key in _HOW and (value is None or isinstance(value, bool)))
        and not _is_alike(value, group[key])
    }
    if wrong:
        raise CheckpointError(
            f"the saved state of the optimiser has unknown options: {some(sorted(wrong), 8)}"
        )


def _is_alike(value: Any, mine: Any) -> bool:
    """Whether a stored option may take the place of this optimiser's own.

    Numbers may differ, as rates do, but not fall below 0 where mine does not. None, true and false must be equal.
    """
    if isinstance(mine, tuple | list):
        alike = isinstance(value, list) and len(value) == len(mine) and all(map(_is_alike, value, mine))
        return alike and all(number is None or number < 1 for number in value)  # Adam's betas
    if mine is None or isinstance(mine, bool):
        return value is mine
    if isinstance(mine, int | float):
        return type(value) in (int, float) and min(mine, 0) <= value < math.inf
    return True


def _names_by_position(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[int, str]:
    """Position in the optimiser's packed state -> parameter name."""
    # An optimiser's `state_dict` numbers the weights through all groups. Files hold names instead of these numbers.
    names = {id(p): name for name, p in model.named_parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = [p for p in params if id(p) not in names]
    if foreign:
        raise ValueError(f"the optimiser holds {counted(len(foreign), 'weight')} of another model")
    return {position: names[id(p)] for position, p in enumerate(params)}


def _class_name(optimizer: Any) -> str:
    """Name of the torch class, also behind Accelerate's wrapper."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return type(inner).__name__


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value
