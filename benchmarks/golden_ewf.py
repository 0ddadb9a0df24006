"""Replays the training runs of EWF's original code, and its fusion by threshold, with everseg's methods in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.golden_checks import Row, Tally
from benchmarks.golden_plop import plop_options
from benchmarks.golden_replay import Comparison, difference
from benchmarks.golden_runs import RunReplay
from everseg.methods.base import Method
from everseg.methods.fusion import fuse, new_share
from everseg.methods.mib import MiB
from everseg.methods.plop import PLOP
from everseg.models.model import frozen_copy

THRESHOLD_SHARE = 0.45


def replay_ewf(folder: Path, file_stem: str) -> dict[str, Comparison]:
    """Train one run again and compare it with its file; see `RunReplay.run`."""
    return RunReplay(folder, file_stem, method_of).run()


def check_ewf(folder: Path) -> list[Row]:
    """The fusion by threshold in every `ewf_threshold_*.npz`: the cut and the fused weights.

    The weights that are fused stand in `train_ewf_*.npz` and `train_mib_MiB.npz`.
    """
    rows = []
    for path in sorted(folder.glob("ewf_threshold_*.npz")):
        golden, tally = np.load(path), Tally(path.name)
        run = RunReplay(folder, path.stem.replace("ewf_threshold", "train_ewf"), method_of)
        step, previous = run.steps[run.first], frozen_copy(run.model)
        run.model.grow(step.grows)
        run.model.double()
        run.set_weights(run.stored(f"step{step.index}/prefusion/"))
        elements = sum(t.numel() for t in previous.state_dict().values() if t.is_floating_point())
        tally.add("elements", elements, golden["n_elements"], 0.0)
        cut = fuse(run.model, previous, new_share(step), THRESHOLD_SHARE)
        tally.add("cut", cut, golden["cut"])
        state = run.state()
        for key in golden.files:
            if key.startswith("final/"):
                tally.add("fused weights", state[key.removeprefix("final/")], golden[key])
        for key, (total, norm) in zip(golden["keys"].tolist(), golden["sum_norm"], strict=True):
            value = state[key]
            tally.note("sums", difference(value.sum(), total, norm * value.numel() ** 0.5))
            tally.note("norms", difference(value.norm(), norm))
        rows += tally.rows()
    return rows


def method_of(options: Mapping[str, Any]) -> Method:
    """The method that a stored command line ran, with the switches of EWF and NeST."""
    switched: dict[str, Any] = {}
    if options.get("fix_pre_cls"):
        switched["freeze_heads"] = "old"
    if options.get("warm_up"):
        switched["pretune"] = options["warm_epochs"]
    if options.get("weight_fusion"):
        switched["fuse"] = "changed" if options.get("threshold_choice") else "all"
        switched["fuse_changed"] = THRESHOLD_SHARE
    if options.get("pod") or options.get("pseudo"):
        found = plop_options(options)
        factor = options.get("pod_coef", 1.0)  # NeST's factor on both weights
        for weight in ("pod_weight", "pod_logits_weight"):
            found[weight] = found[weight] and factor * found[weight]
        return PLOP(**found, **switched)
    return MiB(
        kd_weight=float(options["loss_kd"]),
        unbiased_ce=options["unce"],
        unbiased_kd=options["unkd"],
        init_background=options["init_balanced"],
        **switched,
    )
