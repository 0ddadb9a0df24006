"""Disks that fail: at every operation of a save, and under whole runs."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import itertools
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from apart import Ended, apart, trained
from campaigns import Trial, campaign
from disk import Disk
from processes import complete, results
from toy import settings

from everseg.errors import CheckpointError
from everseg.runs.commit import (
    newest_valid,
    purge,
    read_document,
    save_folder,
    verify,
    write_bytes,
    write_document,
)
from everseg.runs.journal import Journal
from everseg.runs.run_folder import RunFolder

SAID = {
    errno.ENOSPC: "disk full", errno.EDQUOT: "quota", errno.EIO: "reports an error", errno.EROFS: "read-only",
    errno.EACCES: "no permission",
}  # fmt: skip
"""Error -> a word of its sentence."""
SHORT = {"epochs": 1, "epochs_next": 1}


# ---------------------------------------------------------------- every operation of a save


def save(run: Path, iteration: int) -> None:
    """What a run writes: a line, a checkpoint, the removal of an old one, a document, counts."""
    checkpoints = RunFolder(run).checkpoints(0)
    journal = Journal(run / "journal.jsonl")
    journal.rewind(0, iteration - 1)
    journal.add("iteration", step=0, iteration=iteration)
    tensors = {"model": {"w": torch.full((50,), float(iteration))}}
    save_folder(checkpoints / f"it-{iteration:08d}", tensors, {"state": {"iteration": iteration}})
    purge(checkpoints)
    write_document(run / "scenario.json", {"iteration": iteration})
    write_bytes(run / "images.npz", bytes([iteration]) * 3000)


def _begun(run: Path) -> None:
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    for iteration in (1, 2, 3):
        save(run, iteration)


def _content(run: Path) -> dict[str, str]:
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*"))
        if path.is_file()
    }


def _left(run: Path, *, clean: bool) -> str:
    """What is wrong with a folder in which a save failed; "" if nothing."""
    found = newest_valid(RunFolder(run).checkpoints(0), lambda _: None)
    if found is None or found.name not in ("it-00000003", "it-00000004"):
        return f"the newest whole checkpoint is {found}"
    if read_document(run / "scenario.json")["iteration"] not in (3, 4):
        return "scenario.json is neither the old nor the new one"
    if set((run / "images.npz").read_bytes()) not in ({3}, {4}):
        return "images.npz is neither the old nor the new one"
    if clean and (over := [path.name for path in run.rglob("*.tmp")]):
        return f"leftovers: {over}"
    return ""


def _operations(place: Path) -> tuple[int, dict[str, str]]:
    """How many operations a save has, and what it leaves."""
    run = place / "run"
    _begun(run)
    with Disk(run, errno.EIO, None)() as disk:
        save(run, 4)
    return len(disk.done), _content(run)


def _again(run: Path, whole: dict[str, str]) -> str:
    for pattern in (".*.tmp",):  # a run does so when it begins, once they are a minute old
        for path in run.rglob(pattern):
            path.unlink()
    save(run, 4)
    return "" if _content(run) == whole else f"saved again, it differs: {_content(run)} from {whole}"


def _spread(cases: list[tuple[int, ...]], number: int) -> list[tuple[int, ...]]:
    if number >= len(cases):
        return cases
    return random.Random(number).sample(cases, number)


@campaign("errors at every write of a save", everyday=14, long=350)
def errors_of_a_save(place: Path, number: int) -> Iterator[Trial]:
    """Each operation of a save in turn fails (disk full, quota, I/O error, read-only, permission), once or for good: a
    sentence says which, the older files stay whole, nothing half-written is left where deleting is possible, and saving
    again gives the same bytes."""
    count, whole = _operations(place)
    cases = [
        (at, code, lasting) for at, (code, lasting) in itertools.product(range(count), itertools.product(SAID, (0, 1)))
    ]  # fmt: skip
    run = place / "run"
    for at, code, lasting in _spread(cases, number):
        _begun(run)
        disk, problem = Disk(run, code, at, lasting=bool(lasting)), ""
        with disk():
            try:
                save(run, 4)
                # Old checkpoints and leftovers that cannot be deleted are no reason to stop.
                problem = (
                    "" if disk.done[at].split()[0] in ("unlink", "rmdir", "remove") else "it went unnoticed"
                )
            except CheckpointError as error:
                problem = "" if SAID[code] in str(error) else f"{SAID[code]!r} is not in: {error}"
            except Exception as error:
                problem = f"a fault: {error!r}"
        clean = not (lasting and disk._is_frozen())
        what = f"{disk.done[at]} (operation {at}) {errno.errorcode[code]}{' for good' if lasting else ''}"
        try:
            problem = problem or _left(run, clean=clean and code != errno.EACCES) or _again(run, whole)
        except Exception as error:
            problem = f"afterwards: {error!r}"
        yield Trial(what, problem)


@campaign("ends at every write of a save", everyday=4, long=35)
def ends_of_a_save(place: Path, number: int) -> Iterator[Trial]:
    """The process ends before each operation of a save in turn: a whole checkpoint exists, each document is the old
    or the new one, and saving again gives the same bytes."""
    count, whole = _operations(place)
    run = place / "run"
    for (at,) in _spread([(at,) for at in range(count)], number):
        _begun(run)

        def end(at: int = at) -> None:
            with Disk(run, None, at)():
                save(run, 4)

        ended = apart(end, place)
        problem = "" if ended.code == 9 else f"it ended with {ended.code}: {ended.text[-300:]}"
        try:
            problem = problem or _left(run, clean=False) or _again(run, whole)
        except Exception as error:
            problem = f"afterwards: {error!r}"
        yield Trial(f"operation {at}", problem)


# ---------------------------------------------------------------- whole runs


def _whole(run: Path) -> str:
    """What is wrong with a run that was stopped; "" if all that is named as finished is whole."""
    try:
        for path in [*run.glob("steps/*/final"), *run.glob("steps/*/ckpt/it-*[0-9]")]:
            verify(path)
    except CheckpointError as error:
        return str(error)
    return ""


@campaign("a disk that fails under a run", everyday=0, long=40)
def failing_runs(place: Path, number: int) -> Iterator[Trial]:
    """A disk fills up, breaks or becomes read-only at any moment of a run: exit code 4 with the error's sentence, whole
    checkpoints, and the same command goes on to the same bytes."""
    config = settings(place / "whole", train=SHORT)
    counted, whole = place / "counted", trained(config)

    def count() -> None:
        with Disk(place / "whole", errno.EIO, None)() as disk:
            try:
                whole()
            finally:
                counted.write_text("\n".join(disk.done))

    ended = apart(count, place)
    assert ended.code == 0, ended.text
    operations, before = counted.read_text().splitlines(), results(place / "whole" / "toy")
    draw = random.Random(number)
    for _ in range(number):
        at, code = draw.randrange(len(operations)), draw.choice([*SAID][:4])
        out = place / "out"
        config = settings(out, train=SHORT)
        work = trained(config)

        def fail(work=work, out: Path = out, at: int = at, code: int = code) -> None:
            with Disk(out, code, at, lasting=True)():
                work()

        ended = apart(fail, place)
        what = f"{operations[at]} (operation {at} of {len(operations)}) {errno.errorcode[code]}"
        problem = ended.wrong(4, 0, facts=[SAID[code]] if ended.code else [])
        if not problem and not ended.code and results(out / "toy") != before:
            problem = "it ended well with other results"  # the removal of what is old may fail
        problem = problem or _whole(out / "toy")
        if not problem and (code := complete(config)):
            problem = f"the same command ends with {code}"
        if not problem and results(out / "toy") != before:
            problem = "it goes on to other results"
        yield Trial(what, problem)
        shutil.rmtree(out, ignore_errors=True)


# ---------------------------------------------------------------- a real small disk

NEWNS, PRIVATE, REC, REMOUNT, RDONLY = 0x20000, 1 << 18, 1 << 14, 32, 1


def _mounted(target: Path, options: str, flags: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    own = bool(flags & REMOUNT) or not (
        libc.unshare(NEWNS) or libc.mount(b"none", b"/", None, REC | PRIVATE, None)
    )
    if not own:
        raise PermissionError(ctypes.get_errno(), "no mounts of one's own here")
    if libc.mount(b"none", str(target).encode(), b"tmpfs", flags, options.encode()):
        raise PermissionError(ctypes.get_errno(), "no mounts here")


def can_mount(place: Path) -> bool:
    """Whether this machine lets the tests have disks of their own."""
    (place / "try").mkdir(exist_ok=True)
    return apart(lambda: _mounted(place / "try", "size=1m"), place).code == 0


@campaign("a real disk that is full or read-only", everyday=0, long=8)
def real_disks(place: Path, number: int) -> Iterator[Trial]:
    """A run on a disk of 40 to 200 kB, or of few files, or one that is remounted read-only while it trains: exit code
    4 and a sentence; with room the same command goes on to the same bytes. Skipped where mounting is not allowed."""
    if not can_mount(place):
        yield from (
            Trial("no mounts", skipped="this machine lets nobody mount a disk") for _ in range(number)
        )
        return
    assert complete(settings(place / "whole", train=SHORT)) == 0
    before = results(place / "whole" / "toy")
    kinds = itertools.cycle(
        (
            "size=40k",
            "size=80k",
            "size=120k",
            "size=160k",
            "size=200k",
            "nr_inodes=20",
            "read-only",
            "read-only late",
        )
    )
    for number_, kind in zip(range(number), kinds, strict=False):
        out = place / f"disk{number_}"
        out.mkdir()

        def on_it(kind: str = kind, out: Path = out) -> None:
            _mounted(out, kind if "=" in kind else "size=20m")
            config = settings(out, train=SHORT)
            ended = apart(trained(config), place, prepare=None if "=" in kind else _frozen(out, kind))
            problem = _told(ended, kind) or _whole(out / "toy")
            if problem:
                raise CheckpointError(problem)
            _mounted(out, "size=50m,nr_inodes=100000", REMOUNT)
            again = apart(trained(config), place)
            if again.code or results(out / "toy") != before:
                raise CheckpointError(f"it does not go on to the same: {again.text[-500:]}")

        ended = apart(on_it, place)
        yield Trial(kind, "" if ended.code == 0 else ended.text[-700:])


def _frozen(out: Path, kind: str):
    """The disk becomes read-only at an iteration of the run."""

    def prepare() -> None:
        from everseg.engine import step

        train, count = step.train_batch, itertools.count()

        def then(*given, **named):
            if next(count) == (7 if kind.endswith("late") else 1):
                _mounted(out, "size=20m", REMOUNT | RDONLY)
            return train(*given, **named)

        step.train_batch = then

    return prepare


def _told(ended: Ended, kind: str) -> str:
    fact = "inodes" if kind.startswith("nr_inodes") else "disk full" if "=" in kind else "read-only"
    return ended.wrong(4, facts=[fact])
