"""What one large input may take: seconds of a processor and megabytes, at full size by `python tests/bounds.py 1`.

Each function makes the input, and gives back what everseg does with it. Memory is what the process has at most
meanwhile, beyond what it had before, as Linux tells it (`peak.py`).
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from everseg.errors import EversegError
from peak import new_peak, peak

SLACK = (0.1, 5.0)
"""Seconds and megabytes beyond twice its part of the bound that a part of an input may take: what every call costs."""


@dataclass(frozen=True)
class Bound:
    """Most seconds and megabytes at full size."""

    make: Callable[[Path, float], Callable[[], object]]
    seconds: float
    megabytes: float
    part: float
    """The part of the full size that is tried every day. It is so large that four times the bound are seen there."""

    def allowed(self, scale: float) -> tuple[float, float]:
        """Most seconds and megabytes of a part: all costs grow as the input does."""
        if scale >= 1:
            return self.seconds, self.megabytes
        return SLACK[0] + 2 * scale * self.seconds, SLACK[1] + 2 * scale * self.megabytes

    def broken(self, taken: Cost, scale: float) -> str:
        """What is wrong with a cost at a scale; "" if nothing."""
        seconds, megabytes = self.allowed(scale)
        if taken.seconds <= seconds and taken.megabytes <= megabytes:
            return ""
        return (
            f"{taken.seconds:.2f} s, {taken.megabytes:.0f} MB; at {scale:g} of the full size are promised "
            f"{seconds:.2f} s and {megabytes:.0f} MB"
        )


@dataclass(frozen=True)
class Cost:
    """What an input took."""

    name: str
    seconds: float
    megabytes: float


def yaml_keys(folder: Path, scale: float) -> Callable[[], object]:
    """60,000 unknown keys in a configuration."""
    from everseg.config.loading import load

    file = folder / "run.yaml"
    file.write_text("".join(f"k{i}: 1\n" for i in range(int(60_000 * scale))))
    return lambda: load(file)


def data_keys(folder: Path, scale: float) -> Callable[[], object]:
    """60,000 unknown keys in a data.yaml."""
    from everseg.config.loading import load_data
    from everseg.data.datasets import load_dataset

    file = folder / "data.yaml"
    file.write_text("classes: [a, b]\n" + "".join(f"k{i}: 1\n" for i in range(int(60_000 * scale))))
    return lambda: load_dataset(load_data(file))


def ppm_comment(folder: Path, scale: float) -> Callable[[], object]:
    """A comment of 50 MB in the header of a PPM."""
    from everseg.data.datasets.decode import read_image

    file = folder / "picture.ppm"
    with file.open("wb") as out:
        out.write(b"P6\n#" + b"x" * int(50e6 * scale) + b"\n2 2\n255\n" + bytes(12))
    return lambda: read_image(file)


def list_lines(folder: Path, scale: float) -> Callable[[], object]:
    """Two million lines in a list of images, each of a file that is not there."""
    return _listed(folder, (f"images/{i:07}.png" for i in range(int(2e6 * scale))))


def repeated_lines(folder: Path, scale: float) -> Callable[[], object]:
    """Two million lines that name one image."""
    return _listed(folder, ("images/a.png" for _ in range(int(2e6 * scale))))


def _listed(folder: Path, lines: Iterator[str]) -> Callable[[], object]:
    from everseg.data.datasets.decode import Reading
    from everseg.data.datasets.listing import ListedFolder

    for name in ("images", "masks"):
        (folder / name).mkdir()
        Image.new("L", (8, 8)).save(folder / name / "a.png")
    (folder / "list.txt").write_text("\n".join(lines))
    return lambda: ListedFolder(folder, "images", "masks").samples(folder / "list.txt", "train", Reading())


def journal_lines(folder: Path, scale: float) -> Callable[[], object]:
    """A million lines in the journal of a run."""
    from everseg.runs.journal import FILE, Journal, _line

    entry = {"event": "train", "step": 1, "iteration": 100, "loss": 0.5, "lr": 0.01, "terms": {"ce": 0.5}}
    with (folder / FILE).open("wb") as out:
        for number in range(int(1e6 * scale)):
            out.write(_line(entry, number))
    return lambda: Journal(folder / FILE).read()


def coco_objects(folder: Path, scale: float) -> Callable[[], object]:
    """10,000 objects of 500 pixels on a picture of 100 megapixels."""
    from everseg.data.datasets.coco_shapes import Picture, draw

    place, side = np.random.default_rng(0), int(10_000 * scale**0.5)
    objects = []
    for x, y in place.integers(0, side, (int(10_000 * scale), 2)).tolist():
        r = 250 * scale**0.5
        objects.append((1, [[x - r, y, x, y - r, x + r, y, x, y + r]]))
    picture = Picture("a.png", side, side, objects)
    return lambda: draw(picture, {1: 1}, 100_000_000)


def coco_overdrawn(folder: Path, scale: float) -> Callable[[], object]:
    """10,000 objects that cover half of a picture of 100 megapixels each."""
    from everseg.data.datasets.coco_shapes import Picture, draw

    side = int(10_000 * scale**0.5)
    picture = Picture("a.png", side, side, [(1, [[0, 0, side, 0, 0, side]])] * int(10_000 * scale))
    return lambda: draw(picture, {1: 1}, 100_000_000)


def names_to_predict(folder: Path, scale: float) -> Callable[[], object]:
    """A million files in a folder to predict."""
    from everseg.data.datasets.decode import Reading
    from everseg.data.datasets.listing import files_to_predict

    _many(folder / "in", scale)
    return lambda: files_to_predict([folder / "in"], folder / "out", Reading())


def names_to_describe(folder: Path, scale: float) -> Callable[[], object]:
    """A million files in a folder that `everseg data init` looks at."""
    import everseg

    _many(folder / "in" / "images", scale)
    return lambda: everseg.data.init(folder / "in", out=folder / "data.yaml", quiet=True)


def _many(folder: Path, scale: float) -> None:
    folder.mkdir(parents=True)
    for number in range(int(1e6 * scale)):
        (folder / f"{number:07}.png").touch()


BOUNDS: dict[str, Bound] = {
    "yaml_keys": Bound(yaml_keys, 10, 200, 0.1),
    "data_keys": Bound(data_keys, 15, 100, 0.1),
    "ppm_comment": Bound(ppm_comment, 1, 10, 1),
    "list_lines": Bound(list_lines, 60, 700, 0.01),
    "repeated_lines": Bound(repeated_lines, 60, 400, 0.01),
    "journal_lines": Bound(journal_lines, 90, 2000, 0.01),
    "coco_objects": Bound(coco_objects, 20, 400, 0.01),
    "coco_overdrawn": Bound(coco_overdrawn, 20, 200, 0.02),
    "names_to_predict": Bound(names_to_predict, 150, 2000, 0.005),
    "names_to_describe": Bound(names_to_describe, 60, 600, 0.005),
}


_warm: set[str] = set()


def cost(name: str, folder: Path, scale: float = 1.0) -> Cost:
    """Make an input below an empty folder, and say what everseg takes for it."""
    if name not in _warm:  # not what it takes to import the libraries
        _warm.add(name)
        with tempfile.TemporaryDirectory() as other:
            cost(name, Path(other), 1e-5)
    act = BOUNDS[name].make(folder, scale)
    before, begun = new_peak(), time.process_time()
    with contextlib.suppress(EversegError):
        act()
    return Cost(name, time.process_time() - begun, (peak() - before) / 1e6)


def run_all(scale: float | None = None, names: list[str] | None = None, times: float = 1.0) -> Iterator[Cost]:
    """What each input takes, one after the other; without a scale each at its part, or so many times as much."""
    for name in names or list(BOUNDS):
        with tempfile.TemporaryDirectory() as folder:
            yield cost(name, Path(folder), scale or min(1.0, times * BOUNDS[name].part))


def main(words: list[str]) -> None:
    """`parts [TIMES]`, or SCALE [NAME...]."""
    found = (
        run_all(times=float((words[1:] or ["1"])[0]))
        if words[:1] == ["parts"]
        else run_all(float(words[0]), words[1:])
    )
    for one in found:
        print(json.dumps(vars(one)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
