"""Find files by the endings of pictures, and pair images with masks: by the stems of their names, never by position."""

from __future__ import annotations

import csv
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from everseg.data.datasets.decode import (
    CHANNEL_ENDINGS,
    HEIC_ENDINGS,
    PICTURE_ENDINGS,
    Reading,
    check_readable,
)
from everseg.data.datasets.file_names import SPLITS, parts_of, walk, without_ending
from everseg.display import counted
from everseg.errors import MOST_LISTED, ConfigError, DataError, some
from everseg.files import MOST_LIST, UnreadableError, read_text, real_path

"""Endings of pictures, in upper or lower case. JPEG masks are not left out here: the decoder refuses and explains them.
"""
Sample = tuple[str, str, str]


class LeftOut(str):
    """A warning about one sample that is left out."""

    sample: str

    def __new__(cls, text: str, sample: str = "") -> LeftOut:
        warning = super().__new__(cls, text)
        warning.sample = sample
        return warning


def scan(
    root: Path,
    folder: str,
    *,
    suffix: str | tuple[str, ...] = "",
    without: str = "",
    recursive: bool = False,
    endings: tuple[str, ...] = PICTURE_ENDINGS,
    follow_links: bool = False,
) -> dict[str, str]:
    """List the pictures of a folder.

    Hidden files, `._x` companions and files of other types are ignored.

    Args:
        root: data folder.
        folder: relative to `root`.
        suffix: ending that stems must have, or several such endings; it is cut off the names.
        without: stems of this ending are left out.
        endings: of the files' names.
        recursive: also look into sub-folders.
        follow_links: also into those that are links.

    Returns:
        Name -> path relative to `root`. The name is the stem, with its sub-folder if `recursive`, Unicode NFC.

    Raises:
        DataError: the folder is missing or unreadable, or two files have one name.
    """
    suffixes = (suffix,) if isinstance(suffix, str) else suffix
    found: dict[str, str] = {}
    twice: list[str] = []

    def fail(error: OSError) -> None:
        raise DataError(
            f"{error.filename}: cannot be listed ({error.strerror}); {packed(root / folder) or 'check the folder'}"
        ) from None

    for here, _, files in walk(root / folder, recursive=recursive, follow_links=follow_links, onerror=fail):
        inside = Path(here).relative_to(root / folder).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        for file in sorted(files):
            stem, extension = os.path.splitext(file)  # noqa: PTH122 - 20 000 names: Path is 10 times slower
            if file.startswith(".") or extension.lower() not in endings or not stem.endswith(suffixes):
                continue
            if without and stem.endswith(without):
                continue
            # macOS stores decomposed letters (NFD), other systems what they are given: compare names in one form.
            ending = next(s for s in suffixes if stem.endswith(s))
            name = unicodedata.normalize("NFC", prefix + without_ending(stem.removesuffix(ending)))
            path = f"{folder.strip('/')}/{prefix}{file}" if folder.strip("/.") else f"{prefix}{file}"
            if name in found:
                twice.append(f"{found[name]} and {path}")
            found.setdefault(name, path)
    if twice:
        raise DataError(
            f"{root / folder}: {counted(len(twice), 'name', 'stands', 'stand')} for two files each; keep one of "
            f"each: {some(twice)}"
        )
    return found


def pair(
    images: Mapping[str, str],
    masks: Mapping[str, str],
    where: str,
    split: str,
    reading: Reading,
    *,
    prefix: str = "",
) -> tuple[list[Sample], list[str]]:
    """Pair images and masks of equal names, in the order of the names.

    Args:
        images: name -> path, as `scan` returns it.
        masks: the same.
        where: place for messages.
        split: name of the split, for the skip list.
        reading: samples in its `skip` are left out; its `on_missing` decides about files without partner.
        prefix: put before the names to make the samples' ids.

    Returns:
        The samples, and a warning for each file that is left out because it has no partner.

    Raises:
        DataError: images without mask or masks without image; the message counts all and names the first 20.
    """
    skipped = {sample.removeprefix(prefix) for of, sample in reading.skip if of == split}
    images = {n: path for n, path in images.items() if n not in skipped}
    masks = {n: path for n, path in masks.items() if n not in skipped}
    samples = [(prefix + n, images[n], masks[n]) for n in sorted(images.keys() & masks.keys())]
    lonely = sorted(images.keys() ^ masks.keys())
    if reading.on_missing == "skip":
        texts = {n: f"{images[n]}: an image without mask" for n in lonely if n in images}
        texts |= {n: f"{masks[n]}: a mask without image" for n in lonely if n in masks}
        return samples, [LeftOut(texts[n], prefix + n) for n in lonely]
    alone = [images[n] for n in lonely if n in images]
    orphans = [masks[n] for n in lonely if n in masks]
    problems = []
    if alone:
        problems.append(f"{counted(len(alone), 'image')} without mask: {some(alone)}")
    if orphans:
        problems.append(f"{counted(len(orphans), 'mask')} without image: {some(orphans)}")
    if problems:
        raise DataError(
            f"{where}: "
            + "; ".join(problems)
            + ". Add the missing files, or leave the others out with on_missing=skip (data.options.on_missing=skip)"
        )
    return samples, []


