"""The label tables of Cityscapes (which BDD100K shares) and IDD: names, label ids, training ids."""

from __future__ import annotations

from typing import NamedTuple

VOID = 255
"""The training id of everything that is neither learnt nor scored."""


class StreetLabel(NamedTuple):
    """One label of the annotation."""

    name: str
    """The name in polygon files."""
    id: int
    """The label id, in `*_labelIds.png`; -1: a label of the annotation that masks never show."""
    train_id: int
    """The id in masks for training: Cityscapes' trainId or IDD's level3Id; `VOID` if it is not learnt."""


CITYSCAPES = (
    StreetLabel("unlabeled", 0, VOID),
    StreetLabel("ego vehicle", 1, VOID),
    StreetLabel("rectification border", 2, VOID),
    StreetLabel("out of roi", 3, VOID),
    StreetLabel("static", 4, VOID),
    StreetLabel("dynamic", 5, VOID),
    StreetLabel("ground", 6, VOID),
    StreetLabel("road", 7, 0),
    StreetLabel("sidewalk", 8, 1),
    StreetLabel("parking", 9, VOID),
    StreetLabel("rail track", 10, VOID),
    StreetLabel("building", 11, 2),
    StreetLabel("wall", 12, 3),
    StreetLabel("fence", 13, 4),
    StreetLabel("guard rail", 14, VOID),
    StreetLabel("bridge", 15, VOID),
    StreetLabel("tunnel", 16, VOID),
    StreetLabel("pole", 17, 5),
    StreetLabel("polegroup", 18, VOID),
    StreetLabel("traffic light", 19, 6),
    StreetLabel("traffic sign", 20, 7),
    StreetLabel("vegetation", 21, 8),
    StreetLabel("terrain", 22, 9),
    StreetLabel("sky", 23, 10),
    StreetLabel("person", 24, 11),
    StreetLabel("rider", 25, 12),
    StreetLabel("car", 26, 13),
    StreetLabel("truck", 27, 14),
    StreetLabel("bus", 28, 15),
    StreetLabel("caravan", 29, VOID),
    StreetLabel("trailer", 30, VOID),
    StreetLabel("train", 31, 16),
    StreetLabel("motorcycle", 32, 17),
    StreetLabel("bicycle", 33, 18),
    StreetLabel("license plate", -1, VOID),
)

IDD = (
    StreetLabel("road", 0, 0),
    StreetLabel("parking", 1, 1),
    StreetLabel("drivable fallback", 2, 1),
    StreetLabel("sidewalk", 3, 2),
    StreetLabel("rail track", 4, 3),
    StreetLabel("non-drivable fallback", 5, 3),
    StreetLabel("person", 6, 4),
    StreetLabel("animal", 7, 4),
    StreetLabel("rider", 8, 5),
    StreetLabel("motorcycle", 9, 6),
    StreetLabel("bicycle", 10, 7),
    StreetLabel("autorickshaw", 11, 8),
    StreetLabel("car", 12, 9),
    StreetLabel("truck", 13, 10),
    StreetLabel("bus", 14, 11),
    StreetLabel("caravan", 15, 12),
    StreetLabel("trailer", 16, 12),
    StreetLabel("train", 17, 12),
    StreetLabel("vehicle fallback", 18, 12),
    StreetLabel("curb", 19, 13),
    StreetLabel("wall", 20, 14),
    StreetLabel("fence", 21, 15),
    StreetLabel("guard rail", 22, 16),
    StreetLabel("billboard", 23, 17),
    StreetLabel("traffic sign", 24, 18),
    StreetLabel("traffic light", 25, 19),
    StreetLabel("pole", 26, 20),
    StreetLabel("polegroup", 27, 20),
    StreetLabel("obs-str-bar-fallback", 28, 21),
    StreetLabel("building", 29, 22),
    StreetLabel("bridge", 30, 23),
    StreetLabel("tunnel", 31, 23),
    StreetLabel("vegetation", 32, 24),
    StreetLabel("sky", 33, 25),
    StreetLabel("fallback background", 34, 25),
    StreetLabel("unlabeled", 35, VOID),
    StreetLabel("ego vehicle", 36, VOID),
    StreetLabel("rectification border", 37, VOID),
    StreetLabel("out of roi", 38, VOID),
    StreetLabel("license plate", 39, VOID),
)

CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
    "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
"""Class of each trainId 0..18."""

IDD_CLASSES = (
    "road", "drivable fallback", "sidewalk", "non-drivable fallback", "person", "rider", "motorcycle", "bicycle",
    "autorickshaw", "car", "truck", "bus", "vehicle fallback", "curb", "wall", "fence", "guard rail", "billboard",
    "traffic sign", "traffic light", "pole", "obs-str-bar-fallback", "building", "bridge", "vegetation", "sky",
)  # fmt: skip
"""Class of each level3Id 0..25; a class of several labels has the name of the most general or most frequent one."""

CITYSCAPES_TRAIN_ID = {label.id % 256: label.train_id for label in CITYSCAPES}
"""Stored label id (a byte: -1 is 255) -> trainId."""
