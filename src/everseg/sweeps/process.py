"""One run of a sweep as a process of its own: started, waited for, and never left behind.

Whoever starts a run holds one end of a pipe, the lifeline, and the run reads the other end. If the starter is killed,
the pipe closes, and the run stops as SIGTERM would stop it: it saves itself, and the same command continues it.

`run_process` also goes to the nodes of a Ray cluster, where everseg need not be importable. So nothing here needs more
than Python's own modules while it runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everseg.errors import MORE

if TYPE_CHECKING:
    from everseg.sweeps.plan import GridRun

Outcome = dict[str, Any]
"""exit_code and error of one process."""
Submit = Callable[["GridRun"], "Future[Outcome]"]
"""Starts a run of the sweep."""
LIFELINE = "EVERSEG_LIFELINE"
"""Variable with the number of the open file that a run reads its lifeline from."""
RELAY = f"""
import os, signal, subprocess, sys
begun, early = [], []
def pass_on(number, _):
    begun[0].send_signal(number) if begun else early.append(number)
signal.signal(signal.SIGTERM, pass_on)
begun.append(subprocess.Popen(sys.argv[1:], pass_fds=[int(os.environ["{LIFELINE}"])]))
if early:
    begun[0].send_signal(signal.SIGTERM)
code = begun[0].wait()
sys.exit(code if code >= 0 else 128 - code)
"""
"""Program (python -c) that starts a run and waits for it. A worker of Ray that ends by itself, as when the sweep is
killed, first kills its children. This is the child then, and the run loses its lifeline and saves itself. A signal that
comes while the run is being started is passed on as soon as it has been."""
_PATIENCE = 0.2
"""Seconds after which a wait looks up: Ray interrupts a task in Python only, which no system call notices."""


class Child:
    """A process that was started with a lifeline.

    Raises:
        OSError: the program cannot be started.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str], **options: Any) -> None:
        read, self._lifeline = os.pipe()
        try:
            self._process = subprocess.Popen(
                command, env={**environment, LIFELINE: str(read)}, pass_fds=(read,), stdin=subprocess.DEVNULL,
                start_new_session=True, **options,  # Ctrl-C reaches the sweep alone, which passes it on once
            )  # fmt: skip
        except OSError:
            os.close(self._lifeline)
            raise
        finally:
            os.close(read)

    def stop(self, number: int) -> None:
        """Pass on a signal. If the sender is killed now, the run does not take that for a second signal."""
        with contextlib.suppress(OSError):
            os.write(self._lifeline, b".")
        self._process.send_signal(number)

    def wait(self) -> int:
        """Wait for its end and return its exit code; a task that Ray interrupts has the run save itself first."""
        try:
            while True:
                try:
                    code = self._process.wait(_PATIENCE)
                    break
                except subprocess.TimeoutExpired:
                    continue
                except KeyboardInterrupt:
                    self.stop(signal.SIGTERM)
        finally:
            os.close(self._lifeline)
        # Popen gives -N for a process that signal N ended; shells give 128 + N.
        return code if code >= 0 else 128 - code


def run_process(
    command: list[str],
    log: Path,
    threads: int,
    alive: set[Child] | None = None,
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run a command to its end with both outputs in a log file; return its exit code and, if it failed, its error.

    Args:
        threads: its CPU threads, as OMP_NUM_THREADS.
        alive: holds the process as long as it lives.
        folder: working folder of the process; default this process's.
        environment: its variables; default this process's.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    variables = {**(os.environ if environment is None else environment), "OMP_NUM_THREADS": str(threads)}
    alive = set() if alive is None else alive
    with log.open("wb") as file:
        child = Child(command, variables, stdout=file, stderr=subprocess.STDOUT, cwd=folder)
        alive.add(child)
        try:
            code = child.wait()
        finally:
            alive.discard(child)
    return {"exit_code": code, "error": _last_words(log) if code else None}


def _last_words(log: Path) -> str:
    """Read the error message of a run that stopped from its log, without the line about the documentation."""
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    start = text.rfind("error: ")
    if start < 0:
        return f"no message; see {log}"
    return text[start + len("error: ") :].partition(f"\n{MORE}")[0]


def follow() -> None:
    """Stop this process, as SIGTERM does, when whoever started it with a lifeline is killed; else do nothing."""
    number = os.environ.pop(LIFELINE, "")  # what this process starts has no lifeline
    if not number.isdecimal():
        return
    read = int(number)
    try:
        os.set_inheritable(read, False)
    except OSError:  # the variable came from elsewhere; there is no such file
        return

    def wait() -> None:
        if os.read(read, 1) == b"":
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
