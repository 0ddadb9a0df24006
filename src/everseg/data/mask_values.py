"""The values that mask files hold, and what they can mean.

Every mask is read once. What it says about itself (ids, indices with a palette, colours, an alpha channel) is decided
file by file, then over all files. Where two readings are possible, the result is a `Doubt`, never a choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from everseg.data.base import Split
from everseg.data.batches.parallel import Progress, map_samples
from everseg.data.datasets.decode import (
    LOSSY,
    Colour,
    Reading,
    no_data,
    open_inside,
    open_picture,
    packed_colours,
    palette_of_picture,
    stored_ids,
    transparent_pixels,
    unpack_colour,
    whole,
)
from everseg.display import counted, percent
from everseg.errors import DataError, some
from everseg.labels import IGNORED_WIDE

Value = int | Colour
"""What a mask stores for a class: an id or a colour."""
BLACK = (0, 0, 0)
WHITE = 255
"""Largest value of a grey mask: what tools draw objects in, or pixels without annotation."""
VOID_SHARE = 0.5
"""An ignore value that nobody stated may not cover more of the pixels than this."""
LOST_SHARE = 0.05
"""Nor may more of the labelled pixels lie in masks that show the ignore value and no object."""
HIGH, LOW = 224, 31
"""Ids from 224 on are counted to the white end of a grey picture, those up to 31 to the black end."""
ENDS = 0.9
"""Masks of which so many pixels lie at the two ends were black and white once."""
THIN = 3
"""So many values that are nowhere two pixels wide are traces of resizing or of lossy compression."""
MANY = 256
"""A mask with more values than this was not drawn class by class."""


@dataclass(frozen=True)
class MaskFile:
    """What one mask file stores."""

    name: str
    kind: str
    """ids, indexed (ids with a palette), or colours."""
    counts: Mapping[int, int]
    """Id, or packed colour -> pixels."""
    blocks: Mapping[int, int] = field(default_factory=dict)
    """Value -> squares of 2 x 2 pixels of it."""
    palette: bytes = b""
    """Red, green, blue of the indices from 0 on; indexed files only."""
    transparent: Mapping[int, int] = field(default_factory=dict)
    """Packed colour -> pixels of it that are fully transparent; empty without an alpha channel."""
    alpha: bool = False
    """Whether there is an alpha channel."""
    no_data: int | None = None
    """The id that a GeoTIFF calls "no data"."""

    def colour(self, index: int) -> Colour | None:
        """The colour of an index, None where the palette ends before it."""
        found = self.palette[3 * index : 3 * index + 3]
        return (found[0], found[1], found[2]) if len(found) == 3 else None


@dataclass(frozen=True)
class Doubt:
    """Values that can be read in more than one way."""

    values: frozenset[int]
    """The ids in doubt. Names that are tied to all of them decide."""
    found: str
    """What was found, with its figure."""
    options: str
    """The readings, each with the option that decides."""
    no_data: bool = False
    """Whether the doubt is about an id that GeoTIFFs call "no data"."""

    @property
    def text(self) -> str:
        """All of it."""
        return f"{self.found} {self.options}"


@dataclass(frozen=True)
class Values:
    """The values in the masks of a data set."""

    ids: dict[int, int] = field(default_factory=dict)
    """Id -> pixels, where masks hold ids."""
    colours: dict[Colour, int] = field(default_factory=dict)
    """Colour -> pixels, where masks hold colours, in an order that does not depend on the pixels."""
    faults: tuple[str, ...] = ()
    """One line per mask that tells nothing: unreadable, lossy, or of too many values."""
    own: dict[int, Colour] = field(default_factory=dict)
    """Id -> its colour in the masks' own palette, the same one in all files; indexed masks only."""
    doubts: tuple[Doubt, ...] = ()
    notes: tuple[str, ...] = ()
    files: tuple[MaskFile, ...] = ()

    @property
    def counts(self) -> dict[Value, int]:
        """Pixels of every id or colour."""
        found: dict[Value, int] = {}
        for values in (self.colours, self.ids):
            for value, count in values.items():
                found[value] = count
        return found

    @property
    def pixels(self) -> int:
        """All pixels of all masks."""
        return sum(self.counts.values())


