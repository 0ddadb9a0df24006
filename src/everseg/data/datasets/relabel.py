"""Rename the classes of a data set, so that several data sets can share classes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from everseg.data.base import Dataset, Split
from everseg.errors import ConfigError, near_miss
from everseg.labels import (
    IGNORE_NAME,
    IGNORED_WIDE,
    RawLabels,
    doubled,
    find_name,
    is_background_name,
    spelling,
)


def relabelled(dataset: Dataset, rename: Mapping[str, str]) -> Dataset:
    """Rename, join and leave out classes of a data set.

    Classes that get the same name become one class, and the masks show the smallest of their ids. The class that
    contains the background is the background. In a data set without background, a class renamed to a usual background
    name becomes the background. A class renamed to "ignore" becomes void: it reads as the first void id, or, in a data
    set without void, as the smallest of the ignored ids.

    Args:
        dataset: data set to rename; its masks on disk are not changed.
        rename: class name in `dataset`, in any spelling (`everseg.labels.spelling`), the background's included -> its
            name from now on, or "ignore". All names are replaced at once, so two may be swapped; classes not named
            keep theirs.

    Returns:
        The data set with the new names; `dataset` itself if `rename` is empty.

    Raises:
        ConfigError: unknown class names, invalid target names, one target name in two spellings, or no class left.
    """
    if not rename:
        return dataset
    labels = dataset.labels
    _check(dataset.name, labels, rename)
    given = {spelling(old): new for old, new in rename.items()}
    targets = {raw: given.get(spelling(name), name) for raw, name in sorted(labels.names.items())}
    targets = {raw: IGNORE_NAME if spelling(name) == IGNORE_NAME else name for raw, name in targets.items()}
    ignored = [raw for raw, name in targets.items() if name == IGNORE_NAME]
    void = labels.void or tuple(ignored[:1])
    first: dict[str, int] = {}
    for raw, name in targets.items():
        first.setdefault(name, raw)
    table = np.arange(labels.width, dtype=np.uint8 if labels.width <= 256 else np.uint16)
    for raw, name in targets.items():
        table[raw] = void[0] if name == IGNORE_NAME else first[name]
    names = {raw: name for name, raw in first.items() if name != IGNORE_NAME}
    called = (first[name] for name in given.values() if is_background_name(name) and name in first)
    background = next(called, None) if labels.background is None else int(table[labels.background])
    new = RawLabels(names=names, background=background if background in names else None, void=void)
    if not new.classes:
        raise ConfigError(f"rename: leaves data set '{dataset.name}' without a class; keep at least one")
    moved = (table != np.arange(len(table))).any()
    splits = (
        {key: Relabelled(split, table) for key, split in dataset.splits.items()} if moved else dataset.splits
    )
    return replace(dataset, labels=new, splits=splits)


def most_id(labels: RawLabels) -> int:
    """Largest raw id that masks may hold: 255, or 65,535 where larger ids than a byte holds are declared."""
    return 255 if labels.width <= 256 else IGNORED_WIDE


def compact(dataset: Dataset) -> Dataset:
    """Give void ids far above the classes the first id behind the classes, as 65535 in masks of 16 bits.

    Tables over raw ids are as long as the largest id: with 65535 among them, 65,536 numbers for every image.
    """
    labels = dataset.labels
    behind = max(256, max(labels.names, default=0) + 1)
    far = [raw for raw in labels.void if raw > behind]
    if not far:
        return dataset
    # Within a byte where that suffices: then the masks are bytes again.
    free = next(raw for raw in (*range(255, -1, -1), behind) if raw not in labels.declared or raw == behind)
    to = free if max(labels.names, default=0) <= 255 else behind
    table = np.arange(max(far) + 1, dtype=np.uint16)
    # Swapped: pixels that hold the free id are undeclared ones, and must not become void.
    table[to], table[far] = far[0], to
    new = replace(labels, void=tuple(dict.fromkeys(to if raw in far else raw for raw in labels.void)))
    splits = {key: Relabelled(split, table) for key, split in dataset.splits.items()}
    return replace(dataset, labels=new, splits=splits)


class Relabelled:
    """A split whose masks pass through a table; satisfies `everseg.data.base.Split`.

    Attributes of the wrapped split beyond the protocol (paths, warnings) are available too.

    Args:
        split: the wrapped split.
        table: raw id -> raw id; ids beyond it stay, so that later checks report them.
    """

    def __init__(self, split: Split, table: np.ndarray) -> None:
        self.name = split.name
        self._split = split
        self._table = table

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # raised also during unpickling, when `_split` does not exist yet
            raise AttributeError(name)
        return getattr(self._split, name)

    def __len__(self) -> int:
        return len(self._split)

    @property
    def unmapped(self) -> Split:
        """The wrapped split, with its own raw ids."""
        return self._split

    def id(self, index: int) -> str:
        """Name of a sample, unique in the split."""
        return self._split.id(index)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Decode one sample: image (H, W, 3) uint8 RGB and mask (H, W) uint8 raw ids after the table.

        Raises:
            DataError: as the wrapped split.
        """
        image, mask = self._split.read(index)
        return image, self._mapped(mask)

    def read_mask(self, index: int) -> np.ndarray:
        """Decode the mask only, (H, W) uint8 raw ids after the table."""
        return self._mapped(self._split.read_mask(index))

    @property
    def read_digested(self) -> Callable[[int], tuple[np.ndarray, str]]:
        """The wrapped split's method with the mask mapped; an AttributeError if that split has no such method."""
        read = self._split.read_digested  # type: ignore[attr-defined]

        def read_digested(index: int) -> tuple[np.ndarray, str]:
            mask, digest = read(index)
            return self._mapped(mask), digest

        return read_digested

    @property
    def index_key(self) -> Callable[[], str]:
        """The wrapped split's key with the table added; an AttributeError if that split has no such method."""
        key = self._split.index_key  # type: ignore[attr-defined]
        return lambda: self._with_table(key())

    def own_palette(self, index: int) -> tuple[bytes, dict[int, int]]:
        """As that of the wrapped split, for the ids that stand for a single one of its ids."""
        find = getattr(self._split, "own_palette", None)
        palette, stored = find(index) if find is not None else (b"", {})
        behind = {raw: int(self._table[raw]) if raw < len(self._table) else raw for raw in stored}
        once = Counter(behind.values())
        return palette, {new: stored[raw] for raw, new in behind.items() if once[new] == 1}

    def raw_id(self, stored: int) -> int:
        """The raw id of a stored id, after the table."""
        raw = self._split.raw_id(stored)  # type: ignore[attr-defined]
        return int(self._table[raw]) if 0 <= raw < len(self._table) else raw

    def fingerprint(self, *digests: Sequence[str]) -> str:
        """SHA-256 of the wrapped split's fingerprint (which may take the masks' digests) and the table."""
        return self._with_table(self._split.fingerprint(*digests))

    def _with_table(self, fingerprint: str) -> str:
        return hashlib.sha256(f"{fingerprint}:{self._table.tobytes().hex()}".encode()).hexdigest()

    def _mapped(self, mask: np.ndarray) -> np.ndarray:
        """Map a mask through the table. A mask that holds no ids is returned as it is, and later checks report it."""
        if mask.dtype == np.uint8:
            return self._table.take(mask)
        if mask.dtype != np.uint16:
            return mask
        known = mask < len(self._table)
        mapped = np.where(known, self._table.take(np.where(known, mask, 0)), mask)
        return mapped.astype(np.uint8 if mapped.max(initial=0) <= 255 else np.uint16)


def _check(dataset: str, labels: RawLabels, rename: Mapping[str, str]) -> None:
    known = list(labels.names.values())
    problems = [
        f"rename: '{one}' and '{other}' are one name of a class; give it one new name"
        for one, other in doubled({old: old for old in rename})
    ]
    for old, new in rename.items():
        if find_name(old, known) is None:
            hint = near_miss(old, known, f"; it has {', '.join(known)}")
            problems.append(f"rename.{old}: data set '{dataset}' has no class of this name{hint}")
        if not isinstance(new, str) or not new.strip():
            problems.append(f"rename.{old}: expected a class name or '{IGNORE_NAME}', got {new!r}")
    # Two new names with the same spelling are refused. To join classes, the user gives them exactly the same name, so
    # that a typing error joins nothing. Classes that keep their names have been compared earlier.
    given = {spelling(old): new for old, new in rename.items()}
    named = [str(given.get(spelling(name), name)) for name in known]
    problems += [
        f"rename: '{one}' and '{other}' would be two classes; spell one name one way"
        for one, other in doubled({name: name for name in named if spelling(name) != IGNORE_NAME})
    ]
    if problems:
        raise ConfigError(problems)
