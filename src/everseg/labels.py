"""Label spaces, label policies and the look-up tables made of them.

A mask holds *raw ids*, a model's outputs are *train ids*; a table of 256 entries leads from one to the other.
What happens to pixels that carry no class taught now differs between the public codes (a named `LabelPolicy`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import astuple, dataclass

import numpy as np

from everseg.errors import ConfigError

IGNORED = 255
"""The train id of pixels that no loss and no score counts."""
SYNTHETIC_BACKGROUND = -1
"""Raw id of the background channel added for data sets that have no background class: no pixel carries it."""
SYNTHETIC_VOID = -2
"""Raw id of an extra output for void (MDIL's last class): no pixel carries it, so it is never trained as a target."""
SYNTHETIC_OTHER = -3
"""Raw id of the column that counts predictions a label space has no class for: no pixel and no output carries it."""


def spelling(name: str) -> str:
    """What names have in common that differ in case, spaces, dashes or other signs only.

    >>> spelling("Traffic-Light") == spelling("traffic light")
    True
    """
    plain = "".join(letter for letter in name.casefold() if unicodedata.category(letter)[0] in "LMN")
    return plain or name.strip()


@dataclass(frozen=True)
class RawLabels:
    """The ids that stand in a data set's masks."""

    names: Mapping[int, str]
    """Raw id -> class name, background included if the data set has one."""
    background: int | None = 0
    """Raw id of the background class; None if the data set has none (CamVid, street scenes)."""
    void: tuple[int, ...] = (255,)
    """Raw ids of pixels without annotation."""

    @property
    def classes(self) -> tuple[int, ...]:
        """Raw ids of the real classes (no background), ascending."""
        return tuple(sorted(i for i in self.names if i != self.background))

    @property
    def declared(self) -> frozenset[int]:
        """Every raw id a mask may hold."""
        return frozenset(self.names) | frozenset(self.void)


@dataclass(frozen=True)
class LabelPolicy:
    """Train ids given to pixels that carry no class taught now."""

    void: int = IGNORED
    background: int = 0
    old: int = 0
    future: int = 0


@dataclass(frozen=True)
class PolicySet:
    """A named label convention: one policy per role of an image list."""

    train: LabelPolicy
    val: LabelPolicy
    test: LabelPolicy


POLICIES: dict[str, PolicySet] = {
    # MiB's VOC code: void is trained as background; unknown classes are not scored.
    "mib-voc": PolicySet(
        train=LabelPolicy(void=0, background=0, old=0, future=0),
        val=LabelPolicy(void=IGNORED, background=0, old=IGNORED, future=IGNORED),
        test=LabelPolicy(void=IGNORED, background=0, old=IGNORED, future=IGNORED),
    ),
    # MiB's ADE20K code: as above, but raw 0 ("other") is never scored.
    "mib-ade": PolicySet(
        train=LabelPolicy(void=0, background=0, old=0, future=0),
        val=LabelPolicy(void=IGNORED, background=IGNORED, old=IGNORED, future=IGNORED),
        test=LabelPolicy(void=IGNORED, background=IGNORED, old=IGNORED, future=IGNORED),
    ),
    # PLOP and CSSegmentation: void stays ignored; classes not learnt yet are scored as background.
    "plop": PolicySet(
        train=LabelPolicy(void=IGNORED, background=0, old=0, future=0),
        val=LabelPolicy(void=IGNORED, background=0, old=0, future=0),
        test=LabelPolicy(void=IGNORED, background=0, old=0, future=0),
    ),
    # everseg's own choice for other data: void is never learnt, classes not learnt yet are not scored.
    "ignore-void": PolicySet(
        train=LabelPolicy(void=IGNORED, background=0, old=0, future=0),
        val=LabelPolicy(void=IGNORED, background=0, old=IGNORED, future=IGNORED),
        test=LabelPolicy(void=IGNORED, background=0, old=IGNORED, future=IGNORED),
    ),
}


def policy_set(name: str) -> PolicySet:
    """Look up a label convention by name.

    Raises:
        ConfigError: unknown name.
    """
    if name not in POLICIES:
        raise ConfigError(
            f"scenario.policy: unknown label policy '{name}'; choose one of {', '.join(POLICIES)}"
        )
    return POLICIES[name]


@dataclass(frozen=True)
class LabelSpace:
    """The classes of one branch in output order."""

    groups: tuple[tuple[int, ...], ...]
    """groups[s] = raw ids added by the s-th growth; a synthetic background is `SYNTHETIC_BACKGROUND`."""
    names: tuple[str, ...]
    """Class names in output order."""
    background: int | None = 0
    """Train id of the background; None for label spaces without one."""

    @property
    def order(self) -> tuple[int, ...]:
        """Raw ids in output order: the position of an id is its train id."""
        return tuple(i for group in self.groups for i in group)

    @property
    def num_classes(self) -> int:
        return len(self.order)

    def problems(self) -> list[str]:
        """What makes this no list of classes: ids and names that do not match, or anything that stands twice."""
        found = []
        if len(self.names) != self.num_classes:
            found.append(f"{len(self.names)} names for {self.num_classes} ids")
        for what, values in (("id", self.order), ("name", self.names)):
            if twice := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
                found.append(f"the {what} {', '.join(map(str, twice))} stands twice")
        if "" in self.names:
            found.append("a class without a name")
        if self.background is not None and (
            type(self.background) is not int or not 0 <= self.background < self.num_classes
        ):
            found.append("the background is none of the classes")
        return found

    def lut(self, visible: Iterable[int], policy: LabelPolicy, all_raw: Iterable[int]) -> np.ndarray:
        """Build the table raw id -> train id of a data set whose ids are those of this label space.

        In a label space without background, pixels that a policy would call background (0) are ignored instead.

        Args:
            visible: raw ids that keep their train id.
            policy: where all other pixels go.
            all_raw: every class id of the data set; an id outside it counts as void.

        Returns:
            (256,) uint8.
        """
        order = self.order
        background = None if self.background is None else order[self.background]
        train_ids = {raw: i for i, raw in enumerate(order) if raw >= 0 and raw != background}
        if background is not None and background < 0:  # an output of ours: no pixel is labelled so
            background = None
        return self._table(train_ids, background, set(visible), policy, all_raw)

    def lut_for(
        self,
        labels: RawLabels,
        train_ids: Mapping[int, int],
        policy: LabelPolicy,
        visible: Iterable[int] | None = None,
    ) -> np.ndarray:
        """Build the table of a data set with ids of its own, whose classes were found in this label space by name.

        Args:
            labels: of the data set. Its background is the label space's, whatever either is called.
            train_ids: raw id -> train id of the classes that were found, without the background.
            policy: where all other pixels go.
            visible: raw ids that keep their train id; default all of `train_ids`.

        Returns:
            (256,) uint8, as `lut` gives it.
        """
        background = None if self.background is None else labels.background
        return self._table(
            train_ids, background, set(train_ids if visible is None else visible), policy, labels.names
        )

    def _table(
        self,
        train_ids: Mapping[int, int],
        background: int | None,
        visible: Collection[int],
        policy: LabelPolicy,
        all_raw: Iterable[int],
    ) -> np.ndarray:
        """The only place where a table of labels is made."""
        if self.background is None:
            policy = LabelPolicy(*(IGNORED if value == 0 else value for value in astuple(policy)))
        table = np.full(256, policy.void, np.uint8)
        for raw in all_raw:
            table[raw] = policy.future
        for raw, train_id in train_ids.items():
            table[raw] = train_id if raw in visible else policy.old
        if background is not None:
            table[background] = policy.background
        return table

    def train_ids_of(self, labels: RawLabels) -> dict[int, int]:
        """Raw id -> train id of a data set's classes that have a name of this label space; without the background."""
        return {
            raw: self.names.index(name)
            for raw, name in labels.names.items()
            if name in self.names and not (raw == labels.background and self.background is not None)
        }
