"""Runs in forked processes, so that they can be killed at any moment."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from accelerate.state import AcceleratorState

import everseg
from everseg.errors import EversegError


def start(
    config: dict,
    *,
    kill_at_flush: int | None = None,
    environment: dict[str, str] | None = None,
    dry_run: bool = False,
) -> int:
    """Fork a process that does the run; it exits with the code the command line would give.

    Args:
        kill_at_flush: SIGKILL itself at the n-th flush of a file or folder to disk: inside a save.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(environment or {})
        AcceleratorState._reset_state(
            reset_partial_state=True
        )  # a run of this test process may have made one
        if kill_at_flush is not None:
            _kill_at(kill_at_flush)
        everseg.run(config, quiet=True, dry_run=dry_run)
        code = 0
    except EversegError as error:
        os.write(2, f"{error}\n".encode())
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _kill_at(flush: int) -> None:
    real, calls = os.fsync, iter(range(1 << 30))

    def counting(descriptor: int) -> None:
        if next(calls) == flush:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = counting


def wait(child: int, timeout: float = 120) -> int:
    """Wait for a process and return its exit code, negative for a signal."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"process {child} did not end in {timeout} s")


def complete(config: dict, **options) -> int:
    return wait(start(config, **options))


def wait_until(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition never came true")
        time.sleep(0.002)


def ranks(config: dict, world: int, timeout: float = 120, **options) -> list[int]:
    """Do one run in several processes that talk over gloo; their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [
        start(
            config,
            environment={
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "ACCELERATE_USE_CPU": "true",
            },
            **options,
        )
        for rank in range(world)
    ]
    return [wait(child, timeout) for child in children]


def results(run: Path) -> dict[str, str]:
    """SHA-256 of everything a run must give again after any disturbance."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((run / "steps").rglob("*.*"))
    }
