"""Runs in forked processes, so that they can be killed at any moment that can be counted."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch._dynamo  # noqa: F401  torch.optim imports it at the first step: here, so that no fork need do it
import toy
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import everseg
from everseg.engine import one_pass, step
from everseg.errors import EversegError


class At(NamedTuple):
    """A moment of a run, counted, so that it is the same on every machine; and the signal to send oneself then."""

    event: str
    """`flush` of a file to disk, `iteration` of training (or batch of a pass without gradients), `name` given to a
    finished file, or `any` of these; or the `backward` pass of a part of a batch."""
    count: int = 0
    """So many of them pass before; the signal comes at the start of a flush or iteration, and right after a naming."""
    pattern: str = "*"
    """Only files and folders whose path fits are counted by `name`."""
    signal: int = signal.SIGKILL


def start(
    config: dict, *, at: At | None = None, environment: dict[str, str] | None = None, dry_run: bool = False
) -> int:
    """Fork a process that does the run; it exits with the code the command line would give.

    Args:
        at: when it sends itself a signal.
    """
    _know_the_configuration()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(environment or {})
        AcceleratorState._reset_state(
            reset_partial_state=True
        )  # a run of this test process may have made one
        if at is not None:
            _strike(at)
        everseg.run(config, quiet=True, dry_run=dry_run)
        code = 0
    except EversegError as error:
        os.write(2, f"{error}\n".encode())
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@functools.cache
def _know_the_configuration() -> None:
    """Check a run's settings once before the first fork, else every fork would read what the options mean anew.

    That was most of the time of a run that is killed early.
    """
    everseg.run(toy.settings(Path("nowhere")), quiet=True, dry_run=True)


def _strike(at: At) -> None:
    """Count in this process from now on, and send the signal."""
    passed = itertools.count()

    def met() -> None:
        if next(passed) == at.count:
            os.kill(os.getpid(), at.signal)

    def before(function: Callable) -> Callable:
        return lambda *given, **named: (met(), function(*given, **named))[1]

    def naming(function: Callable) -> Callable:
        def renamed(source: Any, target: Any, **named: Any) -> None:
            function(source, target, **named)
            if PurePath(target).match(at.pattern):
                met()

        return renamed

    if at.event in ("flush", "any"):
        os.fsync = before(os.fsync)
    if at.event in ("iteration", "any"):
        step.train_batch = before(step.train_batch)
        one_pass.take_in = before(one_pass.take_in)
    if at.event == "backward":
        Accelerator.backward = before(Accelerator.backward)
    if at.event in ("name", "any"):
        os.rename, os.replace = naming(os.rename), naming(os.replace)


def killed(config: dict, event: str, count: int = 0, pattern: str = "*") -> None:
    """Do a run up to a moment (see `At`), at which it must get killed."""
    assert complete(config, at=At(event, count, pattern)) == -signal.SIGKILL, f"done before {event} {count}"


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


def ranks(
    config: dict,
    world: int,
    timeout: float = 120,
    *,
    at: Mapping[int, At] | None = None,
    stopped: int | None = None,
    change: Mapping[int, dict] | None = None,
    **options,
) -> list[int]:
    """Do one run in several processes that talk over gloo; their exit codes.

    Args:
        at: process -> when it sends itself a signal; or when all do.
        stopped: a process that stops itself. It is killed when all others have ended.
        change: process -> settings that it gets in place of others.
    """
    at, change = dict.fromkeys(range(world), at) if isinstance(at, At) else at or {}, change or {}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [
        start(
            {**config, **change.get(rank, {})},
            at=at.get(rank),
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
    codes = {rank: wait(child, timeout) for rank, child in enumerate(children) if rank != stopped}
    if stopped is not None:
        os.kill(children[stopped], signal.SIGKILL)
        codes[stopped] = wait(children[stopped], timeout)
    return [codes[rank] for rank in range(world)]


def results(run: Path) -> dict[str, str]:
    """SHA-256 of everything a run must give again after any disturbance."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((run / "steps").rglob("*.*"))
        # What a killed process was just writing stays for a minute (`remove_leftovers`), and nothing reads it.
        if not (path.name.startswith(".") and path.suffix == ".tmp")
    }
