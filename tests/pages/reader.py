"""Somebody who types a page from top to bottom, in one folder, exactly as printed but for the table below."""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import possessions
import pytest
from reading import ROOT, blocks, commands, given

from everseg.cli import deploy as verbs
from everseg.config import presets
from everseg.data.get import download
from everseg.deploy import serve

Call = Callable[..., tuple[int, str, str]]

SUBSTITUTIONS = {
    r"data\.domains\.(cs|bdd|idd)\.root=DIR": (r"data.domains.\1.root=have/street/\1", "miniature trees"),
    r"data init DIR(.*,sign)\b": (r"data init have/four-classes\1", "a miniature tree"),
    r"data init DIR": ("data init have/three-classes", "a miniature tree"),
    r"data download (\w+) --to DIR": (r"data download \1 --to have/downloads/\1", "an empty folder"),
    r"data prepare idd DIR": ("data prepare idd have/polygons/idd", "a miniature tree, polygons only"),
    r"cityscapes root=DIR": ("cityscapes root=have/street/cs", "a miniature tree"),
    r"(\bvoc\b.*)\broot=DIR": (r"\1root=have/VOC2012", "a miniature tree"),
    r"(\bcamvid\b.*)\broot=DIR": (r"\1root=have/CamVid", "a miniature tree"),
    r"train\.epochs=(?:[3-9]|\d\d)": ("train.epochs=2", "two passes instead of many"),
    r"epochs: \d+": ("epochs: 1", "one pass instead of many, in files"),
    r"--seeds 0,1,2": ("--seeds 0,1", "two seeds are a group as three are"),
    r"(voc-15-5-overlapped .*--seeds 0),1": (r"\1", "the many steps of one seed"),
    r"--methods all --seeds 0,1": ("--methods ft,acil --seeds 0", "29 methods take four minutes"),
    r"max_time=3500": ("max_time=0.001", "the time is up at once"),
    r"(nproc_per_node|num_processes)([ =])4": (r"\1\g<2>2", "two processes on this machine"),
    r"accelerate launch": ("accelerate launch --cpu", "no GPUs here"),
    r"sync_norm=true": (
        "sync_norm=false train.batch=4",
        "CUDA only; batch norm wants two images per process",
    ),
    r"(keep.at.least.)0\.\d+": (r"\g<1>0.01", "the norms of a network of few steps still move"),
    r"(everseg (?:export|extend|adopt) .*)": (
        r"\1 --no-onnx",
        "ten seconds each; tests/deploy/test_export.py has it",
    ),
    r"run\.export\(([^)]+)\)": (r"run.export(\1, onnx=False)", "the same in Python"),
    r"(everseg serve .*)": (r"\1 --port 0", "the port may be taken"),
    r"http://127.0.0.1:8000": ("SERVER", "the port it took"),
    r"(-m benchmarks --json .*)": (r"\1 --quick --only growth", "few rounds of one part: all take minutes"),
}
"""What of a command is typed in another way -> how, and why; the first DIR that fits counts."""
EXIT_CODES = {"train.max_time=3500": 75}
"""Part of a command -> the exit code that its page tells, where that is not 0."""
EVERSEG = re.compile(r"((?:\w+=\S* )*)(?:\S*/)?everseg (.*)")
PROCESS = re.compile(r"(torchrun|accelerate launch|python -m benchmarks|curl) |python -m pytest test_")
OPTIONS = ("-o", "--out", "--to", "--json")
SAID = re.compile(r"^(?:wrote|run folder:|report:|Wrote|script:) ([^\s:,;]+)", re.MULTILINE)


def is_typed(command: str) -> bool:
    """Whether a command is one that these tests can run."""
    return bool(EVERSEG.fullmatch(command) or PROCESS.match(command))


def as_typed(command: str) -> str:
    for pattern, (replacement, _) in SUBSTITUTIONS.items():
        command = re.sub(pattern, replacement, command)
    return command


