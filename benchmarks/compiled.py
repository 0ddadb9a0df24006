"""What `torch.compile` gains and costs: `python -m benchmarks.compiled [--json FILE]` (minutes: it compiles).

Forward and backward of a student without dropout in training mode, eager against compiled, and the time of the first
compiled iteration. Not part of `python -m benchmarks`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.common import Figure, in_turn, main, medians, ratio
from everseg.models.build import deeplabv3_tiny
from everseg.models.erfnet import erfnet
from everseg.models.model import SegmentationModel


def figures(quick: bool = False) -> list[Figure]:
    """Gain and compile time of ERFNet (512x1024) and of DeepLabV3 on the smallest ResNet (512x512), batch 2."""
    sizes = ((64, 128), (64, 64)) if quick else ((512, 1024), (512, 512))
    made: list[tuple[str, Callable[[], SegmentationModel], tuple[int, int]]] = [
        ("ERFNet", partial(erfnet, dropout=(0, 0)), sizes[0]),
        ("DeepLabV3, smallest ResNet", deeplabv3_tiny, sizes[1]),
    ]
    return [
        figure for name, build, size in made for figure in _compared(name, build, size, 1 if quick else 4)
    ]


def _compared(
    name: str, build: Callable[[], SegmentationModel], size: tuple[int, int], repeat: int
) -> list[Figure]:
    torch.manual_seed(0)
    model = build()
    model.grow({"default": 19})
    model.train()
    image = torch.randn(2, 3, *size)
    compiled = torch.compile(lambda image: model(image)["default"].logits)

    def step(forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        logits = forward(image)
        F.cross_entropy(logits, torch.zeros(2, *logits.shape[-2:], dtype=torch.long)).backward()
        model.zero_grad()

    start = time.perf_counter()
    step(compiled)
    first = time.perf_counter() - start
    ways = {
        "eager": lambda: step(lambda image: model(image)["default"].logits),
        "compiled": lambda: step(compiled),
    }
    seconds = in_turn(ways, repeat)
    what = f"{name}, forward and backward, batch 2 at {size[0]}x{size[1]}, {torch.get_num_threads()} threads"
    return [
        Figure("compiled", f"{what}: compiled over eager", ratio(seconds, *ways), "x", note=medians(seconds)),
        Figure("compiled", f"{what}: first compiled iteration", first, "s", better="lower"),
    ]


if __name__ == "__main__":
    main(figures, argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]))