LIST_ENDINGS = (".txt", ".lst", ".csv")
"""Endings of image lists, in upper or lower case."""
_COLUMNS = {
    "image": ("image", "images", "img", "file", "filename", "file_name", "image_name", "image_path", "image_file",
              "img_path", "path", "name", "image_id", "id"),
    "mask": ("mask", "masks", "label", "labels", "annotation", "target", "segmentation", "mask_path", "mask_name",
             "mask_file", "label_path", "gt"),
    "split": ("split", "set", "subset", "partition", "phase", "usage", "fold"),
}  # fmt: skip
"""Headings of the columns of a CSV list, spelt with _ and without capitals."""
Entry = tuple[str, list[list[str]]]
"""A line of a list, and the ways to read it: [image] or [image, mask]."""


def read_list(path: Path, split: str = "") -> Iterator[Entry]:
    """Yield the entries of an image list: one entry per line, `image` or `image mask`, or a CSV file.

    A byte order mark, CRLF, blank lines, trailing blanks and lines starting with # are tolerated. A tab, or quotation
    marks, say where a name ends; with blanks, commas and semicolons an entry has several readings. Of a CSV file with a
    column `split` only the lines of this split count.

    Raises:
        DataError: unreadable, not text, or a line with more than two fields.
    """
    try:
        text = read_text(path, MOST_LIST)
    except UnreadableError as error:
        raise DataError(f"{path}: the list of images cannot be read ({error})") from None
    if path.suffix.lower() == ".csv":
        for fields, of in _csv_rows(path, text):
            if of in ("", split):
                yield ",".join(fields), [fields]
        return
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        readings = _readings(line)
        if any(len(fields) > 2 for fields in readings):
            raise DataError(
                f"{path}, line {number}: {counted(len(readings[0]), 'field')}, expected 'image' or 'image mask'"
                " (separate names that hold spaces by a tab)"
            )
        yield line, readings


def _readings(line: str) -> list[list[str]]:
    """Ways to read a line: as one name, or as two that part at one of its blanks, commas or semicolons."""
    if "\t" in line:
        return [[field.strip().strip('"') for field in line.split("\t")]]
    if line.startswith('"'):
        return [next(csv.reader([line], delimiter=" ", skipinitialspace=True))]
    parted = [[line[: gap.start()], line[gap.end() :]] for gap in re.finditer(r"\s*[,;]\s*|\s+", line)]
    return [[line], *(fields for fields in parted if all(fields))]


def csv_splits(path: Path) -> list[str]:
    """List the splits in the column `split` of a CSV list, as they are called here (train, val, test); [] without one.

    Raises:
        DataError: as `read_list`.
    """
    try:
        rows = _csv_rows(path, read_text(path, MOST_LIST))
    except UnreadableError:
        return []
    return list(dict.fromkeys(of for _, of in rows if of))


