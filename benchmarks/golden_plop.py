"""Compares losses, thresholds and training runs of PLOP's original code with everseg's, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.golden_checks import EXACT, Row, Tally
from benchmarks.golden_replay import Comparison
from benchmarks.golden_runs import RunReplay
from everseg import losses
from everseg.losses import Term, pixelwise_losses
from everseg.losses.thresholds import BINS
from everseg.methods.base import Method
from everseg.methods.plop import PLOP

FEATURES = ("att0", "att1", "att2", "att3", "feat")
"""Maps of the files, in the original's order; the last one is "small", the logits before they are resized."""
POD_FACTORS = {
    "voc": (0.01, 0.0005),
    "ade": (0.001, 1e-5),
    "cityscapes_domain_factors": (1e-4, 1e-3),
    "voc_noschedule": (0.01, 0.0005),
    "voc_nologits": (0.01, None),
    "voc_scales1": (0.01, 0.0005),
    "voc_scales12": (0.01, 0.0005),
    "voc_trim": (0.01, 0.0005),
    "voc_prepro_none": (0.01, 0.0005),
    "spatial": (0.01, None),
    "voc_logits_default_factor": (0.01, 0.01),
}
"""Factor of the feature maps and of the logits (None = not compared) in each stored variant."""
POD_OPTIONS: dict[str, dict[str, Any]] = {
    "voc_scales1": {"scales": (1,)},
    "voc_scales12": {"scales": (1, 2)},
    "voc_trim": {"channels": "trim"},
    "voc_prepro_none": {"square": False},
    "spatial": {"scales": (1,), "pool": "sum", "cells": "both"},
}
ROUNDED = 1.2e-7
"""Limit where a file holds thresholds that the original computed in float32: one unit in the last place."""
UMAX = {"voc_15_1": (16, 17), "voc_15_5": (16, 21), "voc_19_1": (20, 21), "ade_100_50": (101, 151)}
UMAX["ade_100_10"] = (101, 111)
"""Case -> old and all classes."""


def check_plop(folder: Path) -> list[Row]:
    """Everything in `plop_losses_*.npz` and `plop_thresholds_*.npz`."""
    rows = []
    for path in sorted(folder.glob("plop_losses_*.npz")):
        rows += _check_losses(path)
    for path in sorted(folder.glob("plop_thresholds_*.npz")):
        rows += _check_thresholds(path)
    return rows


def inputs(arrays: Mapping[str, np.ndarray], prefix: str = "") -> dict[str, Tensor]:
    """The file's maps and logits in double precision, and its labels."""
    names = ("logits", "old_logits", *(f"{old}{m}" for m in (*FEATURES, "small") for old in ("", "old_")))
    found = {n: torch.from_numpy(arrays[prefix + n]).double() for n in names if prefix + n in arrays}
    return found | {"labels": torch.from_numpy(arrays[f"{prefix}labels"]).long()}


def pod(
    given: Mapping[str, Tensor], factors: tuple[float, float | None], scale: float, **options: Any
) -> Tensor:
    """PLOP's sum over the maps that a file holds: factor times distance times scale, over the number of maps."""
    weights = dict.fromkeys(FEATURES, factors[0]) | {"small": factors[1]}
    found = [
        weight * scale * losses.local_pod(given[name], given[f"old_{name}"], **{"cells": "width"} | options)
        for name, weight in weights.items()
        if weight is not None and name in given
    ]
    return torch.stack(found).sum() / len(found)


def total(terms: Mapping[str, Term], x: Tensor, label: Tensor, teacher: Tensor) -> Tensor:
    """The sum of pixel-wise terms, as training evaluates them."""
    return torch.stack([*pixelwise_losses(terms, x, label, teacher).values()]).sum()


