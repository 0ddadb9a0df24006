"""Do the same small piece of work for every sample of a split, on all cores."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import numpy as np

from everseg.errors import DataError

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with (done, total) in the calling process."""

SMALL = 64
"""Below this many samples starting processes costs more than it saves."""


def available_cores() -> int:
    """CPU cores this process may use (at least 1)."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def keep_memory() -> None:
    """Let this process keep the memory of one sample's arrays for the next.

    The C library (glibc) hands blocks above a threshold back to the system when they are freed, and every page of the
    next ones is then mapped anew. Freeing one large block lifts the threshold to its size for good. The block is never
    touched, so it costs no memory.
    """
    np.empty(2**25 - 2**16, np.uint8)


def map_samples(
    work: Callable[[Any, int], T],
    subject: Any,
    count: int,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[T]:
    """Compute `[work(subject, i) for i in range(count)]` on several cores.

    Processes are forked where the system can do so: a split from a user's own file then needs no pickling, and a
    script without a main guard is not run again. Elsewhere they are spawned, or threads do the work if `subject`
    cannot be pickled. Workers end with their parent, however that ends.

    Args:
        work: a module-level function; it reports expected faults in its result, and an exception stops everything.
        subject: the first argument of `work`, the same for all samples.
        count: number of samples.
        workers: processes; None = all cores. Small counts, 1 worker and daemonic callers stay in this process.

    Returns:
        The results in the order of the samples.

    Raises:
        DataError: a worker process was killed.
    """
    workers = min(workers or available_cores(), max(1, count))
    if workers == 1 or count < SMALL or mp.current_process().daemon:
        results = []
        for index in range(count):
            results.append(work(subject, index))
            if progress:
                progress(index + 1, count)
        return results
    # About eight chunks per worker even out the load; 64 samples at most keep the progress moving.
    size = max(1, min(64, -(-count // (workers * 8))))
    chunks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    with warnings.catch_warnings():
        # Python warns of forking a process with threads. Workers only decode and count; torch's DataLoader forks, too.
        warnings.filterwarnings(
            "ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning
        )
        with _executor(work, subject, workers) as pool:
            return _collect(pool, chunks, count, progress)


def _collect(pool: Executor, chunks: list[range], count: int, progress: Progress | None) -> list[Any]:
    done = 0
    parts: dict[int, list[Any]] = {}
    futures: dict[Future[list[Any]], range] = {pool.submit(_run_chunk, chunk): chunk for chunk in chunks}
    try:
        for future in as_completed(futures):
            chunk = futures[future]
            parts[chunk.start] = future.result()
            done += len(chunk)
            if progress:
                progress(done, count)
    except (
        BrokenProcessPool,
        BrokenPipeError,
    ) as error:  # the latter if the worker died while it was handed work
        raise DataError(
            "A worker process died while reading the data, most often because memory ran out. "
            "Try again with fewer workers (workers=1)."
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return [result for start in sorted(parts) for result in parts[start]]


# Set once in each worker, so that the subject is not sent with every chunk.
_job: tuple[Callable[[Any, int], Any], Any] | None = None


def _executor(work: Callable[[Any, int], Any], subject: Any, workers: int) -> Executor:
    # macOS has fork, but its system libraries do not survive it reliably.
    if "fork" in mp.get_all_start_methods() and os.uname().sysname != "Darwin":
        context: Any = mp.get_context("fork")
    else:
        context = mp.get_context("spawn")
        try:
            pickle.dumps((work, subject))
        except (pickle.PicklingError, AttributeError, TypeError):
            return ThreadPoolExecutor(workers, initializer=_set_job, initargs=(work, subject))
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(work, subject))


def _set_job(work: Callable[[Any, int], Any], subject: Any) -> None:
    global _job
    _job = (work, subject)


def _start(work: Callable[[Any, int], Any], subject: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    keep_memory()
    _set_job(work, subject)


def _die_with_parent(parent: int) -> None:
    if os.name != "posix":
        process = mp.parent_process()
        if process is not None:
            process.join()
    else:
        # An orphan gets another parent. Polling needs no support of the system beyond POSIX.
        while os.getppid() == parent:
            time.sleep(0.5)
    os._exit(1)


def _run_chunk(chunk: range) -> list[Any]:
    assert _job is not None
    work, subject = _job
    return [work(subject, index) for index in chunk]