def mask_values(
    root: Path,
    masks: Sequence[str],
    *,
    by_colour: bool = False,
    follow_links: bool = False,
    progress: Progress | None = None,
) -> Values:
    """Read masks on all cores, count their values, and decide what they are.

    Args:
        root: data folder, resolved.
        masks: paths below it.
        by_colour: read indexed masks by their colours, although their palettes agree.
        follow_links: links may lead out of the folder.

    Raises:
        DataError: files of ids beside files of colours, palettes that differ and whose colours cannot be told apart,
            or colours that mean two things because the objects stand in the alpha channel.
    """
    found = map_samples(_file, (root, list(masks), follow_links), len(masks), progress=progress)
    files = tuple(f for f in found if isinstance(f, MaskFile))
    return decide(root, files, tuple(f for f in found if isinstance(f, str)), by_colour=by_colour)


def decide(
    root: Path, files: Sequence[MaskFile], faults: tuple[str, ...] = (), *, by_colour: bool = False
) -> Values:
    """Decide over all files whether labels go by id or by colour. Arguments and errors as for `mask_values`."""
    files = tuple(files)
    of = {kind: [f for f in files if f.kind == kind] for kind in ("ids", "indexed", "colours")}
    notes: tuple[str, ...] = ()
    differ = palettes_differ(of["indexed"])
    odd = _odd_black(of["indexed"])
    if of["colours"] or differ or odd or (by_colour and of["indexed"]):
        foreign = [f.name for f in of["ids"] if set(f.counts) != {0}]
        if foreign:
            what = "colours" if of["colours"] else "indices with palettes that differ"
            raise DataError(
                f"{root}: {counted(len(foreign), 'mask')} of ids ({some(foreign, 3)}) beside masks of {what}; keep "
                "one kind"
            )
        if of["indexed"]:
            _require_apart(root, of["indexed"], of["colours"], differ)
            why = (
                f"{differ or odd}; labels go by colour"
                if differ or odd
                else "indexed masks are read by the colours of their palettes"
            )
            notes = (why,)
        _require_opaque(root, of["colours"])
        colours: Counter[Colour] = Counter()
        blocks: Counter[int] = Counter()
        for f in files:
            for value, count in f.counts.items():
                key = _colour_of(f, value)
                colours[key] += count
                blocks[key[0] << 16 | key[1] << 8 | key[2]] += f.blocks.get(value, 0)
        packed = {r << 16 | g << 8 | b: n for (r, g, b), n in colours.items()}
        doubts = _thin(packed, blocks, "colours")
        order = _order(of["indexed"], differ, colours)
        ordered = {colour: colours[colour] for colour in order}
        return Values(colours=ordered, faults=faults, doubts=doubts, notes=notes, files=files)
    _require_one_use(root, of["ids"], of["indexed"])
    ids: Counter[int] = Counter()
    blocks = Counter()
    own: dict[int, Colour] = {}
    for f in files:
        ids.update(f.counts)
        blocks.update(f.blocks)
        if f.kind == "indexed":
            own |= {i: c for i in f.counts if (c := f.colour(i)) is not None}
    rows = [(f.name, f.counts) for f in files]
    high = [i for i in ids if HIGH <= i <= 255]
    others = [i for i in ids if 0 < i < HIGH]
    found = void_doubts(rows)
    if high != [WHITE] and len(high) == 1 and others and max(others) <= LOW:
        found = void_doubts(rows, high[0])
    if WHITE in ids and any(WHITE < i < IGNORED_WIDE for i in ids) and not {WHITE - 1, WHITE + 1} & {*ids}:
        share = percent(ids[WHITE] / sum(ids.values()))
        found += (
            Doubt(
                frozenset({WHITE}),
                f"ids beyond 255 are there, and 255 on {share} % of the pixels: a class like them, or pixels without "
                "annotation, as in masks of bytes.",
                "--classes ignore=255 and a NAME=ID for every class, or NAME=255 and so on",
            ),
        )
    found += _ends(ids) or _thin(ids, blocks, "ids")
    if of["ids"]:
        found += _strangers(rows) or mixed_kinds(of["ids"], of["indexed"])
    # 255 beside other ids is taken for pixels without annotation anyway.
    plain = {WHITE} if set(ids) - {0, WHITE} else set()
    found += no_data_doubts([(None if f.no_data in plain else f.no_data, f.counts) for f in files])
    return Values(dict(sorted(ids.items())), {}, faults, dict(sorted(own.items())), found, (), files)


