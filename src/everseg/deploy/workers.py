"""Predictions in processes of their own, several at a time: for `everseg serve --workers`."""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from everseg.deploy.http_server import RefusedError

_START = 300.0
"""Seconds until a process must have loaded its models."""
_STOPPED = "The server is being stopped."


@dataclass(frozen=True)
class Job:
    """What every process is told: a function that makes what answers, and its arguments. Both must be picklable."""

    make: Callable[..., Callable[..., Any]]
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Workers:
    """Some processes that all do the same. One that hangs or dies is replaced."""

    def __init__(self, number: int, job: Job, timeout: float) -> None:
        """Start the processes, and wait until each is ready.

        Args:
            timeout: seconds that one call may take.

        Raises:
            RuntimeError: a process did not become ready.
        """
        self.job, self.timeout = job, timeout
        self._context = multiprocessing.get_context("spawn")
        self._closed = False
        self._all: list[_Worker] = []
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        try:
            self._all = [_Worker(self._context, job) for _ in range(number)]
            for worker in self._all:
                worker.wait_until_ready()
                self._free.put(worker)
        except BaseException:
            self.kill()
            raise

    @property
    def processes(self) -> list[int]:
        """Their ids."""
        return [worker.process.pid or 0 for worker in self._all]

    def call(self, *arguments: Any) -> Any:
        """Let a free process answer; called from as many threads at once as there are processes.

        Raises:
            RefusedError: what the process raised; or it took too long, or died.
        """
        worker = self._free.get()
        try:
            return worker.ask(arguments, self.timeout)
        except (EOFError, OSError, TimeoutError) as error:
            if self._closed:
                raise RefusedError(503, _STOPPED) from None
            worker.start()  # anew
            if isinstance(error, TimeoutError):
                raise RefusedError(
                    504, f"The prediction took longer than {self.timeout:g} s; try a smaller image."
                ) from None
            raise RefusedError(
                500, "A process of the server died, as for want of memory; try a smaller image."
            ) from None
        finally:
            self._free.put(worker)

    def kill(self) -> None:
        """End all processes at once, whatever they do."""
        self._closed = True
        for worker in self._all:
            worker.kill()

    def close(self) -> None:
        """End all processes; those that still do something have a moment to finish."""
        self._closed = True
        for worker in self._all:
            worker.end()


class _Worker:
    def __init__(self, context: Any, job: Job) -> None:
        self.context, self.job = context, job
        self._begin()

    def _begin(self) -> None:
        self.ours, theirs = self.context.Pipe()
        self.process = self.context.Process(target=_run, args=(theirs, self.job), daemon=True)
        self.process.start()
        theirs.close()

    def start(self) -> None:
        """Replace the process."""
        self.kill()
        self._begin()
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        try:
            if not self.ours.poll(_START):
                raise RuntimeError("a process of the server does not start")
            status, value = self.ours.recv()
        except EOFError:
            raise RuntimeError("a process of the server ended while it started") from None
        if status != "ready":
            raise RuntimeError(f"a process of the server does not start: {value}")

    def ask(self, arguments: tuple[Any, ...], timeout: float) -> Any:
        self.ours.send(arguments)
        if not self.ours.poll(timeout):
            raise TimeoutError
        status, value = self.ours.recv()
        if status == "refused":
            raise RefusedError(*value)
        return value

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.ours.close()

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.ours.send(None)
        self.process.join(2)
        self.kill()


def _run(pipe: Any, job: Job) -> None:
    """What a process does: answer until it is told to end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the main process gets it too, and says when
    try:
        answer = job.make(**job.arguments)
    except Exception as error:
        pipe.send(("failed", str(error)))
        return
    pipe.send(("ready", None))
    with contextlib.suppress(EOFError, OSError):  # the main process is gone
        while (arguments := pipe.recv()) is not None:
            try:
                pipe.send(("answer", answer(*arguments)))
            except RefusedError as refused:
                pipe.send(("refused", (refused.status, str(refused))))
            except Exception as error:
                pipe.send(("refused", (500, f"The prediction failed ({type(error).__name__}).")))
