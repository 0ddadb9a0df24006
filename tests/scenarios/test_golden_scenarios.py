"""Selected images, label tables and published lists agree with the authors' code."""

from __future__ import annotations

import json

import numpy as np
import pytest

from everseg.data.base import Dataset
from everseg.labels import RawLabels
from everseg.scenarios import class_incremental, known_tasks, published, task_groups
from everseg.scenarios.lists import sha1_int64

pytestmark = pytest.mark.golden

NUM = {"voc": 20, "ade": 150}
ROLES = {
    "train_disjoint": ("disjoint", "train"),
    "train_overlap": ("overlapped", "train"),
    "train_disjoint_nomask": ("sequential", "train"),
    "val": ("overlapped", "val"),
    "val_nomask": ("sequential", "val"),
    "test": ("disjoint", "test"),
}


def labels_of(name):
    return RawLabels({0: "background", **{i: f"class {i}" for i in range(1, NUM[name] + 1)}})


def counts_of(maps):
    return np.stack([np.bincount(one.ravel(), minlength=256) for one in maps])


@pytest.fixture(scope="module")
def spec(golden):
    return json.loads((golden / "scenario.json").read_text())


def test_every_original_task_and_order_has_the_authors_classes(spec):
    seen = 0
    for name in NUM:
        for task, entry in spec["tasks"][name].items():
            groups = task_groups(task, labels_of(name), name)
            expected = [[i for i in entry["steps"][str(s)] if i] for s in range(len(entry["steps"]))]
            assert [list(g) for g in groups] == expected, (name, task)
            assert task in known_tasks(name)
            seen += 1
    assert seen == 16


def test_all_selections_and_tables_of_the_authors_are_reproduced(golden, spec):
    maps = dict(np.load(golden / "scenario_maps.npz", allow_pickle=False))
    built, checked = {}, 0
    for case in spec["cases"]:
        name, task = case["dataset"], case["task"]
        protocol, role = ROLES[case["role"]]
        if (name, task, protocol) not in built:
            extra = maps["all_bytes_map"][None]
            counts = {s: counts_of(np.concatenate([maps[f"{name}_{s}"], extra])) for s in ("train", "val")}
            built[name, task, protocol] = class_incremental(
                Dataset(name, labels_of(name), {}),
                task_groups(task, labels_of(name), name),
                counts,
                protocol=protocol,
                policy=f"mib-{name}",
                validation="split",
                strict=False,
            )
        step = built[name, task, protocol][case["step"]]
        (source,) = getattr(step, role)
        last = 40 if role == "train" else 24
        what = (name, task, case["step"], case["role"])
        assert [i for i in source.indices if i != last] == case["selected"], what
        assert (last in source.indices) == case["lut_map_selected"], what
        table = np.full(256, case["lut_default"], np.uint8)
        for raw, train_id in case["lut"].items():
            table[int(raw)] = train_id
        table[255] = case["lut_255"]
        assert source.lut == table.tobytes(), what
        if role == "train":
            assert list(step.spaces["default"].order) == case["order"], what
        checked += 1
    assert checked == 300


def test_shipped_lists_are_the_released_ones(golden, spec):
    released = spec["released_index_files"]
    for key, entry in released.items():
        name, folder, file = key.split("/")
        task, protocol = folder.removesuffix("-ov"), "overlapped" if folder.endswith("-ov") else "disjoint"
        step = int(file.removeprefix("train-").removesuffix(".npy"))
        indices = published(name, task, protocol)[step]
        assert indices.dtype == np.int64
        assert (len(indices), indices.min(), indices.max()) == (entry["n"], entry["min"], entry["max"]), key
        assert indices[:5].tolist() == entry["first5"], key
        assert sha1_int64(indices) == entry["sha1_int64"], key
    assert len(released) == 42
    # ADE: each image belongs to one step at most (golden/README 1.2: 13452 + 6744 = 20196 of 20210).
    whole = np.concatenate(published("ade", "100-50", "disjoint"))
    assert len(whole) == len(np.unique(whole)) == 20196