def _check_losses(path: Path) -> list[Row]:
    arrays, tally = dict(np.load(path)), Tally(path.name)
    given = inputs(arrays)
    num_old, num_new = int(arrays["K"]), int(arrays["N"])
    num_classes = num_old + num_new
    scale = (num_classes / num_new) ** 0.5
    _check_certainty(arrays, given, num_classes, tally)
    _check_variants(arrays, given, num_old, num_classes, tally)
    _check_empty_image(arrays, given, num_old, num_classes, tally)
    for name in sorted({n.split("/")[1] for n in arrays if n.startswith("pod/")}):
        if name not in POD_FACTORS:
            tally.note(f"pod/{name}: not described in benchmarks/golden_plop.py", np.inf)
        else:
            factor = 1.0 if name == "voc_noschedule" else scale
            _check_pod(arrays, f"pod/{name}/", given, POD_FACTORS[name], factor, tally, POD_OPTIONS.get(name))
    if "big/pod_loss" in arrays:
        _check_pod(arrays, "big/", inputs(arrays, "big/"), POD_FACTORS["voc"], scale, tally)
    if "domain/pod_loss" in arrays:
        same = {k: v[:, :num_old] if k in ("logits", "small") else v for k, v in given.items()}
        label = torch.where(given["labels"] == 255, 255, given["labels"] % num_old)
        _check_pod(arrays, "domain/", same, (1e-4, 1e-3), 1.0, tally)
        x = same["logits"].clone().requires_grad_()
        loss = losses.cross_entropy(x, label)
        loss.backward()
        tally.add("cross-entropy, value", loss, arrays["domain/loss"])
        tally.add("cross-entropy, gradient", x.grad.norm(), arrays["domain/grad/z_norm"])
    return tally.rows()


def _check_certainty(
    arrays: Mapping[str, np.ndarray], given: Mapping[str, Tensor], num_classes: int, tally: Tally
) -> None:
    """Entropies, their largest values, histograms of a stream of batches and the thresholds from them."""
    u = losses.uncertainty(given["old_logits"], num_classes)
    tally.add("entropy", u * np.log(num_classes), arrays["entropy/u_times_lognow"])
    for case, (old, every) in UMAX.items():
        if f"umax/{case}" in arrays:
            flat = torch.zeros(1, old, 1, 1, dtype=torch.float64)
            tally.add("largest entropy", losses.uncertainty(flat, every).max(), arrays[f"umax/{case}"])
    stream = torch.from_numpy(arrays["median/old_logits"]).double()
    labels = torch.from_numpy(arrays["median/labels"]).long()

    def histogram(measure: str, bins: int | None) -> Tensor:
        counted = (
            losses.certainty_histogram(
                logits, label, num_classes=num_classes, measure=measure, bins=bins, band=3
            )
            for logits, label in zip(stream, labels, strict=True)
        )
        return torch.stack([*counted]).sum(dim=0)

    for name in arrays:
        match name.split("/"):
            case ["median", measure, bins, base, "thresholds"]:
                count = None if bins == "binsNone" else int(bins.removeprefix("bins"))
                found = losses.histogram_thresholds(
                    histogram(measure, count), float(base.removeprefix("base")), measure=measure
                )
                tally.add("thresholds", found, arrays[name])
            case ["median", measure, "max_value"]:
                largest = np.log(num_classes) if measure == "entropy" else 1.0
                tally.add("thresholds: largest value", largest, arrays[name])
    if "own/entropy_hist" in arrays:
        counts = histogram("entropy", BINS["entropy"])
        tally.add("histogram", counts, arrays["own/entropy_hist"], 0.0)
        exact = losses.histogram_thresholds(counts, 0.001, median="exact")
        tally.add("thresholds, exact", exact, arrays["own/exact_histogram_median"])


