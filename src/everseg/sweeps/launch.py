"""Run a sweep in processes of this machine, or on Ray (`ray_cluster`).

Every run is a process of `everseg run`. concurrent.futures, Ray or SLURM decides which process gets which processor.
This module only adds that a run waits while another one trains the first step that both have in common.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import FrameType

from everseg.engine.runtime import SIGNALS, Signals
from everseg.errors import Interrupted
from everseg.sweeps.plan import GridRun, begin, donor
from everseg.sweeps.process import Child, Outcome, Submit, run_process

Say = Callable[[str], None]
_POLL = 0.5
"""Seconds after which the sweep looks again whether a first step has become ready."""
_SETTLING = 60.0
"""Seconds after which the files of a run that ended on another machine must be seen here."""


def work_off(
    runs: Sequence[GridRun],
    submit: Submit,
    *,
    jobs: int,
    threads: int,
    say: Say,
    changed: Callable[[dict[str, Outcome]], None],
) -> dict[str, Outcome]:
    """Run the unfinished runs of a grid; a failed one does not stop the others.

    A run waits only while another run, already started, trains a first step that it can take over.

    Args:
        submit: starts a process.
        jobs: processes at a time.
        threads: CPU threads of each.
        say: called with a line per event.
        changed: called with the results so far after every run.

    Returns:
        Name -> exit code, error and, where it was copied, the origin of the first step.
    """
    results: dict[str, Outcome] = {}
    pending = [run for run in runs if not run.is_finished]
    working: dict[Future[Outcome], GridRun] = {}
    while pending or working:
        # A copy of the list, as runs leave `pending` inside. The first step of a running run may become ready before
        # that run ends, so the loop also looks after each `_POLL`.
        for run in [run for run in pending if len(working) < jobs]:
            if len(working) >= jobs or _waits(run, runs, list(working.values())):
                continue
            pending.remove(run)
            other, done = donor(run, runs), begin(run, runs, threads)
            shared = {"shared_from": other.name} if other and done.startswith("first step copied") else {}
            results[run.name] = shared
            say(f"{run.name}: started" + (f", {done}" if done else ""))
            working[submit(run)] = run
        finished, _ = wait(working, timeout=_POLL, return_when=FIRST_COMPLETED)
        for future in finished:
            run = working.pop(future)
            outcome = _checked(future.result(), run)
            results[run.name] |= outcome
            text = (
                "finished" if outcome["exit_code"] == 0 else f"stopped with exit code {outcome['exit_code']}"
            )
            say(f"{run.name}: {text}" + (f": {outcome['error']}" if outcome["error"] else ""))
            changed(results)
    return results


def _waits(run: GridRun, runs: Sequence[GridRun], working: Sequence[GridRun]) -> bool:
    """Whether another run is training the first step that this run could take over."""
    # A run with a first step of its own, begun or finished, or with a donor that is ready, has nothing to wait for.
    if run.first_step is None or run.folder.step(0).exists() or donor(run, runs) is not None:
        return False
    return any(other.first_step == run.first_step for other in working)


def _checked(outcome: Outcome, run: GridRun) -> Outcome:
    """Call a run failed that ended well and is not finished where the sweep looks for it, whatever its exit code."""
    elsewhere = outcome.pop("host", "") not in ("", socket.gethostname())
    if outcome["exit_code"]:
        return outcome
    # A network file system may show what another machine wrote a little later.
    until = time.monotonic() + (_SETTLING if elsewhere else 0)
    while not run.is_finished:
        if time.monotonic() >= until:
            told = (
                f"it ended well, and {run.folder.path.absolute()} holds no finished run of these settings here: was it "
                "written to another file system, or deleted?"
            )
            return {"exit_code": 4, "error": told}
        time.sleep(_POLL)
    return outcome


def one(run: GridRun, runs: Sequence[GridRun], *, threads: int, say: Say) -> int:
    """Run a single run of a sweep here and return its exit code; every task of a SLURM array does this."""
    if run.is_finished:
        say(f"{run.name}: finished already")
        return 0
    done = begin(run, runs, threads)
    if done:
        say(f"{run.name}: {done}")
    with processes(threads) as (submit, _):
        outcome = _checked(submit(run).result(), run)
    if outcome["error"]:
        say(f"{run.name}: {outcome['error']}")
    return int(outcome["exit_code"])


@contextlib.contextmanager
def processes(threads: int, jobs: int = 1) -> Iterator[tuple[Submit, int]]:
    """Run commands as processes of this machine; pass on a signal that ends the sweep, so that every run saves itself.

    Args:
        threads: CPU threads of each, as OMP_NUM_THREADS.
    """
    alive: set[Child] = set()
    stopped = threading.Event()

    def work(run: GridRun) -> Outcome:
        if stopped.is_set():
            return {"exit_code": 130, "error": "not started"}
        return run_process(run.command, run.folder.path.parent / "logs" / f"{run.name}.log", threads, alive)

    def pass_on(number: int) -> None:
        stopped.set()
        for process in list(alive):
            process.stop(number)

    with stopping(pass_on):
        pool = ThreadPoolExecutor(jobs)
        try:
            yield (lambda run: pool.submit(work, run)), jobs
        finally:
            pool.shutdown(wait=True)


@contextlib.contextmanager
def stopping(pass_on: Callable[[int], None] | None = None) -> Iterator[None]:
    """Turn a signal that asks to stop into `Interrupted`; those that follow from it (`Signals`) mean nothing new.

    Args:
        pass_on: hands a signal to the runs, a second Ctrl-C too: each then ends at once by itself. None = a second one
            ends the wait for the runs.
    """
    signals = Signals()

    def stop(number: int, _frame: FrameType | None) -> None:
        meaning = signals.meaning(number)
        if meaning == "same":
            return
        if pass_on is not None:
            pass_on(number)
        # A second error would end the wait for the runs, which are saving themselves.
        if meaning == "stop" or pass_on is None:
            raise Interrupted(
                "the sweep was interrupted; its runs are saved, the same command continues them", number
            )

    main = threading.current_thread() is threading.main_thread()
    before = {s: signal.signal(s, stop) for s in SIGNALS} if main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
