"""Compares which images a memory keeps, and the partitioned protocol, with what the authors' original code chose."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.golden_checks import Row, Tally
from everseg.data.batches.selection import flat, reservoir, round_robin
from everseg.scenarios.class_incremental import drawn_owners
from everseg.types import IMAGENET_MEAN, IMAGENET_STD

VOID, SSUL_VOID = 255, 254
"""Void in the class lists of DKD's records and of SSUL's, which counts from the background."""
MEMORY_THRESHOLD = {"ssul": 0.7, "dkd": 0.9, "mibaugm": 0.7}
Record = list[Any]
"""What the authors store of an image; the first entry is its name."""
Arrays = Mapping[str, np.ndarray]


def check_memory(folder: Path) -> list[Row]:
    """Everything that the files of the folder say of memories and partitions."""
    checks: dict[str, Callable[[Arrays, Tally], None]] = {
        "dkd_memory_*": _check_dkd_lists,
        "mibaugm_memory_*": _check_mibaugm_lists,
        "train_ssulm_*": _check_ssul_run,
        "train_microseg_*": _check_ssul_run,
        "train_dkdm_*": _check_dkd_run,
        "train_mibaugm_*": _check_mibaugm_run,
    }
    rows = []
    for pattern, check in checks.items():
        for path in sorted(folder.glob(f"{pattern}.npz")):
            with np.load(path) as file:
                arrays, tally = {name: file[name] for name in file.files}, Tally(path.name)
            check(arrays, tally)
            rows += tally.rows()
    return rows


def _same(tally: Tally, quantity: str, ours: Any, theirs: Any) -> None:
    """Note whether two JSON values are equal."""
    same = json.loads(json.dumps(ours)) == json.loads(json.dumps(theirs))
    tally.note(quantity, 0.0 if same else np.inf, 0.0)


def _tasks(arrays: Arrays) -> dict[int, list[int]]:
    return {int(step): ids for step, ids in json.loads(str(arrays["tasks"])).items()}


# ---------------------------------------------------------------- records of SSUL and DKD


def chosen_records(pool: Sequence[Record], classes: Sequence[int], size: int, seed: int) -> list[Record]:
    """Records of the images that the round robin takes, in the order in which the authors write them."""
    taken = round_robin([record[-1] for record in pool], classes, size, np.random.RandomState(seed))
    return [pool[place] for place in flat(taken)]


def family_json(memories: Sequence[Sequence[Record]], offered: Sequence[Sequence[Record]]) -> dict[str, Any]:
    """The file that SSUL and DKD write: the memory of each step, and behind it what the next step's choice added.

    Args:
        memories: records of the memory of steps 1, 2, ...
        offered: records of the candidates of steps 2, 3, ..., which their code appends to the step before.
    """
    found = {}
    for number, memory in enumerate(memories, 1):
        added = offered[number - 1] if number <= len(offered) else []
        found[f"step_{number}"] = {
            "memory_candidates": [*memory, *added],
            "memory_list": sorted(record[0] for record in memory),
        }
    return found


def ssul_record(name: str, label: np.ndarray) -> Record:
    """SSUL's record of an image from its label map, in which background is 1 and void 255."""
    classes = [int(value) - 1 for value in np.unique(label) if value > 1]
    return [name, len(classes), int((label > 1).sum()), classes]


def dkd_record(name: str, label: np.ndarray) -> Record:
    """DKD's record of an image from its label map, in which background is 0 and void 255."""
    stem = name.removesuffix(".jpg")
    shown = f"/JPEGImages/{stem}.jpg /SegmentationClassAug/{stem}.png"
    return [shown, [int(value) for value in np.unique(label) if value > 0]]


def _check_dkd_lists(arrays: Arrays, tally: Tally) -> None:
    tasks, size, seed = _tasks(arrays), int(arrays["mem_size"]), int(arrays["seed"])
    memories, offered = [], []
    for step in sorted(tasks)[1:]:
        at = f"step{step}/"
        labels = arrays[f"{at}labels"].astype(np.int64)
        if step > 1:
            scores = _sigmoid(arrays[f"{at}logits"][:, 1:])  # without the auxiliary channel
            labels = _completed(labels, scores, MEMORY_THRESHOLD["dkd"], first=1)
        new = [dkd_record(str(name), label) for name, label in zip(arrays[f"{at}names"], labels, strict=True)]
        pool = [*(memories[-1] if memories else []), *new]
        offered += [new] if memories else []
        memories.append(chosen_records(pool, _ids(tasks, step), size, seed))
        theirs = json.loads(str(arrays[f"{at}memory_json"]))
        _same(tally, "memory, with records", family_json(memories, offered), theirs)


