"""Progress display of a run: a live bar on a terminal, plain lines elsewhere.

Everything goes to stderr, so that stdout stays free for tables and JSON.
"""

from __future__ import annotations

import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as RichProgress

PLAIN_SECONDS = 10.0
"""Shortest time between two plain lines of one bar."""


def memory_text() -> str:
    """Describe the memory in use: the peak on the GPU if CUDA is in use, else this process's resident memory."""
    torch = sys.modules.get("torch")  # if nothing has imported torch, no GPU is in use
    if torch is not None and torch.cuda.is_initialized():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f}G gpu"
    return f"{resident_bytes() / 2**30:.1f}G"


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes. Systems without /proc only tell its peak."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes


def time_text(seconds: float) -> str:
    """Format seconds as "m:ss" or "h:mm:ss"."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


_UNITS = {"s": 1, "min": 60, "h": 3600}


def seconds_of(text: str) -> float | None:
    """Read a duration such as "90s", "10min" or "1.5h"; None if it is not one.

    >>> seconds_of("10min"), seconds_of("10")
    (600.0, None)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min|h)", text.strip())
    return float(match[1]) * _UNITS[match[2]] if match and float(match[1]) > 0 else None


class Progress:
    """Shows one bar at a time: call `begin`, then `update` repeatedly, then `end`. `message` may be called at any time.

    Args:
        quiet: print nothing at all.
        rank: only rank 0 prints.
        stream: where to print; default stderr.
        clock: seconds, monotonic; replaced in tests.
        columns: width of the display; default the terminal's width.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        rank: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        columns: int | None = None,
    ) -> None:
        self._silent = quiet or rank != 0
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._console = Console(file=self._stream, highlight=False, markup=False, width=columns)
        self._live: RichProgress | None = None
        self._title = ""
        self._total = self._start = self._done = 0
        self._began = self._printed = 0.0
        self._detail = ""

    def begin(self, title: str, total: int, start: int = 0) -> None:
        """Start a bar. If another bar is open, it is closed first.

        Args:
            title: the current work ("step 2/6 epoch 3/30").
            total: number of iterations.
            start: iterations that a resumed run has done before; the estimate of the time left excludes them.
        """
        self.end()
        self._title, self._total, self._start, self._done = title, total, start, start
        self._began = self._clock()
        self._printed = self._began
        self._detail = ""
        if self._silent or not self._console.is_terminal:
            return
        self._live = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=self._console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()
        self._live.add_task(title, total=total, completed=start, detail="")

    def update(
        self,
        iteration: int,
        terms: Mapping[str, float] | None = None,
        lr: float = 0.0,
        images_per_second: float = 0.0,
        measured: Mapping[str, float] | None = None,
    ) -> None:
        """Move the bar.

        Args:
            iteration: iterations done so far, `start` included.
            terms: loss term -> value, weights applied; their sum is shown as the loss. None if nothing is trained.
            lr: learning rate of this iteration; 0 hides it.
            images_per_second: throughput over all processes; 0 hides it.
            measured: other numbers, each shown under its name.
        """
        if self._silent:
            return
        self._done = iteration
        self._detail = self._describe(terms or {}, lr, images_per_second, measured or {})
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=iteration, detail=self._detail)
        elif self._clock() - self._printed >= PLAIN_SECONDS:
            self._line()

    def message(self, text: str) -> None:
        """Print a separate line above the bar."""
        if not self._silent:
            self._console.print(text, soft_wrap=True)

    def end(self) -> None:
        """Close the bar and print its last state as a line. Do nothing if no bar is open."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._title and self._detail and not self._silent:
            self._line()
        self._title = self._detail = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def _describe(
        self,
        terms: Mapping[str, float],
        lr: float,
        images_per_second: float,
        measured: Mapping[str, float],
    ) -> str:
        parts = []
        if len(terms) > 1:
            each = " ".join(f"{name} {value:.3f}" for name, value in terms.items())
            parts.append(f"loss {sum(terms.values()):.3f} ({each})")
        elif terms:
            parts.append(" ".join(f"{name} {value:.3f}" for name, value in terms.items()))
        parts += [f"{name} {value:.3g}" for name, value in measured.items()]
        if lr:
            parts.append(f"lr {lr:.1e}")
        if images_per_second:
            parts.append(f"{images_per_second:.1f} img/s")
        parts.append(memory_text())
        # The speed is measured on the iterations of this process only.
        fresh = self._done - self._start
        if fresh > 0 and self._done < self._total:
            spent = self._clock() - self._began
            parts.append(f"left {time_text(spent / fresh * (self._total - self._done))}")
        return "  ".join(parts)

    def _line(self) -> None:
        self._printed = self._clock()
        self._console.print(f"{self._title}  {self._done}/{self._total}  {self._detail}", soft_wrap=True)


@contextmanager
def counting(title: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show how many samples are done. The bar appears with the first sample.

    Yields:
        A function to call with (done, total).
    """
    with Progress(quiet=quiet) as progress:
        started: list[int] = []

        def advance(done: int, total: int) -> None:
            if not started:
                started.append(total)
                progress.begin(title, total)
            progress.update(done)

        yield advance


def counting_bytes(title: str, *, quiet: bool = False) -> Callable[[int, int], None]:
    """Show how much of a download is done: in place on a terminal, else as a line every 10 s.

    Returns:
        A function to call with (bytes done, total bytes or 0 if unknown).
    """
    terminal = sys.stderr.isatty()
    last = [0.0]

    def advance(done: int, total: int) -> None:
        now = time.monotonic()
        if quiet or (now - last[0] < (0.2 if terminal else PLAIN_SECONDS) and done != total):
            return
        last[0] = now
        whole = f" of {total / 1e6:.0f}" if total else ""
        end = "\r" if terminal and done != total else "\n"
        sys.stderr.write(f"{title}: {done / 1e6:.0f}{whole} MB{end}")
        sys.stderr.flush()

    return advance
