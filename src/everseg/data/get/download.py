"""Fetch public data sets when the user asks for them, into folders that the readers know."""

from __future__ import annotations

import json
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from everseg.data.get.fetch import fetch
from everseg.data.get.unpack import ArchiveError, extract
from everseg.data.writing import write_atomically
from everseg.display import counted
from everseg.errors import ConfigError, DataError
from everseg.files import UnreadableError, json_of, read_regular

RECEIPT = ".everseg-download.json"
VOC = "VOCdevkit/VOC2012"
LISTS = f"{VOC}/ImageSets/Segmentation"
TRAIN_AUG = 10582
"""Images of the augmented VOC training list: the 12031 masks of SegmentationClassAug less the 1449 of val."""


@dataclass(frozen=True)
class Source:
    """One archive and where its content belongs."""

    file: str
    """Name of the archive."""
    urls: tuple[str, ...]
    """Addresses of the same file, tried in turn."""
    checksum: str | None
    """"md5:HEX" or "sha256:HEX"; None where none is published: the receipt then records that of the file received."""
    folder: str
    """The wanted folder inside the archive (the shallowest of that name)."""
    place: str
    """Where the folder goes, below the target."""


SOURCES: dict[str, tuple[Source, ...]] = {
    "voc": (
        Source(
            "VOCtrainval_11-May-2012.tar",
            ("http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",),
            "md5:6cd6e144f989b92b3379bac3b3de84fd",
            "VOCdevkit",
            "VOCdevkit",
        ),
        Source(
            "SegmentationClassAug.zip",
            (
                "https://www.dropbox.com/s/oeu149j8qtbs1x0/SegmentationClassAug.zip?dl=1",
                "http://cs.jhu.edu/~cxliu/data/SegmentationClassAug.zip",
            ),
            None,
            "SegmentationClassAug",
            f"{VOC}/SegmentationClassAug",
        ),
    ),
    "sbd": (
        Source(
            "benchmark.tgz",
            (
                "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
            ),
            "md5:82b4d87ceb2ed10f6038a1cba92111cb",
            "benchmark_RELEASE",
            "benchmark_RELEASE",
        ),
    ),
    "ade": (
        Source(
            "ADEChallengeData2016.zip",
            ("http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",),
            "md5:7328b3957e407ddae1d3cbf487f149ef",
            "ADEChallengeData2016",
            "ADEChallengeData2016",
        ),
    ),
}
"""Data set -> archives. VOC and SBD checksums as in torchvision. "voc" holds SBD's masks already converted to
images; "sbd" is SBD's original (MATLAB files), which no reader of everseg needs."""

ROOTS = {"voc": VOC, "sbd": "benchmark_RELEASE", "ade": "ADEChallengeData2016"}


def download(
    name: str,
    to: str | Path,
    *,
    sources: Sequence[Source] | None = None,
    keep_archives: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Path:
    """Fetch, verify and unpack a data set; a second call, also after an interruption, does only what is missing.

    For "voc" it also provides `ImageSets/Segmentation/train_aug.txt`. If an archive holds that list, it is taken from
    there. Otherwise it is written from the masks: all of SegmentationClassAug but those of `val.txt`, by ascending
    name, each line "/JPEGImages/X.jpg /SegmentationClassAug/X.png". That is the order of the published list.

    Args:
        name: "voc" (VOC 2012 with the SBD masks), "ade", or "sbd".
        to: folder, made if need be. A receipt `.everseg-download.json` there records address, size and SHA-256.
        sources: other archives in place of the table's (a mirror).
        keep_archives: keep the archives after unpacking.
        progress: called with (bytes so far, bytes in all or 0) for each file in turn.
        options: passed to `fetch` (attempts, pause, timeout).

    Returns:
        The folder to give as `data.root`.

    Raises:
        ConfigError: unknown name.
        DataError: as `fetch` and `extract`; a folder in the way; another download running in `to`.
    """
    if name not in SOURCES:
        raise ConfigError(f"data download: unknown data set '{name}'; choose one of {', '.join(SOURCES)}")
    to = Path(to)
    try:
        to.mkdir(parents=True, exist_ok=True)
        with _alone(to):
            receipt = _read_receipt(to, name)
            for source in SOURCES[name] if sources is None else sources:
                _provide(source, to, name, receipt, progress, options)
            if name == "voc":
                _ensure_train_aug(to)
            if not keep_archives:
                for source in SOURCES[name] if sources is None else sources:
                    (to / source.file).unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{error.filename or to}: {error.strerror or error}; choose a folder that can be written"
        ) from None
    return to / ROOTS[name]


