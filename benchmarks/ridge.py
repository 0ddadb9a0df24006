"""Time of acil's closed form: `python -m benchmarks.ridge [--json FILE]`.

A pass over the batches of a step, and the classifier at its end, in float64 and in two ways: "sums" adds the features'
products and factorises once (Cholesky, `everseg.losses.ridge`); "recursion" updates the inverse batch by batch by the
Woodbury identity and the weights with it, as the authors' code does. Both see the same features. Their weights are
compared too, so that a fast way that computes something else would be seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Figure, in_turn, main, medians, ratio
from everseg.losses import ridge

CASES = {
    "1024 features, 20 batches of 2 x 28 x 28 cells": (1024, 20, 1568),
    "1024 features, 20 batches of 2 x 14 x 14 cells": (1024, 20, 392),
}
"""Name -> features, batches, cells of a batch: crops of 224 pixels at stride 8 (CamVid's preset) and at 16."""
QUICK = {"256 features, 8 batches of 98 cells": (256, 8, 98)}
CLASSES, GAMMA = 12, 10.0
Batches = Sequence[tuple[Tensor, Tensor]]


def sums(batches: Batches, width: int) -> Tensor:
    """Add up and solve once: (n, C)."""
    gram, cross = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, CLASSES).double()
    for features, label in batches:
        ridge.add_pixels(gram, cross, features, label)
    return ridge.ridge_weights(gram, cross, GAMMA)


def recursion(batches: Batches, width: int) -> Tensor:
    """Keep the inverse up to date, as the authors do: (n, C)."""
    inverse = torch.eye(width, dtype=torch.float64) / GAMMA
    weights = torch.zeros(width, CLASSES, dtype=torch.float64)
    for x, label in batches:
        target = F.one_hot(label, CLASSES).double()
        seen = x @ inverse
        inner = torch.eye(len(x), dtype=torch.float64) + seen @ x.T
        inverse = inverse - seen.T @ torch.linalg.solve(inner, seen)
        weights = weights + inverse @ (x.T @ (target - x @ weights))
    return weights


def figures(quick: bool = False) -> list[Figure]:
    """All figures."""
    found = []
    for name, (width, count, cells) in (QUICK if quick else CASES).items():
        generator = torch.Generator().manual_seed(0)
        batches = [
            (
                torch.randn(cells, width, generator=generator).double().relu(),
                torch.randint(CLASSES, (cells,), generator=generator),
            )
            for _ in range(count)
        ]
        both = {"recursion": recursion, "sums": sums}
        seconds = in_turn(
            {key: partial(way, batches, width) for key, way in both.items()},
            1 if quick else 3,
            warm=0 if quick else 1,
        )
        one, other = (way(batches, width) for way in both.values())
        what = f"a pass and its solution, {name}, {torch.get_num_threads()} threads"
        found.append(
            Figure("ridge", f"{what}: times faster than the authors' recursion",
                   ratio(seconds, "recursion", "sums"), "x", 1, note=medians(seconds))
        )  # fmt: skip
        found.append(
            Figure("ridge", f"{what}: largest difference of the two's weights, of the largest weight",
                   float((one - other).abs().max() / other.abs().max()), "", 1e-8, "lower")
        )  # fmt: skip
    return found


if __name__ == "__main__":
    main(figures, argparse.ArgumentParser(description=__doc__.splitlines()[0]))
