"""The classifier inside the losses? `python -m benchmarks.classifier [--compile] [--json FILE]` (minutes).

The 1x1 classifier, the resizing and MiB's two terms of 847 classes, forward and backward to the features and the
weights, batch 1. "plain" writes the formulas down, full-resolution logits and all; "compiled" is `torch.compile` of
that (`--compile`: it takes minutes); "whole" is `pixelwise_losses` with the rows of an image resized at once, as it was
before stripes; "stripes" is `pixelwise_losses`; "fused" is a trial that computes the classifier's product a stripe at a
time, too: neither logits nor their gradient ever exist. That is the idea of the linear cross-entropy kernels of
language models (each block of logits is made, used for loss and gradient, and dropped), in the geometry of images.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Figure, in_turn, main, medians, ratio
from benchmarks.losses import banded, direct
from everseg.losses import banded as owner
from everseg.losses import unbiased_cross_entropy, unbiased_distillation
from everseg.progress import resident_bytes

CLASSES, OLD, WIDTH = 847, 600, 256
SMALLEST = "256x256 at stride 16"
CASES = {SMALLEST: (256, 16), "512x512 at stride 16": (512, 16), "512x512 at stride 4": (512, 4)}
"""Side of the image, stride of the features."""
PAIRS = (("plain", "stripes"), ("plain", "compiled"), ("whole", "stripes"), ("stripes", "fused"))
"""What is compared with what: the second against the first."""
Given = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(side: int, stride: int) -> Given:
    """Features (1, D, h, w), weights (C, D), bias (C,), label (1, H, W) and the teacher's logits (1, K, h, w)."""
    torch.manual_seed(0)
    small = side // stride
    label = torch.randint(0, CLASSES, (1, side, side)).masked_fill(torch.rand(1, side, side) < 0.1, 65535)
    features = torch.randn(1, WIDTH, small, small).requires_grad_()
    weight = (torch.randn(CLASSES, WIDTH) / WIDTH**0.5).requires_grad_()
    bias = torch.zeros(CLASSES).requires_grad_()
    return features, weight, bias, label, 3 * torch.randn(1, OLD, small, small)


