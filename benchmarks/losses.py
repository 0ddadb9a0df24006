"""Cost of MiB's loss at full resolution: `python -m benchmarks.losses [--threads 1 2] [--repeat N] [--json FILE]`.

Student and teacher logits at stride 16, forward and backward of unbiased cross-entropy and unbiased distillation:
"direct" resizes the logits and writes the formulas down as log-softmax forms, left to autograd; "functions" resizes
them and calls the package's functions of equal resolution; "banded" is `pixelwise_losses`. Times are medians of runs
in turn, so that a busy machine slows all alike; "cpu" is the same of the process's own time on all its threads.
Memory is by how much one run lifts the peak of the resident size over the size before, in a process of its own (Linux).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from everseg.engine.progress import resident_bytes
from everseg.losses import unbiased_cross_entropy, unbiased_distillation, upsample
from everseg.losses.banded import Term, pixelwise_losses

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


def measure(case: str, threads: int, repeat: int) -> dict[str, Any]:
    """Seconds and peak bytes of the three ways, their ratios, and how far the results are apart."""
    torch.set_num_threads(threads)
    given = inputs(case)
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    cpu: dict[str, list[float]] = {form: [] for form in FORMS}
    values, grads = {}, {}
    for form, loss in FORMS.items():  # warm
        values[form] = run(loss, *given)
        assert given[0].grad is not None
        grads[form] = given[0].grad.clone()
    for _ in range(repeat):
        for form, loss in FORMS.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            run(loss, *given)
            seconds[form].append(time.perf_counter() - start)
            cpu[form].append(time.process_time() - start_cpu)
    ratios = [a / b for a, b in zip(seconds["direct"], seconds["banded"], strict=True)]
    memory = {}
    for form in FORMS:
        command = [
            sys.executable,
            "-m",
            "benchmarks.losses",
            "--memory",
            case,
            form,
            "--threads",
            str(threads),
        ]
        memory[form] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    error = (grads["banded"] - grads["direct"]).norm() / grads["direct"].norm()
    return {
        "case": case,
        "shape": dict(zip(("batch", "classes", "old", "height", "width"), CASES[case], strict=True)),
        "threads": threads,
        "seconds": {form: round(statistics.median(times), 4) for form, times in seconds.items()},
        "cpu_seconds": {form: round(statistics.median(times), 4) for form, times in cpu.items()},
        "megabytes": {form: round(size / 2**20, 1) for form, size in memory.items()},
        "time_ratio": round(statistics.median(ratios), 2),
        "time_ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "memory_ratio": round(memory["direct"] / max(memory["banded"], 1), 1),
        "relative_difference": {
            "value": float(abs(values["banded"] / values["direct"] - 1)),
            "gradient": float(error),
        },
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, with ratios to "direct"."""
    heads = ("case", "threads", "way", "seconds", "", "cpu", "", "MB", "")
    lines = [heads]
    for row in rows:
        for form in FORMS:
            cells = [row["case"], str(row["threads"]), form]
            for key, digits in (("seconds", 3), ("cpu_seconds", 3), ("megabytes", 1)):
                figures = row[key]
                cells += [f"{figures[form]:.{digits}f}", f"{figures['direct'] / figures[form]:.1f}x"]
            lines.append(tuple(cells))
    return "\n".join(" ".join(f"{cell:>9}" for cell in line) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--cases", nargs="+", default=[*CASES], choices=[*CASES])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "WAY"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory:
        torch.set_num_threads(given.threads[0])
        sys.stdout.write(str(peak_memory(*given.memory)))
        return
    rows = [measure(case, threads, given.repeat) for case in given.cases for threads in given.threads]
    sys.stdout.write(table(rows) + "\n")
    text = json.dumps({"torch": torch.__version__, "rows": rows}, indent=1)
    if given.json:
        given.json.write_text(text + "\n")
    else:
        sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
