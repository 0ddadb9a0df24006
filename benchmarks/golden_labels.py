"""Compares which images and labels a step sees with the data classes of PLOP's, MiB's and SDR's original code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.golden_checks import NUM_CLASSES, Row, Tally
from everseg.data.base import Dataset
from everseg.labels import RawLabels
from everseg.scenarios import class_incremental, task_groups
from everseg.scenarios.steps import Step

POLICIES = {"PLOP": "plop", "MiB": "mib", "SDR": "mib"}
"""Family of the file -> first part of the name of its label policy; the second is the data set."""


def check_label_maps(path: Path) -> list[Row]:
    """Selected images and translated ids of every case of one file such as `label_maps.json`."""
    spec, tally = json.loads(path.read_text()), Tally(path.name)
    differing = spec.get("different_from_PLOP", {})
    built: dict[tuple[str, str, str, str], tuple[Step, ...]] = {}
    for family, cases in {"PLOP": spec["cases"], **{name: differing[name] for name in differing}}.items():
        for key, case in {**spec["cases"], **cases}.items():
            name, task, step, split, overlapped = key.split("/")
            protocol = "overlapped" if overlapped == "ov1" else "disjoint"
            which = (family, name, task, protocol)
            if which not in built:
                built[which] = _scenario(f"{POLICIES[family]}-{name}", name, task, protocol, spec)
            (source,) = getattr(built[which][int(step)], split)
            same = list(source.indices) == case["idx"]
            tally.note(f"{family}: selected images", 0.0 if same else 1.0, 0.0)
            wrong = [raw for raw, train_id in case["lut"] if source.lut[raw] != train_id]
            tally.note(f"{family}: label tables", float(len(wrong)), 0.0)
    return tally.rows()


def _scenario(policy: str, name: str, task: str, protocol: str, spec: dict[str, Any]) -> tuple[Step, ...]:
    labels = RawLabels({0: "background", **{i: f"class {i}" for i in range(1, NUM_CLASSES[name] + 1)}})
    # One pixel of each id that a map holds: only whether an id is present counts.
    counts = np.stack([np.bincount(ids, minlength=256) for ids in spec["maps_classes"][name]])
    return class_incremental(
        Dataset(name, labels, {}),
        task_groups(task, labels, name),
        {"train": counts, "val": counts},
        protocol=protocol,
        policy=policy,
        validation="split",
        strict=False,
    )
