"""Compares losses and training runs of REMINDER's original code with everseg's, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.golden_checks import Row, Tally
from benchmarks.golden_plop import POD_FACTORS, inputs, plop_options, pod, total
from benchmarks.golden_replay import Comparison
from benchmarks.golden_runs import RunReplay
from everseg import losses
from everseg.losses import Term, pixelwise_losses
from everseg.methods.base import Method
from everseg.methods.reminder import REMINDER

WEIGHT = 0.5
"""Of the class-similarity-weighted term, in the published runs and in the files of functions."""
OPTIONS = (
    "pod_weight",
    "pod_logits_weight",
    "pod_schedule",
    "threshold",
    "adaptive_factor",
    "init_background",
)
"""Hyper-parameters that REMINDER shares with PLOP."""


def replay_reminder(folder: Path, stem: str) -> dict[str, Comparison]:
    """Train the steps of `train_reminder*.npz` again and compare every quantity that the file holds."""
    return RunReplay(folder, stem, reminder_method).run()


def reminder_method(options: Mapping[str, Any]) -> Method:
    """REMINDER with the options of an original run, as its `meta` stores them."""
    shared = {name: value for name, value in plop_options(options).items() if name in OPTIONS}
    return REMINDER(csw_weight=options["csw_kd"], delta=options["delta_csw"], empty="nan", **shared)


def check_reminder(folder: Path) -> list[Row]:
    """Everything in `reminder_losses_*.npz`."""
    return [row for path in sorted(folder.glob("reminder_losses_*.npz")) for row in _check_losses(path)]


def _check_losses(path: Path) -> list[Row]:
    arrays, tally = dict(np.load(path)), Tally(path.name)
    given = inputs(arrays)
    num_old, num_classes = int(arrays["K"]), int(arrays["K"]) + int(arrays["N"])
    raw, teacher = given["labels"], given["old_logits"]
    old_prototypes = torch.from_numpy(arrays["prototypes"]).double()
    thresholds = torch.from_numpy(arrays["thresholds_used"])
    sums, pixels = losses.class_sums(given["feat"], raw, num_classes, first=num_old, align_corners=True)
    prototypes = sums / pixels.clamp(min=1)[:, None]
    tally.add("prototypes of the batch", prototypes, arrays["batch_prototypes"])
    found = losses.pseudo_labels(teacher, raw, num_classes=num_classes, thresholds=thresholds)
    share = losses.accepted_share(found.old, found.accepted, epsilon=0)
    new = (raw >= num_old) & (raw != 255)
    distance = pod(given, POD_FACTORS["voc"], (num_classes / int(arrays["N"])) ** 0.5)
    for delta in sorted({name.split("/")[0] for name in arrays if name.startswith("delta")}):
        similarity = losses.class_similarity(
            prototypes, old_prototypes, delta=float(delta.removeprefix("delta"))
        )
        terms = {
            "ce": Term(losses.cross_entropy, image_weight=share),
            "csw": Term(
                losses.similarity_distillation,
                options={"similarity": similarity},
                weight=WEIGHT,
                mask=new,
                over="valid",
            ),
        }
        x = given["logits"].clone().requires_grad_()
        values = pixelwise_losses(terms, x, found.label, teacher)
        whole = values["ce"] + values["csw"] + distance
        whole.backward()
        tally.add("class loss", values["ce"], arrays[f"{delta}/loss"])
        tally.add("similarity term", values["csw"], arrays[f"{delta}/csw"])
        tally.add("POD", distance, arrays[f"{delta}/pod_loss"])
        tally.add("total", whole, arrays[f"{delta}/loss_tot"])
        tally.add("adaptive factor", share, arrays[f"{delta}/factor"])
        if f"{delta}/grad_logits" in arrays:
            tally.add("gradient", x.grad, arrays[f"{delta}/grad_logits"])
            tally.add("pseudo-labels", found.label, arrays[f"{delta}/labels_used"], 0.0)
        if f"{delta}/gradnorm_logits" in arrays:
            tally.add("gradient", x.grad.norm(), arrays[f"{delta}/gradnorm_logits"])
    if "no_new_pixels/csw" in arrays:  # the original's nan is 0 here unless the nan is asked for
        none = torch.where(new, 255, raw)
        value = losses.similarity_distillation(
            given["logits"], none, teacher, similarity=similarity, empty=float("nan")
        )
        tally.note("no pixel of a new class", 0.0 if value.isnan() else np.inf)
    if "image0_without_background/loss" in arrays:
        label = raw.clone()
        label[0][label[0] < num_old] = 255
        found = losses.pseudo_labels(teacher, label, num_classes=num_classes, thresholds=thresholds)
        share = losses.accepted_share(found.old, found.accepted, epsilon=0)
        loss = total(
            {"ce": Term(losses.cross_entropy, image_weight=share)}, given["logits"], found.label, teacher
        )
        theirs = arrays["image0_without_background/factor"]
        same = np.array_equal(np.isnan(share.numpy()), np.isnan(theirs)) and bool(loss.isnan())
        tally.note("an image without old pixels", 0.0 if same else np.inf)
        tally.add("adaptive factor", share[~share.isnan()], theirs[~np.isnan(theirs)])
    return tally.rows()
