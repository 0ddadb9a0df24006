"""Draw id masks from polygon annotations and store them beside these: on all cores, resumable, verified."""

from __future__ import annotations

import errno
import io
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from everseg.data.batches.index import count_ids, ranges
from everseg.data.batches.parallel import Progress, map_samples
from everseg.data.datasets import idd
from everseg.data.datasets.decode import MaskCoding, Reading, decode_mask, open_inside, open_picture
from everseg.data.datasets.street_labels import CITYSCAPES, IDD, VOID, StreetLabel
from everseg.data.polygons import MAX_BYTES, MAX_PIXELS, Annotation, draw, parse
from everseg.data.writing import write_atomically
from everseg.display import Piece, Result, counted
from everseg.errors import ConfigError, DataError
from everseg.files import real_path

POLYGONS = "_gtFine_polygons.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Layout:
    """How a data set keeps its polygons, and what its masks are."""

    labels: tuple[StreetLabel, ...]
    mask: str
    """Ending of the masks' names, in place of `POLYGONS`."""
    least_points: int
    """Polygons of fewer points are left out."""
    places: tuple[str, ...]
    """Where `gtFine/` may lie below the folder given, besides directly."""

    @cached_property
    def values(self) -> dict[str, int | None]:
        """Label -> pixel value; None if the mask never shows it."""
        return {label.name: None if label.id < 0 else label.train_id for label in self.labels}

    @cached_property
    def declared(self) -> frozenset[int]:
        """Every value a mask may hold."""
        return frozenset(label.train_id for label in self.labels) | {VOID}


LAYOUTS: Mapping[str, Layout] = {
    "cityscapes": Layout(CITYSCAPES, "_gtFine_labelTrainIds.png", 2, ("cityscapes", "Cityscapes")),
    "idd": Layout(IDD, "_gtFine_labellevel3Ids.png", 3, tuple(place for part in idd.PARTS for place in part)),
}


