"""Other class names for a data set, so that several data sets can share classes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from everseg.data.base import Dataset, Split
from everseg.errors import ConfigError, near_miss
from everseg.labels import IGNORE_NAME, RawLabels, doubled, find_name, is_background_name, spelling


def relabelled(dataset: Dataset, rename: Mapping[str, str]) -> Dataset:
    """Rename, join and leave out classes of a data set.

    Classes that end up with one name become one class: the masks show the smallest of their ids. The class that the
    background is part of is the background; in a data set that had none, a class renamed to one of the background's
    usual names is. A class sent to "ignore" becomes void: it reads as the first void id, or as the smallest of the
    ignored ids where the data set has no void.

    Args:
        dataset: its masks on disk stay as they are.
        rename: class name in `dataset`, in any spelling (`everseg.labels.spelling`), the background's included -> its
            name from now on, or "ignore". All names are replaced at once, so two may be swapped; classes not named
            keep theirs.

    Returns:
        The data set seen so; `dataset` itself if `rename` is empty.

    Raises:
        ConfigError: unknown class names, target names that are no names or one name in two spellings, no class left.
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
    table = np.arange(256, dtype=np.uint8)
    for raw, name in targets.items():
        table[raw] = void[0] if name == IGNORE_NAME else first[name]
    names = {raw: name for name, raw in first.items() if name != IGNORE_NAME}
    called = (first[name] for name in given.values() if is_background_name(name) and name in first)
    background = next(called, None) if labels.background is None else int(table[labels.background])
    new = RawLabels(names=names, background=background if background in names else None, void=void)
    if not new.classes:
        raise ConfigError(f"rename: leaves data set '{dataset.name}' without a class; keep at least one")
    moved = (table != np.arange(256)).any()
    splits = (
        {key: Relabelled(split, table) for key, split in dataset.splits.items()} if moved else dataset.splits
    )
    return replace(dataset, labels=new, splits=splits)


class Relabelled:
    """A split whose masks pass through a table; satisfies `everseg.data.base.Split`.

    What the wrapped split offers beyond the protocol (paths, warnings) is offered as well.

    Args:
        split: what is wrapped.
        table: raw id -> raw id, (256,) uint8.
    """

    def __init__(self, split: Split, table: np.ndarray) -> None:
        self.name = split.name
        self._split = split
        self._table = table

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also while it is unpickled, when there is no _split yet
            raise AttributeError(name)
        return getattr(self._split, name)

    def __len__(self) -> int:
        return len(self._split)

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
        """The wrapped split's method with the mask after the table; no such attribute if that split has none."""
        read = self._split.read_digested  # type: ignore[attr-defined]

        def read_digested(index: int) -> tuple[np.ndarray, str]:
            mask, digest = read(index)
            return self._mapped(mask), digest

        return read_digested

    @property
    def index_key(self) -> Callable[[], str]:
        """The wrapped split's method with the table in its key; no such attribute if that split has none."""
        key = self._split.index_key  # type: ignore[attr-defined]
        return lambda: self._with_table(key())

    def fingerprint(self, *digests: Sequence[str]) -> str:
        """SHA-256 of the wrapped split's fingerprint (which may take the masks' digests) and the table."""
        return self._with_table(self._split.fingerprint(*digests))

    def _with_table(self, fingerprint: str) -> str:
        return hashlib.sha256(f"{fingerprint}:{self._table.tobytes().hex()}".encode()).hexdigest()

    def _mapped(self, mask: np.ndarray) -> np.ndarray:
        """The mask after the table; one that is not of bytes is left to the checks that name it."""
        return self._table.take(mask) if mask.dtype == np.uint8 else mask


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
    # Two new names that are one: joining classes is done by giving them the same name, letter by letter, so that a
    # slip of the keyboard joins nothing. That two classes which keep their names are not one has been seen before.
    given = {spelling(old): new for old, new in rename.items()}
    named = [str(given.get(spelling(name), name)) for name in known]
    problems += [
        f"rename: '{one}' and '{other}' would be two classes; spell one name one way"
        for one, other in doubled({name: name for name in named if spelling(name) != IGNORE_NAME})
    ]
    if problems:
        raise ConfigError(problems)
