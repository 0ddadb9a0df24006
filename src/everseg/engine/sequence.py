"""Scores of a whole sequence of steps, from the counts a run has stored (floor 5)."""

from __future__ import annotations

from typing import Any

import numpy as np

from everseg.engine.folder import RunFolder
from everseg.labels import LabelSpace
from everseg.metrics import defined_mean, sequence_scores


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
