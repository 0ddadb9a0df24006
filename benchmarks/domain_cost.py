"""What each extra domain costs an iteration of MDIL: `python -m benchmarks.domain_cost [--size H W] [--repeat N]`.

Counts the multiply-adds of one training iteration (student and teacher, forward and backward) for the 1st, 2nd ...
domain, and times the same iterations interleaved, so that a busy machine slows all rows alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from everseg.labels import LabelSpace
from everseg.methods.base import StepContext
from everseg.methods.mdil import MDIL
from everseg.models.erfnet import erfnet
from everseg.models.model import SegmentationModel, frozen_copy
from everseg.scenarios.steps import Source, Step
from everseg.types import Batch

CLASSES = 19
DOMAINS = 4


def iteration_of(
    domains: int, batch: int, size: tuple[int, int], options: Mapping[str, Any]
) -> Callable[[], None]:
    """Make the function that runs one training iteration (no optimiser) on the last of so many domains."""
    torch.manual_seed(0)
    method = MDIL()
    model: SegmentationModel = erfnet(**options)
    space = LabelSpace((tuple(range(CLASSES)),), tuple(f"class {i}" for i in range(CLASSES)), None)
    teacher = None
    for index in range(domains):
        names = [f"domain {i}" for i in range(index + 1)]
        source = Source(names[-1], names[-1], "train", (0,), bytes(256))
        step = Step(index, (source,), (), dict.fromkeys(names, space), {names[-1]: CLASSES})
        teacher = frozen_copy(model) if index else None
        method.prepare_model(model, step)
    model.train()
    ctx = StepContext(step, model, model, teacher)
    image = torch.rand(batch, 3, *size)
    data = Batch(image, torch.randint(0, CLASSES, (batch, *size)), names[-1])

    def run() -> None:
        for terms in method.losses(data, ctx):
            model.zero_grad(set_to_none=True)
            torch.stack([*terms.values()]).sum().backward()

    return run


def measure(batch: int, size: tuple[int, int], repeat: int) -> list[dict[str, float]]:
    """One row per number of domains: multiply-adds (billions) and seconds of an iteration, and both as ratios."""
    runs = [iteration_of(n, batch, size, {}) for n in range(1, DOMAINS + 1)]
    flops = []
    for run in runs:
        with FlopCounterMode(display=False) as counter:
            run()
        flops.append(counter.get_total_flops() / 2e9)
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeat):
        for number, run in enumerate(runs):
            start = time.perf_counter()
            run()
            seconds[number].append(time.perf_counter() - start)
    times = [statistics.median(values) for values in seconds]
    return [
        {
            "domains": number + 1,
            "gmacs": round(flops[number], 2),
            "gmacs_ratio": round(flops[number] / flops[0], 3),
            "seconds": round(times[number], 3),
            "seconds_ratio": round(times[number] / times[0], 2),
        }
        for number in range(len(runs))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=(128, 256), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    rows = measure(given.batch, tuple(given.size), given.repeat)
    json.dump({"batch": given.batch, "size": list(given.size), "threads": torch.get_num_threads(), "rows": rows},
              sys.stdout, indent=1)  # fmt: skip
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
