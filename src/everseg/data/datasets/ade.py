"""Read ADE20K as the scene parsing challenge released it, ADEChallengeData2016."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from everseg.data.base import Dataset
from everseg.data.datasets.files import FileSplit
from everseg.data.datasets.listing import data_folder, pair, scan
from everseg.data.datasets.options import reading_of, root_of
from everseg.labels import RawLabels

_FOLDERS = {"train": "training", "val": "validation"}


def build(
    root: str | Path | None = None,
    **shared: Any,
) -> Dataset:
    """Read ADE20K.

    Args:
        root: `ADEChallengeData2016` (with `images/` and `annotations/`), or the folder that holds it.
        shared: options of all readers, see `everseg.data.datasets.options.reading_of`.

    Returns:
        Splits `train` and `val` sorted by file name; published image lists are positions in this order. Raw id 0 is
        "other" and counts as background. 255 would be void, but no pixel has it.

    Raises:
        ConfigError: no such root, or a wrong option.
        DataError: not this layout, or images and masks that do not pair.
    """
    reading = reading_of(shared)
    needed = [f"{kind}/{f}" for kind in ("images", "annotations") for f in _FOLDERS.values()]
    base = data_folder(root_of(root), ("ADEChallengeData2016",), needed, "ADEChallengeData2016")
    splits = {}
    for name, folder in _FOLDERS.items():
        images, masks = scan(base, f"images/{folder}"), scan(base, f"annotations/{folder}")
        samples, warnings = pair(images, masks, f"{base}, {folder}", name, reading)
        splits[name] = FileSplit(name, base, samples, reading=reading, warnings=warnings)
    names = dict(enumerate(("background", *NAMES)))
    return Dataset("ade", RawLabels(names=names, background=0, void=(255,)), splits)


_TEXT = """
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
    table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field,
    armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard,
    chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway,
    case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower,
    book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine,
    hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television, airplane,
    dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship,
    fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag,
    minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher,
    screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate,
    monitor, bulletin board, shower, radiator, glass, clock, flag
    """
NAMES: tuple[str, ...] = tuple(name.strip() for name in _TEXT.split(","))
"""NAMES[i] is the class of raw id i + 1. Raw id 21 is "auto" in the release; here it is "car", as nearly everywhere."""