class Reader:
    """Types what a page prints; an assertion names page and line."""

    def __init__(self, page: Path, call: Call, patch: pytest.MonkeyPatch) -> None:
        self.page, self.call, self.patch = page, call, patch
        self.scope: dict[str, Any] = {"__name__": "page"}
        self.servers: list[tuple[serve.Server, threading.Thread]] = []

    def read(self, left_out: Callable[[str], bool]) -> None:
        """Go through the page in the current folder; `left_out` says what is not typed."""
        for name in given(self.page):
            self.own(name)
        for block in blocks(self.page):
            where = f"{self.page.name}:{block.line}"
            if block.file is not None:
                Path(block.file).write_text(as_typed(block.code) if block.language == "yaml" else block.code)
            elif block.language == "python" and not left_out(block.code):
                exec(compile(as_typed(block.code), where, "exec"), self.scope)
            elif block.language == "sh":
                for command in commands(block.code):
                    if not left_out(command):
                        self.type(command, where)

    def own(self, name: str) -> None:
        """Make what the page says is there."""
        path = Path(name)
        if path.parent.name == "runs":
            known = path.name in presets.names(every=True)
            self.type(f"everseg run {path.name if known else 'camvid-6-5-mib'}"
                      + ("" if name.startswith("runs/demo") else " data.root=DIR")
                      + ("" if known else f" name={path.name}"), f"given: {name}")  # fmt: skip
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            possessions.FILES[name](path)

    def type(self, command: str, where: str) -> None:
        typed = as_typed(command)
        assert "DIR" not in typed, f"{where}: {command}\nwhat does DIR stand for? See SUBSTITUTIONS"
        for folder in re.findall(r"\bhave/([\w-]+)", typed):
            if not (Path("have") / folder).exists():
                possessions.TREES[folder](Path("have") / folder)
        own = EVERSEG.fullmatch(typed)
        if own and own[2].startswith("serve "):
            code, out, err = self.serve(shlex.split(own[2]))
        elif own:
            with self.patch.context() as patch:
                for setting in own[1].split():
                    patch.setenv(*setting.split("=", 1))
                code, out, err = self.call(*shlex.split(own[2]))
        else:
            code, out, err = self.process(shlex.split(typed))
        expected = next((code for part, code in EXIT_CODES.items() if part in command), 0)
        assert code == expected, (
            f"{where}: {command}\nexit code {code}, not {expected}: {out[-2000:]}{err[-3000:]}"
        )
        for made in promised(shlex.split(typed), out):
            assert made.exists(), f"{where}: {command}\n{made} was not made"

    def process(self, words: list[str]) -> tuple[int, str, str]:
        """Run what needs processes of its own: launchers with the small presets, benchmarks, curl."""
        launchers = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.launch"}
        if words[0] in launchers:
            skip = 1 if words[0] == "torchrun" else 2
            at = words.index("-m")
            assert words[at + 1] == "everseg"
            script = str(Path(__file__).with_name("small.py"))
            words = [sys.executable, "-m", launchers[words[0]], *words[skip:at], script, *words[at + 2 :]]
        elif words[0] == "python":
            words = [sys.executable, *words[1:]]
        elif shutil.which(words[0]) is None:
            warnings.warn(f"{words[0]} is not installed here; not executed: {' '.join(words)}", stacklevel=2)
            return 0, "", ""
        else:
            words = [word.replace("SERVER", self.servers[-1][0].url.rstrip("/")) for word in words] + ["-fsS"]
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        # Options of this run, such as --slow, mean nothing to the tests that a page tells its reader to write.
        environment.pop("PYTEST_ADDOPTS", None)
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        return done.returncode, done.stdout, done.stderr

    def serve(self, words: list[str]) -> tuple[int, str, str]:
        """Start the page on this machine; it goes on until `end`."""
        started, ready = [], threading.Event()

        class Noticed(serve.Server):
            def serve_forever(self) -> None:
                started.append(self)
                ready.set()
                super().serve_forever()

        self.patch.setattr(serve, "Server", Noticed)
        # Only the main thread may set what a signal does, and the command runs in another one here.
        deaf = types.SimpleNamespace(signal=lambda *_: None, SIGTERM=None, default_int_handler=None)
        self.patch.setattr(verbs, "signal", deaf)
        thread = threading.Thread(target=lambda: self.call(*words), daemon=True)
        thread.start()
        ready.wait(30)
        self.servers += [(server, thread) for server in started]
        return (0, "", "") if started else (1, "", "the server did not start")

    def end(self) -> None:
        for server, thread in self.servers:
            server.shutdown()
            thread.join(10)


def promised(words: list[str], out: str) -> Iterator[Path]:
    """Files and folders that a command names as its results, or says it wrote."""
    if "--dry-run" in words:
        return
    for option, value in pairwise(words):
        if option in OPTIONS and not value.startswith("-"):
            yield Path(value)
    yield from (Path(name) for name in SAID.findall(out))


def in_this_process(lock: threading.Lock, call: Call) -> Callable[..., dict[str, Any]]:
    """`launch.run_process` without a process: the same command, one at a time."""

    def run(command: list[str], log: Path, threads: int, alive: Any = None) -> dict[str, Any]:
        assert command[1:3] == ["-m", "everseg"]
        with lock:
            code, _, err = call(*command[3:])
        return {"exit_code": code, "error": err if code else None}

    return run


@contextlib.contextmanager
def archives(folder: Path) -> Iterator[dict[str, tuple[download.Source, ...]]]:
    """The download table with a server of this machine in it."""
    possessions.archives(folder)
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        here = f"http://127.0.0.1:{server.server_port}"
        try:
            yield {
                name: tuple(replace(s, urls=(f"{here}/{s.file}",), checksum=None) for s in sources)
                for name, sources in download.SOURCES.items()
            }
        finally:
            server.shutdown()
            thread.join()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass
