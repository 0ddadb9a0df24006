"""Render a page of images overlaid with their labels, to look at before training."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from PIL import Image, ImageDraw

from everseg.data.base import Dataset, channels_of_split
from everseg.data.batches.index import count_ids
from everseg.data.channels import picture_of
from everseg.data.class_colours import IGNORED_COLOUR, colour_word, colourise, overlay
from everseg.data.datasets.decode import Colour
from everseg.data.mask_values import own_palette
from everseg.display import capital, counted, printable, share
from everseg.errors import DataError
from everseg.labels import IGNORED, ignored_id

IMAGES = 24
LOOKED_AT = 200
"""So many masks at most are searched for classes that no chosen image shows."""
UNLABELLED = "without annotation"
SIDE = 400
"""Longest side of a picture on the page, in pixels."""
OPACITY = 0.55
"""Of the colours over an image: little enough that its own edges are seen beneath the outlines."""
SMALL = 16
"""A class with fewer pixels in a picture of the page gets a ring around it."""


def preview(
    dataset: Dataset,
    *,
    images: int = IMAGES,
    seed: int = 0,
    first: str = "",
    commands: Sequence[str] = (),
) -> str:
    """Render the page as self-contained HTML.

    Pictures are drawn at random over all splits. Pictures that add a class not yet shown come before the rest. Samples
    that cannot be read appear with their fault.

    Args:
        images: number of pictures.
        seed: of the draw.
        first: what has to be done before the commands, as a sentence.
        commands: what to type next.
    """
    order = [(name, i) for name, split in dataset.splits.items() for i in range(len(split))]
    random.Random(seed).shuffle(order)
    looked = [(name, i, _counts(dataset, name, i)) for name, i in order[:LOOKED_AT]]
    chosen = _choose(looked, images)
    colours = _colours(dataset)
    read = [c for _, _, c in looked if c is not None]
    per_mask = np.stack(read) if read else np.zeros((0, dataset.labels.width), np.int64)
    legend = list(_legend(dataset, colours, per_mask, _own_colours(dataset, looked)))
    page = Environment(loader=PackageLoader("everseg.data.proposal"), autoescape=True).get_template(
        "preview.html"
    )
    return page.render(
        name=printable(dataset.name),
        counts=", ".join(f"{len(split)} {name}" for name, split in dataset.splits.items()),
        rule=f"This page shows {len(chosen)} of them, drawn at random (seed {seed}). Pictures in which a class is met "
        "for the first time come first.",
        masks="all masks" if len(read) == len(order) else f"{len(read)} of {len(order)} masks",
        first=printable(capital(first)),
        commands=[printable(command) for command in commands],
        legend=legend,
        own=any(row["own"] for row in legend),
        items=[_item(dataset, name, index, colours) for name, index in chosen],
    )


def _choose(looked: list[tuple[str, int, np.ndarray | None]], images: int) -> list[tuple[str, int]]:
    seen: set[int] = set()
    first: list[tuple[str, int]] = []
    rest: list[tuple[str, int]] = []
    for name, index, counts in looked:
        ids: set[int] = set() if counts is None else set(np.flatnonzero(counts).tolist())
        (first if ids - seen else rest).append((name, index))  # `first` adds an id not seen before
        seen |= ids
    return [*first, *rest][:images]


def _counts(dataset: Dataset, name: str, index: int) -> np.ndarray | None:
    try:
        return count_ids(dataset.splits[name].read_mask(index), dataset.labels.width)[: dataset.labels.width]
    except (DataError, OSError):
        return None


def _colours(dataset: Dataset) -> np.ndarray:
    """Map each raw id to its palette position: classes in their order, anything else is ignored."""
    ignored = ignored_id(len(dataset.labels.names))
    table = np.full(max(dataset.labels.width, 256), ignored, np.uint8 if ignored == IGNORED else np.uint16)
    for position, raw in enumerate(sorted(dataset.labels.names)):
        table[raw] = position
    return table


def _background(dataset: Dataset, table: np.ndarray) -> int | None:
    """Palette position of the background in `table`, from `_colours`."""
    raw = dataset.labels.background
    return None if raw is None else int(table[raw])


def _own_colours(
    dataset: Dataset, looked: list[tuple[str, int, np.ndarray | None]]
) -> dict[int, list[Colour]]:
    """Raw id -> the colours that the masks themselves give it; {} where masks are grey."""
    found: dict[int, list[Colour]] = {}
    for split in dataset.splits.values():
        for raw, colours in getattr(split, "colours", {}).items():
            found.setdefault(raw, []).extend(colours)
    for name, index, counts in looked:
        if counts is not None:
            palette, stored = own_palette(dataset.splits[name], index, counts)
            for raw, place in stored.items():
                red, green, blue = palette[3 * place : 3 * place + 3]
                found.setdefault(raw, []).append((red, green, blue))
    return {raw: list(dict.fromkeys(colours)) for raw, colours in found.items()}


def _legend(
    dataset: Dataset, table: np.ndarray, per_mask: np.ndarray, own: Mapping[int, list[Colour]]
) -> Iterator[dict[str, Any]]:
    """Make a row of the legend for each class.

    Args:
        table: from `_colours`.
        per_mask: pixels of each raw id in each mask looked at, (N, width).
    """
    total, shown_in = per_mask.sum(0), (per_mask > 0).sum(0)
    ids = np.arange(len(dataset.labels.names), dtype=table.dtype)[None]
    colours = colourise(ids, background=_background(dataset, table))[0]
    rows = sorted(dataset.labels.names.items()) + [(raw, UNLABELLED) for raw in dataset.labels.void]
    for raw, name in rows:
        red, green, blue = (
            colours[table[raw]] if raw in dataset.labels.names else np.array(IGNORED_COLOUR)
        ).tolist()
        if raw == dataset.labels.background:
            name += " (not coloured)"
        yield {
            "id": raw,
            "name": printable(name),
            "share": share(total[raw] / total.sum(), digits=2) if total.sum() else "",
            "images": counted(int(shown_in[raw]), "image"),
            "colour": f"rgb({red} {green} {blue})",
            "own": [
                (f"rgb({r} {g} {b})", f"{colour_word((r, g, b))} {r},{g},{b}") for r, g, b in own.get(raw, ())
            ],
        }


def _item(dataset: Dataset, name: str, index: int, table: np.ndarray) -> dict[str, Any]:
    split = dataset.splits[name]
    item: dict[str, Any] = {"id": printable(f"{name}/{split.id(index)}"), "fault": "", "classes": ""}
    try:
        image, mask = split.read(index)
    except (DataError, OSError) as error:
        return {**item, "fault": printable(error)}
    scale = min(1.0, SIDE / max(mask.shape))
    size = max(1, round(mask.shape[1] * scale)), max(1, round(mask.shape[0] * scale))
    picture = Image.fromarray(picture_of(image, channels_of_split(split)))
    small = np.asarray(picture.resize(size, Image.Resampling.BOX))
    ids = np.asarray(
        Image.fromarray(table[np.minimum(mask, len(table) - 1)]).resize(size, Image.Resampling.NEAREST)
    )
    known = {**dataset.labels.names, **dict.fromkeys(dataset.labels.void, UNLABELLED)}
    counts = count_ids(mask)
    names = [known.get(int(raw), f"id {raw}, not declared") for raw in np.flatnonzero(counts)]
    drawn = overlay(small, ids, OPACITY, background=_background(dataset, table))
    if dataset.labels.background is not None:
        plain = ids == table[dataset.labels.background]
        drawn[plain] = small[plain]
    draw_outlines(drawn, ids)
    rare = np.flatnonzero((counts > 0) & (counts * scale**2 < SMALL)).tolist()
    drawn = _ringed(drawn, [_place(mask == raw, scale) for raw in rare])
    names = [
        f"{known[raw]} (ring)" if raw in rare and raw in known else name
        for raw, name in zip(np.flatnonzero(counts).tolist(), names, strict=True)
    ]
    return {
        **item,
        "classes": printable(", ".join(names)),
        "image": _inline(small),
        "overlay": _inline(drawn),
        "width": size[0],
        "height": size[1],
    }


def draw_outlines(picture: np.ndarray, ids: np.ndarray) -> None:
    """Draw, in place, a line where two ids meet: white on one side and black on the other, so it shows on any colour.

    Args:
        picture: (H, W, 3) uint8.
        ids: (H, W) integers.
    """
    for axis in (0, 1):
        differ = np.diff(ids.astype(np.int32), axis=axis) != 0
        before = np.pad(differ, [(0, 1), (0, 0)] if axis == 0 else [(0, 0), (0, 1)])
        picture[before] = 255
        picture[np.roll(before, 1, axis)] = 0


def _place(where: np.ndarray, scale: float) -> tuple[float, float]:
    """Find a pixel of a small class: (x, y) in the picture of the page."""
    places = np.argwhere(where)
    y, x = places[len(places) // 2].tolist()
    return (x + 0.5) * scale, (y + 0.5) * scale


def _ringed(picture: np.ndarray, places: Sequence[tuple[float, float]], radius: float = 9) -> np.ndarray:
    """Draw a ring around each place."""
    drawn = Image.fromarray(picture)
    pen = ImageDraw.Draw(drawn)
    for x, y in places:
        for further, colour in ((1, "black"), (0, "white")):
            reach = radius + further
            pen.ellipse((x - reach, y - reach, x + reach, y + reach), outline=colour, width=1 + further)
    return np.asarray(drawn)


def _inline(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
