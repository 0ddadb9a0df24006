"""Runs a part of the tests under the oldest and the newest supported libraries, and prints a table.

`python scripts/matrix.py` makes a virtual environment for each row, one after the other, and removes it again. A row
that this machine cannot install is left out, and its line says why. `--rows newest` runs one of them; `--use
newest=VENV` runs a row in an environment that is there already. What follows `--` goes to pytest, in place of SUBSET.

The bounds come from pyproject.toml, so the rows move with it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUBSET = (
    "tests/losses",
    "tests/metrics",
    "tests/models",
    "tests/engine/test_resume.py",
    "tests/deploy/test_export.py",
    "tests/deploy/test_adopt.py",
    "tests/deploy/test_adopt_timm.py",
)
"""What the libraries can break: numbers, models and their encoders, resuming, ONNX, foreign networks."""
TOOLS = ("pytest", "pytest-xdist", "hypothesis")
PYTHONS = ("3.11", "3.12", "3.13")
SHOWN = ("torch", "torchvision", "timm", "transformers", "numpy", "onnx", "onnxruntime", "accelerate")
"""Packages whose versions stand in the table."""
CUDA = ("nvidia-", "cuda-")
"""Beginnings of the packages that a CUDA build of PyTorch brings; several GB together."""


@dataclass(frozen=True)
class Row:
    """An environment: its name, its Python, and what pip is asked for beside the tools."""

    name: str
    python: str
    packages: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """A line of the table."""

    row: str
    versions: str
    result: str
    seconds: float
    failed: bool = False


def bounds() -> dict[str, tuple[str, str]]:
    """Package -> its lowest supported version and its range, of the core and of the extras that have bounds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in ("hf", "timm", "export") for line in extras[name])]
    found = {}
    for line in lines:
        match = re.fullmatch(r"([\w-]+)>=([\d.]+)((?:,<[\d.]+)?)", line)
        if match is None:
            raise SystemExit(f"pyproject.toml: '{line}' has no lower bound")
        found[match[1]] = (match[2], f">={match[2]}{match[3]}")
    return found


def rows() -> list[Row]:
    """The rows, cheap ones first."""
    known = bounds()
    timm = ("timm", "torchvision")
    onnx = ("onnx", "onnxscript", "onnxruntime")

    def lowest(*left_out: str) -> tuple[str, ...]:
        # ".*" takes the last correction of that version: a lower bound is a promise about it, not about its first file.
        return tuple(
            f"{name}=={low}.*" if low.count(".") < 2 else f"{name}=={low}"
            for name, (low, _) in known.items()
            if name not in left_out
        )

    def highest(*left_out: str) -> tuple[str, ...]:
        return tuple(f"{name}{wide}" for name, (_, wide) in known.items() if name not in left_out)

    return [
        # PyTorch of every day with all else at its lowest: what a plain install does not try, and cheap.
        Row("oldest but torch", PYTHONS[0], ("torch<2.14", *lowest("torch", *timm))),
        Row("oldest", PYTHONS[0], lowest(*onnx)),
        Row("newest", PYTHONS[0], highest()),
        *(Row(f"newest, Python {python}", python, highest()) for python in PYTHONS[1:]),
    ]


def interpreter(version: str) -> str | None:
    """A Python of a version on this machine; None = none."""
    for name in (sys.executable, f"python{version}"):
        path = shutil.which(name)
        if path is None:
            continue
        said = subprocess.run(
            [path, "-c", "import sys; print('{}.{}'.format(*sys.version_info))"],
            capture_output=True,
            text=True,
        )
        if said.returncode == 0 and said.stdout.strip() == version:
            return path
    return None


