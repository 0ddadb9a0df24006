"""Run folders written by hand: counts whose scores are known, no training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from everseg.config.loading import load, to_json
from everseg.labels import LabelSpace
from everseg.metrics import step_scores
from everseg.runs.commit import write_json
from everseg.runs.memory import FILE, Memory
from everseg.runs.model_folder import ModelFile, save_model
from everseg.runs.run_folder import RunFolder

VERSIONS = {"everseg": "0.1.0", "torch": "2.0"}


def counts(*ious: float) -> np.ndarray:
    """A confusion matrix of background and classes of these IoUs: 1000 true pixels each, errors are background."""
    matrix = np.zeros((len(ious) + 1, len(ious) + 1), np.int64)
    matrix[0, 0] = 10_000
    for c, iou in enumerate(ious, 1):
        matrix[c, c] = round(1000 * iou)
        matrix[c, 0] = 1000 - matrix[c, c]
    return matrix


def two_steps(before: float, old: float, new: float) -> dict[str, Any]:
    """Steps and groups of a run: two classes at `before`, then at `old`, and a new one."""
    return {
        "steps": [{"default": counts(before, before)}, {"default": counts(old, old, new)}],
        "groups": [(3,), (3, 1)],
    }


def made_run(
    out: Path,
    name: str,
    preset: str,
    steps: Sequence[Mapping[str, np.ndarray]],
    groups: Sequence[Sequence[int]],
    *,
    overrides: Sequence[str] = (),
    background: int | None = 0,
    digest: str = "same",
    seconds: Sequence[float] = (),
    finished: bool = True,
    images: Mapping[str, np.ndarray] | None = None,
    versions: Mapping[str, str] = VERSIONS,
    weights: Sequence[Mapping[str, Tensor]] = (),
    memory: Memory | None = None,
    extends: bool = False,
    new: int | None = None,
    tests: int = 1,
    planned_steps: int = 0,
) -> Path:
    """Write a finished run.

    Args:
        steps: per step the counts of each tested domain (or "default").
        groups: per step the sizes of the groups of classes known then.
        images: what the last step's counts are per image, (N, 3, C) of each domain; None as in older runs.
        seconds: time of each step's training, told by the journal, which says 100 MiB of memory per step so far.
        weights: of each step's model.
        memory: what each step leaves to later ones.
        extends: whether the run extends a bundle of one step, so that its own step is number 1.
        new: how many classes the last step teaches; default its last group.
        tests: images of each test.
        planned_steps: steps that the scenario plans; default those given. Further ones are not finished.
    """
    config = load(preset, [*overrides, f"name={name}", f"out={out}"])
    folder = RunFolder(out / name)
    folder.path.mkdir(parents=True)
    write_json(folder.path / "run.json",
               {"config": to_json(config), "hash": "", "threads": 1, "versions": dict(versions)})  # fmt: skip
    planned = []
    for index, (tested, sizes) in enumerate(zip(steps, groups, strict=True), int(extends)):
        names = [f"c{i}" for i in range(sum(sizes))]
        bounds = np.cumsum([0, *sizes]).tolist()
        groups_of = tuple(tuple(range(a, b)) for a, b in pairwise(bounds))
        spaces = {key: LabelSpace(groups_of, tuple(names), background) for key in tested}
        growth = [{key: sum(sizes) for key in tested}]
        about = ModelFile({"name": "deeplabv3-tiny", "options": {}, "growth": growth}, spaces,
                          fresh=config.scenario.single)  # fmt: skip
        if extends:
            save_model(folder.final(0), about, {})
        kept = {} if memory is None else {Path(FILE).stem: memory.document()}
        copied = {name: name.encode() for copy in (memory.copies if memory else ()) for name in copy.names
                  if copy.step == index}  # fmt: skip
        save_model(
            folder.final(index), about, weights[index] if weights else {}, documents=kept, files=copied
        )
        scores = {
            key: {
                **step_scores(value, sizes, background),
                "classes": names,
                "branch": key,
                "new_classes": names[len(names) - (sizes[-1] if new is None else new) :],
            }
            for key, value in tested.items()
        }
        if finished or index == 0:
            each = dict(images or {}) if index == len(steps) - 1 + extends else None
            folder.save_result(index, dict(tested), {"step": index, "branches": scores}, each)
        domains, known = config.data.domains, list(range(sum(sizes) * extends))
        planned.append({
            "index": index,
            "branches": {},
            "train": [{"branch": key, "dataset": key, "split": "train", "images": 1, "sha256": digest, "lut": [],
                       **({"domain": key} if domains else {})} for key in tested],
            "test": [{"branch": key, "dataset": key, "split": "val", "images": tests, "sha256": digest, "lut": known,
                      **({"domain": key} if domains else {})} for key in tested],
        })  # fmt: skip
    planned += [{**planned[-1], "index": index} for index in range(len(planned), planned_steps)]
    write_json(folder.path / "scenario.json", {"steps": planned})
    lines = [
        _train_line(index, spent, config.train.batch) for index, spent in enumerate(seconds, int(extends))
    ]
    (folder.path / "journal.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder.path


def _train_line(step: int, seconds: float, batch: int) -> str:
    """Ten iterations that took so long."""
    speed: Any = 10 * batch / seconds
    return (
        f'{{"event": "train", "step": {step}, "iteration": 10, "images_per_second": {speed}, '
        f'"memory": {(step + 1) * 100 * 2**20}}}'
    )
