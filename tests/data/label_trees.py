"""Random small trees of masks as labelling tools write them, with the truth of every pixel.

`outcome(seed, folder)` draws a tree, runs `init` and `check` over it as a user would, and compares whatever `check`
passes with the truth, pixel by pixel. Any number of trees: `python tests/data/label_trees.py FIRST COUNT`.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from everseg import data
from everseg.config.fields import DataConfig
from everseg.data.datasets import load_dataset
from everseg.errors import EversegError
from everseg.labels import spelling

NAMES = ("road", "tree", "building", "person", "sign", "water")
VOID = -1
"""Pixels without annotation in the truth; 0 is the first class or the background, 1, 2, ... are the next."""
COLOURS = (
    (0, 0, 0),
    (128, 64, 128),
    (107, 142, 35),
    (70, 70, 70),
    (220, 20, 60),
    (220, 220, 0),
    (0, 90, 200),
)
LATE = 0.25
"""Share of the trees that get more masks, drawn in another way, after the description was written."""


@dataclass
class Tree:
    """What a user has: masks, and the names of the classes in the order of the truth."""

    rng: np.random.Generator
    root: Path
    names: list[str]
    background: bool
    truth: dict[str, np.ndarray] = field(default_factory=dict)
    """Sample -> (H, W) truth."""
    way: str = ""
    saying: str = ""
    late: bool = False

    def shapes(self, shown: list[int], void: float, size: tuple[int, int]) -> np.ndarray:
        """Rectangles of some classes over the background, or over one of the classes where there is none."""
        rng, (height, width) = self.rng, size
        mask = np.zeros(size, int) if self.background else np.full(size, int(rng.choice(shown)))
        for value in shown:
            for _ in range(int(rng.integers(1, 3))):
                h, w = int(rng.integers(6, height // 2)), int(rng.integers(6, width // 2))
                y, x = int(rng.integers(0, height - h)), int(rng.integers(0, width - w))
                mask[y : y + h, x : x + w] = value
        if rng.random() < void:
            mask[: int(rng.integers(2, 6)), :] = VOID
        return mask


Paint = Callable[[Tree, np.ndarray], Image.Image]


def _ids(mask: np.ndarray, void: int = 255, table: np.ndarray | None = None) -> np.ndarray:
    values = mask if table is None else table[np.maximum(mask, 0)]
    return np.where(mask == VOID, void, values)


def grey(tree: Tree, mask: np.ndarray) -> Image.Image:
    return Image.fromarray(_ids(mask).astype(np.uint8))


def deep(tree: Tree, mask: np.ndarray) -> Image.Image:
    return Image.fromarray(_ids(mask).astype(np.uint16))


def _palette(colours: list[tuple[int, int, int]]) -> list[int]:
    return [part for colour in colours for part in colour]


def indexed(tree: Tree, mask: np.ndarray) -> Image.Image:
    """One palette in all files; void is index 255."""
    picture = Image.fromarray(_ids(mask).astype(np.uint8)).convert("L")
    picture.putpalette(_palette([*COLOURS, *[(9, 9, 9)] * (255 - len(COLOURS)), (224, 224, 192)]))
    return picture


def adaptive(tree: Tree, mask: np.ndarray) -> Image.Image:
    """A palette of the colours that this file shows, in its own order."""
    rgb = colour_array(mask)
    shown = np.unique(rgb.reshape(-1, 3), axis=0)
    shown = shown[tree.rng.permutation(len(shown))]
    index = np.argmax((rgb[:, :, None] == shown[None, None]).all(-1), axis=-1)
    picture = Image.fromarray(index.astype(np.uint8)).convert("L")
    picture.putpalette(_palette([tuple(map(int, c)) for c in shown]))
    return picture


def random_palette(tree: Tree, mask: np.ndarray) -> Image.Image:
    """Ids with colours that are drawn anew for every file."""
    picture = Image.fromarray(_ids(mask).astype(np.uint8)).convert("L")
    picture.putpalette([int(v) for v in tree.rng.integers(0, 256, 768)])
    return picture


def colour_array(mask: np.ndarray) -> np.ndarray:
    return np.array([*COLOURS, (255, 255, 255)], np.uint8)[mask]


def colour(tree: Tree, mask: np.ndarray) -> Image.Image:
    return Image.fromarray(colour_array(mask))


def clear_background(tree: Tree, mask: np.ndarray) -> Image.Image:
    alpha = np.where(mask == 0, 0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([colour_array(mask), alpha]), "RGBA")


def alpha_only(tree: Tree, mask: np.ndarray) -> Image.Image:
    alpha = np.where(mask == 0, 0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([np.zeros((*mask.shape, 3), np.uint8), alpha]), "RGBA")


def black_and_white(tree: Tree, mask: np.ndarray) -> Image.Image:
    return Image.fromarray(_ids(np.minimum(mask, 1), 128).astype(np.uint8) * 255)


def nearly_white(tree: Tree, mask: np.ndarray) -> Image.Image:
    return Image.fromarray((np.minimum(mask, 1) * int(tree.rng.integers(252, 256))).astype(np.uint8))


def bilevel(tree: Tree, mask: np.ndarray) -> Image.Image:
    return Image.fromarray((mask > 0).astype(np.uint8) * 255).convert("1")


def through_jpeg(tree: Tree, mask: np.ndarray) -> Image.Image:
    file = io.BytesIO()
    Image.fromarray((mask > 0).astype(np.uint8) * 255).save(
        file, "JPEG", quality=int(tree.rng.integers(60, 98))
    )
    return Image.open(file).convert("L")


def smooth(tree: Tree, mask: np.ndarray) -> Image.Image:
    large = Image.fromarray((mask > 0).astype(np.uint8) * 255)
    size = (large.width // 3 * 2, large.height // 3 * 2)
    return large.resize(size, Image.Resampling.BILINEAR).resize(large.size, Image.Resampling.BILINEAR)


def resized_ids(tree: Tree, mask: np.ndarray) -> Image.Image:
    picture = Image.fromarray(_ids(mask, 0).astype(np.uint8) * 10)
    size = (picture.width // 3 * 2, picture.height // 3 * 2)
    return picture.resize(size, Image.Resampling.BILINEAR).resize(picture.size, Image.Resampling.BILINEAR)


def smooth_colour(tree: Tree, mask: np.ndarray) -> Image.Image:
    picture = colour(tree, mask)
    size = (picture.width // 3 * 2, picture.height // 3 * 2)
    return picture.resize(size, Image.Resampling.BILINEAR).resize(picture.size, Image.Resampling.BILINEAR)


def spread(tree: Tree, mask: np.ndarray) -> Image.Image:
    """Ids that are spread evenly up to 255, so that people can see them."""
    return Image.fromarray((np.maximum(mask, 0) * (255 // len(tree.names))).astype(np.uint8))


def gaps(tree: Tree, mask: np.ndarray) -> Image.Image:
    return Image.fromarray(_ids(mask, 255, np.array([0, 7, 11, 24, 26, 33, 40])).astype(np.uint8))


BINARY: tuple[Paint, ...] = (black_and_white, nearly_white, bilevel, through_jpeg, smooth, grey)
MANY: tuple[Paint, ...] = (
    grey, deep, indexed, adaptive, random_palette, colour, clear_background, alpha_only, resized_ids, smooth_colour,
    spread, gaps,
)  # fmt: skip
LOSSY = (through_jpeg, smooth, resized_ids, smooth_colour)


def draw(seed: int, root: Path) -> tuple[Tree, list[str]]:
    """Write a tree. Returns it with the mask files that come after the description."""
    rng = np.random.default_rng(seed)
    binary = rng.random() < 0.35
    count = 1 if binary else int(rng.integers(2, 6))
    background = binary or rng.random() < 0.75
    names = [str(n) for n in rng.permutation(NAMES)[: count + (not background)]]
    tree = Tree(rng, root, ["background", *names] if background else names, background)
    paints = BINARY if binary else MANY
    ways: list[Paint] = [paints[int(rng.integers(len(paints)))]]
    if rng.random() < 0.3:
        ways.append(paints[int(rng.integers(len(paints)))])
    tree.late = len(ways) > 1 and rng.random() < LATE
    tree.way = "+".join(w.__name__ for w in ways) + ("(late)" if tree.late else "")
    ids = list(range(1, len(tree.names))) if background else list(range(len(tree.names)))
    if not binary and rng.random() < 0.3 and len(ids) > 1:
        ids.remove(int(rng.choice(ids)))  # a class that is not drawn yet
    void = float(rng.choice([0.0, 0.5]))
    size = (int(rng.integers(30, 48)), int(rng.integers(30, 48)))
    late = []
    for number in range(int(rng.integers(5, 9))):
        shown = [i for i in ids if rng.random() < 0.7] or [int(rng.choice(ids))]
        second = len(ways) > 1 and number % 2
        way = ways[1] if second else ways[0]
        mask = tree.shapes(
            shown,
            void if way not in (*BINARY[:-1], *LOSSY, spread, clear_background, alpha_only) else 0,
            size,
        )
        if way in LOSSY:
            mask = np.maximum(mask, 0)
        picture = way(tree, mask)
        if way in (through_jpeg, smooth):
            mask = (np.asarray(picture) >= 128).astype(int)
        name = f"a{number}"
        tree.truth[name] = mask
        noise = rng.integers(0, 255, (*size, 3)).astype(np.uint8)
        folder = "late" if tree.late and second else "."
        for kind, one in (("images", Image.fromarray(noise)), ("masks", picture)):
            place = root / folder / kind / f"{name}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            one.save(place)
        if folder == "late":
            late.append(f"{name}.png")
    for kind in ("images", "masks"):
        if (root / "late" / kind).is_dir():
            (root / "late" / kind).rename(root.with_name(f"{root.name}_late_{kind}"))
    shutil.rmtree(root / "late", ignore_errors=True)
    return tree, late


def said(tree: Tree) -> dict[str, object]:
    """What the user says about names, truthfully: a file beside the data, --classes, or nothing."""
    rng = tree.rng
    objects = tree.names[1:] if tree.background else tree.names
    way = str(
        rng.choice(["nothing", "objects.txt", "all.txt", "numbered.txt", "tied", "ordered", "like", "hand"])
    )
    tree.saying = way
    first = tree.way.partition("+")[0].partition("(")[0]
    by_colour = ("adaptive", "colour", "clear_background", "smooth_colour", "random_palette")
    coloured = first in by_colour
    text = ""
    if way == "objects.txt":
        text = "\n".join(objects)
    elif way == "all.txt":
        text = "\n".join(tree.names)
    elif way == "numbered.txt":
        text = "\n".join(f"{i} {name}" for i, name in enumerate(tree.names))
    if first in (
        "spread",
        "gaps",
        "black_and_white",
        "nearly_white",
        "through_jpeg",
        "smooth",
        "resized_ids",
    ):
        text = text if way == "objects.txt" and first != "resized_ids" else ""
        tree.saying = way if text else "nothing"
    if any(one in tree.way for one in by_colour):
        text = ""  # plain names are told to be of no use for colours
        tree.saying = way if way == "tied" else "nothing"
    if text:
        (tree.root / "classes.txt").write_text(text + "\n")
    way = tree.saying if way in ("objects.txt", "all.txt", "numbered.txt") else way
    if first in ("through_jpeg", "smooth", "nearly_white") and rng.random() < 0.5:
        tree.saying = "range"
        return {"classes": [f"{tree.names[0]}=0-127", f"{tree.names[1]}=128-255"]}
    if way in ("like", "hand"):
        return _described(tree, way, first)
    shown = {int(v) for m in tree.truth.values() for v in np.unique(m)} - {VOID}
    if way == "tied" and coloured:
        ties = [f"{name}={','.join(map(str, COLOURS[i]))}" for i, name in enumerate(tree.names)]
        return {"classes": [*ties, "ignore=255,255,255"]}
    # Who says ignore=255 of masks in which 255 is an object as well has said something wrong.
    honest = not any(one in tree.way for one in ("white", "jpeg", "smooth", "spread"))
    if way == "tied" and first in ("grey", "indexed", "deep") and honest:
        return {"classes": [*(f"{name}={i}" for i, name in enumerate(tree.names)), "ignore=255"]}
    if way == "ordered" and first in ("grey", "indexed", "deep", "gaps") and not tree.late:
        return {"classes": [tree.names[i] for i in sorted(shown)]}
    if way in ("tied", "ordered"):
        tree.saying = "nothing"
    return {}


def _described(tree: Tree, way: str, first: str) -> dict[str, object]:
    """A description that somebody wrote: the one of last month, or that of these masks."""
    tree.saying = way
    earlier = tree.root.parent / ("earlier.yaml" if way == "like" else "data.yaml")
    lines = [f"root: {tree.root.name}\nimages: images\nmasks: masks\nsplit: {{val: 0.2, seed: 0}}"]
    lines.append(f"classes: [{', '.join(tree.names)}]")
    if first in ("colour", "adaptive", "clear_background"):
        palette = ", ".join(f"{n}: {list(c)}" for n, c in zip(tree.names, COLOURS, strict=False))
        lines.append(f"labels: {{palette: {{{palette}, ignore: [255, 255, 255]}}}}")
    elif first == "gaps":
        table = ", ".join(f"{i}: {n}" for i, n in zip((0, 7, 11, 24, 26, 33, 40), tree.names, strict=False))
        lines.append(f"labels: {{map: {{{table}, 255: ignore}}}}")
    elif tree.rng.random() < 0.5 and way == "hand":
        lines.append("ignore: 255")
    earlier.write_text("\n".join(lines) + "\n")
    return {"like": earlier} if way == "like" else {"hand": True}


def wrong_labels(tree: Tree, description: Path) -> str:
    """Compare what is read with the truth: "" if no label is wrong."""
    dataset = load_dataset(DataConfig(dataset=str(description)))
    labels = dataset.labels
    means: dict[int, set[int]] = {}
    for split in dataset.splits.values():
        for index in range(len(split)):
            truth, read = tree.truth[split.id(index)], split.read_mask(index)
            for raw in np.unique(read).tolist():
                for value in np.unique(truth[read == raw]).tolist():
                    means.setdefault(raw, set()).add(value)
    for raw, values in means.items():
        if len(values) > 1:
            return f"id {raw} stands for {values}"
        (value,) = values
        if raw in labels.void:
            if value != VOID:
                return f"{tree.names[value]} is void"
            continue
        name = labels.names[raw]
        if value == VOID:
            if any(spelling(name) == spelling(n) for n in tree.names) or raw == labels.background:
                return f"void is {name}"
            continue
        own = any(spelling(name) == spelling(n) for n in tree.names)
        if (own or tree.saying != "nothing") and spelling(name) != spelling(tree.names[value]):
            return f"{tree.names[value]} is called {name}"
        # Without any word of the user 0 is proposed as the background, which is printed as a guess.
        guessed = tree.saying == "nothing" and value == 0
        if raw == labels.background and not (tree.background and value == 0) and not guessed:
            return f"{tree.names[value]} is background"
    if tree.saying == "nothing":  # without names, classes are called by their values, and a person joins them
        return ""
    owners = Counter(value for values in means.values() for value in values)
    split_up = [tree.names[v] for v, n in owners.items() if n > 1 and v != VOID]
    return f"{split_up} is in several classes" if split_up else ""


def outcome(seed: int, folder: Path) -> tuple[str, str, Tree]:
    """Draw a tree, init and check it, and compare.

    Returns:
        right, wrong, or refused by init or check; the reason; the tree.
    """
    tree, late = draw(seed, folder / "data")
    saying = said(tree)
    out = folder / "data.yaml"
    try:
        if "hand" not in saying:
            data.init(folder / "data", out=out, quiet=True, **saying)  # type: ignore[arg-type]
    except EversegError as error:
        return "init", str(error), tree
    for kind in ("images", "masks"):
        for name in late:
            shutil.move(folder / f"data_late_{kind}" / name, folder / "data" / kind / name)
    report = data.check(out, cache=False, quiet=True)
    if not report.ok:
        return "check", "; ".join(f.message for f in report.findings if f.level == "error")[:300], tree
    fault = wrong_labels(tree, out)
    return ("wrong" if fault else "right"), fault, tree


def main() -> int:
    first, count = int(sys.argv[1]), int(sys.argv[2])
    found: Counter[tuple[str, str]] = Counter()
    bad = []
    for seed in range(first, first + count):
        with tempfile.TemporaryDirectory() as folder:
            what, why, tree = outcome(seed, Path(folder))
        found[(what, tree.way)] += 1
        if what == "wrong":
            bad.append(seed)
            print(f"seed {seed}: {tree.way}, {tree.saying}, {tree.names}: {why}", flush=True)
    total = Counter(what for (what, _), n in found.items() for _ in range(n))
    print(dict(total), "wrong seeds:", bad)
    for (what, way), n in sorted(found.items(), key=lambda item: item[0][::-1]):
        if "+" not in way:
            print(f"  {way:20} {what:8} {n}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
