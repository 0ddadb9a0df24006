"""The command line in processes of their own: the one place that says how it is started.

Nothing here knows an inner module of everseg, so that the tests that use it survive every move inside the package.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import everseg


def begin(*arguments: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Start `everseg ARGUMENTS` in a folder, on one thread, with the everseg that this process imports."""
    source = str(Path(everseg.__file__).parents[1])
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return subprocess.Popen(
        [sys.executable, "-m", "everseg", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **threads, "PYTHONPATH": source, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str], timeout: float = 180) -> str:
    """Wait for a process that must succeed; what it printed."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, f"{process.args}\n{out}\n{err[-3000:]}"
    return out


def everseg_command(*arguments: object, cwd: Path) -> str:
    """Run `everseg ARGUMENTS`, which must succeed; what it printed."""
    return end(begin(*arguments, cwd=cwd))


def everseg_ranks(world: int, *arguments: object, cwd: Path) -> None:
    """Run `everseg ARGUMENTS` in several processes that talk over gloo on the CPU, as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    size = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    started = [
        begin(*arguments, cwd=cwd, **shared, **size, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(world)
    ]
    try:
        for process in started:
            end(process)
    finally:
        for process in started:
            process.kill()  # the others wait for ever for one that failed; a finished one does not mind
