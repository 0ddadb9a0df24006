"""Processes, devices, signals and seeds."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from everseg.config.fields import TrainConfig
from everseg.engine.peers import did_not_meet, refuse_sharding, srun_processes
from everseg.errors import ConfigError, EversegError, Interrupted, TimeBudgetReached
from everseg.runs.lock import release


@contextlib.contextmanager
def keeping_threads() -> Iterator[None]:
    """Give PyTorch its number of CPU threads back at the end.

    A run sets its own number for the whole process (`train.threads`, or what it was begun with). Whatever the caller
    computes afterwards, in a notebook for instance, shall not inherit it.
    """
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_accelerator(train: TrainConfig, *, find_unused: bool = False, training: bool = True) -> Accelerator:
    """Set threads and precision, and join the other processes if a launcher (torchrun, SLURM) started several.

    Args:
        find_unused: some update leaves trainable weights without gradient.
        training: check the needs of training as well: synchronised norms, a batch that can be shared.

    Raises:
        ConfigError: a precision or option the machine cannot honour.
    """
    on_cpu = not torch.cuda.is_available()
    if train.precision == "fp16" and on_cpu:
        raise ConfigError("train.precision: fp16 needs a CUDA device; use bf16 or fp32 here")
    if training and train.sync_norm and on_cpu:
        raise ConfigError(
            "train.sync_norm: synchronised norms need CUDA devices; set train.sync_norm=false here"
        )
    if train.threads:
        torch.set_num_threads(train.threads)
    refuse_sharding(os.environ)
    os.environ.update(srun_processes(os.environ, torch.cuda.device_count()))
    # Accelerate keeps its settings for the whole process; a second run in it may use another precision.
    AcceleratorState._reset_state(reset_partial_state=False)
    precision = {"fp32": "no"}.get(train.precision, train.precision)
    try:
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=precision,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused)],
        )
    except torch.distributed.DistError as error:
        raise did_not_meet(error) from error
    if training and train.batch % (accelerator.num_processes * train.accumulate):
        accelerator.wait_for_everyone()  # a process that ends while another still joins breaks the other's connection
        parts = f" in {train.accumulate} parts each (train.accumulate)" if train.accumulate > 1 else ""
        raise ConfigError(
            f"train.batch: {train.batch} images cannot be shared equally by "
            f"{accelerator.num_processes} processes{parts}; choose a multiple"
        )
    return accelerator


def computes_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bf16; a CPU without them is several times slower than with float32."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a run to save itself and stop."""


class Signals:
    """Tells one request to stop from a second one.

    A launcher passes a signal on that the system has sent to the run already, and SLURM sends SIGTERM some time after
    SIGUSR1. Those are one request. Only a person presses Ctrl-C again because it takes too long.
    """

    WINDOW = 1.0
    """Seconds within which signals belong together."""

    def __init__(self) -> None:
        self._first: float | None = None

    def meaning(self, number: int) -> Literal["stop", "same", "at once"]:
        """Say what a signal that has just come asks for: to stop, nothing more than before, or to end at once."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
            return "stop"
        return "at once" if number == signal.SIGINT and now - self._first > self.WINDOW else "same"


class StopRequest:
    """Notes `SIGNALS` and the end of the time budget; the loop asks at iteration boundaries."""

    TIME_BUDGET = 75

    def __init__(self, max_time: float | None = None) -> None:
        self.received: int | None = None
        self._signals = Signals()
        self.deadline = None if max_time is None else time.monotonic() + max_time
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        with contextlib.suppress(ValueError):  # not the main thread: signals stay with the caller
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        meaning = self._signals.meaning(number)
        if meaning == "at once":
            release()
            os._exit(128 + number)
        if meaning == "stop":
            self.received = number
            # `os.write`: printing from a signal handler may meet a buffer that is being written to.
            os.write(2, b"\nstopping at the next iteration; Ctrl-C again ends at once, unsaved\n")

    def code(self) -> int:
        """0 = go on, a signal number, or `TIME_BUDGET`."""
        if self.received is not None:
            return self.received
        return self.TIME_BUDGET if self.deadline is not None and time.monotonic() > self.deadline else 0

    @staticmethod
    def error(code: int, where: str) -> EversegError:
        """Make the error that ends a saved run."""
        if code == StopRequest.TIME_BUDGET:
            return TimeBudgetReached(
                f"time budget reached; saved at {where}; run the same command to continue"
            )
        name = signal.Signals(code).name
        return Interrupted(f"stopped by {name}; saved at {where}; run the same command to continue", code)
