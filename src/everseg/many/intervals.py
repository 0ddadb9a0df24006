"""How far scores depend on which images were tested: bootstrap intervals over them (floor 6)."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

import numpy as np

from everseg.many.results import Group, Result, per_domain
from everseg.metrics import defined_means, group_miou, resampled_sums
from everseg.runs.folder import RunFolder

RESAMPLES = 1000
"""Draws of as many images as there are, with replacement, the same for all runs tested on the same images."""
LEVEL = 0.95
"""Share of the draws that an interval holds."""

Draws = Mapping[str, np.ndarray]
"""Name of a number -> its value in each draw, (RESAMPLES,)."""


def draws_of(run: Result) -> Draws:
    """The last step's numbers over resampled test images; {} for a run that has not stored its images' counts."""
    folder = RunFolder(run.path)
    found: dict[str, np.ndarray] = {}
    for track in run.tracks:
        images = folder.images(track.steps[-1]).get(track.name)
        if images is None or not len(images):
            return {}
        sums = resampled_sums(images, RESAMPLES, zlib.crc32(track.name.encode()))
        means = group_miou(sums, [len(group) for group in track.space.groups], track.background)
        if run.several:
            found[per_domain(track)] = means["miou"]["all"]
            continue
        for suffix, key in (("", "miou"), (" (no bg)", "miou_without_background")):
            found |= {f"{name}{suffix}": values for name, values in means[key].items()}
    if run.several:
        found["mIoU mean"] = defined_means(np.stack([*found.values()], axis=1))
    return found


def interval(draws: Iterable[np.ndarray]) -> list[float] | None:
    """Where `LEVEL` of the draws of the mean over runs lie, [low, high]; None without draws or if one is undefined."""
    rows = list(draws)
    if not rows:
        return None
    mean = np.mean(rows, axis=0)
    if np.isnan(mean).any():
        return None
    rest = 50 * (1 - LEVEL)
    return [float(value) for value in np.percentile(mean, [rest, 100 - rest])]


def of_scores(group: Group, draws: Mapping[int, Draws], number: str) -> list[float] | None:
    """Interval of a group's mean over seeds; None unless all of its runs have stored their images' counts.

    Args:
        draws: `id` of a result -> its draws.
    """
    runs = [draws[id(run)] for run in group.runs]
    return interval(one[number] for one in runs) if all(number in one for one in runs) else None


def of_differences(group: Group, base: Group, draws: Mapping[int, Draws], number: str) -> list[float] | None:
    """Interval of the mean difference of runs with the same seed, both drawn the same images."""
    theirs = {run.config.seed: draws[id(run)] for run in base.runs}
    pairs = [(draws[id(run)], theirs[run.config.seed]) for run in group.runs if run.config.seed in theirs]
    if not all(number in mine and number in other for mine, other in pairs):
        return None
    return interval(mine[number] - other[number] for mine, other in pairs)