@dataclass(frozen=True, repr=False)
class Prepared(Result):
    """What `prepare` did with the polygon files."""

    written: int
    kept: int
    """Masks that existed already and are whole."""
    faults: tuple[str, ...]
    """One line for each file that has no whole mask now: "FILE: what is wrong"."""
    checked: bool = field(default=False, compare=False)
    """Whether masks were only verified, none written."""
    seconds: float = field(default=0.0, compare=False)

    def counts(self) -> str:
        """How many masks there are, in one line."""
        masks = (
            f"{counted(self.kept, 'mask')} whole"
            if self.checked
            else f"{counted(self.written, 'mask')} written, {self.kept} kept"
        )
        return f"{masks}, {counted(len(self.faults), 'file')} refused in {self.seconds:.1f} s"

    def shown(self) -> Iterable[Piece]:
        yield self.counts()
        if self.faults:
            yield self.refusal()

    def refusal(self) -> str:
        """The files that were refused, and what to do; several lines."""
        head = f"{len(self.faults)} without a mask of these polygons (a mask made before is left as it was):"
        remedy = "Restore these files, or leave the images out."
        if any("not of this data set" in fault for fault in self.faults):
            remedy += " --skip-unknown draws the rest of files with unknown labels."
        return "\n  ".join([head, *self.faults]) + f"\n{remedy}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def prepare(
    name: str,
    root: str | Path,
    *,
    overwrite: bool = False,
    check: bool = False,
    skip_unknown: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Draw the id masks of all polygon files `gtFine/*/*/*_gtFine_polygons.json`, each beside its file.

    Cityscapes gets `*_gtFine_labelTrainIds.png` (0-18 and 255), IDD `*_gtFine_labellevel3Ids.png` (0-25 and 255).
    A mask counts as whole if it decodes, has the size that its polygon file states, and holds only those ids. Every new
    mask is read back and verified in this way. If the process is killed, every mask is whole or missing, and the next
    call goes on.

    Args:
        name: "cityscapes" or "idd".
        root: the folder that holds `gtFine/`, or one that holds the data set's own folder or folders with it.
        overwrite: draw whole masks again too, after the polygons or the drawing changed.
        check: write nothing; missing masks and masks that are not whole are faults.
        skip_unknown: leave out polygons of unknown labels instead of refusing their file.
        workers: processes; None = all cores.
        progress: called with (done, total).

    Raises:
        ConfigError: unknown data set, or no such folder.
        DataError: no polygon files there.
        OSError: the disk is full or read-only. Other faults of single files are in the result.
    """
    if name not in LAYOUTS:
        raise ConfigError(f"data prepare: unknown data set '{name}'; choose one of {', '.join(LAYOUTS)}")
    layout, root = LAYOUTS[name], Path(root).expanduser().absolute()
    if not root.is_dir():
        raise ConfigError(f"data prepare: {root} is not a folder; name the one that holds gtFine/")
    if overwrite and check:
        raise ConfigError("data prepare: --overwrite writes and --check does not; choose one")
    begun = time.monotonic()
    job = _Job(layout, polygon_files(root, layout), overwrite, check, skip_unknown)
    results = map_samples(_one, job, len(job.files), workers=workers, progress=progress)
    outcomes = [outcome for outcome, _ in results]
    return Prepared(
        outcomes.count("written"),
        outcomes.count("kept"),
        tuple(f"{file}: {text}" for file, (_, text) in zip(job.files, results, strict=True) if text),
        check,
        time.monotonic() - begun,
    )


def polygon_files(root: Path, layout: Layout) -> list[Path]:
    """Find the polygon files of a data set, sorted within each of its folders.

    Raises:
        DataError: there are none.
    """
    folders = [root, *(root / place for place in layout.places)]
    files = [
        file
        for folder in dict.fromkeys(real_path(f) for f in folders)
        for file in sorted(folder.glob(f"gtFine/*/*/*{POLYGONS}"))
        if not file.name.startswith(".")
    ]
    if not files:
        tried = ", ".join(str(folder) for folder in folders)
        raise DataError(
            f"{root}: no gtFine/SPLIT/FOLDER/*{POLYGONS} in any of {tried}; name the folder that holds gtFine/"
        )
    return files


@dataclass(frozen=True)
class _Job:
    layout: Layout
    files: list[Path]
    overwrite: bool
    check: bool
    skip_unknown: bool


Outcome = tuple[Literal["written", "kept", "fault"], str]


def _one(job: _Job, index: int) -> Outcome:
    """Draw or check one mask; return what was done, and what is wrong."""
    file = job.files[index]
    mask = file.with_name(file.name.removesuffix(POLYGONS) + job.layout.mask)
    try:
        with open_inside(file.parent, file.name, follow_links=True) as stream:
            annotation = parse(stream.read(MAX_BYTES + 1))
        if job.check:
            if not mask.exists():
                return "fault", "has no mask"
            _read_mask(mask, annotation, job.layout)
            return "kept", ""
        if not job.overwrite and mask.exists() and _is_whole(mask, annotation, job.layout):
            return "kept", ""
        picture = draw(
            annotation,
            job.layout.values,
            background=VOID,
            least_points=job.layout.least_points,
            skip_unknown=job.skip_unknown,
        )
        # Written whole or not at all, then read back: a full or failing disk shows here, not in training.
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        write_atomically(mask, buffer.getvalue())
        if not np.array_equal(_read_mask(mask, annotation, job.layout), np.asarray(picture)):
            return "fault", f"{mask.name} does not read back as it was written; check the disk"
    except DataError as error:
        return "fault", str(error).removeprefix(f"{file}: ")
    except OSError as error:
        if error.errno in _FULL:  # every further mask would fail as well
            raise
        return "fault", f"{mask.name} cannot be written ({error.strerror})"
    return "written", ""


def _is_whole(mask: Path, annotation: Annotation, layout: Layout) -> bool:
    try:
        _read_mask(mask, annotation, layout)
    except DataError:
        return False
    return True


def _read_mask(mask: Path, annotation: Annotation, layout: Layout) -> np.ndarray:
    """Decode a mask, (H, W) uint8.

    Raises:
        DataError: it is missing, does not decode, has another size, or holds ids that are not declared.
    """
    with open_inside(mask.parent, mask.name, follow_links=True) as stream:
        ids = decode_mask(open_picture(stream, mask, Reading(max_pixels=MAX_PIXELS)), mask, MaskCoding())
    if ids.shape != (annotation.height, annotation.width):
        stated = f"{annotation.width}x{annotation.height}"
        raise DataError(f"{mask.name} is {ids.shape[1]}x{ids.shape[0]}, but the polygons are of {stated}")
    foreign = set(np.flatnonzero(count_ids(ids)).tolist()) - layout.declared
    if foreign:
        raise DataError(f"{mask.name} holds ids {ranges(foreign)}, which are not declared")
    return ids
