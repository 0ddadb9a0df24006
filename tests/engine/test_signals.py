"""Several signals are one request to stop; only Ctrl-C a second time is another one."""

from __future__ import annotations

import os
import signal
import time

import pytest

from everseg.engine import runtime
from everseg.engine.runtime import StopRequest
from everseg.runs import lock


def asked(folder, *signals: tuple[float, int]) -> tuple[int, int]:
    """Send signals to a process that holds a lock and notes requests, each after so many seconds.

    Returns:
        Its exit code, which is what it noted unless a signal ended it; and the number of files it left.
    """
    child = os.fork()
    if not child:
        try:
            with lock.locked(folder), StopRequest() as stop:
                for after, number in signals:
                    time.sleep(after)
                    os.kill(os.getpid(), number)
                code = stop.code()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(list(folder.iterdir()))


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([], 0),
        ([(0, signal.SIGTERM), (0, signal.SIGTERM)], signal.SIGTERM),  # the system and the launcher
        (
            [(0, signal.SIGUSR1), (0.2, signal.SIGTERM)],
            signal.SIGUSR1,
        ),  # SLURM: soon the limit, now the limit
        ([(0, signal.SIGTERM), (0.2, signal.SIGTERM)], signal.SIGTERM),
        ([(0, signal.SIGINT), (0, signal.SIGINT)], signal.SIGINT),  # a terminal and the launcher in it
        ([(0, signal.SIGINT), (0.2, signal.SIGINT)], 130),  # a person
        ([(0, signal.SIGTERM), (0.2, signal.SIGINT)], 130),
    ],
)
def test_only_ctrl_c_after_a_while_is_a_second_request(tmp_path, monkeypatch, capfd, signals, code):
    monkeypatch.setattr(runtime.Signals, "WINDOW", 0.1)
    assert asked(tmp_path, *signals) == (code, 0)  # the lock is gone, too
    assert capfd.readouterr().err.count("Ctrl-C") == (1 if signals else 0)
