"""Find files by the names that other machines wrote: either slash, drives, servers, addresses, NFC and NFD."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

from everseg.data.datasets.decode import PICTURE_ENDINGS
from everseg.errors import DataError, some
from everseg.files import real_path

SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""Words for a split, in lower case -> the split."""


class FileNote(str):
    """A note about a file that is not used."""

    __slots__ = ()


def split_in_name(path: PurePosixPath) -> str:
    """Return the split that a file's name, or else the folders above it, speak of; "" if none or several do.

    >>> split_in_name(PurePosixPath("annotations/instances_Train.json"))
    'train'
    >>> split_in_name(PurePosixPath("valid/_annotations.coco.json"))
    'val'
    """
    for part in (path.stem, *reversed(path.parent.parts)):
        words = {SPLITS[word] for word in re.split("[^a-z]+", part.lower()) if word in SPLITS}
        if words:
            return words.pop() if len(words) == 1 else ""
    return ""


def parts_of(entry: str) -> list[str]:
    r"""Cut a name from a list or an export into its folders and its file, in Unicode NFC.

    An address gives its path (of Label Studio's `/data/local-files/?d=images/a.jpg` the part behind `d=`). A drive, a
    leading slash and `.` are left out.

    >>> parts_of("D:\\data\\images\\a.jpg")
    ['data', 'images', 'a.jpg']
    """
    if "?d=" in entry:
        entry = parse_qs(urlsplit(entry).query).get("d", [entry])[0]
    elif "://" in entry:
        entry = unquote(urlsplit(entry).path)
    entry = re.sub(r"^[A-Za-z]:(?=[\\/])", "", entry)
    parts = unicodedata.normalize("NFC", entry).replace("\\", "/").split("/")
    return [part for part in parts if part not in ("", ".")]


def without_ending(name: str, endings: tuple[str, ...] = PICTURE_ENDINGS) -> str:
    """Cut all endings of pictures off a name: `a.jpg.png` is `a`, as tools name the mask of `a.jpg`."""
    while True:
        stem, ending = os.path.splitext(name)  # noqa: PTH122 - 20 000 names: Path is 10 times slower
        if ending.lower() not in endings or not stem:
            return name
        name = stem


class FileIndex:
    """All picture files below a folder, to be found by the ends of their names.

    Args:
        root: the folder. Hidden files and folders are left out; links to folders are followed if `follow_links`.
    """

    def __init__(self, root: Path, *, follow_links: bool = False) -> None:
        self._root = root
        self._by_name: dict[str, list[tuple[list[str], str]]] = {}
        for path in walk_pictures(root, follow_links=follow_links):
            parts = parts_of(path)
            self._by_name.setdefault(_key(parts[-1]), []).append((parts, path))

    def exact(self, path: str) -> str | None:
        """Return how a path below the root is written on disk, where letters may be composed otherwise, or None."""
        parts = parts_of(path)
        same = self._by_name.get(_key(parts[-1]), ()) if parts else ()
        return next((on_disk for have, on_disk in same if have == parts), None)

    def paths(self) -> list[str]:
        """All pictures, as they are written on disk."""
        return sorted(path for of in self._by_name.values() for _, path in of)

    def folders(self) -> list[str]:
        """All folders that hold pictures."""
        return sorted({path.rpartition("/")[0] for of in self._by_name.values() for _, path in of})

    def find(self, entry: str, below: str = "", *, whole: bool = False) -> str | None:
        """Return the path of the file whose end agrees with the end of an entry in most parts; None if there is none.

        The file's own name has to agree up to the case and kind of its ending; the folders count as far as they agree.

        Args:
            entry: a name as it was written by another machine.
            below: folder that the file has to be in.
            whole: all folders of the entry have to agree.

        Raises:
            DataError: several files agree equally well; the error names them.
        """
        parts = parts_of(entry)
        if not parts:
            return None
        inside = parts_of(below)
        found = [
            (_agreeing(parts, have), have[-1] == parts[-1], have, path)
            for have, path in self._by_name.get(_key(parts[-1]), ())
            if have[: len(inside)] == inside
        ]
        if not found or (whole and max(found)[0] < len(parts) - 1):
            return None
        most = max(found)[:2]
        best = [path for length, exact, _, path in found if (length, exact) == most]
        if len(best) > 1:
            raise DataError(
                f"'{entry}' may be any of {some(best, 5)} below {self._root}; "
                "write the folder before the name, or name the folder of the images"
            )
        return best[0]


def _agreeing(wanted: Sequence[str], have: Sequence[str]) -> int:
    """Count the folders, from the last, that two paths share."""
    count = 0
    for one, other in zip(reversed(wanted[:-1]), reversed(have[:-1]), strict=False):
        if one != other:
            break
        count += 1
    return count


def _key(name: str) -> str:
    stem, ending = os.path.splitext(name)  # noqa: PTH122
    return stem if ending.lower() in PICTURE_ENDINGS else name


def walk_pictures(root: Path, *, follow_links: bool = False) -> list[str]:
    """List the pictures below a folder, with forward slashes, in the order of folders and names.

    Raises:
        DataError: a folder that cannot be listed, or one that a link makes part of itself.
    """
    found = []
    for here, _, files in walk(root, follow_links=follow_links):
        inside = Path(here).relative_to(root).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        found += [
            prefix + name
            for name in sorted(files)
            if not name.startswith(".") and name.lower().endswith(PICTURE_ENDINGS)
        ]
    return found


def walk(
    root: Path,
    *,
    recursive: bool = True,
    follow_links: bool = False,
    onerror: Callable[[OSError], None] | None = None,
) -> list[tuple[str, list[str], list[str]]]:
    """List folders as `os.walk` does, without the hidden ones, in order.

    Args:
        recursive: False lists the root only.
        follow_links: go into links to folders.
        onerror: called with the error of a folder that cannot be listed; by default it is left out.

    Raises:
        DataError: links lead in a circle.
    """
    found = []
    for here, folders, files in os.walk(root, followlinks=follow_links, onerror=onerror):
        # os.walk goes into the folders that are left in this list, in its order.
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if recursive else []
        if follow_links:
            above = real_path(Path(here))
            for name in folders:
                place = Path(here) / name
                if place.is_symlink() and above.is_relative_to(real_path(place)):
                    raise DataError(f"{place}: a link to a folder that holds it; remove the link")
        found.append((here, list(folders), files))
    return found
