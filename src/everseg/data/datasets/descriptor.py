"""Check the data.yaml that describes plain folders, and report all of its faults at once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everseg.data.datasets.decode import Colour
from everseg.data.datasets.listing import LIST_ENDINGS
from everseg.data.datasets.options import SHARED, own_file
from everseg.data.datasets.tiles import Tiles, tiles_of
from everseg.errors import MOST_LISTED, ConfigError, near_miss
from everseg.files import UnreadableError, read_text, whole_number
from everseg.labels import (
    BACKGROUND,
    IGNORE_NAME,
    IGNORED,
    IGNORED_WIDE,
    RawLabels,
    doubled,
    find_name,
    is_background_name,
    is_void_name,
    spelling,
)

KEYS = (
    "name", "root", "images", "masks", "splits", "classes", "ignore", "background", "labels", "pair",
    "split", "tiles", "layout", "void_share", "no_data", *SHARED,
)  # fmt: skip

NO_DATA_CLASS = "class"
"""What `no_data` states: ids that GeoTIFF masks call "no data" are the classes of these ids."""


@dataclass(frozen=True)
class Descriptor:
    """A checked data.yaml."""

    name: str
    images: str
    masks: str
    splits: Mapping[str, str] | None
    """Split -> folder or list file; None: those of train, val, test whose image folder exists."""
    labels: RawLabels
    palette: Mapping[Colour, int] | None
    id_table: Mapping[int, int] | None
    image_suffix: str = ""
    mask_suffix: str = ""
    division: Division | None = None
    """How one set of images is cut into splits."""
    tiles: Tiles | None = None
    """Windows that the pictures are cut into."""
    void_share: float = 0.0
    """Largest share of the pixels that may be without annotation; 0: not stated."""
    no_data_stated: bool = False
    """Whether ids that GeoTIFF masks call "no data" are classes nevertheless."""


def parse(given: Mapping[str, Any], where: str, *, name: str = "folder") -> Descriptor:
    """Check the keys of a description.

    Args:
        given: the keys, as read from YAML.
        where: file name for messages.
        name: of the data set, if `given` has none.

    Raises:
        ConfigError: every problem found.
    """
    check = _Check(given)
    check.keys("", given, KEYS)
    classes = check.classes()
    void = check.void(classes)
    background = check.background(classes)
    palette, table = check.labels(classes, void)
    images, masks = check.folder("images", "images/{split}"), check.folder("masks", "masks/{split}")
    division, wrong = division_of(given.get("split"))
    tiles, more = tiles_of(given.get("tiles"))
    check.problems += wrong + more
    if given.get("layout", "folders") != "folders":
        check.wrong("layout", "folders, or nothing, beside these keys", given["layout"])
    splits = check.splits(images, given.get("split") is not None)
    share = given.get("void_share", 0.0)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        check.wrong("void_share", "a share of the pixels from 0 to 1", share)
    if given.get("no_data") not in (None, NO_DATA_CLASS):
        check.wrong("no_data", f"'{NO_DATA_CLASS}', or nothing", given["no_data"])
    pair = check.mapping("pair")
    check.keys("pair.", pair, ("image_suffix", "mask_suffix"))
    suffixes = [check.text(f"pair.{k}", pair.get(k), "") for k in ("image_suffix", "mask_suffix")]
    if images == masks and suffixes[0] == suffixes[1]:
        check.problems.append(
            "masks: the same folder as images; tell them apart with pair: {mask_suffix: _mask}, or move the masks"
        )
    name = check.text("name", given.get("name"), name)
    if check.problems:
        raise ConfigError(check.problems, where)
    return Descriptor(
        name=name,
        images=images,
        masks=masks,
        splits=splits,
        labels=RawLabels(classes, background, void),
        palette=palette,
        id_table=table,
        image_suffix=suffixes[0],
        mask_suffix=suffixes[1],
        division=division,
        tiles=tiles,
        void_share=float(share),
        no_data_stated=given.get("no_data") is not None,
    )


@dataclass
class _Check:
    """Reads one key after the other and collects the faults."""

    given: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)

    def keys(self, prefix: str, found: Mapping[str, Any], known: tuple[str, ...]) -> None:
        for key in found:
            if key not in known:
                shown = len(self.problems) < MOST_LISTED
                hint = near_miss(key, known, f"; known: {', '.join(known)}") if shown else ""
                self.problems.append(f"{prefix}{key}: unknown key{hint}")

    def wrong(self, key: str, expected: str, value: Any) -> None:
        self.problems.append(f"{key}: expected {expected}, got {value!r}")

    def text(self, key: str, value: Any, default: str) -> str:
        if value is None:
            return default
        if not isinstance(value, str):
            self.wrong(key, "text", value)
            return default
        return value

    def mapping(self, key: str) -> Mapping[Any, Any]:
        value = self.given.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.wrong(key, "keys with values", value)
            return {}
        return value

    def folder(self, key: str, default: str) -> str:
        value = self.text(key, self.given.get(key), default)
        parts = value.replace("\\", "/").split("/")
        if value.startswith("/") or ".." in parts or "\0" in value:
            self.problems.append(
                f"{key}: '{value}' leads out of the data folder; set root to a folder that holds both"
            )
        return value.rstrip("/")

    def splits(self, images: str, divided: bool) -> Mapping[str, str] | None:
        value = self.given.get("splits")
        if divided and (value is not None or "{split}" in images):
            other = "splits" if value is not None else "images with {split}"
            self.problems.append(f"split: cuts one set of images into splits; give either it or {other}")
            return None
        if isinstance(value, list):
            value = (
                {v: v for v in value if isinstance(v, str)} if all(isinstance(v, str) for v in value) else 0
            )
        if value is None:
            if "{split}" not in images and not divided:
                self.problems.append(
                    "splits: needed, since images has no {split}; name image lists: {train: train.txt, val: val.txt},"
                    " or cut the images into splits with split: {val: 0.2, seed: 0}"
                )
            return None
        if not isinstance(value, Mapping) or not value or not all(
            isinstance(k, str) and k and isinstance(v, str) and v for k, v in value.items()
        ):  # fmt: skip
            self.wrong("splits", "a list of names, or split: folder or list.txt", self.given.get("splits"))
            return None
        for split, place in value.items():
            if ".." in place.replace("\\", "/").split("/"):
                self.problems.append(f"splits.{split}: '{place}' leads out of the data folder")
            elif not place.lower().endswith(LIST_ENDINGS) and "{split}" not in images:
                self.problems.append(
                    f"splits.{split}: images has no {{split}}, so '{place}' must be an image list"
                    f" ({', '.join(LIST_ENDINGS)})"
                )
        return dict(value)

    def classes(self) -> dict[int, str]:
        value = self.given.get("classes")
        named: dict[Any, Any]
        if isinstance(value, list) and value:
            named = dict(enumerate(value))
        elif isinstance(value, Mapping) and value:
            named = dict(value)
        else:
            self.wrong("classes", "a list of names, or id: name", value)
            return {}
        good: dict[int, str] = {}
        seen: dict[str, int] = {}
        for raw, name in named.items():
            if not _is_id(raw, IGNORED_WIDE - 1):
                self.wrong(f"classes.{raw}", "an id from 0 to 65534", raw)
            elif not isinstance(name, str) or not name.strip() or spelling(name) == IGNORE_NAME:
                self.wrong(f"classes.{raw}", f"a name other than '{IGNORE_NAME}'", name)
            elif spelling(name) in seen:
                other = seen[spelling(name)]
                self.problems.append(
                    f"classes.{raw}: the name '{name}' stands for id {other} already"
                    + ("" if good[other] == name else f", which is called '{good[other]}'")
                )
            else:
                good[raw] = name
                seen[spelling(name)] = raw
        return good

    def void(self, classes: Mapping[int, str]) -> tuple[int, ...]:
        if "ignore" not in self.given:
            usual = IGNORED if max(classes, default=0) <= IGNORED else IGNORED_WIDE
            return () if usual in classes else (usual,)
        value = self.given["ignore"]
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(_is_id(i, IGNORED_WIDE) for i in ids):
            self.wrong("ignore", "ids from 0 to 65535", value)
            return ()
        for i in ids:
            if i in classes:
                self.problems.append(f"ignore: id {i} is the class '{classes[i]}'; take one of them away")
        return tuple(sorted(set(ids)))

    def background(self, classes: Mapping[int, str]) -> int | None:
        ids = {spelling(name): i for i, name in classes.items()}
        if "background" not in self.given:
            return ids.get(BACKGROUND)  # under any of its usual names, because they share one spelling
        value = self.given["background"]
        if value is None:
            return None
        if spelling(str(value)) not in ids:
            hint = near_miss(value, classes.values())
            self.problems.append(
                f"background: '{value}' is not one of the classes{hint} (null: there is no background class)"
            )
            return None
        return ids[spelling(str(value))]

    def labels(
        self, classes: Mapping[int, str], void: tuple[int, ...]
    ) -> tuple[dict[Colour, int] | None, dict[int, int] | None]:
        section = self.mapping("labels")
        self.keys("labels.", section, ("palette", "map"))
        colours, table = section.get("palette"), section.get("map")
        if colours is not None and table is not None:
            self.problems.append("labels: give either palette or map, not both")
        for key, value in (("palette", colours), ("map", table)):
            if value is not None and (not isinstance(value, Mapping) or not value):
                self.wrong(f"labels.{key}", "keys with values", value)
        targets: dict[Any, int] = {**{i: i for i in classes}, **{n: i for i, n in classes.items()}}
        if void:
            targets[IGNORE_NAME] = void[0]
        palette = self._palette(colours, targets) if isinstance(colours, Mapping) else None
        return palette, self._map(table, targets, void) if isinstance(table, Mapping) else None

    def _target(self, key: str, value: Any, targets: Mapping[Any, int]) -> int:
        names = [t for t in targets if isinstance(t, str)]
        found = find_name(value, names) if isinstance(value, str) else value
        if isinstance(value, bool) or not isinstance(found, int | str) or found not in targets:
            hint = near_miss(value, names)
            self.problems.append(f"{key}: {value!r} is neither a class nor '{IGNORE_NAME}'{hint}")
            return 0
        return targets[found]

    def _palette(self, given: Mapping[Any, Any], targets: Mapping[Any, int]) -> dict[Colour, int]:
        palette: dict[Colour, int] = {}
        self.problems += [
            f"labels.palette: '{one}' and '{other}' are one name; give all its colours in one list"
            for one, other in doubled({name: name for name in given if isinstance(name, str)})
        ]
        for name, value in given.items():
            raw = self._target(f"labels.palette.{name}", name, targets)
            several = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
            for c in several:
                if not isinstance(c, list) or len(c) != 3 or not all(_is_id(x) for x in c):
                    self.wrong(f"labels.palette.{name}", "[red, green, blue] from 0 to 255", c)
                elif palette.setdefault((c[0], c[1], c[2]), raw) != raw:
                    self.problems.append(
                        f"labels.palette.{name}: the colour {c} is given to another class already"
                    )
        without = [
            n
            for n, raw in targets.items()
            if isinstance(n, str) and n != IGNORE_NAME and raw not in palette.values()
        ]
        if without:
            self.problems.append(f"labels.palette: no colour for {', '.join(without)}")
        return palette

    def _map(
        self, given: Mapping[Any, Any], targets: Mapping[Any, int], void: tuple[int, ...]
    ) -> dict[int, int]:
        table = {i: i for i in void}
        for stored, value in given.items():
            if isinstance(stored, bool) or not isinstance(stored, int):
                self.wrong(f"labels.map.{stored}", "a whole number (the id in the mask files)", stored)
            else:
                table[stored] = self._target(f"labels.map.{stored}", value, targets)
        return table


def _is_id(value: Any, most: int = 255) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


@dataclass(frozen=True)
class Division:
    """Shares of the images that are held out. The remaining images are `train`."""

    val: float = 0.2
    test: float = 0.0
    seed: int = 0

    def parts(self, names: Sequence[str]) -> dict[str, list[int]]:
        """Positions of each split's samples.

        The split of a sample depends only on the seed and its name, so adding or removing samples does not move any
        other. The shares are therefore met only on average. If `train` or `val` would be empty, it takes one sample
        from the other; `val` does so only if its share is not 0.
        """
        draws = [_draw(self.seed, name) for name in names]
        parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
        for position, draw in enumerate(draws):
            held_out = "val" if draw < self.val else "test" if draw < self.val + self.test else "train"
            parts[held_out].append(position)
        if len(names) > 1:
            for empty, full in (("val", "train"), ("train", "val")):
                if not parts[empty] and parts[full] and (empty == "train" or self.val):
                    parts[empty].append(parts[full].pop())
        return {name: positions for name, positions in parts.items() if positions or name == "train"}


def division_of(given: Any) -> tuple[Division | None, list[str]]:
    """Check a `split` key.

    Returns:
        The division, or None if it is missing or wrong, and the faults.
    """
    if given is None:
        return None, []
    if not isinstance(given, Mapping):
        return None, [f"split: expected shares such as {{val: 0.2, seed: 0}}, got {given!r}"]
    known = ("val", "test", "seed")
    problems = [f"split.{key}: unknown key{near_miss(key, known)}" for key in given if key not in known]
    shares = {key: given.get(key, getattr(Division, key)) for key in ("val", "test")}
    for key, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            problems.append(f"split.{key}: expected a share from 0 to below 1, got {share!r}")
    seed = given.get("seed", 0)
    if type(seed) is not int:
        problems.append(f"split.seed: expected a whole number, got {seed!r}")
    if not problems and sum(shares.values()) >= 1:
        problems.append("split: val and test together leave nothing for train")
    return (None, problems) if problems else (Division(shares["val"], shares["test"], seed), [])


def _draw(seed: int, name: str) -> float:
    """Draw a number in [0, 1) that depends only on seed and name."""
    text = f"{seed}:{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64


MAX_BYTES = 1_000_000


def read_labelmap(path: Path) -> dict[str, Colour]:
    """Read a label map: a line `name:red,green,blue:parts:actions` per class; # starts a comment.

    Raises:
        ConfigError: the file cannot be read, lines have another form, or a name or colour occurs twice; lists them.
    """
    try:
        text = read_text(path, MAX_BYTES)
    except UnreadableError as error:
        raise ConfigError(f"labels.palette: {path} cannot be read ({error})") from None
    found: dict[str, Colour] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, rest = line.partition(":")
        numbers = rest.split(":")[0].split(",")
        values = [value for n in numbers if (value := whole_number(n)) is not None]
        if len(numbers) != 3 or len(values) != 3 or max(values) > 255 or not name.strip():
            # What stands there instead is not shown: the file may be none of the data's.
            problems.append(f"line {number}: expected 'name:red,green,blue::'")
        elif (other := find_name(name.strip(), found)) is not None:
            as_it = "" if other == name.strip() else f", once as '{other}'"
            problems.append(f"line {number}: '{name.strip()}' appears twice{as_it}")
        elif (values[0], values[1], values[2]) in found.values():
            problems.append(f"line {number}: the colour {values} is given to another class already")
        else:
            found[name.strip()] = (values[0], values[1], values[2])
    if not found and not problems:
        problems.append("names no class")
    if problems:
        raise ConfigError(problems, str(path))
    return found


def palette_of(labelmap: Mapping[str, Colour]) -> tuple[list[str], dict[str, list[int]]]:
    """Make the class list of a label map, background first, and its palette. Names for void become "ignore"."""
    names = [name for name in labelmap if not is_void_name(name)]
    names.sort(key=lambda name: not is_background_name(name))
    palette = {name: list(labelmap[name]) for name in names}
    ignored = [list(colour) for name, colour in labelmap.items() if is_void_name(name)]
    return names, {**palette, **({IGNORE_NAME: ignored} if ignored else {})}  # type: ignore[dict-item]


def with_labelmap(
    given: Mapping[str, Any], here: Path, roots: Sequence[Path | None] = (None,)
) -> dict[str, Any]:
    """Replace the file name in `labels.palette` by the content of that label map.

    Args:
        given: keys of a data.yaml.
        here: folder that a relative name starts from.
        roots: folders that it must lie in, as for `own_file`.

    Raises:
        ConfigError: as `own_file` and `read_labelmap`.
    """
    labels = given.get("labels")
    if not isinstance(labels, Mapping) or not isinstance(labels.get("palette"), str):
        return dict(given)
    file = own_file(here / Path(labels["palette"]).expanduser(), roots, "labels.palette")
    names, palette = palette_of(read_labelmap(file))
    background = {"background": names[0]} if names and is_background_name(names[0]) else {}
    return {"classes": names, **background, **given, "labels": {**labels, "palette": palette}}