def _ids(tasks: Mapping[int, Sequence[int]], step: int) -> list[int]:
    """Ids of all classes of the steps before one, in the order of the tasks."""
    return [number for earlier in range(step) for number in tasks[earlier]]


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def _completed(labels: np.ndarray, scores: np.ndarray, threshold: float, first: int = 0) -> np.ndarray:
    """Labels in which background pixels have the class that is seen there, if its score reaches the threshold.

    Args:
        labels: (N, H, W), background 0.
        scores: (N, C, H, W).
        threshold: least score.
        first: id of the first score.
    """
    best, score = scores.argmax(1) + first, scores.max(1)
    return np.where((labels == 0) & (best > 0) & (score >= threshold), best, labels)


def _check_dkd_run(arrays: Arrays, tally: Tally) -> None:
    """Later memories of a run. The order of the candidates was the loader's, and the file holds it only there."""
    tasks, meta = _tasks(arrays), json.loads(str(arrays["meta"]))
    labels = {f"im{number:03d}": label for number, label in enumerate(arrays["data/labels"])}
    steps = [step for step in sorted(tasks)[1:] if f"step{step}/memory_json" in arrays]
    for step in steps:
        theirs = json.loads(str(arrays[f"step{step}/memory_json"]))
        last = theirs[f"step_{step}"]["memory_candidates"]
        _same(tally, "memory lists", sorted(r[0] for r in last), theirs[f"step_{step}"]["memory_list"])
        if step == 1:
            # Labels alone say what these show.
            ours = []
            for name, _ in last:
                stem = Path(name.split()[0]).stem
                seen = np.where(np.isin(labels[stem], [*_raw(tasks, 0), VOID]), labels[stem], 0)
                ours.append(dkd_record(stem, seen))
            _same(tally, "classes of the first memory", ours, last)
            continue
        pool = theirs[f"step_{step - 1}"]["memory_candidates"]
        _same(
            tally, "memory, chosen", chosen_records(pool, _ids(tasks, step), meta["mem"], meta["seed"]), last
        )


def _raw(tasks: Mapping[int, Sequence[int]], step: int) -> list[int]:
    return [raw for raw in tasks[step] if raw > 0]


def _check_ssul_run(arrays: Arrays, tally: Tally) -> None:
    """Memories of a run: step 1 from labels, later ones also from what the network of the step before sees."""
    if "memory_json" not in arrays:
        return
    tasks, meta = _tasks(arrays), json.loads(str(arrays["meta"]))
    size, theirs = int(meta.get("mem", 0)), json.loads(str(arrays["memory_json"]))
    names = [str(name) for name in arrays["data/names"]]
    shown = [set(map(int, str(line).split()[1:])) for line in arrays["data/train_cls"]]
    ours: dict[str, Any] = {}
    memories: list[list[Record]] = []
    offered: list[list[Record]] = []
    for step in sorted(tasks)[1:]:
        own = set(_raw(tasks, step - 1))
        new = []
        for number, classes in enumerate(shown):
            # `train_cls` counts classes from 0. A disjoint step takes images of its own classes and earlier ones.
            raw = {c + 1 for c in classes}
            if not raw & own or not (meta.get("overlap", True) or raw <= {*range(1, min(own)), *own}):
                continue
            label = arrays["data/labels"][number].astype(np.int64)
            label = np.where(np.isin(label, [*own, VOID]), label, 0)
            if step > 1:
                if "proposals" in " ".join(arrays):  # MicroSeg scores proposals: its replay has that network
                    return
                scores = _ssul_scores(arrays, step - 1, arrays["data/images"][number])
                best, score = scores.argmax(0) - 1, scores.max(0)  # channels: unknown, background, classes
                seen = (label == 0) & (best > 0) & (score >= MEMORY_THRESHOLD["ssul"])
                label = np.where(seen, best, label)
            new.append(ssul_record(names[number], np.where(label == VOID, VOID, label + 1)))
        count = sum(len(tasks[earlier]) for earlier in range(step)) - 1  # without the background
        offered += [new] if memories else []
        pool = [*(memories[-1] if memories else []), *new]
        memories.append(chosen_records(pool, range(1, count + 1), size, 1))
        ours = family_json(memories, offered)
        _same(
            tally,
            "memory, with records",
            ours[f"step_{step}"]["memory_list"],
            theirs[f"step_{step}"]["memory_list"],
        )
        last = theirs[f"step_{step}"]["memory_candidates"][:size]
        _same(tally, "memory, with records", memories[-1], last)
    _same(tally, "memory, the whole file", ours, theirs)