def palettes_differ(files: Iterable[MaskFile]) -> str:
    """Say where the palettes of indexed masks contradict each other; "" if ids mean the same in all of them.

    Only indices that occur count. Two indices of one colour are no contradiction where the palettes are the same:
    then the palette says nothing, and the ids do.
    """
    colour_of: dict[int, tuple[Colour | None, str]] = {}
    index_of: dict[Colour, tuple[int, MaskFile]] = {}
    for f in files:
        for index in f.counts:
            colour = f.colour(index)
            before, where = colour_of.setdefault(index, (colour, f.name))
            if before != colour:
                return (
                    f"the palettes of the masks differ: index {index} is {shown(before)} in {where}, but "
                    f"{shown(colour)} in {f.name}"
                )
            if colour is None:
                continue
            other, first = index_of.setdefault(colour, (index, f))
            if other != index and first.palette != f.palette and other not in f.counts:
                return (
                    f"the palettes of the masks differ: {shown(colour)} is index {other} in {first.name}, but index "
                    f"{index} in {f.name}"
                )
    return ""


def _odd_black(files: Sequence[MaskFile]) -> str:
    """Say that index 0 is not the black one, so that it can hardly be the background; "" if there is no such thing."""
    for f in files:
        black = [i for i in f.counts if i != 0 and f.colour(i) == BLACK]
        if black and 0 in f.counts and f.colour(0) != BLACK:
            return f"index {black[0]} is black in {f.name}, and index 0 is {shown(f.colour(0))}"
    return ""


def shown(value: Value | None) -> str:
    """Write a value as `--classes` takes it: 7, or 128,64,128."""
    if value is None:
        return "no colour"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def void_doubts(files: Sequence[tuple[str, Mapping[int, int]]], value: int = 255) -> tuple[Doubt, ...]:
    """Doubt what a high value means if it looks like an object; 255, that it marks pixels without annotation.

    Args:
        files: name and id -> pixels of every mask.
        value: 255, or another high value, which is doubted only if it stands alone.
    """
    held = [(name, counts) for name, counts in files if counts.get(value)]
    objects = sorted({i for _, counts in files for i in counts} - {0, value})
    if not held or not objects:
        return ()
    total = sum(sum(counts.values()) for _, counts in files)
    covered = sum(counts[value] for _, counts in held)
    labelled = sum(n for _, counts in files for i, n in counts.items() if i != 0)
    partly = [
        (name, counts) for name, counts in held if len(counts) > 1
    ]  # the others are not annotated at all
    alone = [(name, counts) for name, counts in partly if not set(counts) - {0, value}]
    lost = sum(counts[value] for _, counts in alone)
    places = some([name for name, _ in alone], 3)
    steps = [*objects, value]
    even = len(steps) <= 8 and all(abs(v - value * (k + 1) / len(steps)) <= 1.5 for k, v in enumerate(steps))
    if alone and len(alone) == len(partly):
        found = (
            f"{value} is in {counted(len(alone), 'mask')} ({places}), and in none of them with another object; "
            f"{some([str(i) for i in objects], 6)} is in other masks. {percent(lost / labelled)} % of the labelled "
            f"pixels carry {value}."
        )
    elif value != WHITE:
        return ()
    elif lost > LOST_SHARE * labelled:
        found = (
            f"no object but {value} is in {counted(len(alone), 'mask')} ({places}); {percent(lost / labelled)} % "
            "of the "
            f"labelled pixels lie there (limit {percent(LOST_SHARE)} %)."
        )
    elif covered > VOID_SHARE * total:
        found = (
            f"{value} covers {percent(covered / total)} % of the pixels (limit {percent(VOID_SHARE)} %), too much to "
            "leave it out unasked."
        )
    elif even:
        found = (
            f"the values 0, {', '.join(map(str, steps))} are spread evenly, so {value} can be a class like the others "
            f"({percent(covered / total)} % of the pixels)."
        )
    else:
        return ()
    first = objects[0]
    options = (
        f"It can be the same object as {first} (--classes NAME={first},NAME={value}), a class of its own "
        f"(--classes NAME={first},OTHER={value}), or pixels without annotation (--classes NAME={first},ignore={value})"
    )
    return (Doubt(frozenset({value}), found, options),)


