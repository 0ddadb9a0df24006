"""Draw the picture at the top of README.md: the same street scenes through the demo's models.

Usage: python scripts/pictures/readme.py [--runs FOLDER] [--out FILE]

FOLDER is the `--out` of an `everseg demo`; what is missing in it is trained first (less than a minute).
Without --runs the runs are made in a temporary folder. The picture stands on its own light ground, so that it can be
read on light and on dark pages.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import everseg
from everseg.data.demo import NAMES, build
from everseg.inference.pictures import palette

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "assets" / "forgetting.png"
SCENES = 2
"""Rows."""
SCALE = 3
"""A scene of 64 x 96 pixels is shown so many times larger."""
GAP, MARGIN, HEAD, FOOT = 12, 24, 160, 76
"""Pixels between pictures, around all, above and below them."""
GROUND, INK, SOFT = (255, 255, 255), (28, 28, 32), (96, 98, 106)


def chosen(split: object) -> list[int]:
    """The test scenes to show, by a rule that looks at the labels alone: the rarest class is as large as can be."""
    sizes = [
        min(np.bincount(split.read_mask(index).ravel(), minlength=len(NAMES))) for index in range(len(split))
    ]
    return sorted(np.argsort(sizes, kind="stable")[::-1][:SCENES].tolist())


def columns(runs: Path) -> tuple[list[str], list[tuple[str, str, list[np.ndarray]]]]:
    """The class names, and for each column its two lines of heading and its pictures, (H, W, 3) uint8."""
    rows = {row.method: row for row in everseg.demo(out=runs)}
    split = build().splits["val"]
    scenes = [split.read(index) for index in chosen(split)]
    models = {
        "step 0": everseg.load(runs / "demo-ft", step=0),
        **{method: everseg.load(runs / f"demo-{method}") for method in rows},
    }
    names = list(models["joint"].predict(scenes[0][0]).classes)
    colours = palette(len(names), background=0)
    # raw id of the scenes -> id of the model of all classes; the first step's ids are the beginning of these
    lut = np.array([names.index(name) for _, name in sorted(NAMES.items())])

    def through(model: str) -> list[np.ndarray]:
        return [colours[models[model].predict(image).ids] for image, _ in scenes]

    def scored(method: str) -> str:
        return f"old {100 * rows[method].old:.0f}  new {100 * rows[method].new:.0f}"

    return names, [
        ("scene", "", [image for image, _ in scenes]),
        ("labels", "", [colours[lut[mask]] for _, mask in scenes]),
        ("four classes", f"old {100 * rows['ft'].first:.0f}", through("step 0")),
        ("fine-tuning", scored("ft"), through("ft")),
        ("MiB", scored("mib"), through("mib")),
        ("joint training", scored("joint"), through("joint")),
    ]


def draw(names: list[str], shown: list[tuple[str, str, list[np.ndarray]]], new: int) -> Image.Image:
    """Put the columns side by side, their headings above and the colours of the classes below.

    Args:
        names: of the classes, background first.
        shown: what `columns` gives.
        new: how many of the classes, the last ones, step 1 adds.
    """
    large, small = ImageFont.load_default(size=32), ImageFont.load_default(size=26)
    height, width = (SCALE * side for side in shown[0][2][0].shape[:2])
    left = [MARGIN + number * (width + GAP) for number in range(len(shown))]
    total = (left[-1] + width + MARGIN, HEAD + SCENES * (height + GAP) + FOOT)
    picture = Image.new("RGB", total, GROUND)
    pen = ImageDraw.Draw(picture)
    added = " and ".join(names[-new:])
    for first, last, text in ((2, 2, "after step 0"), (3, 5, f"after step 1, which adds {added}")):
        pen.text((left[first], 44), text, fill=INK, font=large, anchor="ls")
        pen.line((left[first], 60, left[last] + width, 60), fill=SOFT, width=2)
    for x, (head, below, pictures) in zip(left, shown, strict=True):
        pen.text((x, HEAD - (56 if below else 20)), head, fill=INK, font=large, anchor="ls")
        pen.text((x, HEAD - 20), below, fill=SOFT, font=small, anchor="ls")
        for row, pixels in enumerate(pictures):
            tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            picture.paste(tile, (x, HEAD + row * (height + GAP)))
    x, y = MARGIN, total[1] - FOOT // 2
    for name, colour in zip(names, palette(len(names), background=0).tolist(), strict=True):
        pen.rounded_rectangle((x, y - 13, x + 26, y + 13), 5, fill=tuple(colour))
        pen.text((x + 36, y), name, fill=INK, font=small, anchor="lm")
        x += 36 + int(small.getlength(name)) + 32
    pen.text((total[0] - MARGIN, y), "old, new: mean IoU in percent", fill=SOFT, font=small, anchor="rm")
    return picture


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=PICTURE, metavar="FILE")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        names, shown = columns(given.runs or Path(temporary))
    picture = draw(names, shown, new=2)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(given.out, optimize=True)


if __name__ == "__main__":
    main()