def logits_of(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(features, weight[:, :, None, None], bias)


def plain(features: Tensor, weight: Tensor, bias: Tensor, label: Tensor, teacher: Tensor) -> None:
    _direct(features, weight, bias, label, teacher).backward()


def _direct(features: Tensor, weight: Tensor, bias: Tensor, label: Tensor, teacher: Tensor) -> Tensor:
    return direct(logits_of(features, weight, bias), label.masked_fill(label == 65535, 255), teacher)


def whole(features: Tensor, weight: Tensor, bias: Tensor, label: Tensor, teacher: Tensor) -> None:
    before, owner._WHOLE_BYTES = owner._WHOLE_BYTES, 2**40
    stripes(features, weight, bias, label, teacher)
    owner._WHOLE_BYTES = before


def stripes(features: Tensor, weight: Tensor, bias: Tensor, label: Tensor, teacher: Tensor) -> None:
    banded(logits_of(features, weight, bias), label, teacher).backward()


class _Made:
    """Logits (C, h, w) whose rows are computed when they are asked for."""

    def __init__(self, features: Tensor, weight: Tensor, bias: Tensor) -> None:
        self.features, self.weight, self.bias = features, weight, bias

    def __getitem__(self, index: Any) -> Tensor:
        rows = self.features[index]  # (D, h', w)
        return torch.addmm(self.bias[:, None], self.weight, rows.flatten(1)).view(-1, *rows.shape[1:])


def fused(features: Tensor, weight: Tensor, bias: Tensor, label: Tensor, teacher: Tensor) -> None:
    terms = {
        "ce": owner.Term(unbiased_cross_entropy, options={"num_old": OLD}),
        "kd": owner.Term(unbiased_distillation, weight=10.0),
    }
    # Tells the plan sizes and types; takes no memory.
    like = features.detach().new_zeros(()).expand(1, CLASSES, *features.shape[2:])
    plan = owner._Plan(terms, like, label, teacher, None, False)
    factors = [features.new_full((), float(factor)) for factor in plan.factors]
    spare: list[Any] = []
    of_features, of_weight = torch.zeros_like(features), torch.zeros_like(weight)
    of_bias = torch.zeros_like(bias)
    with torch.no_grad():
        made: Any = _Made(features[0], weight, bias)
        for here in plan.stripes:
            stripe = owner._Stripe(plan, 0, here, factors, made, spare, True)
            owner.on_all_threads(stripe.work, features.device)
            assert stripe.grad_rows is not None
            part = plan.resize.rows_adjoint(stripe.grad_rows, here).flatten(1)  # (C, h' * w)
            sources = plan.resize.sources(here)
            seen = features[0, :, sources]
            of_weight.addmm_(part, seen.flatten(1).t())
            of_bias += part.sum(dim=1)
            of_features[0, :, sources] += (weight.t() @ part).view_as(seen)
    features.grad, weight.grad, bias.grad = of_features, of_weight, of_bias


WAYS: dict[str, Callable[..., None]] = {"plain": plain, "whole": whole, "stripes": stripes, "fused": fused}


def gradients(way: Callable[..., None], given: Given) -> list[Tensor]:
    """Run a way; the gradients of features, weights and bias."""
    found = []
    for tensor in given[:3]:
        tensor.grad = None
    way(*given)
    for tensor in given[:3]:
        assert tensor.grad is not None
        found.append(tensor.grad)
    return found


def peak_memory(case: str, way: str) -> int:
    """Bytes that one forward and backward adds to the peak resident size of this, a fresh, process."""
    gradients(WAYS[way], inputs(32, 16))
    given = inputs(*CASES.get(case, (64, 16)))
    before = resident_bytes()
    gradients(WAYS[way], given)
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 - before


def figures(quick: bool = False, *, compile: bool = False) -> list[Figure]:
    """Time, memory and agreement of the ways; "plain" and "compiled" in the smallest case only: they take gigabytes."""
    return [figure for case in CASES for figure in _case(case, quick, compile and case == SMALLEST)]


def _case(case: str, quick: bool, compile: bool) -> list[Figure]:
    side, stride = CASES[case]
    given = inputs(64 if quick else side, stride)
    names = [name for name in WAYS if name != "plain" or case == SMALLEST]
    ways = {name: partial(gradients, WAYS[name], given) for name in names}
    if compile:
        made = torch.compile(_direct)
        ways["compiled"] = partial(gradients, lambda *given: made(*given).backward(), given)
    apart = max(
        float((a - b).norm() / b.norm()) for a, b in zip(ways["fused"](), ways["stripes"](), strict=True)
    )
    seconds = in_turn(ways, 1 if quick else 3)
    command = [sys.executable, "-m", "benchmarks.classifier", "--memory", "quick" if quick else case]
    memory = {
        name: int(subprocess.run([*command, name], capture_output=True, text=True, check=True).stdout)
        for name in names
    }
    used = ", ".join(f"{name} {size / 2**20:.0f} MB" for name, size in memory.items())
    what = f"{CLASSES} classes, {case}, {torch.get_num_threads()} threads: classifier and losses"
    pairs = [(other, way) for other, way in PAIRS if other in ways and way in ways]
    return [
        *(Figure("classifier", f"{what}, {way} against {other}, time", ratio(seconds, other, way), "x",
                 note=medians(seconds)) for other, way in pairs),
        *(Figure("classifier", f"{what}, {way} against {other}, memory", memory[other] / max(memory[way], 1), "x",
                 note=used) for other, way in pairs if way in memory),
        Figure("classifier", f"{what}, relative difference of fused gradients", apart, ""),
    ]  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        sys.stdout.write(str(peak_memory(sys.argv[2], sys.argv[3])))
    else:
        parser = argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--compile", action="store_true", help="also torch.compile of the plain formulas")
        main(figures, parser)
