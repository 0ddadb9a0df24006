"""How long each form of a bundle takes on this machine, and how much memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from everseg.data.batches.parallel import available_cores
from everseg.deploy.bundle import Bundle, open_bundle
from everseg.display import Piece, Result, counted, figure, size, table
from everseg.errors import ConfigError, EversegError
from everseg.progress import counting
from everseg.runs.model_folder import PRECISIONS, WEIGHTS

RUNS, BATCH = 20, 4
SIDE = 512
"""Side of the image, where the model does not say one."""


@dataclass(frozen=True)
class Form:
    """A form of the model, as it was measured."""

    name: str
    bytes: int
    """Size of its file."""
    load: float
    """Seconds until it is ready."""
    latency: float
    """Seconds for one image, from pixels to the mask; median of the runs."""
    slowest: float
    """The same in the slowest tenth of the runs (90th percentile)."""
    throughput: float
    """Images in a second, in batches; median of the runs."""
    memory: int
    """Bytes that loading and predicting one image added to a process, at the peak."""
    runs: int


@dataclass(frozen=True, repr=False)
class Bench(Result):
    """Latency, throughput and memory of each form of a bundle on this machine."""

    path: Path
    size: tuple[int, int]
    """(H, W) of the images."""
    threads: int
    batch: int
    """Images at once, for the throughput."""
    forms: tuple[Form, ...]
    notes: tuple[str, ...] = ()
    """Forms that could not be measured."""

    def shown(self) -> Iterator[Piece]:
        first = self.forms[0].latency if self.forms else 1.0
        columns = ["form", "size", "latency ms", "90 %", "speed", "images/s", "memory", "load s", "runs"]
        rows = [
            [
                form.name, size(form.bytes), figure(1000 * form.latency), figure(1000 * form.slowest),
                f"{figure(first / form.latency, digits=2)} x", figure(form.throughput), size(form.memory),
                figure(form.load, digits=2), form.runs,
            ]
            for form in self.forms
        ]  # fmt: skip
        height, width = self.size
        title = f"{self.path}: {height} x {width} pixels, {counted(self.threads, 'thread')}"
        yield table(columns, rows, title=title, right="|".join(columns[1:]))
        yield (
            f"latency: median for one image of noise, from pixels to the mask; images/s: in batches of {self.batch}; "
            "memory: what loading and predicting one image added to a process"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path), "size": list(self.size), "threads": self.threads, "batch": self.batch,
            "forms": [asdict(form) for form in self.forms], "notes": list(self.notes),
        }  # fmt: skip


def bench(
    bundle: str | Path,
    *,
    size: str | None = None,
    domain: str | None = None,
    runs: int = RUNS,
    threads: int | None = None,
    model: str | None = None,
    quiet: bool = False,
) -> Bench:
    """Measure each form of a bundle: PyTorch, its ONNX files by onnxruntime, and by OpenVINO where that is installed.

    Each form runs in a process of its own, one after the other, on noise: the content changes no time.

    Args:
        size: "HEIGHTxWIDTH" of the images; default what the model resizes to, its window, or 512x512.
        domain: the domain, or branch, that is measured; default the first.
        runs: timed runs of each form; fewer (at least 5) where they take more than 20 s.
        threads: default the processors that this process may use.
        model: "FILE.py:NAME" of your own architecture, if the bundle has one.
        quiet: print no progress.

    Raises:
        ConfigError: an unknown domain, or a size that is none.
        CheckpointError: the bundle is missing or damaged.
    """
    opened = open_bundle(bundle)
    about = opened.about
    branches = {**{name: name for name in about.spaces}, **about.domains}
    if domain is not None and domain not in branches:
        raise ConfigError(f"--domain {domain}: the model of {bundle} knows {', '.join(branches)}")
    branch = branches[domain] if domain is not None else next(iter(about.spaces))
    sides = _sides(opened, size)
    threads = threads or available_cores()
    channels = about.form.channels
    job = {
        "bundle": str(opened.path), "branch": branch, "threads": threads, "runs": runs, "builder": model,
        "shape": [BATCH, *sides, 3 if channels is None else len(channels)],
        "kind": "uint8" if channels is None else channels.array_type.name,
    }  # fmt: skip
    found, notes = [], []
    planned = list(_planned(opened, branch))
    with counting("measuring", quiet=quiet) as advance:
        for number, (name, engine, file) in enumerate(planned):
            told = _in_a_process({**job, "engine": engine, "file": file})
            if isinstance(told, str):
                notes.append(f"{name} could not be measured: {told}")
            else:
                found.append(_form(name, (opened.path / file).stat().st_size, told))
            advance(number + 1, len(planned))
    if find_spec("openvino") is None and about.onnx:
        notes.append("OpenVINO is not installed (pip install 'everseg[openvino]'), so it was not measured")
    if not found:
        raise EversegError("; ".join(notes))
    return Bench(opened.path, sides, threads, BATCH, tuple(found), tuple(notes))


def _sides(bundle: Bundle, asked: str | None) -> tuple[int, int]:
    form = bundle.about.form
    if asked is None:
        return form.resized_to or ((form.window, form.window) if form.window else (SIDE, SIDE))
    parts = asked.split("x")
    if len(parts) != 2 or not all(
        part.isascii() and part.isdigit() and 0 < int(part) <= 16384 for part in parts
    ):
        raise ConfigError(f"--size {asked}: expected HEIGHTxWIDTH in pixels, such as 512x1024")
    return int(parts[0]), int(parts[1])


def _planned(bundle: Bundle, branch: str) -> Iterator[tuple[str, str, str]]:
    """Name, engine and file of each form."""
    yield "PyTorch", "torch", WEIGHTS
    for engine, name in (("onnxruntime", "onnxruntime"), ("openvino", "OpenVINO")):
        if find_spec(engine) is None:
            continue
        for precision in PRECISIONS:
            if file := bundle.about.onnx_files(precision).get(branch):
                yield f"{name} {precision}", engine, file


def _in_a_process(job: Mapping[str, Any]) -> Mapping[str, Any] | str:
    """Measure in a process of its own. Return what it found, or why it could not."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"])}
    done = subprocess.run(
        [sys.executable, "-m", "everseg.deploy.bench_one"], input=json.dumps(job), env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"its process ended with {done.returncode}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _form(name: str, bytes_: int, told: Mapping[str, Any]) -> Form:
    latency: Sequence[float] = told["latency"]
    return Form(
        name, bytes_, told["load"], float(np.median(latency)), float(np.quantile(latency, 0.9)),
        BATCH / float(np.median(told["batches"])), told["memory"], len(latency),
    )  # fmt: skip
