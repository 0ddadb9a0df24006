"""Do something in a forked process that may be limited, watched and killed; and say how it ended."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState

RUNS_CODE = {
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pickle.find_class", "socket.connect",
    "socket.getaddrinfo", "urllib.Request", "webbrowser.open", "ctypes.dlopen",
}  # fmt: skip
"""Events of Python's audit that no hostile file may cause."""
WATCHED = "WATCHED "


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    """Its exit code; negative for a signal."""
    text: str
    """What it wrote to both streams."""
    seconds: float
    """Of the processor."""
    memory: int
    """Most bytes of memory that it took beside those of the process that was forked."""

    def wrong(self, *codes: int, facts: Sequence[str] = ()) -> str:
        """What is wrong with an end that should have one of these exit codes, and a message; "" if nothing."""
        if self.code not in codes:
            return f"exit code {self.code} instead of {' or '.join(map(str, codes))}: {self.text[-700:]}"
        for bad in ("Traceback", "fault of everseg", WATCHED):
            if bad in self.text:
                return f"{bad!r} in: {self.text[-700:]}"
        said = re.search(r"^(error: |\d+ errors?, )", self.text, re.MULTILINE)
        if self.code not in (0, 75) and not said:
            return f"no message: {self.text[-300:]!r}"
        if lost := [fact for fact in facts if fact not in self.text]:
            return f"the message lacks {lost}: {self.text[-700:]}"
        return ""


def apart(
    work: Callable[[], object],
    place: Path,
    *,
    prepare: Callable[[], object] | None = None,
    watch: bool = False,
    cache: Path | None = None,
    timeout: float = 600.0,  # the machine may be busy with other work
    kill_after: float | None = None,
) -> Ended:
    """Do the work in a forked process, in a folder.

    Args:
        prepare: done in the process before: limits, faults.
        watch: write a line for everything in `RUNS_CODE` that happens.
        cache: where everseg keeps what it knows of data sets; default where this process has it.
        timeout: seconds after which it counts as hanging, and is killed; its text says so then.
        kill_after: seconds after which SIGKILL comes.
    """
    # A forked process begins with the pages that this one has now, not with those of its own largest moment.
    own = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    with tempfile.TemporaryFile() as out:
        child = os.fork()
        if child == 0:
            if cache is not None:
                os.environ["EVERSEG_CACHE"] = str(cache)
            _child(work, place, out.fileno(), prepare, watch)
        hung, code, used = _wait(child, timeout, kill_after)
        out.seek(0)
        text = out.read().decode("utf-8", "replace") + ("\nHUNG: killed" if hung else "")
    return Ended(code, text, used.ru_utime + used.ru_stime, max(0, (used.ru_maxrss << 10) - own))


def _wait(child: int, timeout: float, kill_after: float | None) -> tuple[bool, int, Any]:
    began = time.monotonic()
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            return False, os.waitstatus_to_exitcode(status), used
        passed = time.monotonic() - began
        if passed > (timeout if kill_after is None else min(timeout, kill_after)):
            os.kill(child, signal.SIGKILL)
            _, status, used = os.wait4(child, 0)
            return kill_after is None, os.waitstatus_to_exitcode(status), used
        time.sleep(0.002)


def _child(
    work: Callable[[], object], place: Path, out: int, prepare: Callable[[], object] | None, watch: bool
) -> None:
    from everseg.errors import EversegError

    code = 1
    try:
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        os.chdir(place)
        if prepare is not None:
            prepare()
        if watch:
            sys.addaudithook(_told)
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except EversegError as error:
        os.write(2, f"error: {error}\n".encode("utf-8", "backslashreplace"))
        code = error.exit_code
    except BaseException:
        os.write(2, traceback.format_exc().encode("utf-8", "backslashreplace"))
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:
                code = code or 1
        os._exit(code & 255)


def _told(event: str, arguments: tuple[Any, ...]) -> None:
    # Another everseg, with less rights; and Python's own question for the processor.
    own = event == "subprocess.Popen" and arguments[0] in (sys.executable, "uname")
    if event in RUNS_CODE and not own and not (event == "pickle.find_class" and _harmless(*arguments[:2])):
        os.write(2, f"{WATCHED}{event} {arguments}\n".encode("utf-8", "backslashreplace"))


def _harmless(module: str, _: str) -> bool:
    """Processes that share work send each other what they made themselves."""
    return module.split(".")[0] in ("everseg", "numpy", "pathlib", "collections", "concurrent", "builtins")


def everseg(*arguments: object) -> Callable[[], object]:
    """The command line, as work."""

    def call() -> None:
        from everseg.cli import main as cli

        cli.main([str(argument) for argument in arguments])

    return call


def trained(config: Mapping[str, Any]) -> Callable[[], object]:
    """A whole run by the command line, as work. Its settings are written to a file beside its `out` now."""
    path = Path(config["out"]).with_name("run.yaml")
    path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    call = everseg("run", path, "--quiet")

    def work() -> None:
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)  # a run of this process may have made one
        call()

    return work
