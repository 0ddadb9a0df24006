"""Compares SDR's losses and training runs with the numbers of the authors' code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.golden_checks import Row, Tally
from benchmarks.golden_replay import Comparison
from benchmarks.golden_runs import RunReplay
from everseg.losses import prototypes as sdr
from everseg.methods.sdr import SDR

NORMS = {
    "max_maskedforclass": "class_max", "max_foreachfeature": "channel_max", "max_overall": "batch_max",
    "L1": "l1", "L2": "l2", "softmax": "softmax",
}  # fmt: skip
SHRINKS = {"squared": "squared", "power3": "cubed", "exponential": "exponential"}


def replay_sdr(folder: Path, stem: str) -> dict[str, Comparison]:
    """Train one `train_sdr*.npz` again, in the authors' form."""
    protocol = "disjoint" if "disjoint" in stem else "overlapped"
    return RunReplay(folder, stem, lambda options: SDR(form="authors"), protocol).run()


def check_sdr(folder: Path) -> list[Row]:
    """Prototypes, losses and gradients of every `sdr_losses_*.npz`, in the authors' forms."""
    return [row for path in sorted(folder.glob("sdr_losses_*.npz")) for row in _check_file(path)]


def _check_file(path: Path) -> list[Row]:
    arrays, tally = dict(np.load(path)), Tally(path.name)
    num_old = int(arrays["K"])
    for case in sorted({name.split("/")[0] for name in arrays if name.endswith("/features")}):
        mine = {
            name.removeprefix(f"{case}/"): value
            for name, value in arrays.items()
            if name.startswith(f"{case}/")
        }
        _check_case(mine, num_old, tally)
    return tally.rows()


def _check_case(arrays: dict[str, np.ndarray], num_old: int, tally: Tally) -> None:
    features = torch.from_numpy(arrays["features"]).double()
    rows = torch.from_numpy(arrays["prototypes"]).double()
    label = sdr.label_at(torch.from_numpy(arrays["labels"]).long(), features.shape[2:])
    tally.add("labels", label, arrays["labels_down"][:, 0], 0.0)
    teacher_ids = torch.from_numpy(arrays["old_logits_s4"]).argmax(dim=1)
    for name in arrays:
        kind, *rest = name.split("/")
        if kind == "running" and rest[-1] == "prototypes":
            _check_running(arrays, "/".join((kind, rest[0])), rest[0], features, label, tally)
        elif kind == "cluster" and rest[-1] in ("attraction", "repulsion"):
            value = lambda x, how=rest[0], term=rest[1]: _cluster(how, term, x, label, rows)  # noqa: E731
            _compare(
                f"{kind} {rest[0]} {rest[1]}",
                value,
                features,
                arrays,
                name,
                name.replace(rest[1], f"grad_{rest[1]}"),
                tally,
            )
        elif kind == "matching" and rest[-1] == "loss":
            hidden = sdr.hidden_label(label, teacher_ids, num_old, labelled=rest[0] == "sequential")
            value = lambda x, how=rest[0], at=hidden: sdr.matching(  # noqa: E731
                x, at, rows, per_pixel=how == "perpixel", scrambled=True
            )
            _compare(f"{kind} {rest[0]}", value, features, arrays, name, name.replace("loss", "grad"), tally)
        elif kind == "sparsity" and rest[-1] == "loss":
            norm, shrink, measure = rest[:3]
            value = lambda x, a=norm, b=shrink, c=measure: sdr.sparsity(  # noqa: E731
                x, label, norm=NORMS[a], shrink=SHRINKS[b], measure=c
            )
            _compare(
                f"{kind} {norm} {shrink} {measure}",
                value,
                features,
                arrays,
                name,
                name.replace("loss", "grad"),
                tally,
            )


def _check_running(
    arrays: dict[str, np.ndarray], at: str, setting: str, features: Tensor, label: Tensor, tally: Tally
) -> None:
    step, overlap, sequential = (int(x) for x in re.findall(r"\d+", setting))
    rows, count = torch.from_numpy(arrays["prototypes"]).double(), torch.from_numpy(arrays["count"])
    sums, number = sdr.class_sums(features, label, len(rows), scrambled=True)
    number = number * sdr.collected(
        number, background=bool(sequential or not (overlap or step)), first_dropped=True
    )
    rows, count = sdr.updated_prototypes(rows, count, sums, number)
    tally.add("running prototypes", rows, arrays[f"{at}/prototypes"])
    tally.add("running counts", count, arrays[f"{at}/count"], 0.0)


def _cluster(how: str, term: str, x: Tensor, label: Tensor, rows: Tensor) -> Tensor:
    options: dict[str, Any] = {"scrambled": True, "background": how != "nobgr"}
    if term == "attraction":
        return sdr.attraction(x, label, rows, normalise=how == "l2", nested=True, **options)
    if how.startswith("orth"):
        return sdr.orthogonality(x, label, rows, largest=how == "orth_max", **options)
    return sdr.repulsion(x, label, len(rows), normalise=how == "l2", **options)


def _compare(
    quantity: str,
    loss: Any,
    features: Tensor,
    arrays: dict[str, np.ndarray],
    name: str,
    gradient: str,
    tally: Tally,
) -> None:
    """Value and gradient; gradients are stored whole or by their norm."""
    x = features.clone().requires_grad_()
    value = loss(x)
    tally.add(f"{quantity}, value", value, arrays[name])
    if gradient in arrays:
        value.backward()
        ours = x.grad if arrays[gradient].ndim else x.grad.norm()
        tally.add(f"{quantity}, gradient", ours, arrays[gradient])