def made(row: Row, folder: Path, cuda: bool) -> Path | str:
    """Make the environment of a row; return its Python, or why there is none."""
    python = interpreter(row.python)
    if python is None:
        return f"not run: no Python {row.python} on this machine"
    subprocess.run([python, "-m", "venv", folder], check=True)
    inside = folder / "bin" / "python"
    wanted = [*row.packages, *TOOLS, str(ROOT)]
    pip = [str(inside), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    # pip's report says what it would install without fetching whole packages.
    plan = folder / "plan.json"
    asked = subprocess.run(
        [*pip, "--dry-run", "--report", str(plan), *wanted], capture_output=True, text=True
    )
    if asked.returncode:
        return f"not run: {_reason(asked.stderr)}"
    names = [item["metadata"]["name"].lower() for item in json.loads(plan.read_text())["install"]]
    if not cuda and any(name.startswith(CUDA) for name in names):
        return "not run: pip takes a CUDA build of PyTorch here, several GB (--cuda-builds runs it)"
    done = subprocess.run([*pip, *wanted], capture_output=True, text=True)
    return inside if done.returncode == 0 else f"not run: {_reason(done.stderr)}"


def _reason(text: str) -> str:
    errors = (
        [line for line in text.splitlines() if line.startswith("ERROR")]
        or text.splitlines()
        or ["pip failed"]
    )
    return errors[0].removeprefix("ERROR: ")[:200]


def tried(row: str, python: Path, tests: list[str]) -> Outcome:
    """Run the tests with a Python; the package comes from this checkout, whatever is installed."""
    begin = time.monotonic()
    code = (
        "import importlib.metadata as m, platform\n"
        "def v(n):\n"
        "    try: return n + ' ' + m.version(n)\n"
        "    except m.PackageNotFoundError: return ''\n"
        f"print(', '.join(filter(None, ['Python ' + platform.python_version(), *map(v, {SHOWN!r})])))"
    )
    versions = subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run(
            [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", f"{place}/t", *tests],
            cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            print(f"{row}: {line}", file=sys.stderr)
    last = re.sub(r"^=+ | =+$", "", lines[-1]) if lines else _reason(done.stderr)
    return Outcome(row, versions, last, time.monotonic() - begin, done.returncode != 0)


def main(given: list[str]) -> int:
    split = given.index("--") if "--" in given else len(given)
    asked, tests = given[:split], given[split + 1 :]
    known = rows()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", help=f"names, parted by ';': {'; '.join(row.name for row in known)}")
    parser.add_argument(
        "--use", action="append", default=[], metavar="ROW=VENV", help="an environment that is there"
    )
    parser.add_argument(
        "--cuda-builds", action="store_true", help="also rows that take a CUDA build of PyTorch"
    )
    chosen = parser.parse_args(asked)
    at_hand = dict(item.split("=", 1) for item in chosen.use)
    names = [name.strip() for name in chosen.rows.split(";")] if chosen.rows else [row.name for row in known]
    if wrong := sorted({*names, *at_hand} - {row.name for row in known}):
        parser.error(f"no row {', '.join(wrong)}; rows: {'; '.join(row.name for row in known)}")
    outcomes = []
    for row in known:
        if row.name not in names:
            continue
        with tempfile.TemporaryDirectory(prefix="everseg-matrix-") as place:
            python: Path | str
            if row.name in at_hand:
                python = Path(at_hand[row.name]).expanduser() / "bin" / "python"
            else:
                python = made(row, Path(place) / "venv", chosen.cuda_builds)
            outcome = (
                Outcome(row.name, "", python, 0.0)
                if isinstance(python, str)
                else tried(row.name, python, tests or list(SUBSET))
            )
        print(f"{outcome.row}: {outcome.result}", file=sys.stderr, flush=True)
        outcomes.append(outcome)
    print("| row | versions | result | seconds |\n|---|---|---|---|")
    for one in outcomes:
        print(
            f"| {one.row} | {one.versions or '-'} | {one.result} | {f'{one.seconds:.0f}' if one.seconds else '-'} |"
        )
    return int(any(one.failed for one in outcomes))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
