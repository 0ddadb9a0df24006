"""Label spaces, label policies and the look-up tables made of them.

A mask holds *raw ids*, a model's outputs are *train ids*; a table of 256 entries leads from one to the other.
What happens to pixels that carry no class taught now differs between the public codes (a named `LabelPolicy`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
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
    """Train ids given to pixels that carry no class taught now (255 = ignored)."""

    void: int = 255
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
        val=LabelPolicy(void=255, background=0, old=255, future=255),
        test=LabelPolicy(void=255, background=0, old=255, future=255),
    ),
    # MiB's ADE20K code: as above, but raw 0 ("other") is never scored.
    "mib-ade": PolicySet(
        train=LabelPolicy(void=0, background=0, old=0, future=0),
        val=LabelPolicy(void=255, background=255, old=255, future=255),
        test=LabelPolicy(void=255, background=255, old=255, future=255),
    ),
    # PLOP and CSSegmentation: void stays ignored; classes not learnt yet are scored as background.
    "plop": PolicySet(
        train=LabelPolicy(void=255, background=0, old=0, future=0),
        val=LabelPolicy(void=255, background=0, old=0, future=0),
        test=LabelPolicy(void=255, background=0, old=0, future=0),
    ),
    # everseg's own choice for other data: void is never learnt, classes not learnt yet are not scored.
    "ignore-void": PolicySet(
        train=LabelPolicy(void=255, background=0, old=0, future=0),
        val=LabelPolicy(void=255, background=0, old=255, future=255),
        test=LabelPolicy(void=255, background=0, old=255, future=255),
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
        """Build the table raw id -> train id.

        In a label space without background, pixels that a policy would call background (0) are ignored instead.

        Args:
            visible: raw ids that keep their train id.
            policy: where all other pixels go.
            all_raw: every class id of the data set; an id outside it counts as void.

        Returns:
            (256,) uint8.
        """
        order = self.order
        visible, all_raw = set(visible), set(all_raw)
        background = None if self.background is None else order[self.background]
        if self.background is None:
            policy = LabelPolicy(*(255 if value == 0 else value for value in astuple(policy)))
        table = np.full(256, policy.void, np.uint8)
        for raw in all_raw - set(order):
            table[raw] = policy.future
        for train_id, raw in enumerate(order):
            if raw >= 0 and raw != background:
                table[raw] = train_id if raw in visible else policy.old
        if background is not None and background >= 0:
            table[background] = policy.background
        return table
