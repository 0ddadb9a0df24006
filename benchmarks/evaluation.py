"""Cost of evaluation: `python -m benchmarks.evaluation [--quick] [--json FILE]`.

Arg-max by bands against resizing all logits first, confusion counts against one-hot counting and a masked `bincount`,
both together per image, and the memory of an image seen through windows as it grows. Ways take turns, so that a busy
machine slows all alike; memory is by how much one run lifts the peak of the resident size of a fresh process (Linux).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Figure, in_turn, main, medians, ratio
from everseg.inference.windows import sliding_ids
from everseg.losses.argmax import predict_ids
from everseg.metrics import ConfusionMatrix
from everseg.progress import resident_bytes
from everseg.runs.input_form import Windows

PART = "evaluation"
CASES = {
    "21 classes, 512x512, stride 16": (21, (32, 32), (512, 512)),
    "151 classes, 512x512, stride 16": (151, (32, 32), (512, 512)),
    "19 classes, 1024x2048, stride 8": (19, (128, 256), (1024, 2048)),
    "19 classes, 1024x2048, no stride": (19, (1024, 2048), (1024, 2048)),
}
"""Classes, small and full size."""
SLIDING_WIDTH, SLIDING_CLASSES, STRIDE = 1024, 60, 16


def small_logits(classes: int, size: tuple[int, int]) -> Tensor:
    """Logits (1, C, h, w) with regions, as networks give them, and noise."""
    torch.manual_seed(0)
    coarse = torch.randn(1, classes, 2 + size[0] // 8, 2 + size[1] // 8)
    regions = F.interpolate(coarse, size, mode="bilinear", align_corners=False)
    return 6 * regions + torch.randn(1, classes, *size)


def plain(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The usual way: all logits at full resolution, then their arg-max."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1).to(torch.uint8)


def ids_pair(classes: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Prediction and label (1, H, W) uint8 of regions; a tenth of the labels are wrong, a twentieth ignored."""
    torch.manual_seed(1)
    coarse = torch.randint(0, classes, (1, 1, size[0] // 32, size[1] // 32)).float()
    label = F.interpolate(coarse, size).to(torch.uint8)[0]
    other = torch.randint(0, classes, label.shape, dtype=torch.uint8)
    prediction = torch.where(torch.rand(label.shape) < 0.1, other, label)
    return prediction, label.masked_fill(torch.rand(label.shape) < 0.05, 255)


def one_hot(prediction: Tensor, label: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hits, false alarms and misses per class from (B, C, H, W) maps of zeros and ones, ignored pixels left out."""
    shape = (len(label), classes + 1, *label.shape[1:])
    seen = torch.zeros(shape).scatter_(1, prediction.long()[:, None], 1)
    true = torch.zeros(shape).scatter_(1, label.long().clamp(max=classes)[:, None], 1)
    ignored, seen, true = true[:, classes:], seen[:, :classes], true[:, :classes]
    hits = (seen * true).sum((0, 2, 3))
    alarms = (seen * (1 - true - ignored)).sum((0, 2, 3))
    return hits, alarms, ((1 - seen) * true).sum((0, 2, 3))


def masked_bincount(prediction: Tensor, label: Tensor, classes: int) -> np.ndarray:
    """The usual counts: `numpy.bincount` of C * label + prediction where the label is not ignored."""
    truth, seen = label.numpy().reshape(-1), prediction.numpy().reshape(-1)
    valid = truth != 255
    index = classes * truth[valid].astype(np.int64) + seen[valid]
    return np.bincount(index, minlength=classes**2).reshape(classes, classes)


def counts(prediction: Tensor, label: Tensor, classes: int) -> Tensor:
    """Ours."""
    matrix = ConfusionMatrix(classes)
    matrix.update(prediction, label)
    return matrix.counts


def figures(quick: bool = False) -> list[Figure]:
    """All figures of this part; under two minutes."""
    cases = dict(list(CASES.items())[:1]) if quick else CASES
    repeat = 2 if quick else 7
    found: list[Figure] = []
    for name, (classes, small, size) in cases.items():
        found += argmax_figures(name, classes, small, size, repeat)
        if small != size:
            found += counts_figures(name.rpartition(",")[0], classes, size, repeat)
    name = list(cases)[-2 if len(cases) > 1 else 0]
    found.append(image_figure(name, *cases[name], repeat))
    return [*found, *sliding_figures()]


def argmax_figures(
    name: str, classes: int, small: tuple[int, int], size: tuple[int, int], repeat: int
) -> list[Figure]:
    """Time and memory of the arg-max by bands over the usual way's."""
    logits = small_logits(classes, small)
    assert (predict_ids(logits, size) != plain(logits, size)).float().mean() < 1e-4
    ways: dict[str, Callable[[], object]] = {
        "usual": lambda: plain(logits, size),
        "resizing alone": lambda: F.interpolate(logits, size, mode="bilinear", align_corners=False),
        "bands": lambda: predict_ids(logits, size),
    }
    if small == size:
        del ways["resizing alone"]
    seconds = in_turn(ways, repeat)
    rate = ratio(seconds, "usual", "bands")
    usual, bands = (peak(f"argmax_peak({way!r}, {name!r})") for way in ("plain", "predict_ids"))
    note = f"{usual / 2**20:.1f} and {bands / 2**20:.1f} MB"
    return [
        Figure(
            PART,
            f"arg-max by bands, faster than resize + argmax: {name}",
            rate,
            "x",
            1,
            note=medians(seconds),
        ),
        Figure(PART, f"arg-max by bands, less memory: {name}", usual / max(bands, 2**16), "x", 1, note=note),
    ]


def counts_figures(name: str, classes: int, size: tuple[int, int], repeat: int) -> list[Figure]:
    """Time of the counts of one image under those of one-hot counting and of a masked bincount."""
    prediction, label = ids_pair(classes, size)
    ours = counts(prediction, label, classes)
    np.testing.assert_array_equal(ours.numpy(), masked_bincount(prediction, label, classes))
    assert torch.equal(one_hot(prediction, label, classes)[0], ours.diagonal().float())
    seconds = in_turn(
        {
            "one-hot": lambda: one_hot(prediction, label, classes),
            "bincount": lambda: masked_bincount(prediction, label, classes),
            "ours": lambda: counts(prediction, label, classes),
        },
        repeat,
    )
    note = medians(seconds)
    return [
        Figure(
            PART, f"counts, faster than one-hot: {name}", ratio(seconds, "one-hot", "ours"), "x", 5, note=note
        ),
        Figure(
            PART,
            f"counts, faster than bincount: {name}",
            ratio(seconds, "bincount", "ours"),
            "x",
            1,
            note=note,
        ),
    ]


def image_figure(
    name: str, classes: int, small: tuple[int, int], size: tuple[int, int], repeat: int
) -> Figure:
    """From small logits to counts, both usual ways in one against ours."""
    logits, (_, label) = small_logits(classes, small), ids_pair(classes, size)
    ways: dict[str, Callable[[], object]] = {
        "resize, argmax, one-hot": lambda: one_hot(plain(logits, size), label, classes),
        "ours": lambda: counts(predict_ids(logits, size), label, classes),
    }
    seconds = in_turn(ways, repeat)
    rate = ratio(seconds, "resize, argmax, one-hot", "ours")
    return Figure(
        PART, f"an image from logits to counts, faster: {name}", rate, "x", 5, note=medians(seconds)
    )


def sliding_figures() -> list[Figure]:
    """Bytes that each further pixel of a high image takes, seen through windows, over those of its logits."""
    low, high = (peak(f"sliding_peak({rows})") for rows in (1024, 5120))
    each = (high - low) / (4096 * SLIDING_WIDTH)
    note = f"{low / 2**20:.1f} MB at 1024 rows, {high / 2**20:.1f} at 5120; full logits: {4 * SLIDING_CLASSES} bytes"
    what = f"windows of 256, {SLIDING_CLASSES} classes: bytes per further pixel, image given"
    return [Figure(PART, what, each, "bytes", 4, "lower", note)]


def peak(call: str) -> int:
    """Bytes by which a call of this module lifts the peak resident size of a fresh process."""
    code = f"import torch; torch.set_num_threads({torch.get_num_threads()}); from benchmarks import evaluation as e"
    command = [sys.executable, "-c", f"{code}; print(e.{call})"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def lifted(work: Callable[[], object]) -> int:
    """Bytes between the resident size before a work and its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, that of making the inputs
    before = resident_bytes()
    work()
    status = Path("/proc/self/status").read_text()
    return max(0, int(status.partition("VmHWM:")[2].split()[0]) * 1024 - before)


def argmax_peak(way: str, name: str) -> int:
    """Of one arg-max."""
    classes, small, size = CASES[name]
    work, logits = {"plain": plain, "predict_ids": predict_ids}[way], small_logits(classes, small)
    work(logits[:, :, :8, :8], (16, 16))  # libraries are loaded, threads are there
    return lifted(lambda: work(logits, size))


def sliding_peak(rows: int) -> int:
    """Of an image seen through windows, by a network that costs nothing."""

    def see(part: Tensor) -> Tensor:
        grey = F.avg_pool2d(part.float().mean(1, keepdim=True), STRIDE)
        return grey * torch.linspace(-1, 1, SLIDING_CLASSES)[:, None, None]

    image = torch.zeros(3, rows, SLIDING_WIDTH, dtype=torch.uint8)
    windows = Windows(256)
    sliding_ids(see, image[:, :300, :300], windows)
    return lifted(lambda: sliding_ids(see, image, windows))


if __name__ == "__main__":
    main(figures, argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]))