def _ends(ids: Mapping[int, int]) -> tuple[Doubt, ...]:
    """Doubt grey masks whose values crowd at the white end, or at both: one object under several values."""
    objects = [i for i in ids if i > 0]
    high = [i for i in objects if i >= HIGH]
    if any(i > 255 for i in ids) or len(high) < 2:
        return ()
    total = sum(ids.values())
    ends = sum(n for i, n in ids.items() if i <= LOW or i >= HIGH)
    between = [i for i in ids if LOW < i < HIGH]
    if ends < ENDS * total or (len(objects) > 200 and len(between) > 150):
        return ()
    low = [i for i in ids if i <= LOW]
    crowd = f"{min(high)}-{max(high)}" + (
        f" and {min(low)}-{max(low)}" if len(low) > 1 else f" beside {low[0]}" if low else ""
    )
    return (
        Doubt(
            frozenset(objects),
            f"the values crowd at the ends ({crowd}; {percent(ends / total)} % of the pixels): black and white masks "
            "that were stored as JPEG or resized, or one object stored under several values.",
            "Export them again without loss, or say where the object begins: --classes background=0-127,NAME=128-255; "
            "if they are classes, name each: --classes " + ",".join(f"NAME={i}" for i in high[:2]) + ",...",
        ),
    )


def mixed_kinds(plain: Sequence[MaskFile], indexed: Sequence[MaskFile]) -> tuple[Doubt, ...]:
    """Doubt grey masks beside indexed ones that share no id, if palettes end with what a mask shows.

    Such a palette was made for its picture, and so were its indices.
    """
    grey = {i for f in plain for i in f.counts} - {0, 255}
    other = {i for f in indexed for i in f.counts} - {0, 255}
    if (
        not grey
        or not other
        or grey & other
        or any(len(f.palette) > 3 * (max(f.counts) + 1) for f in indexed)
    ):
        return ()
    return (
        Doubt(
            frozenset(grey | other),
            f"{counted(len(plain), 'grey mask', 'holds', 'hold')} {some([str(i) for i in sorted(grey)], 8)} and "
            f"{counted(len(indexed), 'indexed mask', 'holds', 'hold')} {some([str(i) for i in sorted(other)], 8)} with "
            "palettes of their own: two ways to count.",
            "Export all masks in one way, or name every id: --classes NAME=ID,NAME=ID,...",
        ),
    )