def _provide(
    source: Source,
    to: Path,
    name: str,
    receipt: dict[str, Any],
    progress: Callable[[int, int], None] | None,
    options: dict[str, Any],
) -> None:
    """Bring one archive's folder to its place."""
    entry = receipt["files"].get(source.file, {})
    place = to / source.place
    if entry.get("unpacked") and place.is_dir():
        return
    if place.exists():
        raise DataError(
            f"{place} exists already and was not made by this command; move it away, or use it as data.root"
        )
    archive = to / source.file
    # The receipt vouches for an archive that an earlier, interrupted call has fetched and verified.
    if not (entry and archive.is_file() and archive.stat().st_size == entry["size"]):
        entry = {
            **_fetch_any(source, archive, progress, options),
            "checksum": source.checksum,
            "unpacked": False,
        }
        receipt["files"][source.file] = entry
        _write_receipt(to, receipt)
    scratch = to / f".everseg-unpacked-{uuid.uuid4().hex}"
    try:
        extract(archive, scratch)
        found = _find(scratch, source, archive)
        if name == "voc":
            _keep_list(scratch, found, to)
        # The receipt comes first. It counts only together with the folder, so a crash between the two unpacks again;
        # the other order would leave a folder that "was not made by this command".
        entry["unpacked"] = True
        _write_receipt(to, receipt)
        place.parent.mkdir(parents=True, exist_ok=True)
        found.rename(place)
    except ArchiveError:  # the archive is at fault: the next call must fetch it again
        archive.unlink(missing_ok=True)
        receipt["files"].pop(source.file)
        _write_receipt(to, receipt)
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fetch_any(
    source: Source, archive: Path, progress: Callable[[int, int], None] | None, options: dict[str, Any]
) -> dict[str, Any]:
    problems = []
    for url in source.urls:
        try:
            return asdict(fetch(url, archive, checksum=source.checksum, progress=progress, **options))
        except DataError as error:
            problems.append(str(error))
    raise DataError("\n".join(problems))


def _find(scratch: Path, source: Source, archive: Path) -> Path:
    folders = [p for p in scratch.rglob(source.folder) if p.is_dir()]
    if not folders:
        inside = ", ".join(sorted(p.name for p in scratch.iterdir())[:8]) or "nothing"
        raise DataError(
            f"{archive}: has no folder {source.folder} (inside: {inside}); is it the right archive?"
        )
    return min(folders, key=lambda p: len(p.parts))  # the shallowest


def _keep_list(scratch: Path, found: Path, to: Path) -> None:
    """Save the published list if the archive holds it outside of the wanted folder."""
    lists = [p for p in scratch.rglob("train_aug.txt") if not p.is_relative_to(found)]
    if lists and (to / LISTS).is_dir() and not (to / LISTS / "train_aug.txt").exists():
        lists[0].rename(to / LISTS / "train_aug.txt")


def _ensure_train_aug(to: Path) -> None:
    path = to / LISTS / "train_aug.txt"
    folder = to / VOC / "SegmentationClassAug"
    if path.exists() or not folder.is_dir():
        return
    # SegmentationClassAug also holds the masks of the validation images, which must not be trained on.
    masks = {p.stem for p in folder.glob("*.png")}
    val = (to / LISTS / "val.txt").read_text(encoding="utf-8").split()
    names = sorted(masks - set(val))
    if len(names) != TRAIN_AUG:
        warnings.warn(
            f"{folder} gives {counted(len(names), 'training image')}, not the {TRAIN_AUG} of the "
            "published list; results will not compare with published ones.",
            stacklevel=3,
        )
    lines = (f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png\n" for n in names)
    write_atomically(path, "".join(lines).encode())


@contextmanager
def _alone(to: Path) -> Iterator[None]:
    """Allow one download per folder at a time, and remove what a killed one has left."""
    with (to / ".everseg-download.lock").open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # no such locks on this system
            pass
        except OSError:
            raise DataError(f"{to}: another download is running in this folder; wait for it to end") from None
        for leftover in to.glob(".everseg-unpack*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def _read_receipt(to: Path, name: str) -> dict[str, Any]:
    if not (to / RECEIPT).exists():
        return {"format": 1, "files": {}}
    try:
        receipt = json_of(read_regular(to / RECEIPT, root=to))
        entries = receipt["files"].values()
        if receipt["format"] == 1 and all(isinstance(entry, dict) for entry in entries):
            return receipt
    except (UnreadableError, KeyError, TypeError, AttributeError):
        pass
    raise DataError(
        f"{to / RECEIPT}: is not a readable receipt; delete it and the folders that it lists, and start again"
    )


def _write_receipt(to: Path, receipt: dict[str, Any]) -> None:
    write_atomically(to / RECEIPT, (json.dumps(receipt, indent=1) + "\n").encode())