def _ssul_scores(arrays: Arrays, step: int, image: np.ndarray) -> np.ndarray:
    """Sigmoid scores of every channel, (C, H, W), by the stored network at a step's end, in evaluation mode."""
    state = {
        name.removeprefix(f"step{step}/final/"): torch.from_numpy(value).double()
        for name, value in arrays.items()
        if name.startswith(f"step{step}/final/")
    }

    def conv(x: Tensor, name: str, **how: Any) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **how)

    def norm(x: Tensor, name: str) -> Tensor:
        parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *parts))

    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    x = ((torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 - mean) / std).double()
    for number in (1, 2):
        x = norm(conv(x, f"backbone.conv{number}", stride=2, padding=1), f"backbone.bn{number}")
    at = "classifier.aspp"
    rates = {0: 0, 1: 6, 2: 12, 3: 18}
    maps = [
        norm(conv(x, f"{at}.convs.{n}.0", padding=rate, dilation=max(1, rate)), f"{at}.convs.{n}.1")
        for n, rate in rates.items()
    ]
    pooled = norm(conv(x.mean((2, 3), keepdim=True), f"{at}.convs.4.1"), f"{at}.convs.4.2")
    maps.append(F.interpolate(pooled, x.shape[-2:], mode="bilinear", align_corners=False))
    x = norm(conv(torch.cat(maps, 1), f"{at}.project.0"), f"{at}.project.1")
    heads = sorted({int(name.split(".")[2]) for name in state if name.startswith("classifier.head.")})
    logits = torch.cat(
        [
            conv(
                norm(conv(x, f"classifier.head.{n}.0", padding=1), f"classifier.head.{n}.1"),
                f"classifier.head.{n}.3",
            )
            for n in heads
        ],
        1,
    )
    whole = F.interpolate(logits, image.shape[:2], mode="bilinear", align_corners=False)
    return torch.sigmoid(whole)[0].numpy()


# ---------------------------------------------------------------- MiB-AugM


def mibaugm_record(name: str, label: np.ndarray, given: np.ndarray) -> Record:
    """MiB-AugM's record: name, number of classes, pixels of each, classes with and without pseudo-labels."""
    classes = [int(value) for value in np.unique(label) if value not in (0, VOID)]
    own = [int(value) for value in np.unique(given) if value not in (0, VOID)]
    return [name, len(classes), [int((label == c).sum()) for c in classes], classes, own]


def chosen_reservoir(
    members: Mapping[int, Sequence[Record]],
    new: Sequence[Record],
    classes: Iterable[int],
    size: int,
    seed: int,
) -> dict[int, list[Record]]:
    """Class -> records of the images that the reservoir holds after new ones were offered."""
    pool = [*(record for records in members.values() for record in records), *new]
    held = [number for number, records in members.items() for _ in records]
    taken = reservoir(
        [record[3] for record in pool],
        held,
        list(classes),
        size,
        np.random.RandomState(seed),
        random.Random(seed),
    )
    return {number: [pool[place] for place in places] for number, places in taken.items()}


def mibaugm_json(
    members: Mapping[int, Sequence[Record]], offered: Sequence[Record], step_of: Mapping[str, int]
) -> dict[str, Any]:
    """The file that MiB-AugM writes.

    Args:
        members: class -> records.
        offered: records of all candidates of all steps.
        step_of: name -> step that annotated the image.
    """
    by_step: dict[str, list[str]] = {}
    for records in members.values():
        for record in records:
            by_step.setdefault(f"step_{step_of[record[0]]}", []).append(record[0])
    images: dict[str, int] = {}
    pixels: dict[str, int] = {}
    for record in offered:
        for number, count in zip(record[3], record[2], strict=True):
            images[str(number)] = images.get(str(number), 0) + 1
            pixels[str(number)] = pixels.get(str(number), 0) + count
    return {
        "filenames_wtask": by_step,
        "running_stats": {"img": images, "pixel": pixels},
        "memory_stats": {
            "filenames": {str(number): list(records) for number, records in members.items()},
            "stats": {str(number): len(records) for number, records in members.items()},
        },
    }


