"""Make the pictures of the tutorials: type a page's commands as printed, then photograph what they made.

Usage: python scripts/pictures/screens.py PAGE [--folder FOLDER] [--only-shots]

PAGE is a key of SHOTS. Needs Chromium. FOLDER (default: a temporary one) is where the commands run; with --only-shots
they have run there before. Every picture goes to docs/assets.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "docs" / "assets"
LIMIT = 150_000
"""Bytes of a picture."""
sys.path[:0] = [str(ROOT / "tests" / "pages"), str(ROOT / "tests" / "deploy")]

import chromium  # noqa: E402
from reading import blocks, commands  # noqa: E402


@dataclass(frozen=True)
class Shot:
    """One picture: a web page, from the element `at` on, or an image file, the `times`-fold size."""

    name: str
    file: str
    size: tuple[int, int] = (1000, 560)
    at: str = ""
    times: int = 1


SHOTS = {
    "first-own-data": (
        Shot("first-preview", "data_preview.html", (1000, 760)),
        Shot("first-report", "runs/first/report.html", (1000, 620)),
        Shot("first-overlay", "out/*overlay*", times=6),
    ),
    "tutorials/robotics": (
        Shot("robotics-report", "runs/bundle-v2/report.html", (1000, 640)),
        Shot("robotics-diff", "diff/diff.png"),
    ),
    "tutorials/drone": (Shot("drone-overlay", "masks/*overlay*", times=2),),
    "tutorials/medical": (Shot("medical-diff", "diff/diff.png"),),
    "tutorials/driving": (Shot("driving-compare", "runs/cs-bdd-idd-sweep/compare.html", (1100, 640)),),
}
"""Page below docs -> its pictures."""
NOT_TYPED = re.compile(r"everseg serve|everseg data download|pip |python3 -m venv|source |curl")


def type_page(page: Path, folder: Path) -> None:
    """Run the blocks of a page in order, in `folder`, with the settings as printed."""
    bin_folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "80",
                   "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}  # fmt: skip
    for block in blocks(page):
        if block.file:
            (folder / block.file).write_text(block.code, encoding="utf-8")
            continue
        typed = [[sys.executable, "-c", block.code]] if block.language == "python" else []
        if block.language == "sh":
            typed = [
                ["bash", "-c", command] for command in commands(block.code) if not NOT_TYPED.match(command)
            ]
        for command in typed:
            sys.stdout.write(f"$ {command[-1]}\n")
            began = time.monotonic()
            done = subprocess.run(
                command, cwd=folder, env=environment, text=True, stdin=subprocess.DEVNULL, check=False
            )
            sys.stdout.write(f"[exit code {done.returncode}, {time.monotonic() - began:.0f} s]\n")


def photograph(shots: tuple[Shot, ...], folder: Path) -> None:
    """Write the pictures of files that are there."""
    with tempfile.TemporaryDirectory() as place, chromium.page(Path(place)) as page:
        for shot in shots:
            file = sorted(folder.glob(shot.file))[0]
            if file.suffix == ".html":
                page.window(*shot.size)
                page.call("Emulation.setScrollbarsHidden", hidden=True)
                page.call("Page.navigate", url=file.resolve().as_uri())
                page.wait("document.readyState === 'complete'")
                if shot.at:
                    page.script(f"document.querySelector({shot.at!r}).scrollIntoView()")
                png = Path(place) / "shot.png"
                page.screenshot(png)
                picture = Image.open(png).convert("RGB").crop((0, 0, *shot.size))
            else:
                picture = Image.open(file).convert("RGB")
                size = (picture.width * shot.times, picture.height * shot.times)
                picture = picture.resize(size, Image.Resampling.NEAREST)
                picture.thumbnail((1100, 700))
            save(picture, ASSETS / f"{shot.name}.webp")


def save(picture: Image.Image, file: Path) -> None:
    """As good as fits into LIMIT bytes."""
    for quality in (88, 75, 60, 45, 30):
        picture.save(file, quality=quality, method=6)
        if file.stat().st_size <= LIMIT:
            break
    sys.stdout.write(f"{file.relative_to(ROOT)}: {file.stat().st_size} bytes\n")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", choices=SHOTS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only-shots", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not given.only_shots:
            type_page(ROOT / "docs" / f"{given.page}.md", folder)
        photograph(SHOTS[given.page], folder)


if __name__ == "__main__":
    main()
