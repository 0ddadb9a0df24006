"""Compares UCD's contrastive loss and training runs with the numbers of the authors' code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.golden_checks import Row, Tally
from benchmarks.golden_replay import Comparison
from benchmarks.golden_runs import RunReplay
from everseg.losses import contrast as ucd
from everseg.methods.ucd import UCD
from everseg.scenarios.steps import Step


def replay_ucd(folder: Path, stem: str) -> dict[str, Comparison]:
    """Train one `train_ucd*.npz` again, in the authors' form."""
    return _Replay(folder, stem, lambda options: UCD(form="authors")).run()


class _Replay(RunReplay):
    def logged(self, terms: Mapping[str, float], method: Any, step: Step) -> dict[str, float]:
        """The file's class loss holds the weighted contrast; `contrastive` is without its weight."""
        weighted = terms.get("contrast", 0.0)
        found = super().logged(terms, method, step)
        return found | {"loss": terms["ce"] + weighted, "contrastive": weighted / method.contrast_weight}


def check_ucd(folder: Path) -> list[Row]:
    """Labels, weights, losses and gradients of every `ucd_losses_*.npz`, in the authors' forms."""
    return [row for path in sorted(folder.glob("ucd_losses_*.npz")) for row in _check_file(path)]


def _check_file(path: Path) -> list[Row]:
    arrays, tally = dict(np.load(path)), Tally(path.name)
    num_old = int(arrays["K"])
    features, old, logits = (
        torch.from_numpy(arrays[name]).double() for name in ("feat", "old_feat", "old_small_logits")
    )
    label = ucd.contrast_labels(torch.from_numpy(arrays["labels"]), features.shape[2:], interpolated=True)
    tally.add("labels", label, arrays["labels_down_before_mix"], 0.0)
    ids = ucd.mixed_labels(label, logits).flatten()
    anchor, taught = ids > 0, (ids > 0) & (label.flatten() == 0)
    belief = logits.movedim(1, 3).flatten(0, 2).softmax(dim=1)
    student, teacher = ucd.normalised_pixels(features), ucd.normalised_pixels(old)
    other_ids = torch.cat([ids[anchor], ids[taught]])
    joint = ucd.same_class(
        belief[anchor], torch.cat([belief[anchor], belief[taught]]), ids[anchor], other_ids, num_old
    )
    for quantity, ours in (
        ("anchor_labels", ids[anchor]),
        ("contrast_labels", other_ids),
        ("anchors", student[anchor]),
        ("contrast", torch.cat([student[anchor], teacher[taught]])),
        ("joint", joint),
    ):
        tally.add(quantity, ours, arrays[quantity])
    for name in arrays:
        if not name.endswith("/loss"):
            continue
        temperature, weighing, _ = name.split("/")
        x = features.clone().requires_grad_()
        value = ucd.contrast(
            x, old, label, logits, first_new=None, temperature=float(temperature[1:]),
            certainty=weighing == "uncertainty", shifted=True,
        )  # fmt: skip
        value.backward()
        gradient = arrays[name.replace("/loss", "/grad")]
        tally.add(f"{weighing}, value", value, arrays[name])
        tally.add(f"{weighing}, gradient", x.grad if gradient.ndim else x.grad.norm(), gradient)
    return tally.rows()
