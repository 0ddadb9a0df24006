"""Label spaces, label policies, the look-up tables made from them, and the matching of class names.

A mask holds *raw ids*; a model's outputs are *train ids*. A table of 256 entries maps raw ids to train ids.
The public code bases treat pixels without a class of the current step differently. A `LabelPolicy` describes each way.

Classes of two sides (a data set and a model, two models, two domains) are matched by name. `spelling` is the only rule
for when two names are the same, and all matching of names is done in this module. Names without a partner are reported,
never silently dropped.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TypeVar

import numpy as np

from everseg.display import counted
from everseg.errors import ConfigError, some

IGNORED = 255
"""Train id of pixels that losses and scores leave out, in label spaces of up to 255 outputs."""
IGNORED_WIDE = 65_535
"""The same in label spaces of more outputs, where 255 is a class; see `ignored_id`."""
MOST_CLASSES = 65_534
"""Most outputs of a label space, and most classes of a data set."""
SYNTHETIC_BACKGROUND = -1
"""Raw id of the background channel added for data sets that have no background class: no pixel carries it."""
SYNTHETIC_VOID = -2
"""Raw id of an extra output for void (MDIL's last class): no pixel carries it, so it is never trained as a target."""
SYNTHETIC_OTHER = -3
"""Raw id of the column that counts predictions a label space has no class for: no pixel and no output carries it."""
BACKGROUND = "background"
"""Name of the background in label spaces, whatever the data set calls it."""
IGNORE_NAME = "ignore"
"""Name for pixels without annotation in a description of classes. No class may have it."""
_BACKGROUNDS = frozenset({"background", "bg", "bkg"})
"""Usual names of the background, in folded spelling: they also cover `__background__`, `_background_` and `BG`.

"other" and "unlabeled" are left out: the first is a class in some data sets, the second means void in most.
"""
_VOIDS = frozenset({IGNORE_NAME, "void", "unlabeled", "unlabelled"})
_ACCENTED = ("LATIN", "GREEK")
"""Alphabets whose accents are removed. In other alphabets the same marks make other letters: и and й, か and が."""
_Key = TypeVar("_Key")


def ignored_id(num_classes: int) -> int:
    """Train id of ignored pixels in a label space of so many outputs: `IGNORED`, or `IGNORED_WIDE` above 255 outputs.

    >>> ignored_id(255), ignored_id(256)
    (255, 65535)
    """
    return IGNORED if num_classes <= IGNORED else IGNORED_WIDE


@functools.lru_cache(maxsize=8192)
def spelling(name: str) -> str:
    """Fold a class name. Two names count as the same exactly if this function returns the same text for both.

    The function ignores case, spaces, hyphens, underscores, the accents of Latin and Greek letters, and compatibility
    forms of Unicode (full-width letters, ligatures). It unifies the usual names of the background. All other characters
    distinguish names ("CD3+", "C++"). So do hyphens at the beginning or end ("-1", "CD3-") and the place where a name
    separates numbers ("zone 1-11", "zone 11-1").

    Returns:
        A text for comparing, not for showing. Folding it again changes nothing. Only a blank name gives an empty text.

    >>> spelling("Traffic-Light") == spelling("traffic light") == spelling("TRAFFIC_LIGHT")
    True
    >>> spelling("Straße") == spelling("STRASSE"), spelling("Café") == spelling("cafe")
    (True, True)
    >>> spelling("__background__"), spelling("BG"), spelling("+"), spelling("-")
    ('background', 'background', '+', '-')
    """
    # Casefolding works only after compatibility forms are replaced, and can produce new ones; hence NFKD twice.
    letters = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", name).casefold())
    parted = re.sub("[ -]+", _separator, "".join(map(_without_kinds, letters)).strip(" "))
    # Accents come last: some are separate characters on top of a space, and spaces are removed by now.
    plain = unicodedata.normalize("NFKD", re.sub("(.)([\u0300-\u036f]+)", _accent, parted))
    return BACKGROUND if plain in _BACKGROUNDS else plain or name.strip()


def _without_kinds(letter: str) -> str:
    """Replace every kind of space and hyphen by the plain one, and drop zero-width characters and soft hyphens."""
    category = unicodedata.category(letter)
    if category == "Pd" or letter == "\N{MINUS SIGN}":
        return "-"
    return " " if category in ("Zs", "Zl", "Zp", "Cc", "Pc") else "" if category == "Cf" else letter


def _separator(found: re.Match[str]) -> str:
    """Reduce a run of spaces and hyphens: to a hyphen at either end of a name, a space between digits, else nothing."""
    text, (start, end) = found.string, found.span()
    if start == 0 or end == len(text):
        return "-"
    return " " if text[start - 1].isdecimal() and text[end].isdecimal() else ""


def _accent(found: re.Match[str]) -> str:
    """Remove the accents of a Latin or Greek letter; keep those of other alphabets, where they make another letter."""
    return found[1] if unicodedata.name(found[1], "").startswith(_ACCENTED) else found[0]


def is_background_name(name: str) -> bool:
    """Return whether a name is a usual name of the background: `Background`, `__background__`, `BG`, ..."""
    return spelling(name) == BACKGROUND


def is_void_name(name: str) -> bool:
    """Return whether a name in a label map means pixels without annotation: `ignore`, `void`, `unlabeled`, ..."""
    return spelling(name) in _VOIDS


def find_name(name: str, known: Iterable[str]) -> str | None:
    """Return the first known name that has the same `spelling`, or None if there is none."""
    wanted = spelling(name)
    return next((other for other in known if spelling(other) == wanted), None)


def doubled(named: Mapping[_Key, str]) -> list[tuple[_Key, _Key]]:
    """Find names that occur more than once: return pairs of their keys, the earlier key first.

    Args:
        named: key (an id, an output, ...) -> its name.

    >>> doubled({0: "road", 1: "sky", 7: "Road"})
    [(0, 7)]
    """
    first: dict[str, _Key] = {}
    found = [(first.setdefault(spelling(name), key), key) for key, name in named.items()]
    return [(other, key) for other, key in found if other != key]


def known_as(name: str, known: Collection[str]) -> str:
    """Return a name as it is known already: preferably letter by letter, else by `spelling`; a new name unchanged.

    The exact match comes first because files of older versions may hold one name in two spellings.
    """
    return name if name in known else find_name(name, known) or name


@dataclass(frozen=True)
class Matching:
    """Result of matching wanted names with known names."""

    pairs: Mapping[str, str]
    """Wanted name -> the matching known name, in the order of the wanted names."""
    unmatched_wanted: tuple[str, ...]
    unmatched_known: tuple[str, ...]

    @property
    def respelt(self) -> dict[str, str]:
        """The pairs whose two names are written differently."""
        return {wanted: known for wanted, known in self.pairs.items() if wanted != known}


def match_names(
    wanted: Iterable[str],
    known: Iterable[str],
    *,
    what: tuple[str, str] = ("the names given", "the names known"),
) -> Matching:
    """Match class names by `spelling`. Each name gets one partner or none.

    Args:
        what: what messages call the two sides.

    Raises:
        ConfigError: two names of one side are the same, so it is unclear which of them is meant.

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
    """The ids in a data set's masks."""

    names: Mapping[int, str]
    """Raw id -> class name, background included if the data set has one."""
    background: int | None = 0
    """Raw id of the background class; None if the data set has none (CamVid, street scenes)."""
    void: tuple[int, ...] = (255,)
    """Raw ids of pixels without annotation."""

    def __post_init__(self) -> None:
        """Refuse two classes with the same name (see `spelling`): matching by name would confuse them.

        Raises:
            ConfigError: two classes have the same name; the message gives the ids of each pair.
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

    @property
    def width(self) -> int:
        """Columns of tables over raw ids: 256, or one more than the largest id where that is larger."""
        return max(256, max(self.declared, default=0) + 1)


@dataclass(frozen=True)
class LabelPolicy:
    """Train ids for pixels that belong to no class of the current step."""

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


_PLOP = PolicySet(
    train=LabelPolicy(void=IGNORED, background=0, old=0, future=0),
    val=LabelPolicy(void=IGNORED, background=0, old=0, future=0),
    test=LabelPolicy(void=IGNORED, background=0, old=0, future=0),
)

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
    # PLOP, RCIL, EWF, REMINDER, NeST, UCD and CSSegmentation on VOC: void stays ignored; classes not learnt yet are
    # scored as background.
    "plop-voc": _PLOP,
    # Their ADE20K code: the same tables, so that raw 0 ("other"), which MiB never scores, is a class of the mean.
    "plop-ade": _PLOP,
    # The name of both in runs of earlier versions.
    "plop": _PLOP,
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


def policy_name(name: str, dataset: str) -> str:
    """Return the name of a label convention today: `plop`, of older runs, is `plop-voc` or on ADE20K `plop-ade`."""
    return {"ade": "plop-ade"}.get(dataset, "plop-voc") if name == "plop" else name


_ROLES = {"train": "in training", "test": "in tests"}
_PIXELS = {
    "void": "pixels without annotation",
    "background": "background pixels",
    "old": "pixels of earlier classes that are not to be seen",
    "future": "pixels of classes not learnt yet",
}


def policies_apart(one: str, other: str) -> list[str]:
    """Say in which pixels two label conventions differ, one entry each; [] if their tables are the same.

    Classes of the current step are never among them. Earlier classes keep their ids in tests under every convention,
    so only training is compared there.

    >>> policies_apart("mib-voc", "ignore-void")
    ['pixels without annotation in training: background under mib-voc, ignored under ignore-void']
    """
    first, second = policy_set(one), policy_set(other)
    found = []
    for role, when in _ROLES.items():
        for kind, pixels in _PIXELS.items():
            here, there = (getattr(getattr(policies, role), kind) for policies in (first, second))
            if here != there and (role, kind) != ("test", "old"):
                said = ["ignored" if value == IGNORED else "background" for value in (here, there)]
                found.append(f"{pixels} {when}: {said[0]} under {one}, {said[1]} under {other}")
    return found


@dataclass(frozen=True)
class LabelSpace:
    """The classes of one branch in output order."""

    groups: tuple[tuple[int, ...], ...]
    """groups[s] = raw ids added by the s-th growth; a synthetic background is `SYNTHETIC_BACKGROUND`."""
    names: tuple[str, ...]
    """Class names in output order."""
    background: int | None = 0
    """Train id of the background; None for label spaces without one."""
    formerly: tuple[tuple[str, str], ...] = ()
    """Earlier names of classes: (earlier, today's), after a class was renamed or merged into another. Data that use an
    earlier name mean the class of today."""

    @property
    def order(self) -> tuple[int, ...]:
        """Raw ids in output order: the position of an id is its train id."""
        return tuple(i for group in self.groups for i in group)

    @property
    def num_classes(self) -> int:
        return len(self.order)

    @property
    def ignored(self) -> int:
        """Train id of ignored pixels."""
        return ignored_id(self.num_classes)

    def problems(self, *, stored: bool = False) -> list[str]:
        """List what is wrong with this label space: ids and names that do not match, or duplicates.

        Args:
            stored: whether it was read from a file. Files of older versions may hold one name in two spellings.
        """
        found = []
        if len(self.names) != self.num_classes:
            found.append(f"{counted(len(self.names), 'name')} for {self.num_classes} ids; each needs one")
        # Check only negative ids: where domains share a branch, two data sets may use one id for two classes.
        texts = [("id", [str(raw) for raw in self.order if raw < 0])]
        for what, values in [*texts, *([("name", [*self.names])] if stored else [])]:
            if twice := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
                found.append(f"the {what} {', '.join(twice)} appears twice")
        if "" in self.names:
            found.append("a class has no name")
        if self.background is not None and (
            type(self.background) is not int or not 0 <= self.background < self.num_classes
        ):
            found.append("the background is not one of the classes")
        return found if stored else [*found, *self._respelt()]

    def _respelt(self) -> list[str]:
        """Report outputs whose names differ in spelling only, such as a synthetic background and a class Background."""
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
        """Build the table raw id -> train id for a data set that uses the raw ids of this label space.

        In a label space without background, pixels that the policy would map to background (0) are ignored instead.

        Args:
            visible: raw ids that keep their train id.
            policy: train ids of all other pixels.
            all_raw: every class id of the data set; an id outside it counts as void.

        Returns:
            (256,) uint8, longer where `all_raw` holds larger ids; uint16 where there are more than 255 outputs.
        """
        order = self.order
        background = None if self.background is None else order[self.background]
        train_ids = {raw: i for i, raw in enumerate(order) if raw >= 0 and raw != background}
        if background is not None and background < 0:  # synthetic background: no pixel has its raw id
            background = None
        return self._table(train_ids, background, set(visible), policy, all_raw)

    def lut_for(
        self,
        labels: RawLabels,
        train_ids: Mapping[int, int],
        policy: LabelPolicy,
        visible: Iterable[int] | None = None,
    ) -> np.ndarray:
        """Build the table raw id -> train id for a data set with other raw ids, whose classes were matched by name.

        Args:
            labels: ids of the data set. The two backgrounds are matched by their role, whatever their names.
            train_ids: raw id -> train id of the matched classes, without the background.
            policy: train ids of all other pixels.
            visible: raw ids that keep their train id; default all of `train_ids`.

        Returns:
            The table, as `lut` gives it.
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
        """Build a look-up table. No other function builds one."""
        if self.background is None:
            # Without a background, train id 0 is an ordinary class.
            policy = LabelPolicy(*(IGNORED if value == 0 else value for value in astuple(policy)))
        policy = LabelPolicy(*(self.ignored if value == IGNORED else value for value in astuple(policy)))
        known = [*all_raw]
        width = max(256, max([*known, *train_ids], default=0) + 1)
        # Later assignments overwrite earlier ones: void, unknown classes, known classes, background.
        table = np.full(width, policy.void, np.uint8 if self.ignored == IGNORED else np.uint16)
        for raw in known:
            table[raw] = policy.future
        for raw, train_id in train_ids.items():
            table[raw] = train_id if raw in visible else policy.old
        if background is not None:
            table[background] = policy.background
        return table


@dataclass(frozen=True)
class SharedClasses:
    """The classes that a data set and a label space share. Classes are matched by name, the background by its role."""

    train_ids: Mapping[int, int]
    """Raw id -> train id. A background of both sides is left out: the label policy decides about its pixels."""
    respelt: Mapping[str, str]
    """Name in the data set -> the matching name in the label space, if the two are written differently, or if the first
    is an earlier name of the second."""
    only_data: Mapping[int, str]
    """Raw id -> name of the classes that the label space does not know."""
    only_space: Mapping[int, str]
    """Train id -> name of the classes that the data set does not have. Synthetic outputs (void) are not counted."""


def shared_classes(
    labels: RawLabels, space: LabelSpace, *, what: tuple[str, str] = ("the data set", "the model")
) -> SharedClasses:
    """Find each class of a data set in a label space.

    Args:
        what: what messages call the two.

    Raises:
        ConfigError: two classes on the same side have the same name.
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
    # A name that is a class of today means that class, whatever was called so before.
    earlier = {spelling(one): now for one, now in space.formerly if now in outputs}
    renamed = {name: earlier[key] for name in found.unmatched_wanted if (key := spelling(name)) in earlier}
    met = set(renamed.values())
    # Outputs that no data set can have: synthetic ones, and the background, which the policy handles.
    expected = {i for i, raw in enumerate(space.order) if raw < 0} | ({space.background} if both else set())
    return SharedClasses(
        {raws[name]: outputs[known] for name, known in (*found.pairs.items(), *renamed.items())},
        {**found.respelt, **renamed},
        {raws[name]: name for name in found.unmatched_wanted if name not in renamed},
        {
            outputs[name]: name
            for name in found.unmatched_known
            if outputs[name] not in expected and name not in met
        },
    )


def matching_notes(
    shared: SharedClasses,
    space: LabelSpace,
    table: Sequence[int],
    pixels: Sequence[int] | np.ndarray,
    *,
    what: tuple[str, str] = ("the data set", "the model"),
    trained: bool = False,
) -> list[str]:
    """Report names that were matched despite different spellings and names without a partner, with the consequences.

    Args:
        shared: the classes shared by the data set and `space`.
        table: raw id -> train id, used for training or scoring.
        pixels: number of pixels of each raw id in the images examined.
        what: what to call the two sides.
        trained: whether the pixels are used for training. If they are scored instead, the notes also list the classes
            that only the model has.

    Returns:
        Sentences without a full stop. The list is empty if every name has a partner of exactly the same spelling.
    """
    data, model = what
    notes = [
        f"class '{name}' of {data} is taken for '{known}' of {model}: names are matched whatever their case, spaces, "
        "hyphens, underscores and accents"
        for name, known in shared.respelt.items()
    ]
    fates = {
        space.ignored: "they are ignored",
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