def _strangers(files: Sequence[tuple[str, Mapping[int, int]]]) -> tuple[Doubt, ...]:
    """Doubt ids that fall into groups which never meet in a mask: two ways to count, by two people or two tools."""
    group: dict[int, int] = {}

    def leader(i: int) -> int:
        while group[i] != i:
            i = group[i]
        return i

    for _, counts in files:
        objects = sorted(set(counts) - {0, 255})
        for i in objects:
            group.setdefault(i, i)
            group[leader(i)] = leader(objects[0])
    groups: dict[int, list[int]] = {}
    for i in sorted(group):
        groups.setdefault(leader(i), []).append(i)
    several = [ids for ids in groups.values() if len(ids) > 1]
    if len(several) < 2:
        return ()
    lines = []
    for ids in several:
        held = [name for name, counts in files if set(counts) & set(ids)]
        lines.append(f"{some([str(i) for i in ids], 8)} in {counted(len(held), 'mask')} ({some(held, 2)})")
    return (
        Doubt(
            frozenset(group),
            f"ids fall into groups that never meet in one mask: {'; '.join(lines)}.",
            "If two tools counted in two ways, name each id, one name several times: --classes NAME=ID,NAME=ID,...; "
            "name each as well if all are different classes",
        ),
    )


def no_data_doubts(files: Sequence[tuple[int | None, Mapping[int, int]]]) -> tuple[Doubt, ...]:
    """Doubt ids that GeoTIFFs call "no data": tools set the tag to 0 also where 0 is the background.

    Args:
        files: the id that each mask calls so, and its id -> pixels.
    """
    doubts, pixels = [], sum(n for _, counts in files for n in counts.values())
    for value in sorted({own for own, _ in files if own is not None}):
        share = sum(counts.get(value, 0) for own, counts in files if own == value) / max(1, pixels)
        if share:
            count = sum(own == value for own, _ in files)
            doubts.append(
                Doubt(
                    frozenset({value}),
                    f"{counted(count, 'mask', 'calls', 'call')} {value} 'no data' (GDAL_NODATA), on "
                    f"{percent(share)} % of the pixels",
                    f"pixels without annotation: --classes ignore={value} and a NAME=ID for every class; a class "
                    f"or the background: --classes NAME={value} and so on",
                    no_data=True,
                )
            )
    return tuple(doubts)


def own_no_data(split: Split, index: int) -> int | None:
    """The raw id that a mask in a file calls "no data"; None for other masks."""
    find = getattr(split, "no_data", None)
    try:
        stored = find(index) if find is not None else None
    except DataError:  # reading the mask tells what is wrong with it
        return None
    return None if stored is None else split.raw_id(stored)  # type: ignore[attr-defined]


def _thin(counts: Mapping[int, int], blocks: Mapping[int, int], what: str) -> tuple[Doubt, ...]:
    """Doubt values that are nowhere two pixels wide, if there are several."""
    thin = [v for v in counts if 8 * blocks.get(v, 0) < counts[v]]
    if len(thin) < THIN:
        return ()
    total, lost = sum(counts.values()), sum(counts[v] for v in thin)
    values: list[str] = [shown(unpack_colour(v)) if what == "colours" else str(v) for v in thin]
    best = sorted((v for v in counts if v not in thin), key=lambda v: -counts[v])
    solid = [shown(unpack_colour(v)) if what == "colours" else str(v) for v in best]
    way = (
        "--classes background=0-127,NAME=128-255 cuts black and white masks in the middle"
        if what == "ids"
        else "no option brings the colours back"
    )
    return (
        Doubt(
            frozenset(thin),
            f"{len(thin)} {what} ({some(values, 6, '; ')}) are almost nowhere two pixels wide "
            f"({percent(lost / total)} % of the pixels): traces of smooth edges, resizing or lossy "
            f"compression between {some(solid, 6, '; ')}.",
            f"Export the masks again without loss and without smoothing; {way}; if they are classes (thin lines), "
            "name every one: --classes NAME=VALUE,...",
        ),
    )


