"""Runs that are killed, moved, raced, starved and lied to; in the end each gives the bytes of an undisturbed one."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import trees
from apart import Ended, apart, trained
from apart import everseg as command
from campaigns import Trial, campaign
from disk_faults import SHORT, _whole
from miniature import SETTINGS
from processes import At, complete, results, start, wait
from toy import settings

from everseg.engine import step


def undisturbed(place: Path, **changes: Any) -> dict[str, str]:
    assert complete(settings(place / "whole", **changes)) == 0
    found = results(place / "whole" / "toy")
    shutil.rmtree(place / "whole")
    return found


def at_iteration(number: int, do: Callable[[], object]) -> Callable[[], None]:
    """To be done in a process before it trains: do something right before one of its iterations."""

    def prepare() -> None:
        original, count = step.train_batch, itertools.count()

        def then(*given: Any, **named: Any) -> Any:
            if next(count) == number:
                do()
            return original(*given, **named)

        step.train_batch = then

    return prepare


def _goes_on(config: dict[str, Any], run: Path, before: dict[str, str]) -> str:
    """Run the command again; what is wrong with how that ends."""
    ended = apart(trained(config), run.parent.parent)
    if ended.code:
        return f"the same command ends with {ended.code}: {ended.text[-700:]}"
    return "" if results(run) == before else "it goes on to other results"


# ---------------------------------------------------------------- kills


@campaign("kills", everyday=0, long=200)
def kills(place: Path, number: int) -> Iterator[Trial]:
    """SIGKILL at any moment of a run, five times each (flushes, iterations, renamings, or so many seconds after its
    start, as the system does when memory is short): the same command goes on to the same bytes. MiB, RW and
    fine-tuning, with and without loader processes."""
    draw, done = random.Random(number), 0
    before = {name: undisturbed(place, method={"name": name}) for name in ("mib", "rw", "ft")}
    for name, workers in itertools.cycle(itertools.product(before, (0, 0, 2))):
        config = settings(place / "out", method={"name": name}, data={"workers": workers})
        struck, problem = [], ""
        while len(struck) < min(5, number - done):
            if draw.random() < 0.3:
                after = draw.uniform(0.0, 2.5)
                ended = apart(trained(config), place, kill_after=after)
                what = f"after {after:.3f} s"
                code = ended.code
            else:
                count = draw.randrange(30)
                code, what = complete(config, at=At("any", count)), f"at event {count}"
            if code == 0:  # the run was at its end
                break
            if code != -signal.SIGKILL:
                problem = f"{what}: exit code {code}"
                break
            struck.append(what)
            if broken := _whole(place / "out" / "toy"):
                problem = f"{what}: {broken}"
                break
        problem = problem or _goes_on(config, place / "out" / "toy", before[name])
        if problem and not struck:  # what ended otherwise than by the kill is a trial too
            struck.append(what)
        for count, what in enumerate(struck):
            yield Trial(f"{name}, {workers} workers, {what}", problem if count == len(struck) - 1 else "")
        done += len(struck)
        shutil.rmtree(place / "out", ignore_errors=True)
        if done >= number:
            return


@campaign("polite stops", everyday=0, long=15)
def stops(place: Path, number: int) -> Iterator[Trial]:
    """SIGINT, SIGTERM or SIGUSR1 before any iteration: saved within an iteration, the promised exit code,
    and the same command goes on to the same bytes."""
    draw, before = random.Random(number), undisturbed(place)
    for _ in range(number):
        what = draw.choice((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
        at = draw.randrange(24)
        config = settings(place / "out", train={"checkpoint_every": 10_000})
        code = complete(config, at=At("iteration", at, signal=what))
        problem = "" if code == 128 + what else f"exit code {code}"
        problem = problem or _goes_on(config, place / "out" / "toy", before)
        yield Trial(f"{what.name} before iteration {at}", problem)
        shutil.rmtree(place / "out", ignore_errors=True)


# ---------------------------------------------------------------- the place and the clock


@campaign("moved folders", everyday=0, long=6)
def moved(place: Path, number: int) -> Iterator[Trial]:
    """A run is killed, its folder moved elsewhere (also to a name with spaces and signs), and continued from another
    working directory: it goes on to the same bytes."""
    draw, before = random.Random(number), undisturbed(place, train=SHORT)
    for name in itertools.islice(
        itertools.cycle(("there", "a b é \U0001f6a6", "d" * 200, "x/y/z/w", "-rf", "%s{0}")), number
    ):
        count = draw.randrange(8, 30)
        killed = complete(settings(place / "out", train=SHORT), at=At("any", count))
        problem = "" if killed == -signal.SIGKILL else f"exit code {killed}"
        there, cwd = place / "elsewhere" / name, place / "cwd"
        there.parent.mkdir(parents=True, exist_ok=True)
        cwd.mkdir(exist_ok=True)
        (place / "out").rename(there)
        ended = apart(trained(settings(there, train=SHORT)), cwd)
        problem = problem or (ended.text[-500:] if ended.code else "")
        if not problem and results(there / "toy") != before:
            problem = "it goes on to other results"
        yield Trial(f"killed at event {count}, moved to {name[:20]}", problem)
        shutil.rmtree(place / "elsewhere")


CLOCKS = {
    "an hour back": -3600.0,
    "an hour forth": 3600.0,
    "to 1970": None,
    "ten years forth": 3.2e8,
    "a second back": -1.0,
}


@campaign("clocks that jump", everyday=0, long=10)
def clocks(place: Path, number: int) -> Iterator[Trial]:
    """The clock jumps while a run trains, or all its checkpoints have the same time: the newest checkpoint is the
    one of the most iterations, and the results are the same bytes."""
    draw, before = random.Random(number), undisturbed(place, train=SHORT)
    real = time.time
    for kind in itertools.islice(itertools.cycle((*CLOCKS, "equal times")), number):
        config, at = settings(place / "out", train=SHORT), draw.randrange(8)

        def jump(kind: str = kind) -> None:
            shift = CLOCKS[kind]
            time.time = (lambda: 5.0) if shift is None else (lambda: real() + shift)

        if kind == "equal times":
            code = complete(
                settings(place / "out", train={**SHORT, "checkpoint_every": 1}), at=At("iteration", 5)
            )
            problem = "" if code == -signal.SIGKILL else f"exit code {code}"
            for path in (place / "out").rglob("*"):
                os.utime(path, (1e9, 1e9))
        else:
            ended = apart(trained(config), place, prepare=at_iteration(at, jump))
            problem = ended.wrong(0)
        problem = problem or _goes_on(config, place / "out" / "toy", before)
        yield Trial(f"{kind}, iteration {at}", problem)
        shutil.rmtree(place / "out", ignore_errors=True)


# ---------------------------------------------------------------- images


IMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link out": lambda path: (path.unlink(), path.symlink_to("/etc/passwd")),
    "a web page": lambda path: path.write_bytes(b"<!DOCTYPE html>"),
    "of another size": lambda path: trees.save(path, trees.image_of(1, (5, 7))),
    "zeros": lambda path: path.write_bytes(b"\0" * 100),
    "its folder gone": lambda path: shutil.rmtree(path.parent),
}  # fmt: skip


@campaign("images that go bad in mid-run", everyday=1, long=20)
def images(place: Path, number: int) -> Iterator[Trial]:
    """A training image is deleted, cut, or replaced by a FIFO, a folder or something else after the check: exit code
    3 with its name within seconds, the run is saved, and with the image mended it goes on to the same bytes."""
    import json

    draw = random.Random(number)
    (place / "at").mkdir()
    trees.folder(place / "at/data")
    changes = {
        "train": {**SETTINGS["train"], "epochs": 5},
        "data": {**SETTINGS["data"], "dataset": str(place / "at/data/data.yaml")},
    }
    config = {**json.loads(json.dumps(SETTINGS)), **changes}
    ended = apart(trained({**config, "out": str(place / "whole")}), place)
    assert ended.code == 0, ended.text
    before = results(place / "whole" / "x")
    path = place / "at/data/images/train/a_1.png"
    for (name, do), at in zip(
        itertools.islice(itertools.cycle(IMAGES.items()), number), itertools.count(), strict=False
    ):
        shutil.copytree(place / "at/data", place / "kept")
        mine, when = {**config, "out": str(place / "out"), "name": "x"}, draw.randrange(3)
        ended = apart(trained(mine), place, prepare=at_iteration(when, lambda do=do: do(path)), timeout=60)
        problem = ended.wrong(3, facts=["a_1.png" if "folder gone" not in name else "a_", "saved"])
        shutil.rmtree(place / "at/data")
        (place / "kept").rename(place / "at/data")
        problem = problem or _goes_on(mine, place / "out" / "x", before)
        yield Trial(f"{name} before iteration {when} ({at})", problem)
        shutil.rmtree(place / "out", ignore_errors=True)


# ---------------------------------------------------------------- several processes


@campaign("four writers at once", everyday=0, long=5)
def writers(place: Path, number: int) -> Iterator[Trial]:
    """The same command four times at the same moment: one does the run, three end with 2 and name it; the results
    are the same bytes."""
    before = undisturbed(place)
    for trial in range(number):
        config = settings(place / "out")
        codes = sorted(wait(child) for child in [start(config) for _ in range(4)])
        problem = "" if codes == [0, 2, 2, 2] else f"exit codes {codes}"
        if not problem and results(place / "out" / "toy") != before:
            problem = "other results"
        yield Trial(f"time {trial}", problem)
        shutil.rmtree(place / "out", ignore_errors=True)


def _children(process: int) -> list[int]:
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
        return [int(word) for word in text.split()]
    return []


@campaign("killed loader processes", everyday=0, long=10)
def loaders(place: Path, number: int) -> Iterator[Trial]:
    """A loader process is killed at any moment: the run is saved, ends with 3 and says so, or had no more need of
    it; the same command goes on to the same bytes."""
    draw, before = random.Random(number), undisturbed(place)
    for _ in range(number):
        config = settings(place / "out", data={"workers": 2})
        at = draw.randrange(20)

        def kill() -> None:
            for child in _children(os.getpid())[:1]:
                os.kill(child, signal.SIGKILL)

        ended = apart(trained(config), place, prepare=at_iteration(at, kill))
        problem = ended.wrong(0, 3, facts=["loader process", "saved"] if ended.code else [])
        problem = problem or _goes_on(config, place / "out" / "toy", before)
        yield Trial(f"before iteration {at}: exit code {ended.code}", problem)
        shutil.rmtree(place / "out", ignore_errors=True)


# ---------------------------------------------------------------- limits


def _used() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


LIMITS: dict[str, tuple[Callable[[], object], dict[str, Any], tuple[str, ...]]] = {
    "64 open files": (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)), {"workers": 2}, ("open",)),
    "40 open files": (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40)), {"workers": 2}, ("open",)),
    "12 open files": (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12)), {"workers": 0}, ("open",)),
    "10 MB of memory": (lambda: _memory(10), {"workers": 0}, ("memory",)),
    "60 MB of memory": (lambda: _memory(60), {"workers": 0}, ("memory",)),
    "200 MB of memory": (lambda: _memory(200), {"workers": 2}, ("memory",)),
    "files of 2 kB": (lambda: _files(2000), {"workers": 0}, ("ulimit -f",)),
    "files of 20 kB": (lambda: _files(20_000), {"workers": 0}, ("ulimit -f",)),
}  # fmt: skip


def _memory(megabytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_used() + (megabytes << 20),) * 2)


def _files(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@campaign("limits of the system", everyday=0, long=16)
def limits(place: Path, number: int) -> Iterator[Trial]:
    """`ulimit -n 64`, little memory (where a library may end the process by itself), small files: the run ends well,
    or with 3 or 4 and a sentence that says what ran out; with room the same command goes on to the same bytes."""
    before = undisturbed(place, train=SHORT)
    for name, (limit, data, facts) in itertools.islice(itertools.cycle(LIMITS.items()), number):
        config = settings(place / "out", train=SHORT, data=data)
        ended: Ended = apart(trained(config), place, prepare=limit)
        ended_by_a_library = "memory" in name and ended.code in (-signal.SIGSEGV, -signal.SIGABRT)
        problem = "" if ended_by_a_library else ended.wrong(0, 3, 4, facts=facts if ended.code else ())
        problem = problem or _whole(place / "out" / "toy")
        problem = problem or _goes_on(config, place / "out" / "toy", before)
        yield Trial(f"{name}: exit code {ended.code}", problem)
        shutil.rmtree(place / "out", ignore_errors=True)


# ---------------------------------------------------------------- anything in any order


def _corrupt(run: Path, draw: random.Random) -> str:
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.name != "LOCK"]
    if not files:
        return "nothing to spoil"
    path = draw.choice(files)
    data = bytearray(path.read_bytes())
    if data and draw.random() < 0.6:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    else:
        del data[draw.randrange(len(data) + 1) :]
    path.write_bytes(data)
    return f"spoilt {path.relative_to(run)}"


@campaign("commands in any order", everyday=1, long=50)
def orders(place: Path, number: int) -> Iterator[Trial]:
    """Random sequences of running, killing, spoiling a file, going on, scoring, exporting, reporting, comparing,
    renaming the folder and deleting the cache: never a traceback, exit codes as promised, and no step that was
    finished and not spoilt is lost."""
    for trial in range(number):
        draw, ground = random.Random(trial), place / f"{trial}"
        ground.mkdir()
        run, spoilt, problem, told = ground / "out" / "toy", False, "", []
        for turn in range(7):
            finals = {path.parent.name for path in run.glob("steps/*/final")}
            kind = draw.choice(
                (
                    "run",
                    "run",
                    "kill",
                    "kill",
                    "spoil",
                    "eval",
                    "export",
                    "report",
                    "compare",
                    "rename",
                    "cache",
                )
            )
            told.append(kind)
            config = settings(run.parent, train=SHORT)
            if kind == "run":
                ended = apart(trained(config), ground, cache=ground / "cache")
                problem = ended.wrong(0, 2, 3, 4) if spoilt else ended.wrong(0)
            elif kind == "kill":
                code = complete(config, at=At("any", draw.randrange(30)))
                problem = "" if code in (-9, 0) or (spoilt and code in (2, 3, 4)) else f"exit code {code}"
            elif kind == "spoil" and run.is_dir():
                told[-1] = _corrupt(run, draw)
                spoilt = True
            elif kind in ("eval", "export", "report", "compare") and run.is_dir():
                more = {
                    "export": ["--no-onnx", "-o", f"bundle{turn}"],
                    "report": ["--images", "0"],
                    "compare": ["--out", "c"],
                }
                data = [f"data={config['data']['dataset']}"] if kind in ("eval", "report") else []
                ended = apart(command(kind, run, *more.get(kind, []), *data), ground, cache=ground / "cache")
                problem = ended.wrong(0, 2, 3, 4)
            elif kind == "rename" and run.parent.is_dir():
                new = ground / f"out{turn}"
                run.parent.rename(new)
                run = new / "toy"
            elif kind == "cache":
                shutil.rmtree(ground / "cache", ignore_errors=True)
            lost = finals - {path.parent.name for path in run.glob("steps/*/final")}
            if lost and not problem:
                problem = f"the finished steps {lost} are gone"
            if problem:
                break
        if not spoilt and not problem:
            problem = _whole(run)
        yield Trial(f"seed {trial}: {', '.join(told)}", problem)
        shutil.rmtree(ground)
