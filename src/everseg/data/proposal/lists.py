"""Find the image lists that divide a data set into splits, so that no split is drawn where one exists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from everseg.data.datasets.decode import Reading
from everseg.data.datasets.file_names import split_in_name, walk
from everseg.data.datasets.listing import LIST_ENDINGS, ListedFolder, csv_splits
from everseg.display import counted
from everseg.errors import DataError, some

DEEPEST = 3
"""Lists are looked for so many folders below the root."""
LARGEST = 50_000_000
"""Bytes; larger files are no image lists."""


@dataclass(frozen=True)
class Lists:
    """The lists of a data set."""

    splits: dict[str, str]
    """Split -> list below the root; {} where there is none, or one that names all images as `train`."""
    notes: tuple[str, ...] = ()
    """Lists and images that are not used."""


def find_lists(
    root: Path,
    images: str,
    masks: str,
    *,
    image_suffix: str = "",
    mask_suffix: str = "",
    follow_links: bool = False,
) -> Lists:
    """Find lists whose names (`Train.txt`, `ImageSets/Segmentation/val.txt`) or whose column `split` tell the split.

    A file counts if some of its entries are images of the data set. Where several folders hold lists, those of the one
    with most splits count.

    Raises:
        DataError: there are lists, and none is that of the training images.
    """
    groups: dict[str, dict[str, str]] = {}
    found: dict[str, set[str]] = {}
    for path in _candidates(root):
        relative = path.relative_to(root).as_posix()
        of_name = split_in_name(PurePosixPath(path.stem))
        columns = csv_splits(path) if path.suffix.lower() == ".csv" else []
        for split in columns or ([of_name] if of_name else []):
            listed = ListedFolder(
                root,
                images,
                masks,
                recursive=True,
                image_suffix=image_suffix,
                mask_suffix=mask_suffix,
                follow_links=follow_links,
            )
            try:
                samples, _ = listed.samples(path, split, Reading(on_missing="skip"))
            except DataError:
                continue  # another kind of file
            if samples:
                group = relative if columns else path.parent.relative_to(root).as_posix()
                groups.setdefault(group, {}).setdefault(split, relative)
                found[f"{relative} {split}"] = {image for _, image, _ in samples}
    if not groups:
        return Lists({})
    best = max(
        groups, key=lambda g: (len(groups[g]), "segmentation" in g.lower(), -len(PurePosixPath(g).parts))
    )
    splits: dict[str, str] = {
        name: groups[best][name] for name in ("train", "val", "test") if name in groups[best]
    }
    if "train" not in splits:
        raise DataError(
            f"{root}: {some(list(splits.values()))} hold a split, but no list names the training images; write them "
            "to a train.txt beside, or write a data.yaml with splits: {...}, or with split: {val: 0.2} for a new cut"
        )
    notes = []
    unused = sorted({place for group in groups.values() for place in group.values()} - set(splits.values()))
    if unused:
        notes.append(
            f"not used: the image lists {some(unused, 8)}; those in use: {', '.join(splits.values())}"
        )
    used = set().union(*(found[f"{place} {name}"] for name, place in splits.items()))
    folder = ListedFolder(
        root, images, masks, recursive=True, image_suffix=image_suffix, mask_suffix=mask_suffix
    )
    rest = sorted(set(folder.images()) - used)
    if list(splits) == ["train"] and not rest:
        return Lists({}, (f"{splits['train']} names all images, so some of them become val", *notes))
    if rest:
        notes.append(f"not used: {counted(len(rest), 'image')} in no list: {some(rest, 5)}")
    return Lists(splits, tuple(notes))


def _candidates(root: Path) -> Iterator[Path]:
    for here, folders, files in walk(root):
        del folders
        if len(Path(here).relative_to(root).parts) > DEEPEST:
            continue
        for name in sorted(files):
            path = Path(here) / name
            if name.lower().endswith(LIST_ENDINGS) and path.is_file() and path.stat().st_size <= LARGEST:
                yield path