def _csv_rows(path: Path, text: str) -> list[tuple[list[str], str]]:
    """([image] or [image, mask], split or "") of every line of a CSV list; its first line may name the columns."""
    delimiter = ";" if text.splitlines()[:1] and ";" in text.splitlines()[0] else ","
    rows = [
        [cell.strip() for cell in row]
        for row in csv.reader(text.splitlines(), delimiter=delimiter)
        if any(row)
    ]
    if not rows:
        return []
    heads = [re.sub(r"[^a-z]+", "_", cell.lower()).strip("_") for cell in rows[0]]
    at = {
        kind: next((heads.index(name) for name in names if name in heads), None)
        for kind, names in _COLUMNS.items()
    }
    if at["image"] is None or any(cell.lower().endswith(PICTURE_ENDINGS) for cell in rows[0]):
        if any(len(row) > 2 for row in rows):
            raise DataError(
                f"{path}: {max(map(len, rows))} columns, and none is called image; name the columns image, mask and "
                "split in the first line"
            )
        return [(row, "") for row in rows]
    found = []
    for number, row in enumerate(rows[1:], 2):
        cells = {kind: row[place] for kind, place in at.items() if place is not None and place < len(row)}
        of = cells.get("split", "").lower()
        if not cells.get("image") or (of and of not in SPLITS):
            raise DataError(
                f"{path}, line {number}: expected an image and, as split, one of {', '.join(SPLITS)}; got "
                f"{cells.get('image', '')!r} and {cells.get('split', '')!r}"
            )
        fields = [cells["image"], *([cells["mask"]] if cells.get("mask") else [])]
        found.append((fields, SPLITS.get(of, "")))
    return found