def _check_variants(
    arrays: Mapping[str, np.ndarray],
    given: Mapping[str, Tensor],
    num_old: int,
    num_classes: int,
    tally: Tally,
) -> None:
    """Labels, factors, values and gradients of every form of the class loss."""
    raw, teacher = given["labels"], given["old_logits"]
    ce, uce = losses.cross_entropy, losses.unbiased_cross_entropy
    fixed = torch.from_numpy(arrays["thresholds_used"])

    def labelled(**options: Any) -> losses.PseudoLabels:
        options = {"thresholds": fixed} | options
        return losses.pseudo_labels(teacher, raw, num_classes=num_classes, band=5, **options)

    entropy = labelled()
    old, kept = raw < num_old, entropy.kept
    mixed = torch.where(kept, entropy.label, raw)
    median = torch.from_numpy(arrays["ce/median/thresholds_used"])
    naive = labelled(measure=None, confidence=True)
    soft = labelled(keep_rejected=True)
    stored = {name.split("/")[1] for name in arrays if name.startswith("ce/") and name.endswith("/loss")}
    shares = {
        name: losses.accepted_share(
            entropy.old,
            entropy.accepted,
            minimum=float(name.removeprefix("factor").removeprefix("_min") or 0),
        )
        for name in stored
        if name == "factor" or name.startswith("factor_min")
    }
    unbiased = {"num_old": num_old}
    variants: dict[str, tuple[Tensor, dict[str, Term], Tensor]] = {
        "plain": (entropy.label, {"ce": Term(ce)}, entropy.label),
        "ce_on_pseudo_unce": (
            mixed,
            {"unce": Term(uce, options=unbiased, mask=~kept), "ce": Term(ce, mask=kept)},
            entropy.label,
        ),
        "naive": (naive.label, {"ce": Term(ce)}, naive.label),
        "confidence": (naive.label, {"ce": Term(ce, mask=naive.confidence)}, naive.label),
        "none": (raw, {"ce": Term(ce)}, raw),
        "none_unce": (raw, {"ce": Term(uce, options=unbiased)}, raw),
        "ce_on_new": (torch.where(old, 255, raw), {"ce": Term(ce)}, raw),
        "soft_uncertain": (
            entropy.label,
            {"ce": Term(ce), "soft": Term(losses.soft_uncertain, mask=old & ~kept)},
            soft.label,
        ),
    }
    for name in stored:
        if name.startswith("threshold_"):
            found = labelled(measure="probability", thresholds=float(name.removeprefix("threshold_")))
            variants[name] = (found.label, {"ce": Term(ce)}, found.label)
    by_median = labelled(measure="probability", thresholds=median)
    variants["median"] = (by_median.label, {"ce": Term(ce)}, by_median.label)
    removed = labelled(agreeing=True)
    variants["removed_errors"] = (removed.label, {"ce": Term(ce)}, removed.label)
    for name, share in shares.items():
        variants[name] = (entropy.label, {"ce": Term(ce, image_weight=share)}, entropy.label)
        if f"ce/{name}/factor" in arrays:
            tally.add("adaptive factor", share, arrays[f"ce/{name}/factor"])
    for name in stored - variants.keys() - {"factor_image0_without_background"}:
        tally.note(f"ce/{name}: not described in benchmarks/golden_plop.py", np.inf)
    for name, (label, terms, shown) in variants.items():
        at = f"ce/{name}/"
        if f"{at}loss" not in arrays:
            continue
        x = given["logits"].clone().requires_grad_()
        loss = total(terms, x, label, teacher)
        loss.backward()
        tally.add("class loss, value", loss, arrays[f"{at}loss"])
        tally.add("pseudo-labels", shown, arrays[f"{at}labels_used"], 0.0)
        if f"{at}grad_logits" in arrays:
            tally.add("class loss, gradient", x.grad, arrays[f"{at}grad_logits"])
        else:
            tally.add("class loss, gradient", x.grad.norm(), arrays[f"{at}gradnorm_logits"])
        if name == "factor" and "total/voc_PLOP/loss_tot" in arrays:
            scale = (num_classes / (num_classes - num_old)) ** 0.5
            whole = loss + pod(given, POD_FACTORS["voc"], scale)
            tally.add("total, value", whole, arrays["total/voc_PLOP/loss_tot"])
            tally.add("class loss, value", loss, arrays["total/voc_PLOP/loss"])


