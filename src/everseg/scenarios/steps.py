"""The parts of a scenario: immutable steps, printable, without tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np

from everseg.labels import IGNORED, IGNORED_WIDE, LabelSpace, RawLabels

Validation = Literal["none", "split", "cross", "train"]
"""Images validated on: none, the split `val`, some of the training images held out, or the training images."""


def missing_splits(whose: str, needed: Iterable[str], known: Collection[str]) -> list[str]:
    """Write a message for each split that is needed and does not exist."""
    return [
        f"{whose} has no split '{split}'; it has {', '.join(known) or 'none'} (see scenario.test_split)"
        for split in dict.fromkeys(needed)
        if split not in known
    ]


class Labelled(Protocol):
    """The two attributes of a data set that scenarios read; a `Dataset` has them."""

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> RawLabels: ...


Table = bytes | tuple[int, ...]


def packed(table: Iterable[int], num_classes: int) -> Table:
    """Pack a table raw id -> train id: into bytes, or into a tuple where there are more than 255 outputs."""
    values = [int(value) for value in table]
    return bytes(values) if num_classes <= IGNORED else tuple(values)


@dataclass(frozen=True)
class Source:
    """Some images of one split, seen through one branch with one label table."""

    branch: str
    dataset: str
    """Key of the data set in the run: the domain's name, or `Dataset.name` in runs on one data set."""
    split: str
    indices: tuple[int, ...]
    """Positions in the split, in the order they are read."""
    lut: Table
    """Raw id -> train id. Where a label space has more than 255 outputs it is a tuple; see `packed`."""
    domain: str = ""
    """Name under which test results are kept where a run has several domains; else empty."""

    @property
    def name(self) -> str:
        """Name of the results on these images: the domain, or the branch in runs on one data set."""
        return self.domain or self.branch

    def labelled(self, space: LabelSpace) -> list[int]:
        """Raw ids that are labelled as a class of the branch's label space, ascending; its background is none."""
        return [
            raw for raw, train_id in enumerate(self.lut) if train_id not in (self.ignored, space.background)
        ]

    @property
    def ignored(self) -> int:
        """Train id of ignored pixels in `lut`."""
        return IGNORED if isinstance(self.lut, bytes) else IGNORED_WIDE

    @property
    def table(self) -> np.ndarray:
        """`lut` as an array: uint8, or uint16 where train ids do not fit a byte; read-only."""
        if isinstance(self.lut, bytes):
            return np.frombuffer(self.lut, np.uint8)
        return np.array(self.lut, np.uint16)

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides which pixels with which labels are used."""
        # With fixed types and order, so that the digest is the same on every machine.
        head = f"{self.branch}|{self.dataset}|{self.split}|".encode()
        return hashlib.sha256(
            head + np.asarray(self.indices, np.int64).tobytes() + self.table.tobytes()
        ).hexdigest()


@dataclass(frozen=True)
class Step:
    """One increment: what is trained, what is tested, and what the model knows afterwards."""

    index: int
    train: tuple[Source, ...]
    test: tuple[Source, ...]
    spaces: Mapping[str, LabelSpace]
    """Branch -> label space known after this step, branches in the order they were met."""
    grows: Mapping[str, int]
    """Branch -> number of outputs it gains at the start of this step."""
    val: tuple[Source, ...] = field(default=())
    class_weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Branch -> weight of each output in the cross-entropy; branches without an entry weigh all classes alike."""
    fresh: bool = False
    """The model starts from its initial weights and knows nothing of the steps before."""
    protocol: str = ""
    """Which images the step trains on and which classes are labelled in them, see `class_incremental`;
    empty where the scenario has no such choice, or mixes several."""
    to_come: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Branch -> number of outputs that each later step of the run adds to it. For methods that reserve them; the other
    methods must not look ahead."""

    @property
    def branch(self) -> str:
        """The branch trained in this step (the first one, if several are)."""
        return self.train[0].branch

    @property
    def branch_order(self) -> tuple[str, ...]:
        return tuple(self.spaces)

    @property
    def is_first(self) -> bool:
        """Whether the model knows nothing yet: it starts from its initial weights."""
        return self.index == 0 or self.fresh

    @property
    def trained_branches(self) -> tuple[str, ...]:
        """Branches trained in this step, in the order of their sources."""
        return tuple(dict.fromkeys(source.branch for source in self.train))

    @property
    def old_branches(self) -> tuple[str, ...]:
        """Branches met before and not trained now."""
        trained = self.trained_branches
        return tuple(branch for branch in self.spaces if branch not in trained)

    def num_old(self, branch: str) -> int:
        """Outputs the branch had before this step; 0 if it is met for the first time."""
        return self.spaces[branch].num_classes - self.grows.get(branch, 0)


def with_outlook(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Tell each step what the later ones add (`Step.to_come`), up to the next one that starts afresh."""
    found: list[Step] = []
    coming: dict[str, tuple[int, ...]] = {}
    for step in reversed(steps):
        found.append(replace(step, to_come=dict(coming)))
        if step.fresh:
            coming = {}
            continue
        for branch, number in step.grows.items():
            if number:
                coming[branch] = (number, *coming.get(branch, ()))
    return tuple(reversed(found))
