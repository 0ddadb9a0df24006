"""How cost grows with classes, image size and domains: `python -m benchmarks.growth [--json FILE]`.

Times are of MiB's two pixel-wise terms (forward and backward, batch 1); multiply-adds are counted, not timed.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import Figure, in_turn, main
from benchmarks.domain_cost import iteration_of, multiply_adds
from benchmarks.losses import STRIDE, banded, run
from everseg.models.build import deeplabv3_resnet101

CLASSES = (21, 51, 101, 151)
SIDES = (256, 512, 1024)


def figures(quick: bool = False) -> list[Figure]:
    """All figures."""
    repeat = 1 if quick else 3
    base = 256
    by_class = _seconds({f"{c} classes": (c, base) for c in CLASSES}, repeat)
    by_side = _seconds({f"{s}x{s}": (CLASSES[0], s) for s in SIDES[: 2 if quick else 3]}, repeat)
    few = by_class[f"{CLASSES[0]} classes"]
    found = [
        Figure("growth", f"losses at {base}x{base}: {name} over {CLASSES[0]}", value / few, "x",
               note=f"{1e3 * value:.1f} ms, {1e9 * value / int(name.split()[0]) / base**2:.1f} ns per logit")
        for name, value in by_class.items()
    ]  # fmt: skip
    found += [
        Figure("growth", f"losses with {CLASSES[0]} classes: {name} over {SIDES[0]}x{SIDES[0]}",
               value / by_side[f"{SIDES[0]}x{SIDES[0]}"], "x", note=f"{1e3 * value:.1f} ms")
        for name, value in by_side.items()
    ]  # fmt: skip
    found += [
        Figure("growth", f"DeepLabV3, ResNet-101, {name}: multiply-adds of a forward per image", value, "G")
        for name, value in _network({"21 classes, 512x512": (21, 512), "151 classes, 512x512": (151, 512),
                                     "21 classes, 1024x1024": (21, 1024)}).items()
    ]  # fmt: skip
    first = multiply_adds(iteration_of("mdil, adapter", 1, 1, (64, 128)))
    for domains in range(2, 5):
        work = multiply_adds(iteration_of("mdil, adapter", domains, 1, (64, 128)))
        what = f"MDIL, {domains} domains: multiply-adds of an iteration over one domain's"
        found.append(Figure("growth", what, work / first, "x"))
    return found


def _seconds(cases: dict[str, tuple[int, int]], repeat: int) -> dict[str, float]:
    """Median seconds of the losses for (classes, side)."""
    ways = {}
    for name, (classes, side) in cases.items():
        torch.manual_seed(0)
        small = side // STRIDE
        logits = torch.randn(1, classes, small, small).requires_grad_()
        label = torch.randint(0, classes, (1, side, side))
        ways[name] = partial(run, banded, logits, label, torch.randn(1, classes * 3 // 4, small, small))
    return {name: statistics.median(values) for name, values in in_turn(ways, repeat).items()}


def _network(cases: dict[str, tuple[int, int]]) -> dict[str, float]:
    """Billions of multiply-adds of a forward for (classes, side), counted on tensors without data."""
    found = {}
    for name, (classes, side) in cases.items():
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            model = deeplabv3_resnet101()
            model.grow({"default": classes})
            model.eval()(torch.empty(1, 3, side, side))
        found[name] = counter.get_total_flops() / 2e9
    return found


if __name__ == "__main__":
    main(figures, argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]))
