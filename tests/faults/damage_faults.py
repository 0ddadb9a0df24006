"""Damages of run folders and bundles: each is told, or leaves everything as it was."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import trees
from campaigns import Trial, campaign
from test_hostile_documents import SETTINGS, everything

import everseg
from everseg.deploy.bundle import open_bundle
from everseg.errors import EversegError
from everseg.runs.commit import verify
from everseg.runs.journal import Journal
from everseg.runs.run_folder import RunFolder


class Damage(NamedTuple):
    """One damage of one file."""

    file: str
    what: str
    do: Callable[[Path], object]
    """Gets the folder."""


def _bytes(change: Callable[[bytearray], object]) -> Callable[[Path], object]:
    def do(path: Path) -> None:
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)

    return do


def _flip(draw: random.Random) -> tuple[str, Callable[[Path], object]]:
    at, bit = draw.random(), draw.randrange(8)

    def change(data: bytearray) -> None:
        data[int(at * len(data))] ^= 1 << bit

    return f"bit {bit} flipped at {at:.4f}", _bytes(change)


def _cut(draw: random.Random) -> tuple[str, Callable[[Path], object]]:
    share = draw.choice((0.0, draw.random(), 0.999))
    return f"cut to {share:.3f}", _bytes(lambda data: data.__delitem__(slice(int(share * len(data)), None)))


def _zeros(draw: random.Random) -> tuple[str, Callable[[Path], object]]:
    at = draw.random()

    def change(data: bytearray) -> None:
        start = int(at * len(data))
        end = min(len(data), start + 512)
        data[start:end] = bytes(end - start)

    return f"zeros at {at:.4f}", _bytes(change)


def _longer(draw: random.Random) -> tuple[str, Callable[[Path], object]]:
    more = draw.randbytes(draw.choice((1, 100, 5000)))
    return f"{len(more)} bytes longer", _bytes(lambda data: data.extend(more))


def _missing(_: random.Random) -> tuple[str, Callable[[Path], object]]:
    return "missing", lambda path: path.unlink()


def _emptied(_: random.Random) -> tuple[str, Callable[[Path], object]]:
    def do(path: Path) -> None:
        path.unlink()
        path.mkdir()

    return "a folder in its place", do


KINDS = (_flip, _flip, _flip, _cut, _zeros, _longer, _missing, _emptied)
EXTRA = ("x.json", ".x.tmp", "it-00000009.tmp", "LOCK.old", "steps.json", "model.pth")


def _damages(folder: Path, number: int, draw: random.Random) -> Iterator[Damage]:
    """Damages of every kind over all files: of single ones, two that change places, and files too many."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for count in range(number):
        file = files[count % len(files)]
        if count % 10 == 8:
            other = draw.choice([name for name in files if name != file])
            yield Damage(file, f"swapped with {other}", lambda at, a=file, b=other: _swap(at / a, at / b))
        elif count % 10 == 9:
            name = draw.choice(EXTRA)
            place = Path(file).parent / name
            yield Damage(str(place), "extra", lambda at, place=place: (at / place).write_bytes(b'{"a": 1}'))
        else:
            what, do = draw.choice(KINDS)(draw)
            yield Damage(file, what, lambda at, file=file, do=do: do(at / file))


def _swap(a: Path, b: Path) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


# ---------------------------------------------------------------- what can be read of them


PHOTO = trees.image_of(3, (40, 48))


def _seen(folder: Path) -> str:
    found = everseg.load(folder).predict(PHOTO)
    return hashlib.sha256(np.ascontiguousarray(found.ids).tobytes()).hexdigest()


def of_run(run: Path) -> str:
    """All that a report, a comparison, a prediction and the next step would read of a run."""
    folder = RunFolder(run)
    finals = [verify(folder.final(step)) for step in range(len(folder.finished_steps))]
    lost = Journal(run / "journal.jsonl").read()[1]
    return repr((everything(run), finals, _seen(run), folder.config(), lost))


def of_bundle(bundle: Path) -> str:
    """All that a prediction, a history and an extension would read of a bundle."""
    opened = open_bundle(bundle)
    return repr((opened.digest, opened.about, opened.lineage, _seen(bundle)))


def _says_the_same(folder: Path, honest: Path, damage: Damage) -> str:
    """Why a damage changes nothing; "" if no reason is known."""
    if damage.what == "extra":
        return "nothing asks for a file that no document names"
    one, two = (at / damage.file for at in (folder, honest))
    try:
        if one.suffix == ".json" and json.loads(one.read_bytes()) == json.loads(two.read_bytes()):
            return "the document says the same"
        if one.suffix == ".jsonl" and [*map(json.loads, one.open("rb"))] == [
            *map(json.loads, two.open("rb"))
        ]:
            return "the lines say the same"
    except (OSError, ValueError):
        pass
    if damage.what.startswith("swapped") and one.read_bytes() == two.read_bytes():
        return "both files are the same"
    return ""


def _judged(damage: Damage, honest: Path, place: Path, read: Callable[[Path], str], before: str) -> Trial:
    shutil.copytree(honest, place)
    what = f"{honest.name}/{damage.file} {damage.what}"
    try:
        damage.do(place)
        found = read(place).replace(str(place), str(honest))
    except EversegError as error:
        told = error.exit_code in (2, 4) and str(place) in str(error)
        return Trial(what, "" if told else f"exit {error.exit_code}, and the folder is not named: {error}")
    except Exception as error:
        return Trial(what, f"a fault: {error!r}")
    finally:
        shutil.rmtree(place)
    # A manifest in another layout has another digest, which the next step compares.
    if found == before or damage.file.endswith("MANIFEST.json"):
        shutil.copytree(honest, place)
        damage.do(place)
        reason = _says_the_same(place, honest, damage)
        shutil.rmtree(place)
        return Trial(what, "" if reason else "it was not noticed", reason)
    if damage.file == "journal.jsonl":  # the report and the count of lost lines say so
        return Trial(what)
    return Trial(what, "something else was read without a word")


@campaign("damages of run folders and bundles", everyday=14, long=310)
def damages(place: Path, number: int) -> Iterator[Trial]:
    """A flipped bit, a cut, zeros, bytes behind, a file lost, swapped, replaced or too many: it is told with the
    folder, or everything is read as before."""
    torch.manual_seed(0)
    run = everseg.run({**SETTINGS, "out": str(place)}, quiet=True).path
    bundle = everseg.export(run, place / "bundle", onnx=False).path
    for folder, read, share in ((run, of_run, 0.65), (bundle, of_bundle, 0.35)):
        draw = random.Random(16)
        before = read(folder)
        count = round(number * share)
        for damage in _damages(folder, count, draw):
            yield _judged(damage, folder, place / "damaged" / folder.name, read, before)