class ListedFolder:
    """Resolves the entries of image lists to files below one data folder.

    An entry may be a stem (`2007_000032`), a path from the data folder with or without a leading slash
    (`/JPEGImages/2007_000032.jpg`), or a path of the machine where the list was written; then only its end counts
    (`/SegNet/CamVid/train/0001TP_006690.png`). The extension in the list is ignored: the file's own one decides.

    Args:
        root: data folder.
        images: folder of the images, relative to `root`.
        masks: folder of the masks.
        recursive: entries may lie in sub-folders.
        image_suffix: ending of the image stems, not part of the names.
        mask_suffix: the same for the masks.
        endings: of the images' file names.
        follow_links: also look into sub-folders that are links.
    """

    def __init__(
        self,
        root: Path,
        images: str,
        masks: str,
        *,
        recursive: bool = False,
        image_suffix: str = "",
        mask_suffix: str = "",
        endings: tuple[str, ...] = PICTURE_ENDINGS,
        follow_links: bool = False,
    ) -> None:
        self._root = root
        self._endings = (endings, PICTURE_ENDINGS)
        self._defaults = (images, masks)
        self._recursive = recursive
        self._suffixes = (image_suffix, mask_suffix)
        self._follow_links = follow_links
        self._scans: dict[tuple[str, int], dict[str, str]] = {}
        self._folders: dict[tuple[str, ...], str | None] = {}
        self._last: dict[int, dict[str, list[str]]] = {}

    def samples(self, list_file: Path, split: str, reading: Reading) -> tuple[list[Sample], list[str]]:
        """Resolve a list, in its order.

        Args:
            list_file: the list.
            split: name of the split, for the skip list.
            reading: samples in its `skip` are left out; its `on_missing` decides about entries without file.

        Returns:
            The samples, duplicates once, and warnings about duplicates and entries left out.

        Raises:
            DataError: entries that leave the data folder, or whose image or mask does not exist (all of them).
        """
        outside, missing, several = [], [], []
        found: dict[Sample, bool] = {}
        count = 0
        left_out: list[str] = []
        for line, readings in read_list(list_file, split):
            if any(_leaves(field) for fields in readings for field in fields):
                outside.append(line)
                continue
            resolved = [self._resolve(fields) for fields in readings]
            complete = self._complete(line, readings, resolved)
            if len(complete) > 1:
                several.append(f"'{line}' ({' or '.join(' with '.join(sample[1:]) for sample in complete)})")
            elif complete:
                (sample,) = complete
                found[sample] = found.get(sample, False) or len(readings[0]) == 1
                count += 1
            else:
                fields, (image, mask) = _nearest(readings, resolved)
                absent = _absent(fields, image is None, mask is None)
                name = image[0] if image else fields[0]
                if (split, name) not in reading.skip:
                    missing += absent
                    if reading.on_missing == "skip":
                        left_out.append(LeftOut(f"{', '.join(absent)}: no such file", name))
        problems = []
        if outside:
            problems.append(
                f"{counted(len(outside), 'entry', 'leads', 'lead')} out of the data folder: {some(outside)}"
            )
        if several:
            problems.append(
                f"{counted(len(several), 'entry')} can be read in several ways, separate the names by a tab: "
                f"{some(several, 5)}"
            )
        if missing and reading.on_missing == "stop":
            problems.append(
                f"{counted(len(missing), 'file', 'does not exist', 'do not exist')} in {self._root}: "
                f"{some(missing)}"
            )
        if problems:
            raise DataError(f"{list_file}: " + "; ".join(problems) + ". Correct the list, or add the files")
        repeated = count - len(found)
        warnings = [f"{list_file}: {counted(repeated, 'duplicate entry')}, used once"] if repeated else []
        return self._named(list_file, found), warnings + left_out

    def images(self) -> list[str]:
        """Paths of the images in the default folder that have a mask of their name in the other."""
        masks = self._scan(self._defaults[1], 1, self._recursive)
        return [
            path for name, path in self._scan(self._defaults[0], 0, self._recursive).items() if name in masks
        ]

    def _resolve(self, fields: list[str]) -> tuple[tuple[str, str] | None, tuple[str, str] | None]:
        """(name, path) of the image and of the mask of an entry."""
        image = self._find(fields[0], 0)
        mask = self._find(fields[1], 1) if len(fields) == 2 else self._mask_of(image, fields[0])
        return image, mask

    def _complete(
        self,
        line: str,
        readings: list[list[str]],
        resolved: list[tuple[tuple[str, str] | None, tuple[str, str] | None]],
    ) -> list[Sample]:
        """Samples that an entry can mean; more than one if it can be read in several ways."""
        two = len(readings) > 1 and any(image and mask for image, mask in resolved[1:])
        found: dict[Sample, None] = {}
        for fields, (image, mask) in zip(readings, resolved, strict=True):
            if image is None or mask is None:
                continue
            # "images/a.jpg masks/b.png" ends like a file, but is no name: a name has the gap in itself, or in a folder
            # above the folder of the images.
            if len(readings) > 1 and len(fields) == 1:
                whole = without_ending(unicodedata.normalize("NFC", line).replace("\\", "/"))
                head = re.split(r"([\s,;]+)", whole.removesuffix(self._suffixes[0]).removesuffix(image[0]))
                above, tail = "".join(head[:-2]), f"/{head[-1]}{image[0]}"
                named = f"/{self._defaults[0]}/" in tail and not above.lower().endswith(PICTURE_ENDINGS)
                if len(head) > 1 and (two or not named):
                    continue
            found[image[0], image[1], mask[1]] = None
        return list(found)

    def _named(self, list_file: Path, found: Mapping[Sample, bool]) -> list[Sample]:
        """Give images of one name in several folders the names of their paths, and refuse masks of several images.

        Args:
            found: sample -> whether its mask was found by the image's name, not by the list.
        """
        paths: dict[str, set[str]] = {}
        images: dict[str, set[str]] = {}
        masks: dict[str, set[str]] = {}
        for (name, image, mask), derived in found.items():
            paths.setdefault(name, set()).add(image)
            images.setdefault(image, set()).add(mask)
            if derived:
                masks.setdefault(mask, set()).add(image)
        shared = [f"{mask} for {' and '.join(sorted(of))}" for mask, of in masks.items() if len(of) > 1]
        if shared:
            raise DataError(
                f"{list_file}: {counted(len(shared), 'mask')} would be those of several images of one name: "
                f"{some(shared, 5)}; "
                "put masks into folders as the images, or name them in the list behind a tab"
            )
        if unsure := [f"{image}: {' and '.join(sorted(of))}" for image, of in images.items() if len(of) > 1]:
            raise DataError(
                f"{list_file}: {counted(len(unsure), 'image')} with several masks: {some(unsure, 5)}; keep one of each"
            )
        return [
            (name if len(paths[name]) == 1 else without_ending(image), image, mask)
            for name, image, mask in found
        ]

    def _parts(self, entry: str, kind: int) -> list[str]:
        """Folders and stem of an entry, without the suffix of its kind."""
        parts = parts_of(entry)
        if parts:
            endings = self._endings[kind]
            parts[-1] = without_ending(
                without_ending(parts[-1], endings).removesuffix(self._suffixes[kind]), endings
            )
        return parts

    def _find(self, entry: str, kind: int) -> tuple[str, str] | None:
        """Find (name, path) of an entry as image (kind 0) or mask (kind 1)."""
        parts = self._parts(entry, kind)
        if not parts:
            return None
        # An entry that names an existing folder is looked up there. Otherwise its longest end that is a name in the
        # default folder counts (a name holds a sub-folder where entries may lie in some).
        folder = self._folder(tuple(parts[:-1]))
        if folder is not None:
            path = self._scan(folder, kind, False).get(parts[-1])
            return None if path is None else (parts[-1], path)
        return self._by_end(parts, kind)

    def _by_end(self, parts: list[str], kind: int) -> tuple[str, str] | None:
        known = self._scan(self._defaults[kind], kind, self._recursive)
        for start in range(len(parts)):
            name = "/".join(parts[start:])
            if name in known:
                return name, known[name]
        # A name without its folder counts where only one folder has it.
        within = self._stems(kind).get(parts[-1], []) if len(parts) == 1 else []
        return (within[0], known[within[0]]) if len(within) == 1 else None

    def _mask_of(self, image: tuple[str, str] | None, entry: str) -> tuple[str, str] | None:
        """Find (name, path) of the mask with the name of an image, in the folder of its name if there is one."""
        if image is None:
            return None
        known = self._scan(self._defaults[1], 1, self._recursive)
        parts = self._parts(entry, 0)
        names = ["/".join(parts[start:]) for start in range(len(parts))]
        name = next((name for name in (*names[:-1], image[0]) if name in known), None)
        return None if name is None else (name, known[name])

    def _stems(self, kind: int) -> dict[str, list[str]]:
        """Last part of a name -> the names that have it, in the default folder."""
        if kind not in self._last:
            self._last[kind] = {}
            for name in self._scan(self._defaults[kind], kind, self._recursive):
                self._last[kind].setdefault(name.rpartition("/")[2], []).append(name)
        return self._last[kind]

    def _folder(self, parts: tuple[str, ...]) -> str | None:
        """Find the longest end of `parts` that is a folder below the data folder."""
        if parts not in self._folders:
            tails = ("/".join(parts[i:]) for i in range(len(parts)))
            self._folders[parts] = next((t for t in tails if (self._root / t).is_dir()), None)
        return self._folders[parts]

    def _scan(self, folder: str, kind: int, recursive: bool) -> dict[str, str]:
        key = (folder, kind)
        if key not in self._scans:
            self._scans[key] = scan(
                self._root,
                folder,
                suffix=self._suffixes[kind],
                recursive=recursive,
                endings=self._endings[kind],
                follow_links=self._follow_links,
            )
        return self._scans[key]