def _order(indexed: Sequence[MaskFile], differ: str, colours: Iterable[Colour]) -> list[Colour]:
    """Order colours so that it does not depend on the pixels: as the common palette has them, else by themselves.

    Palettes that differ follow VOC's colour map at best, which counts in red first, then in green, then in blue.
    """
    if not indexed:
        return sorted(colours)
    place: dict[Colour, int] = {}
    for f in [] if differ else indexed:
        for index in range(len(f.palette) // 3):
            if (colour := f.colour(index)) is not None:
                place.setdefault(colour, index)
    return sorted(colours, key=lambda c: (place.get(c, 256), c[2], c[1], c[0]))


def _colour_of(file: MaskFile, value: int) -> Colour:
    if file.kind == "colours":
        return unpack_colour(value)
    return BLACK if file.kind == "ids" else file.colour(value) or BLACK


def _require_apart(root: Path, files: Sequence[MaskFile], coloured: Sequence[MaskFile], differ: str) -> None:
    """Refuse palettes that differ where colours do not tell the classes apart."""
    faults = []
    owners: Counter[Colour] = Counter()
    indices: set[int] = set()
    for f in files:
        seen: dict[Colour, int] = {}
        for index in f.counts:
            colour = f.colour(index)
            if colour is None:
                faults.append(f"{f.name}: index {index} has no colour")
            elif seen.setdefault(colour, index) != index:
                faults.append(f"{f.name}: indices {seen[colour]} and {index} are both {shown(colour)}")
        indices |= set(f.counts)
        owners.update(list(seen))
    if faults:
        raise DataError(
            f"{root}: {differ or 'indexed masks'}, and their colours cannot be told apart: {some(faults, 5, '; ')}; "
            "export the masks again with one palette, or as grey pictures of ids"
        )
    for f in coloured:
        owners.update([unpack_colour(v) for v in f.counts])
    once = [c for c, n in owners.items() if n == 1]
    if (
        differ
        and len(files) + len(coloured) >= 4
        and len(owners) > 2 * len(indices)
        and len(once) > len(owners) / 2
    ):
        raise DataError(
            f"{root}: {differ}, and {len(once)} of {len(owners)} colours are in one mask only, so neither the indices "
            "nor the colours tell the classes; export the masks again with one palette, or as grey pictures of ids"
        )


def _require_opaque(root: Path, files: Sequence[MaskFile]) -> None:
    """Refuse colours that are transparent here and opaque there: the alpha channel is dropped, and with it objects."""
    with_alpha = [f for f in files if f.alpha]
    clear: Counter[int] = Counter()
    solid: Counter[int] = Counter()
    for f in with_alpha:
        clear.update(f.transparent)
        solid.update({v: n - f.transparent.get(v, 0) for v, n in f.counts.items()})
    both = [v for v in clear if clear[v] and solid[v]]
    if both:
        total = sum(sum(f.counts.values()) for f in files)
        lines = [
            f"{shown(unpack_colour(v))} is transparent on {clear[v]} pixels and opaque on {solid[v]}"
            for v in both
        ]
        lost = sum(min(clear[v], solid[v]) for v in both)
        raise DataError(
            f"{root}: objects stand in the alpha channel, which is not read: {some(lines, 4, '; ')} "
            f"({percent(lost / total)} % of the pixels would change their class); export the masks as opaque pictures "
            "on a background of a colour of its own"
        )


def _require_one_use(root: Path, plain: Sequence[MaskFile], indexed: Sequence[MaskFile]) -> None:
    """Refuse grey masks beside indexed ones if the grey values are the brightness of the palette's colours."""
    if not plain or not indexed:
        return
    grey = {v for f in plain for v in f.counts} - {0, 255}
    colours = {c for f in indexed for i in f.counts if (c := f.colour(i)) is not None}
    used = {i for f in indexed for i in f.counts}
    bright = {round((299 * r + 587 * g + 114 * b) / 1000) for r, g, b in colours}
    if grey and not grey <= used and any(min(abs(v - b) for b in bright) <= 1 for v in grey - used):
        raise DataError(
            f"{root}: grey masks ({some([f.name for f in plain], 3)}) beside indexed masks "
            f"({some([f.name for f in indexed], 3)}) whose grey values are the brightness of the palette's colours, "
            "not its ids; export all masks in one way"
        )


def _file(job: tuple[Path, list[str], bool], index: int) -> MaskFile | str:
    root, name = job[0], job[1][index]
    try:
        with open_inside(root, name, follow_links=job[2]) as file:
            picture = open_picture(file, root / name, Reading())
            if picture.format in LOSSY:
                return f"{name}: stored as {picture.format}, which changes values"
            if picture.mode in ("RGB", "RGBA", "RGBX"):
                picture.load()
                kind, pixels = "colours", packed_colours(picture)
            elif picture.mode in ("P", "L", "1") or picture.mode.startswith("I"):
                kind, pixels = ("indexed" if picture.mode == "P" else "ids"), stored_ids(picture, root / name)
            else:
                return f"{name}: a mask of mode {picture.mode}; save one channel of ids, or colours"
            palette = palette_of_picture(picture) if kind == "indexed" else b""
            clear, own = transparent_pixels(picture), no_data(picture)
    except DataError as error:
        return str(error)
    except Exception as error:  # decoders raise almost any exception on damaged files
        return f"{name}: {error}"
    if pixels.ndim != 2:
        return f"{name}: a mask of mode {picture.mode}"
    counts = value_counts(pixels.reshape(-1))
    if len(counts) > MANY and (kind == "colours" or pixels.dtype == np.uint8 or max(counts) > IGNORED_WIDE):
        return f"{name}: {counted(len(counts), 'different value')}; no mask of classes"
    if kind == "indexed" and _is_ramp(palette, counts):
        kind, palette = "ids", b""
    blocks = blocks_of(pixels)
    hidden = {} if clear is None else value_counts(pixels[clear])
    return MaskFile(name, kind, counts, blocks, palette, hidden, picture.mode == "RGBA", whole(own))


def blocks_of(pixels: np.ndarray) -> dict[int, int]:
    """Count the squares of 2 x 2 pixels of one value, by value, in an array (H, W)."""
    same = (pixels[:-1, :-1] == pixels[1:, 1:]) & (pixels[:-1, :-1] == pixels[1:, :-1])
    same &= pixels[:-1, :-1] == pixels[:-1, 1:]
    return value_counts(pixels[:-1, :-1][same])


def _is_ramp(palette: bytes, counts: Iterable[int]) -> bool:
    """Whether every index that occurs has itself as its grey: a grey picture stored with a palette."""
    used = set(counts)  # black at index 0 is no evidence: most palettes begin so
    return used != {0} and all(palette[3 * i : 3 * i + 3] == bytes([i, i, i]) for i in used)


def own_palette(split: Split, index: int, counts: np.ndarray) -> tuple[bytes, dict[int, int]]:
    """Read the palette that an indexed mask carries although its labels go by id.

    Args:
        counts: (256,) pixels per raw id of the mask.

    Returns:
        Red, green, blue of the stored ids from 0 on, and raw id -> stored id for the ids that occur; empty without a
        palette, or with one that only repeats the ids as greys.
    """
    find = getattr(split, "own_palette", None)
    try:
        palette, stored = find(index) if find is not None else (b"", {})
    except DataError:  # the mask is drawn from another file
        return b"", {}
    held = {int(raw): stored[int(raw)] for raw in np.flatnonzero(counts) if int(raw) in stored}
    held = {raw: place for raw, place in held.items() if 3 * place + 3 <= len(palette)}
    return (b"", {}) if _is_ramp(palette, held.values()) else (palette, held)


def value_counts(pixels: np.ndarray) -> dict[int, int]:
    """Count the values of a flat array. Masks consist of long runs, so runs are counted, not pixels."""
    if not pixels.size:
        return {}
    (ends,) = (pixels[1:] != pixels[:-1]).nonzero()
    ends = np.append(ends, pixels.size - 1)
    values, which = np.unique(pixels[ends], return_inverse=True)
    counts = np.bincount(which, np.diff(ends, prepend=-1))
    return {int(v): int(n) for v, n in zip(values, counts, strict=True)}
