"""Time one form of a model in a process of its own, so that its memory is its own: `python -m` this, a job on stdin.

PyTorch is imported only for the form that it runs.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

WARM = 3
"""Runs before the first that is timed."""
LEAST = 5
"""Runs at least, however long they take."""
SECONDS = 20.0
"""Time for all timed runs of one kind."""
Run = Callable[[np.ndarray], np.ndarray]


def measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """Load a form, and time it from pixels to masks.

    Args:
        job: engine ("torch", "onnxruntime" or "openvino"), bundle, file (of ONNX), branch, shape (B, H, W, C) of the
            larger batch, kind of its values, threads, runs; builder for your own architecture (FILE.py:NAME).

    Returns:
        load (seconds), latency (seconds of every run on one image), batches (the same on the batch), memory (bytes
        that loading and running on one image added, at the peak).
    """
    count, height, width, channels = job["shape"]
    noise = (
        np.random.default_rng(0)
        .integers(0, 256, (count, height, width, channels), np.uint8)
        .astype(job["kind"])
    )
    open_ = {"torch": _torch, "onnxruntime": _onnxruntime, "openvino": _openvino}[job["engine"]]
    prepare = open_(job)
    before = _resident()
    begun = time.perf_counter()
    run = prepare()
    loaded = time.perf_counter() - begun
    latency = _timed(run, noise[:1], job["runs"])
    memory = max(0, _peak() - before)
    batches = _timed(run, noise, job["runs"]) if count > 1 else latency
    return {"load": loaded, "latency": latency, "batches": batches, "memory": memory}


def _timed(run: Run, images: np.ndarray, runs: int) -> list[float]:
    for _ in range(WARM):
        run(images)
    found: list[float] = []
    while len(found) < runs and (len(found) < LEAST or sum(found) < SECONDS):
        begun = time.perf_counter()
        run(images)
        found.append(time.perf_counter() - begun)
    return found


def _torch(job: Mapping[str, Any]) -> Callable[[], Run]:
    import torch

    from everseg import registry
    from everseg.inference.predict import load
    from everseg.losses.reading import read_ids

    torch.set_num_threads(job["threads"])

    def prepare() -> Run:
        builder = None if job["builder"] is None else registry.resolve("model", job["builder"])
        model = load(job["bundle"], builder=builder)

        @torch.no_grad()
        def run(images: np.ndarray) -> np.ndarray:
            given = torch.from_numpy(images.transpose(0, 3, 1, 2)).to(model.device)
            output = model.see(given, job["branch"])
            ids: np.ndarray = read_ids(output, model.model.readout, images.shape[1:3]).cpu().numpy()
            return ids

        return run

    return prepare


def _onnxruntime(job: Mapping[str, Any]) -> Callable[[], Run]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    options.log_severity_level = 3

    def prepare() -> Run:
        path = Path(job["bundle"]) / job["file"]
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda images: session.run(["mask"], {"image": images})[0]

    return prepare


def _openvino(job: Mapping[str, Any]) -> Callable[[], Run]:
    import openvino

    # Where the processor has bfloat16, OpenVINO would compute in it by itself, and some pixels get other classes.
    settings = {
        "INFERENCE_NUM_THREADS": job["threads"], "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32",
    }  # fmt: skip

    def prepare() -> Run:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(Path(job["bundle"]) / job["file"]), "CPU", settings)
        return lambda images: compiled({"image": images})["mask"]

    return prepare


def _resident() -> int:
    """Bytes of memory that this process holds now; of its peak where the system does not tell."""
    return _status("VmRSS")


def _peak() -> int:
    """Bytes of memory that this process held at most."""
    return _status("VmHWM")


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
    except (OSError, StopIteration):
        # Not on Linux, where this would count the memory that the parent held when it started this process.
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(json.load(sys.stdin))))