def _nearest(
    readings: list[list[str]], resolved: list[tuple[tuple[str, str] | None, tuple[str, str] | None]]
) -> tuple[list[str], tuple[tuple[str, str] | None, tuple[str, str] | None]]:
    """The reading of an entry that most of its files exist of; of equal ones, two fields where the line has one gap."""
    order = (
        sorted(zip(readings, resolved, strict=True), key=lambda pair: len(pair[0]) != 2)
        if len(readings) == 2
        else [*zip(readings, resolved, strict=True)]
    )
    return max(order, key=lambda pair: sum(one is not None for one in pair[1]) if len(pair[0]) == 2 else 0)


def _absent(fields: Sequence[str], image: bool, mask: bool) -> list[str]:
    """Name the missing files of a list entry."""
    missing = [f"image {fields[0]}"] if image else []
    if mask and (not image or len(fields) == 2):
        missing.append(f"mask of {fields[-1]}" if len(fields) == 1 else f"mask {fields[1]}")
    return missing


def data_folder(root: Path, candidates: Iterable[str], needed: Sequence[str], layout: str) -> Path:
    """Find the folder that holds a layout: `root` itself or one of `candidates` below it.

    Raises:
        DataError: none of them has the `needed` sub-folders.
    """
    tried = [root, *(root / c for c in candidates)]
    for folder in tried:
        if all((folder / n).is_dir() for n in needed):
            return folder
    names = ", ".join(str(t) for t in tried)
    raise DataError(
        f"{root}: is not a {layout} folder: no {' and '.join(n + '/' for n in needed)} in any of {names};"
        f" {packed(root) or 'pass the right folder as data.root=DIR'}"
    )


ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
"""Endings of archives, which the user has to unpack first; readers open none."""