def _check_empty_image(
    arrays: Mapping[str, np.ndarray],
    given: Mapping[str, Tensor],
    num_old: int,
    num_classes: int,
    tally: Tally,
) -> None:
    """The class loss where the first image has no old pixel; the file does not say what replaces them."""
    at = "ce/factor_image0_without_background/"
    if f"{at}loss" not in arrays:
        return
    label = given["labels"].clone()
    label[0][label[0] < num_old] = 255
    thresholds = torch.from_numpy(arrays["thresholds_used"])
    found = losses.pseudo_labels(given["old_logits"], label, num_classes=num_classes, thresholds=thresholds)
    share = losses.accepted_share(found.old, found.accepted)
    terms = {"ce": Term(losses.cross_entropy, image_weight=share)}
    loss = total(terms, given["logits"], found.label, given["old_logits"])
    tally.add("adaptive factor", share, arrays[f"{at}factor"])
    tally.add("class loss, value", loss, arrays[f"{at}loss"])


def _check_pod(
    arrays: Mapping[str, np.ndarray],
    at: str,
    given: Mapping[str, Tensor],
    factors: tuple[float, float | None],
    scale: float,
    tally: Tally,
    options: Mapping[str, Any] | None = None,
) -> None:
    maps = {n: v.clone().requires_grad_() if n in (*FEATURES, "small") else v for n, v in given.items()}
    loss = pod(maps, factors, scale, **options or {})
    loss.backward()
    tally.add("POD, value", loss, arrays[f"{at}pod_loss"])
    for name in (*FEATURES, "small"):
        for key, gradient in (("", lambda g: g), ("_norm", Tensor.norm)):
            if f"{at}grad/{name}{key}" in arrays:
                tally.add("POD, gradient", gradient(maps[name].grad), arrays[f"{at}grad/{name}{key}"])


def _check_thresholds(path: Path) -> list[Row]:
    """Thresholds from hand-made histograms, nan and inf included."""
    arrays, tally = dict(np.load(path)), Tally(path.name)
    for name, theirs in arrays.items():
        match name.split("/"):
            case [bins, form, base, "thresholds"]:
                counts = torch.from_numpy(arrays[f"{bins}/histograms"])
                measure = "entropy" if form == "entropy" else "probability"
                ours = losses.histogram_thresholds(
                    counts, float(base.removeprefix("base")), measure=measure
                ).numpy()
                finite = np.isfinite(theirs)
                single = np.array_equal(theirs[finite], theirs[finite].astype(np.float32))
                same = np.array_equal(ours[~finite], theirs[~finite], equal_nan=True)
                tally.add("thresholds", ours[finite], theirs[finite], ROUNDED if single else EXACT)
                tally.note("thresholds that are not finite", 0.0 if same else np.inf)
    return tally.rows()


def replay_plop(folder: Path, stem: str) -> dict[str, Comparison]:
    """Train the steps of `train_plop*.npz` again and compare every quantity that the file holds."""
    return RunReplay(folder, stem, plop_method).run()


def plop_method(options: Mapping[str, Any]) -> Method:
    """PLOP with the options of an original run, as its `meta` stores them."""
    return PLOP(**plop_options(options))


def plop_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters of PLOP from the names of the original's options."""
    logits = (options["pod_options"] or {}).get("switch", {}).get("after", {})
    pseudo = options["pseudo"] or "none"
    return {
        "pod": options["pod"] or "local",
        "pod_weight": options["pod_factor"] if options["pod"] else 0.0,
        "pod_logits_weight": logits.get("factor", options["pod_factor"])
        if options["pod"] and options["pod_logits"]
        else None,
        "pod_scales": tuple(options["spp_scales"]),
        "pod_square": options["pod_prepro"] == "pow",
        "pod_new_logits": logits.get("extra_channels", "sum"),
        "pod_schedule": not options["no_pod_schedule"],
        "pod_cells": "width",
        "pseudo": pseudo.partition("_")[0],
        "threshold": float(pseudo.partition("_")[2] or options["threshold"]),
        "bins": options["pseudo_nb_bins"],
        "rejected": "soft"
        if options["pseudo_soft"]
        else "kept"
        if options["ce_on_pseudo"] and not options["unce"]
        else "ignored",
        "learn": "new" if options["ce_on_new"] else "agreeing" if options["pseudo_ablation"] else "all",
        "adaptive_factor": options["classif_adaptive_factor"],
        "min_factor": options["classif_adaptive_min_factor"],
        "unbiased_ce": options["unce"],
        "init_background": options["init_balanced"],
    }
