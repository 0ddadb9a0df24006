"""What each extra domain costs a training iteration: `python -m benchmarks.domain_cost [--size H W] [--repeat N]`.

Counts the multiply-adds of one iteration (student and teacher, forward and backward) with 1, 2 ... domains, for MDIL
with adapters, MDIL with a decoder per domain only, and multi-task training; and times the same iterations interleaved,
so that a busy machine slows all rows alike.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from everseg.labels import LabelSpace
from everseg.methods.base import Method, StepContext
from everseg.methods.ft import FineTuning
from everseg.methods.mdil import MDIL
from everseg.models.erfnet import erfnet
from everseg.models.model import frozen_copy
from everseg.scenarios.steps import Source, Step
from everseg.types import Batch

CLASSES = 19
DOMAINS = 4
KINDS = ("mdil, adapter", "mdil, decoder", "multi-task")
"""Method and, for MDIL, what a domain owns (`per_branch`); multi-task training with adapters."""


def iteration_of(
    kind: str, domains: int, batch: int, size: tuple[int, int], options: Mapping[str, Any] | None = None
) -> Callable[[], None]:
    """Make the function that runs one training iteration (no optimiser) with so many domains.

    MDIL trains the last domain and holds the others; multi-task training takes a batch of the next domain in turn.

    Args:
        kind: one of `KINDS`.
        options: further options of `erfnet`.
    """
    torch.manual_seed(0)
    name, _, own = kind.partition(", ")
    model = erfnet(**{"per_branch": own or "adapter", **(options or {})})
    names = [f"domain {i}" for i in range(domains)]
    method: Method
    if name == "mdil":
        method, trained = MDIL(), names[-1:]
        for index in range(domains):
            teacher = frozen_copy(model) if index else None
            step = _step(index, names[: index + 1], names[index : index + 1])
            method.prepare_model(model, step)
    else:
        method, trained, teacher, step = FineTuning(), names, None, _step(0, names, names)
        method.prepare_model(model, step)
    model.train()
    ctx = StepContext(step, model, model, teacher)
    image, label = torch.rand(batch, 3, *size), torch.randint(0, CLASSES, (batch, *size))
    turns = itertools.cycle(Batch(image, label, domain) for domain in trained)

    def run() -> None:
        for terms in method.losses(next(turns), ctx):
            model.zero_grad(set_to_none=True)
            torch.stack([*terms.values()]).sum().backward()

    return run


def _step(index: int, known: Sequence[str], trained: Sequence[str]) -> Step:
    space = LabelSpace((tuple(range(CLASSES)),), tuple(f"class {i}" for i in range(CLASSES)), None)
    sources = tuple(Source(name, name, "train", (0,), bytes(256)) for name in trained)
    return Step(index, sources, (), dict.fromkeys(known, space), dict.fromkeys(trained, CLASSES))


def multiply_adds(run: Callable[[], None]) -> int:
    """Multiply-adds of the convolutions and matrix products in a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def measure(batch: int, size: tuple[int, int], repeat: int) -> list[dict[str, Any]]:
    """A row per kind and number of domains: multiply-adds (billions) and seconds of an iteration.

    The ratios are to an iteration of the first domain with MDIL and adapters.
    """
    cases = [(kind, number) for kind in KINDS for number in range(1, DOMAINS + 1)]
    runs = [iteration_of(kind, number, batch, size) for kind, number in cases]
    gmacs = [multiply_adds(run) / 1e9 for run in runs]
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeat):
        for number, run in enumerate(runs):
            start = time.perf_counter()
            run()
            seconds[number].append(time.perf_counter() - start)
    times = [statistics.median(values) for values in seconds]
    return [
        {
            "kind": kind,
            "domains": number,
            "gmacs": round(work, 2),
            "gmacs_ratio": round(work / gmacs[0], 3),
            "seconds": round(spent, 3),
            "seconds_ratio": round(spent / times[0], 2),
        }
        for (kind, number), work, spent in zip(cases, gmacs, times, strict=True)
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