def packed(folder: Path) -> str:
    """Advise which archives to unpack where a folder is missing or holds no picture; "" if none is near."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        names = [folder] if folder.is_file() else sorted(folder.iterdir())
    except OSError:
        return ""
    found = [path.name for path in names if path.suffix.lower() in ARCHIVES and path.is_file()]
    return f"unpack {some(found, 3)} first" if found else ""


def _leaves(entry: str) -> bool:
    """Whether an entry leads out of the data folder: by "..", an address, or a byte that ends names for the system."""
    return "\0" in entry or "://" in entry or ".." in entry.replace("\\", "/").split("/")


def endings_of(reading: Reading) -> tuple[str, ...]:
    """How the names of image files end that are read in this way."""
    return PICTURE_ENDINGS if reading.channels is None else CHANNEL_ENDINGS


def files_to_predict(
    paths: Iterable[str | Path], out: Path, reading: Reading
) -> tuple[list[tuple[Path, Path]], list[str]]:
    """List the images given, and those in the folders given, and check their headers; none is decoded.

    Args:
        out: where the results will be written. Files below it are not taken from a folder that holds it.
        reading: how the images will be read.

    Returns:
        (image, its path below `out` without ending) of every image, and a text for every kind of file that is left out.

    Raises:
        DataError: no image, one that cannot be read, or two of one name; the message lists all.
        ConfigError: a result would overwrite an image.
    """
    files: list[tuple[Path, Path]] = []
    missing: list[str] = []
    left_out: dict[str, list[str]] = {}
    real = _Places()
    for path in map(Path, paths):
        if path.is_dir():
            below = None if real_path(out) == real_path(path) else real_path(out)
            for found in sorted(p for p in path.rglob("*") if not p.is_dir()):
                inside = found.relative_to(path)
                if why := _why_not(found, inside, below, endings_of(reading), real):
                    left_out.setdefault(why, []).append(str(inside))
                else:
                    files.append((found, inside.with_suffix("")))
        elif path.is_file():
            files.append((path, Path(path.stem)))
        else:
            missing.append(str(path))
    said = [
        f"{counted(len(names), 'file')} left out, {why}: {some(names, 5)}" for why, names in left_out.items()
    ]
    if missing:
        raise DataError(f"no such image or folder: {', '.join(missing)}")
    if not files:
        endings = ", ".join(sorted(endings_of(reading)))
        raise DataError("\n  ".join([f"no image ({endings}) in the folders given", *said]))
    stems = Counter(stem for _, stem in files)
    if twice := sorted(str(stem) for stem, count in stems.items() if count > 1):
        raise DataError(
            f"several images would be written to one name: {some(twice)}; predict them separately"
        )
    target = real_path(out)  # once, and not for each of a million files
    inside_out = [path for path, _ in files if real(path).is_relative_to(target)]
    kinds = ("mask", "overlay") if inside_out else ()
    results = {real(out / f"{stem}_{kind}.png") for stem in stems for kind in kinds}
    if inputs := [str(path) for path in inside_out if real(path) in results]:
        raise ConfigError(
            f"--out {out}: the results would overwrite images given to predict: {some(inputs)}; "
            "give another folder"
        )
    bad = []
    for path, _ in files:
        try:
            check_readable(path, reading)
        except DataError as error:
            bad.append(str(error))
    if bad:
        head = f"{counted(len(bad), 'unreadable image')}; nothing was written:"
        raise DataError(f"{head}\n  " + some(bad, MOST_LISTED, "\n  "))
    return files, said


class _Places:
    """Where files really are. Folders are looked up once: a folder may hold a million files."""

    def __init__(self) -> None:
        self._folders: dict[Path, Path] = {}

    def __call__(self, path: Path) -> Path:
        if path.is_symlink():
            return real_path(path)
        if path.parent not in self._folders:
            self._folders[path.parent] = real_path(path.parent)
        return self._folders[path.parent] / path.name


def _why_not(
    path: Path, inside: Path, out: Path | None, endings: tuple[str, ...], real: Callable[[Path], Path]
) -> str:
    """Say why a file of a folder is not predicted; "" if it is."""
    if any(part.startswith(".") for part in inside.parts):
        return "hidden"
    if out is not None and real(path).is_relative_to(out):
        return "in the folder of the results"
    ending = path.suffix.lower()
    if ending in endings:
        return ""
    if ending in HEIC_ENDINGS:
        return "HEIC pictures (pip install 'everseg[heic]' reads them, or save them as JPEG)"
    return f"no pictures of a kind that is read ({ending or 'no ending'})"


def image_files(folder: str | Path, reading: Reading | None = None) -> list[Path]:
    """List every image below a folder, in the order of their paths; the reading says which files are images.

    Raises:
        DataError: no such folder, or no image in it.
    """
    folder, endings = Path(folder), endings_of(reading or Reading())
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images")
    found = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in endings and not path.name.startswith(".")
    )
    if not found:
        raise DataError(f"no image ({', '.join(sorted(endings))}) in {folder}")
    return found
