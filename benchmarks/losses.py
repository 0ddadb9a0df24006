"""Cost of MiB's loss at full resolution: `python -m benchmarks.losses [--cases ade voc] [--repeat N] [--json FILE]`.

Student and teacher logits at stride 16, forward and backward of unbiased cross-entropy and unbiased distillation:
"direct" resizes the logits and writes the formulas down as log-softmax forms, left to autograd; "functions" resizes
them and calls the package's functions of equal resolution; "banded" is `pixelwise_losses`. Times are medians of runs
in turn, so that a busy machine slows all alike. Memory is by how much one run lifts the peak of the resident size over
the size before, in a process of its own (Linux).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Figure, in_turn, main, medians, ratio
from everseg.losses import unbiased_cross_entropy, unbiased_distillation, upsample
from everseg.losses.banded import Term, pixelwise_losses
from everseg.progress import resident_bytes

CASES = {"ade": (2, 151, 101, 512, 512), "voc": (2, 21, 16, 512, 512)}
"""Batch, classes, old classes, height, width."""
STRIDE = 16
KD_WEIGHT = 10.0
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def direct(logits: Tensor, label: Tensor, teacher: Tensor) -> Tensor:
    """MiB's two terms as their equations stand."""
    size, num_old = label.shape[1:], teacher.shape[1]
    logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    teacher = F.interpolate(teacher, size, mode="bilinear", align_corners=False)
    normaliser = torch.logsumexp(logits, dim=1, keepdim=True)
    old_or_background = torch.logsumexp(logits[:, :num_old], dim=1, keepdim=True) - normaliser
    filler = torch.zeros_like(logits[:, 1:num_old])
    log_prob = torch.cat([old_or_background, filler, logits[:, num_old:] - normaliser], dim=1)
    merged = label * (label >= num_old)
    entropy = F.nll_loss(log_prob, merged, ignore_index=255, reduction="none").mean()
    background_or_new = torch.cat([logits[:, :1], logits[:, num_old:]], dim=1)
    background = torch.logsumexp(background_or_new, dim=1, keepdim=True) - normaliser
    log_prob = torch.cat([background, logits[:, 1:num_old] - normaliser], dim=1)
    distilled = -(torch.softmax(teacher, dim=1) * log_prob).mean()
    return entropy + KD_WEIGHT * distilled


def functions(logits: Tensor, label: Tensor, teacher: Tensor) -> Tensor:
    """The same from the package's functions of equal resolution."""
    size = label.shape[1:]
    logits, teacher = upsample(logits, size), upsample(teacher, size)
    entropy = unbiased_cross_entropy(logits, label, num_old=teacher.shape[1])
    return entropy + KD_WEIGHT * unbiased_distillation(logits, teacher)


def banded(logits: Tensor, label: Tensor, teacher: Tensor) -> Tensor:
    """The same, band by band."""
    terms = {
        "ce": Term(unbiased_cross_entropy, options={"num_old": teacher.shape[1]}),
        "kd": Term(unbiased_distillation, weight=KD_WEIGHT),
    }
    return torch.stack([*pixelwise_losses(terms, logits, label, teacher).values()]).sum()


FORMS: dict[str, Loss] = {"direct": direct, "functions": functions, "banded": banded}


def inputs(case: str) -> tuple[Tensor, Tensor, Tensor]:
    """Small logits of student and teacher, and a label with ignored pixels."""
    batch, classes, old, height, width = CASES[case]
    torch.manual_seed(0)
    small = (height // STRIDE, width // STRIDE)
    label = torch.randint(0, classes, (batch, height, width))
    label[torch.rand(batch, height, width) < 0.1] = 255
    logits = 3 * torch.randn(batch, classes, *small)
    return logits.requires_grad_(), label, 3 * torch.randn(batch, old, *small)


def run(loss: Loss, logits: Tensor, label: Tensor, teacher: Tensor) -> Tensor:
    """Forward and backward."""
    logits.grad = None
    value = loss(logits, label, teacher)
    value.backward()
    return value.detach()


def peak_memory(case: str, form: str) -> int:
    """Bytes that one forward and backward adds to the peak resident size of this, a fresh, process."""
    logits, label, teacher = inputs(case)
    few = logits.detach()[:, :, :2, :2].clone().requires_grad_(), label[:, :8, :8], teacher[:, :, :2, :2]
    run(FORMS[form], *few)  # libraries are loaded, threads are there
    before = resident_bytes()
    run(FORMS[form], logits, label, teacher)
    # not getrusage: its peak includes that of the process that started this one
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 - before


def measure(case: str, threads: int, repeat: int) -> list[Figure]:
    """Time and memory of the banded way against the direct formula, and how far the results are apart."""
    given = inputs(case)
    ways = {form: partial(run, loss, *given) for form, loss in FORMS.items()}
    values, grads = {}, {}
    for form, way in ways.items():  # warm
        values[form] = way()
        assert given[0].grad is not None
        grads[form] = given[0].grad.clone()
    seconds = in_turn(ways, repeat, warm=0)
    memory = {form: _memory_of(case, form, threads) for form in FORMS}
    megabytes = ", ".join(f"{form} {size / 2**20:.0f} MB" for form, size in memory.items())
    batch, classes, old, height, width = CASES[case]
    name = f"{batch}x{classes}x{height}x{width}, {old} old classes, {threads} threads: banded against direct"
    error = (grads["banded"] - grads["direct"]).norm() / grads["direct"].norm()
    return [
        Figure("losses", f"{name}, time", ratio(seconds, "direct", "banded"), "x", 3, note=medians(seconds)),
        Figure(
            "losses", f"{name}, memory", memory["direct"] / max(memory["banded"], 1), "x", 8, note=megabytes
        ),
        Figure("losses", f"{name}, relative difference of the gradient", float(error), ""),
    ]


def _memory_of(case: str, form: str, threads: int) -> int:
    """`peak_memory` of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.losses", "--memory", case, form, str(threads)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def figures(quick: bool = False, *, cases: Sequence[str] = tuple(CASES), repeat: int = 5) -> list[Figure]:
    """Both cases with the threads that torch uses."""
    threads = torch.get_num_threads()
    return [figure for case in cases for figure in measure(case, threads, 1 if quick else repeat)]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        torch.set_num_threads(int(sys.argv[4]))
        sys.stdout.write(str(peak_memory(*sys.argv[2:4])))
    else:
        parser = argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--cases", nargs="+", default=[*CASES], choices=[*CASES])
        parser.add_argument("--repeat", type=int, default=5)
        main(figures, parser)
