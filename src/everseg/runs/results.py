"""Scores of a whole sequence of steps, from the counts a run has stored."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from everseg.errors import CheckpointError, some
from everseg.labels import LabelSpace
from everseg.metrics import defined_mean, sequence_scores, step_scores
from everseg.runs.commit import read_document
from everseg.runs.folder import RunFolder
from everseg.runs.journal import Journal, replaced_samples


def run_sequence(folder: RunFolder) -> dict[str, Any]:
    """Average over steps, forgetting and backward transfer of a run's scored steps.

    Returns:
        For a run on one data set what `metrics.sequence_scores` gives; {} before the first scored step. For a run
        over domains:

        * `domains`: domain -> what `sequence_scores` gives for it;
        * `miou`: domain -> mIoU over all its classes after the last step that tested it;
        * `average_miou`: mean over steps of the mean over the domains tested then;
        * `forgetting`, `backward_transfer`: {"mean": over domains, "domains": domain -> its own, None for domains
          that only the last step knows}.
    """
    tested: dict[str, list[tuple[np.ndarray, LabelSpace]]] = {}
    per_step: list[list[float | None]] = []
    last: dict[str, float | None] = {}
    for index in folder.finished_steps:
        counts, spaces = folder.counts(index), folder.spaces(index)
        scores, paths = folder.metrics(index)["branches"], folder.paths(index)
        for name, values in scores.items():
            if name not in tested or folder.is_fresh(index):  # another model: nothing goes on
                tested[name] = []
            tested[name].append((counts[name], spaces[paths[name]]))
            last[name] = values["miou"]["all"]
        per_step.append([values["miou"]["all"] for values in scores.values()])
    if not tested:
        return {}
    sequences = {name: _of(rows) for name, rows in tested.items()}
    if len(sequences) == 1 and not folder.config().data.domains:
        return next(iter(sequences.values()))
    result: dict[str, Any] = {
        "domains": sequences,
        "miou": last,
        "average_miou": defined_mean(defined_mean(values) for values in per_step),
    }
    for key in ("forgetting", "backward_transfer"):
        means = {name: values[key]["mean"] for name, values in sequences.items()}
        result[key] = {"mean": defined_mean(means.values()), "domains": means}
    return result


def _of(rows: list[tuple[np.ndarray, LabelSpace]]) -> dict[str, Any]:
    sizes = [[len(group) for group in space.groups] for _, space in rows]
    return sequence_scores([counts for counts, _ in rows], sizes, rows[-1][1].background)


@dataclass(frozen=True)
class Track:
    """The results of one model as it goes on, on one data set or domain."""

    name: str
    """The domain, or the branch in runs on one data set."""
    branch: str
    steps: tuple[int, ...]
    """Steps after which it was tested."""
    counts: tuple[np.ndarray, ...]
    """One per step: (C, C) int64, rows = truth."""
    spaces: tuple[LabelSpace, ...]
    """One per step."""

    @property
    def space(self) -> LabelSpace:
        """Label space after the last step."""
        return self.spaces[-1]

    @property
    def background(self) -> int | None:
        return self.space.background

    @cached_property
    def scores(self) -> list[dict[str, Any]]:
        """What `metrics.step_scores` makes of the counts after each step."""
        return [
            step_scores(n, [len(group) for group in space.groups], space.background)
            for n, space in zip(self.counts, self.spaces, strict=True)
        ]

    @cached_property
    def sequence(self) -> dict[str, Any]:
        """What `metrics.sequence_scores` makes of them."""
        sizes = [[len(group) for group in space.groups] for space in self.spaces]
        return sequence_scores(self.counts, sizes, self.background)

    @property
    def born(self) -> list[int]:
        """Growth -> the step after which it was first tested."""
        return [self.steps[self._first(group)] for group in range(len(self.space.groups))]

    def _first(self, group: int) -> int:
        return next(i for i, space in enumerate(self.spaces) if len(space.groups) > group)

    @property
    def group_of(self) -> list[int]:
        """Train id -> growth that brought it."""
        return [number for number, group in enumerate(self.space.groups) for _ in group]

    def at_birth(self, train_id: int) -> int:
        """Position in `steps` of the first test that knew a class."""
        return self._first(self.group_of[train_id])

    @property
    def group_titles(self) -> list[str]:
        """What a growth is called: by its step, by its number where one step taught several (joint training)."""
        born = self.born
        if len(set(born)) < len(born):
            return [f"group {number}" for number in range(len(born))]
        return [f"learnt in step {step}" for step in born]

    def group_names(self, group: int) -> list[str]:
        """Names of the classes one growth brought, without background."""
        ends = [0, *accumulate(len(g) for g in self.space.groups)]
        ids = range(ends[group], ends[group + 1])
        return [self.space.names[c] for c in ids if c != self.background]

    @property
    def old(self) -> list[int]:
        """Train ids of the classes known before the last test, background included: 0, 1, ...; [] of a single test."""
        return [c for c in range(self.space.num_classes) if self.at_birth(c) < len(self.steps) - 1]


def tracks_of(folder: RunFolder) -> list[Track]:
    """The results of every domain (or branch) over the steps; of models trained afresh only the last one's.

    Raises:
        CheckpointError: no finished step, or counts that do not fit their classes.
    """
    rows: dict[str, list[tuple[int, str, np.ndarray, LabelSpace]]] = {}
    for index in folder.finished_steps:
        counts, spaces = folder.counts(index), folder.spaces(index)
        for name, branch in folder.paths(index).items():
            if folder.is_fresh(index):
                rows[name] = []
            known = counts.get(name)
            if known is None or branch not in spaces or len(known) != spaces[branch].num_classes:
                raise CheckpointError(
                    f"{folder.step(index) / 'confusion.npz'} does not fit the classes of the step; "
                    f"delete {folder.step(index) / 'metrics.json'} and run the same command to score it again"
                )
            rows.setdefault(name, []).append((index, branch, known, spaces[branch]))
    if not rows:
        raise CheckpointError(f"{folder.path} has no finished step yet; run its command to finish one")
    return [
        Track(
            name,
            found[-1][1],
            tuple(index for index, _, _, _ in found),
            tuple(counts for _, _, counts, _ in found),
            tuple(space for _, _, _, space in found),
        )
        for name, found in rows.items()
    ]


def planned_steps(folder: RunFolder) -> list[dict[str, Any]]:
    """The steps as scenario.json records them, finished or not."""
    return list(read_document(folder.path / "scenario.json", "steps")["steps"])


def replaced_text(folder: RunFolder) -> str:
    """Say how many training samples could not be read and were replaced, and which; "" = none."""
    found = replaced_samples(Journal(folder.path / "journal.jsonl"))
    if not found:
        return ""
    what = "1 training sample was" if len(found) == 1 else f"{len(found)} training samples were"
    names = some([f"{sample} of {dataset}" for dataset, sample in found], 6)
    return f"{what} replaced by others, as data.skip_bad allows: {names}."
