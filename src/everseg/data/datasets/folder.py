"""Plain folders of images and masks, described by a small YAML file."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from everseg.config.yaml import read
from everseg.data.base import Dataset, Split
from everseg.data.datasets.decode import Reading
from everseg.data.datasets.descriptor import Descriptor, parse, with_labelmap
from everseg.data.datasets.file_names import SPLITS
from everseg.data.datasets.files import FileSplit
from everseg.data.datasets.listing import LIST_ENDINGS, ListedFolder, endings_of, packed, pair, scan
from everseg.data.datasets.options import SHARED, own_file, reading_of, root_of
from everseg.data.datasets.relabel import most_id
from everseg.data.datasets.tiles import TiledSplit
from everseg.display import counted
from everseg.errors import ConfigError, DataError, some
from everseg.files import real_path


def build(root: str | Path | None = None, *, descriptor: str | Path | None = None, **options: Any) -> Dataset:
    """Read folders of images and masks of the same names.

    The description (`classes` is the only key without default)::

        root: .                      # relative to this file; default: this file's folder
        images: images/{split}       # sub-folders are searched as well
        masks: masks/{split}
        splits: [train, val]         # or {train: training, val: validation}, or {train: train.txt, val: val.txt}
        split: {val: 0.2, seed: 0}   # instead: cut one set of images (images: images) into train and val
        pair: {image_suffix: "", mask_suffix: _mask}     # a_1.jpg and a_1_mask.png
        classes: [background, road, tree]                # ids 0, 1, 2; or {7: road, 8: tree}
        background: background       # null: no background class; default: the class of that name, if any
        ignore: 255                  # id or ids without annotation
        no_data: class               # ids that GeoTIFFs call "no data" are classes; default: such masks are doubted
        void_share: 0.6              # so much of the pixels may be without annotation; default: half, see the check
        labels: {palette: {road: [128, 64, 128], ...}}   # colour masks; or {map: {7: road, 0: ignore}}

    `labels.palette` may name a file of `name:red,green,blue` lines, as CVAT's labelmap.txt; `classes` then defaults
    to its names. `channels` states images of other channels than RGB with 8 bits
    (`everseg.data.channels.channels_of`). `tiles: {size: 512, overlap: 64}` makes every window of a picture a sample.
    Also `name`, and the options of all readers (`everseg.data.datasets.options.reading_of`).

    Args:
        root: data folder; takes precedence over the description's.
        descriptor: the YAML file.
        options: any of its keys; they take precedence over the file's.

    Returns:
        The splits described, or those of `train`, `val`, `test` whose image folder exists; images in the order of
        their names or of the list.

    Raises:
        ConfigError: faults of the description (all of them), or no such root.
        DataError: empty splits, images and masks that do not pair, listed files that do not exist.
    """
    given: dict[str, Any] = {}
    here = Path.cwd()
    if descriptor is not None:
        file = Path(descriptor).expanduser()
        value = read(file).value
        if not isinstance(value, dict):
            raise ConfigError("expected keys like images, masks, classes", str(descriptor))
        given, here = value, real_path(file).parent
    # Somebody else may have written the data.yaml: the files that it names lie with the data. The user may name any.
    stated = given.get("root") if root is None else root
    data = here / Path(stated).expanduser() if isinstance(stated, str | Path) else here

    def roots(key: str) -> tuple[Path | None, ...]:
        return (None,) if key in options or descriptor is None else (here, data)

    given = with_labelmap({**given, **options}, here, roots("labels"))
    where = str(descriptor) if descriptor is not None else "data.options"
    beside = here if "skip" not in options else None
    shared = {key: given[key] for key in SHARED if key in given}
    if descriptor is None:
        described, reading = parse(given, where), reading_of(shared, here=beside, roots=roots("skip"))
    else:
        try:
            described = parse(given, where, name=Path(descriptor).stem)
            reading = reading_of(shared, here=beside, below="", roots=roots("skip"))
        except ConfigError as error:
            raise _placed(error.problems, options, where) from None
    if root is None and isinstance(given.get("root"), str):
        root = here / Path(given["root"]).expanduser()
    elif root is None and "root" in given:
        raise ConfigError(f"root: expected a folder, got {given['root']!r}", where)
    elif root is None and descriptor is not None:
        root = here
    base = root_of(root)
    if described.splits is not None:
        for place in described.splits.values():
            if place.lower().endswith(LIST_ENDINGS):
                own_file(list_at(here, base, place), roots("splits"), "splits")
    listed = _listed(described, base, here, reading)
    splits: dict[str, Split] = {}
    for name, (samples, warnings) in listed.items():
        whole = FileSplit(
            name,
            base,
            samples,
            palette=described.palette,
            id_table=described.id_table,
            most=most_id(described.labels),
            reading=reading,
            warnings=warnings,
            void_share=described.void_share,
            no_data_stated=described.no_data_stated,
        )
        splits[name] = whole if described.tiles is None else TiledSplit(whole, described.tiles, reading)
    return Dataset(described.name, described.labels, splits)


def _placed(problems: Sequence[str], options: Mapping[str, Any], where: str) -> ConfigError:
    """Say of each problem ("tiles.size: ...") where its key was given: in the options, or else in the file."""
    given = [re.split(r"[.:\[]", problem)[0] in options for problem in problems]
    named = [f"data.options.{p}" if of_options else p for p, of_options in zip(problems, given, strict=True)]
    return ConfigError(named, "" if all(given) else where)


def _listed(
    described: Descriptor, base: Path, here: Path, reading: Reading
) -> dict[str, tuple[list[tuple[str, ...]], list[str]]]:
    """Samples and warnings of every split."""
    if described.division is None:
        places = _places(described, base).items()
        return {name: _samples(described, base, here, name, place, reading) for name, place in places}
    # One set of images that is cut into splits here. A skip list names the splits; as the cut is made afterwards, its
    # samples are left out whichever split they would come to.
    anywhere = replace(reading, skip=frozenset(("", sample) for _, sample in reading.skip))
    samples, warnings = _samples(described, base, here, "", "", anywhere)
    parts = described.division.parts([sample[0] for sample in samples])
    return {
        name: ([samples[i] for i in positions], warnings if name == "train" else [])
        for name, positions in parts.items()
    }


def _places(described: Descriptor, base: Path) -> dict[str, str]:
    if described.splits is not None:
        return dict(described.splits)
    names = ("train", "val", "test")
    found = {n: n for n in names if (base / described.images.replace("{split}", n)).is_dir()}
    if not found:
        raise DataError(
            f"{base}: none of {', '.join(described.images.replace('{split}', n) for n in names)} exists; "
            + (packed(base) or "set root, images or splits in the data.yaml")
        )
    return found


def _samples(
    described: Descriptor, base: Path, here: Path, name: str, place: str, reading: Reading
) -> tuple[list[tuple[str, ...]], list[str]]:
    listed = place.lower().endswith(LIST_ENDINGS)
    images = _of_split(base, described.images, name if listed else place)
    masks = _of_split(base, described.masks, name if listed else place)
    if listed:
        folder = ListedFolder(
            base, images, masks, recursive=True,
            image_suffix=described.image_suffix, mask_suffix=described.mask_suffix,
            endings=endings_of(reading), follow_links=reading.follow_links,
        )  # fmt: skip
        samples, warnings = folder.samples(list_at(here, base, place), name, reading)
        return _with_channels(samples, described, base, images, name if listed else place, reading), warnings
    # Where images and masks lie in one folder, the ending of the masks tells them apart.
    without = described.mask_suffix if images == masks else ""
    links = reading.follow_links
    found = scan(
        base,
        images,
        suffix=described.image_suffix,
        without=without,
        recursive=True,
        endings=endings_of(reading),
        follow_links=links,
    )
    drawn = scan(base, masks, suffix=described.mask_suffix, recursive=True, follow_links=links)
    samples, warnings = pair(found, drawn, f"{base}, split '{name}'", name, reading)
    return _with_channels(samples, described, base, images, place, reading), warnings


def list_at(here: Path, base: Path, place: str) -> Path:
    """Find a list: beside the data.yaml, or else in the data folder."""
    beside = here / place
    return beside if beside.is_file() else base / place


def _of_split(base: Path, template: str, place: str) -> str:
    """Folder of a split. `train` may be spelt otherwise beside the masks than beside the images: Train, training."""
    named = template.replace("{split}", place)
    if (base / named).exists() or "{split}" not in template or place.lower() not in SPLITS:
        return named
    pattern = re.escape(template).replace(re.escape("{split}"), "([A-Za-z]+)")
    above = (
        base / named.split("/")[0] if template.startswith("{split}") else base / template.split("{split}")[0]
    )
    here = (
        above.parent if "{split}" in template.split("/")[0] else above.parent if not above.is_dir() else above
    )
    depth = template.split("{split}")[0].count("/")
    folders = here.iterdir() if here.is_dir() else ()
    rest = "/".join(template.split("/")[depth + 1 :])
    found = []
    for folder in sorted(folders):
        path = folder.relative_to(base).as_posix() + (f"/{rest}" if rest else "")
        match = re.fullmatch(pattern, path)
        if match and SPLITS.get(match[1].lower()) == SPLITS[place.lower()] and (base / path).is_dir():
            found.append(path)
    return found[0] if len(found) == 1 else named


def _with_channels(
    samples: Sequence[tuple[str, str, str]],
    described: Descriptor,
    base: Path,
    images: str,
    place: str,
    reading: Reading,
) -> list[tuple[str, ...]]:
    """Add the files of further channels to the samples: those of the same name below `channels.folders`."""
    folders = () if reading.channels is None else reading.channels.folders
    if not folders:
        return [tuple(sample) for sample in samples]
    found = [
        scan(
            base,
            _of_split(base, folder, place),
            recursive=True,
            endings=endings_of(reading),
            follow_links=reading.follow_links,
        )
        for folder in folders
    ]
    results: list[tuple[str, ...]] = []
    missing: list[str] = []
    for sample in samples:
        name = PurePosixPath(sample[1]).relative_to(images).with_suffix("").as_posix()
        name = unicodedata.normalize("NFC", name.removesuffix(described.image_suffix))
        missing += [
            f"{folder}: {name}" for folder, there in zip(folders, found, strict=True) if name not in there
        ]
        results.append((*sample, *(there[name] for there in found if name in there)))
    if missing:
        raise DataError(
            f"{base}: channels.folders lack {counted(len(missing), 'file')}: {some(missing)}; add them, or leave "
            "their images out"
        )
    return results