def _check_mibaugm_lists(arrays: Arrays, tally: Tally) -> None:
    tasks, size, seed = _tasks(arrays), int(arrays["mem_size"]), int(arrays["seed"])
    members: dict[int, list[Record]] = {}
    offered: list[Record] = []
    step_of: dict[str, int] = {}
    for step in sorted(tasks)[1:]:
        at = f"step{step}/"
        given = arrays[f"{at}labels"].astype(np.int64)
        labels = given
        if step > 1:
            scores = torch.softmax(torch.from_numpy(arrays[f"{at}logits"]), 1).numpy()
            labels = _completed(given, scores, MEMORY_THRESHOLD["mibaugm"])
        names = [str(name) for name in arrays[f"{at}names"]]
        new = [mibaugm_record(*each) for each in zip(names, labels, given, strict=True)]
        step_of |= dict.fromkeys(names, step - 1)
        offered += new
        members = chosen_reservoir(members, new, _ids(tasks, step), size, seed)
        theirs = json.loads(str(arrays[f"{at}memory_json"]))
        _same(tally, "memory, with records", mibaugm_json(members, offered, step_of), theirs)


def _check_mibaugm_run(arrays: Arrays, tally: Tally) -> None:
    """The partition of a run's images, and its memories.

    In later steps a network whose weights nobody knows adds classes to the candidates. Which ones can be told where it
    saw a class in none of them or in all, because the file counts them. Other steps are not compared.
    """
    tasks, meta = _tasks(arrays), json.loads(str(arrays["meta"]))
    labels = arrays["data/labels"][: int(arrays["data/n_train"])]
    owners = drawn_owners([_foreground(label) for label in labels], int(meta["seed"]))
    stems = [Path(str(name)).stem for name in arrays["data/names"]]
    of_class: dict[str, list[str]] = {str(c): [] for c in sorted({c for c in owners if c is not None})}
    for stem, owner in zip(stems, owners, strict=False):
        if owner is not None:
            of_class[str(owner)].append(f"/JPEGImages/{stem}.jpg /SegmentationClassAug/{stem}.png")
    of_task = {
        str(step): [name for c in ids for name in of_class.get(str(c), ())] for step, ids in tasks.items()
    }
    theirs = json.loads(str(arrays["split_json"]))
    _same(tally, "partition", {"imgs_per_task": of_task, "imgs_per_cls": of_class}, theirs)
    members: dict[int, list[Record]] = {}
    before: dict[int, int] = {}  # class -> candidates of earlier steps that show it
    size, seed = int(meta.get("mem", 0)), int(meta["seed"])
    for step in sorted(tasks)[1:]:
        if f"step{step}/memory_json" not in arrays:
            continue
        new = []
        for name in of_task[str(step - 1)]:
            stem = Path(name.split()[0]).stem
            label = arrays["data/labels"][stems.index(stem)].astype(np.int64)
            label = np.where(np.isin(label, [*_raw(tasks, step - 1), VOID]), label, 0)
            new.append(mibaugm_record(f"{stem}.jpg", label, label))
        classes = [c for c in _ids(tasks, step) if c > 0]
        theirs = json.loads(str(arrays[f"step{step}/memory_json"]))
        counted = {int(c): number for c, number in theirs["running_stats"]["img"].items()}
        for c in classes:
            own = sum(c in record[3] for record in new)
            number = counted.get(c, 0) - before.get(c, 0)
            if number not in (own, len(new)):
                return  # the network saw the class in some of the images: nobody knows in which
            if number > own:
                new = [[*r[:3], sorted({*r[3], c}), r[4]] for r in new]
        before = counted
        members = chosen_reservoir(members, new, classes, size, seed)
        found = theirs["memory_stats"]["filenames"]
        if step == 1:
            _same(tally, "first memory, with records", {str(c): each for c, each in members.items()}, found)
        else:
            ours = {str(c): [[r[0], *r[3:]] for r in each] for c, each in members.items()}
            _same(
                tally,
                "later memories",
                ours,
                {c: [[r[0], *r[3:]] for r in each] for c, each in found.items()},
            )
            members = {int(c): each for c, each in found.items()}  # with the pixels that their network added


def _foreground(label: np.ndarray) -> list[int]:
    return [int(value) for value in np.unique(label) if value not in (0, VOID)]
