"""Label spaces, label policies, the look-up tables made of them, and names of classes.

A mask holds *raw ids*, a model's outputs are *train ids*; a table of 256 entries leads from one to the other.
What happens to pixels that carry no class taught now differs between the public codes (a named `LabelPolicy`).

Classes of two sides (a data set and a model, two models, two domains) meet by name. `spelling` is the only rule that
says when two names are one, and whoever matches names does it here; a name that meets nobody is told, not dropped.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TypeVar

import numpy as np

from everseg.errors import ConfigError, some

IGNORED = 255
"""The train id of pixels that no loss and no score counts."""
SYNTHETIC_BACKGROUND = -1
"""Raw id of the background channel added for data sets that have no background class: no pixel carries it."""
SYNTHETIC_VOID = -2
"""Raw id of an extra output for void (MDIL's last class): no pixel carries it, so it is never trained as a target."""
SYNTHETIC_OTHER = -3
"""Raw id of the column that counts predictions a label space has no class for: no pixel and no output carries it."""
BACKGROUND = "background"
"""What label spaces call the background, whatever the data set calls it."""
IGNORE_NAME = "ignore"
"""The name that stands for pixels without annotation where classes are described; no class may have it."""
_BACKGROUNDS = frozenset({"background", "bg", "bkg"})
"""How people and tools call the background, folded: `__background__`, `_background_` and `BG` are among them.

Not here: "other" and "unlabeled". The first is a class in some data sets, the second is void in most.
"""
_VOIDS = frozenset({IGNORE_NAME, "void", "unlabeled", "unlabelled"})
_ACCENTED = ("LATIN", "GREEK")
"""Alphabets whose accents are folded. In others the same marks make other letters: и and й, か and が."""
_Key = TypeVar("_Key")


@functools.lru_cache(maxsize=8192)
def spelling(name: str) -> str:
    """Fold a class name: two names are one name exactly if this gives the same text for both.

    Folded are case, spaces, hyphens, underscores and the accents of Latin and Greek letters, compatibility forms of
    Unicode (full-width letters, ligatures) and the usual names of the background. All other signs tell names apart
    ("CD3+", "C++"), and so do hyphens at the beginning or end ("-1", "CD3-") and the place where a name parts
    numbers ("zone 1-11", "zone 11-1").

    Returns:
        A text to compare, not to show. It is its own spelling; it is empty for a blank name only.

    >>> spelling("Traffic-Light") == spelling("traffic light") == spelling("TRAFFIC_LIGHT")
    True
    >>> spelling("Straße") == spelling("STRASSE"), spelling("Café") == spelling("cafe")
    (True, True)
    >>> spelling("__background__"), spelling("BG"), spelling("+"), spelling("-")
    ('background', 'background', '+', '-')
    """
    # Case can only be folded after compatibility forms are gone, and leaves some of them behind itself.
    letters = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", name).casefold())
    parted = re.sub("[ -]+", _separator, "".join(map(_without_kinds, letters)).strip(" "))
    # Accents come last: some are signs of their own that stand on a space, which has gone by now.
    plain = unicodedata.normalize("NFKD", re.sub("(.)([\u0300-\u036f]+)", _accent, parted))
    return BACKGROUND if plain in _BACKGROUNDS else plain or name.strip()


def _without_kinds(letter: str) -> str:
    """One kind of space and one kind of hyphen; zero-width signs and soft hyphens are no part of a name."""
    category = unicodedata.category(letter)
    if category == "Pd" or letter == "\N{MINUS SIGN}":
        return "-"
    return " " if category in ("Zs", "Zl", "Zp", "Cc", "Pc") else "" if category == "Cf" else letter


def _separator(found: re.Match[str]) -> str:
    """What is left of spaces and hyphens: a hyphen at either end of a name, a space between digits, else nothing."""
    text, (start, end) = found.string, found.span()
    if start == 0 or end == len(text):
        return "-"
    return " " if text[start - 1].isdecimal() and text[end].isdecimal() else ""


def _accent(found: re.Match[str]) -> str:
    """A letter without its accents, where these are no other letter."""
    return found[1] if unicodedata.name(found[1], "").startswith(_ACCENTED) else found[0]


def is_background_name(name: str) -> bool:
    """Whether a class is called as the background usually is: `Background`, `__background__`, `BG`, ..."""
    return spelling(name) == BACKGROUND


def is_void_name(name: str) -> bool:
    """Whether a label map's name means pixels without annotation: `ignore`, `void`, `unlabeled`, ..."""
    return spelling(name) in _VOIDS


def find_name(name: str, known: Iterable[str]) -> str | None:
    """The first known name that is this name, however it is spelled; None if there is none."""
    wanted = spelling(name)
    return next((other for other in known if spelling(other) == wanted), None)


def doubled(named: Mapping[_Key, str]) -> list[tuple[_Key, _Key]]:
    """What has one name with another: pairs of keys, the earlier one first.

    Args:
        named: an id, an output or whatever else has a name -> that name.

    >>> doubled({0: "road", 1: "sky", 7: "Road"})
    [(0, 7)]
    """
    first: dict[str, _Key] = {}
    found = [(first.setdefault(spelling(name), key), key) for key, name in named.items()]
    return [(other, key) for other, key in found if other != key]


def known_as(name: str, known: Collection[str]) -> str:
    """A name as it is known already, in the same spelling if it is there, else in another; itself if it is new.

    Files of older versions may hold one name in two spellings: there each means itself.
    """
    return name if name in known else find_name(name, known) or name


@dataclass(frozen=True)
class Matching:
    """Which of the names wanted is which of those known."""

    pairs: Mapping[str, str]
    """Name wanted -> the same name as the known ones spell it, in the order wanted."""
    unmatched_wanted: tuple[str, ...]
    unmatched_known: tuple[str, ...]

    @property
    def respelt(self) -> dict[str, str]:
        """Those of the pairs whose two spellings differ."""
        return {wanted: known for wanted, known in self.pairs.items() if wanted != known}


def match_names(
    wanted: Iterable[str],
    known: Iterable[str],
    *,
    what: tuple[str, str] = ("the names given", "the names known"),
) -> Matching:
    """Match class names by `spelling`; each finds one partner or none.

    Args:
        what: how messages call the two sides.

    Raises:
        ConfigError: two names of one side are one name, so that it is open which of them is meant.

    >>> match_names(["Green", "blue"], ["red", "green"])
    Matching(pairs={'Green': 'green'}, unmatched_wanted=('blue',), unmatched_known=('red',))
    """
    wanted, known = tuple(wanted), tuple(known)
    problems = [
        f"{side}: '{names[one]}' and '{names[other]}' are one name, so it is open which is meant; rename one of them"
        for side, names in zip(what, (wanted, known), strict=True)
        for one, other in doubled(dict(enumerate(names)))
    ]
    if problems:
        raise ConfigError(problems)
    partners = {spelling(name): name for name in known}
    pairs = {name: partners[spelling(name)] for name in wanted if spelling(name) in partners}
    met = set(pairs.values())
    return Matching(
        pairs,
        tuple(name for name in wanted if name not in pairs),
        tuple(name for name in known if name not in met),
    )


@dataclass(frozen=True)
class RawLabels:
    """The ids that stand in a data set's masks."""

    names: Mapping[int, str]
    """Raw id -> class name, background included if the data set has one."""
    background: int | None = 0
    """Raw id of the background class; None if the data set has none (CamVid, street scenes)."""
    void: tuple[int, ...] = (255,)
    """Raw ids of pixels without annotation."""

    def __post_init__(self) -> None:
        """Refuse two classes of one name (see `spelling`): whatever goes by names would take one for the other.

        Raises:
            ConfigError: with the ids of each pair.
        """
        names = {raw: str(name) for raw, name in self.names.items()}
        if pairs := doubled(names):
            raise ConfigError(
                [
                    f"ids {one} '{names[one]}' and {other} '{names[other]}' are two classes of one name; rename one of "
                    "them, or give both one id"
                    for one, other in pairs
                ]
            )

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

    def problems(self, *, stored: bool = False) -> list[str]:
        """What makes this no list of classes: ids and names that do not match, or anything that stands twice.

        Args:
            stored: it stands in a file already. Files of older versions may hold one name in two spellings.
        """
        found = []
        if len(self.names) != self.num_classes:
            found.append(f"{len(self.names)} names for {self.num_classes} ids")
        # Only ids that stand for no pixel: where domains share a branch, two data sets may number two classes alike.
        texts = [("id", [str(raw) for raw in self.order if raw < 0])]
        for what, values in [*texts, *([("name", [*self.names])] if stored else [])]:
            if twice := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
                found.append(f"the {what} {', '.join(twice)} stands twice")
        if "" in self.names:
            found.append("a class without a name")
        if self.background is not None and (
            type(self.background) is not int or not 0 <= self.background < self.num_classes
        ):
            found.append("the background is none of the classes")
        return found if stored else [*found, *self._respelt()]

    def _respelt(self) -> list[str]:
        """Outputs whose names differ in spelling only, such as a background of ours beside a class Background."""
        return [
            f"outputs {one} '{self.names[one]}' and {other} '{self.names[other]}' are two classes of one name; rename "
            "one of them"
            + (
                f", or say which class is the background (background: {self.names[other]})"
                if one == self.background
                else ""
            )
            for one, other in doubled(dict(enumerate(self.names)))
        ]

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


@dataclass(frozen=True)
class SharedClasses:
    """Which classes of a data set a label space knows: by name, the background by its role."""

    train_ids: Mapping[int, int]
    """Raw id -> train id. Without the background where both have one: its pixels are the label policy's affair."""
    respelt: Mapping[str, str]
    """Name in the data set -> the same name in the label space, where the two spellings differ."""
    only_data: Mapping[int, str]
    """Raw id -> name of the classes that the label space does not know."""
    only_space: Mapping[int, str]
    """Train id -> name of the classes that the data set does not have; outputs of ours (void) are none."""


def shared_classes(
    labels: RawLabels, space: LabelSpace, *, what: tuple[str, str] = ("the data set", "the model")
) -> SharedClasses:
    """Find each class of a data set in a label space.

    Args:
        what: how messages call the two.

    Raises:
        ConfigError: two classes of one name on either side.
    """
    data, model = what
    if pairs := doubled(dict(enumerate(space.names))):
        one, other = pairs[0]
        raise ConfigError(
            f"{model} has two classes of one name, the outputs {one} '{space.names[one]}' and {other} "
            f"'{space.names[other]}', so nothing can be matched with them by name; train it on data whose classes "
            "have a name each"
        )
    both = labels.background is not None and space.background is not None
    raws = {name: raw for raw, name in labels.names.items() if not (both and raw == labels.background)}
    outputs = {name: i for i, name in enumerate(space.names)}
    found = match_names(raws, outputs, what=(data, model))
    expected = {i for i, raw in enumerate(space.order) if raw < 0} | ({space.background} if both else set())
    return SharedClasses(
        {raws[name]: outputs[known] for name, known in found.pairs.items()},
        found.respelt,
        {raws[name]: name for name in found.unmatched_wanted},
        {outputs[name]: name for name in found.unmatched_known if outputs[name] not in expected},
    )


def naming_notes(
    shared: SharedClasses,
    space: LabelSpace,
    table: Sequence[int] | bytes,
    pixels: Sequence[int] | np.ndarray,
    *,
    what: tuple[str, str] = ("the data set", "the model"),
    trained: bool = False,
) -> list[str]:
    """Say which names were matched in two spellings, which met nobody, and what that means for the figures.

    Args:
        shared: of the data set and `space`.
        table: raw id -> train id, (256,), as the pixels are counted or trained.
        pixels: of each raw id in the images looked at, (256,).
        what: how to call the two.
        trained: whether the pixels are trained on; else they are scored, and the model's lonely classes are told too.

    Returns:
        Sentences without a full stop; none where every name met its own.
    """
    data, model = what
    notes = [
        f"class '{name}' of {data} is taken for '{known}' of {model}: names are matched whatever their case, spaces, "
        "hyphens, underscores and accents"
        for name, known in shared.respelt.items()
    ]
    fates = {
        IGNORED: "they are ignored",
        space.background: "they are trained as background" if trained else "they count as background",
    }
    for train_id, fate in fates.items():
        lonely = [
            f"'{name}' ({int(pixels[raw]):,} pixels)"
            for raw, name in shared.only_data.items()
            if table[raw] == train_id
        ]
        if lonely:
            notes.append(f"{model} does not know {some(lonely, 12)} of {data}: {fate}")
    absent = [f"'{name}'" for name in shared.only_space.values()]
    if absent and not trained:
        notes.append(
            f"{data} has no class {some(absent, 12)} of {model}: no IoU and no part in any mean; pixels that the model "
            "calls so are errors of the classes they belong to"
        )
    return notes
