"""How cost grows with classes, image size and domains: `python -m benchmarks.growth [--json FILE]`.

Times of losses are of MiB's two pixel-wise terms (forward and backward, batch 1); multiply-adds are counted, not timed.
A long sequence is trained for real: 50 steps of one class and one iteration each, on images that show every class, so
that a step has the same images to train and to test on whatever its number.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import everseg
from benchmarks.common import Figure, in_turn, main
from benchmarks.domain_cost import iteration_of, multiply_adds
from benchmarks.losses import STRIDE, banded, run
from everseg.data.datasets.files import FileSplit
from everseg.labels import RawLabels
from everseg.models.build import deeplabv3_resnet101
from everseg.progress import resident_bytes
from everseg.scenarios.class_incremental import class_incremental

CLASSES = (21, 51, 101, 151, 301, 847)
SIDES = (256, 512, 1024)
STEPS = 50


class _Named(NamedTuple):
    """What a scenario asks of a data set."""

    name: str
    labels: RawLabels


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
    for domains in (2, 3, 4) if quick else (2, 3, 4, 10):
        work = multiply_adds(iteration_of("mdil, adapter", domains, 1, (64, 128)))
        what = f"MDIL, {domains} domains: multiply-adds of an iteration over one domain's"
        found.append(Figure("growth", what, work / first, "x"))
    return [
        *found,
        *_scenario(quick),
        *_long_sequence(6 if quick else STEPS),
        _names(10**4 if quick else 10**6),
    ]


def _scenario(quick: bool) -> list[Figure]:
    """Building the steps of 100 classes from the counts of many images, in few steps and in many."""
    classes, images = 100, 10**3 if quick else 10**5
    table = (np.random.default_rng(0).random((images, classes + 1)) < 0.05).astype(np.uint32)
    names = {number: f"class {number}" for number in range(classes + 1)}
    dataset = _Named("many", RawLabels(names, background=0))
    ids = list(range(1, classes + 1))
    found = {}
    for steps in (2, 10, STEPS):
        size = classes // steps
        groups = [ids[start : start + size] for start in range(0, classes, size)]
        start = time.perf_counter()
        class_incremental(dataset, groups, {"train": table, "val": table[:100]})
        found[steps] = time.perf_counter() - start
    return [
        Figure("growth", f"scenario of {steps} steps, {classes} classes, {images} images: time over 2 steps",
               value / found[2], "x", note=f"{1e3 * value:.0f} ms, {1e3 * value / steps:.1f} ms a step")
        for steps, value in found.items()
    ]  # fmt: skip


def _long_sequence(steps: int) -> list[Figure]:
    """A run of many steps against runs of 2 steps: a late step, and the finished run given once more."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_images(folder / "data", steps + 1)
        few = [_run_of(2, steps, folder, f"few-{number}") for number in range(3)]
        many, many_again = _run_of(steps, steps, folder, "many")
    short = statistics.median(each[0] for each, _ in few)
    tenth = max(1, len(many) // 5)
    first, last = statistics.median(many[:tenth]), statistics.median(many[-tenth:])
    few_again = statistics.median(again for _, again in few)
    return [
        Figure("growth", f"a step to {steps} classes: as the last {tenth} of {steps} steps, over the last of 2",
               last / short, "x", note=f"{1e3 * short:.0f} and {1e3 * last:.0f} ms a step"),
        Figure("growth", f"the last {tenth} steps of {steps} over the first {tenth}, which have fewer classes",
               last / first, "x", note=f"{1e3 * first:.0f} and {1e3 * last:.0f} ms a step"),
        Figure("growth", f"a finished run of {steps} steps, given again: time over one of 2 steps",
               many_again / few_again, "x", note=f"{1e3 * few_again:.0f} and {1e3 * many_again:.0f} ms"),
    ]  # fmt: skip


def _run_of(number: int, classes: int, folder: Path, name: str) -> tuple[list[float], float]:
    """Train a run of so many steps: seconds of every step after the first, and of the same command once more."""
    config = {
        "name": name, "out": str(folder), "seed": 0, "tracker": [], "report": False,
        "data": {"dataset": str(folder / "data" / "data.yaml"), "crop": 64, "workers": 0},
        "task": f"{classes + 1 - number}-1",
        "model": {"name": "deeplabv3-tiny", "options": {"widths": [8, 8, 8, 8], "hidden": 8}},
        "method": "mib", "train": {"batch": 4, "max_iterations": 1, "threads": 1}, "scenario": {"test_split": "val"},
    }  # fmt: skip
    made = everseg.run(config, quiet=True).path
    ends = [(made / "steps" / f"{step:02d}" / "metrics.json").stat().st_mtime for step in range(number)]
    start = time.perf_counter()
    everseg.run(config, quiet=True)
    return [late - early for early, late in pairwise(ends)], time.perf_counter() - start


def _write_images(folder: Path, classes: int) -> None:
    """A tree of images that all show every class, and its data.yaml."""
    side = 64
    patches = np.arange(side * side // 16) % classes  # of 4x4 pixels
    mask = np.kron(patches.reshape(side // 4, side // 4), np.ones((4, 4), int)).astype(np.uint8)
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "images" / split / f"{number}.png")
            Image.fromarray(mask).save(folder / "masks" / split / f"{number}.png")
    names = ", ".join(f'{number}: "class {number}"' for number in range(classes))
    head = f"classes: {{{names}}}\nbackground: class 0\n"
    (folder / "data.yaml").write_text(
        head + "images: images/{split}\nmasks: masks/{split}\nsplits: [train, val]\n"
    )


def _names(count: int) -> Figure:
    """A split of many names: memory for each."""
    samples = [
        (f"{number:07d}", f"images/{number:07d}.jpg", f"masks/{number:07d}.png") for number in range(count)
    ]
    before, start = resident_bytes(), time.perf_counter()
    split = FileSplit("train", ".", samples)
    seconds, taken = time.perf_counter() - start, resident_bytes() - before
    note = f"{seconds:.2f} s, {taken / 2**20:.0f} MB more resident"
    return Figure(
        "growth", f"a split of {len(split)} names: time for each", 1e6 * seconds / count, "us", note=note
    )


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
