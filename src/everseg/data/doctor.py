"""Look at every file of a data set before training and list all faults (floor 2)."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from everseg.data.base import Dataset, Split
from everseg.data.datasets.decode import FORMATS
from everseg.data.findings import ClassRow, Finding, Report, finding
from everseg.data.index import count_ids, ranges, remedy, undeclared
from everseg.data.parallel import Progress, map_samples
from everseg.errors import DataError
from everseg.labels import RawLabels

RARE = 3
"""A class in fewer training images than this is reported."""

MAX_DECODED = 100_000_000
"""Larger pictures are not decoded to find out why a reader refused them."""


def check(
    dataset: Dataset,
    *,
    splits: Sequence[str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Read every image and mask once, on all cores, and report all faults.

    Errors are what would stop a run or make its scores meaningless: files that cannot be read, sizes that
    differ, colour or lossy masks, undeclared ids, empty splits, training images that are byte for byte in
    another split. Warnings: masks of void only, images one pixel wide or high, classes without training image,
    classes in fewer than 3 training images, what the reader had to correct. Images smaller than the crop are fine.

    Args:
        splits: names; None = all.
        workers: processes; None = all cores.
        progress: called with (done, total) samples over all splits.

    Raises:
        DataError: a split that the data set does not have.
    """
    names = list(dataset.splits) if splits is None else list(splits)
    unknown = [name for name in names if name not in dataset.splits]
    if unknown:
        raise DataError(f"{dataset.name} has no split {unknown}; it has {', '.join(dataset.splits)}")
    findings: list[Finding] = []
    samples: dict[str, list[_Sample]] = {}
    done, total = 0, sum(len(dataset.splits[name]) for name in names)

    def advance(reached: int, _: int) -> None:
        if progress:
            progress(done + reached, total)

    for name in names:
        split = dataset.splits[name]
        samples[name] = map_samples(_examine, split, len(split), workers=workers, progress=advance)
        done += len(split)
        findings += _of_split(name, split, dataset.labels, samples[name])
    findings += _same_images(dataset, samples)
    rows = _class_rows(dataset.labels, samples)
    findings += _of_classes(rows, names)
    return Report(dataset.name, tuple(findings), {name: len(samples[name]) for name in names}, rows)


def check_source(
    build: Callable[[], Dataset],
    *,
    splits: Sequence[str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Build a data set and check it; faults that stop the building (unpaired files, a missing folder) are findings.

    Raises:
        ConfigError: from `build`; wrong options are no fault of the data.
    """
    try:
        dataset = build()
    except DataError as error:
        return Report("data", (finding("error", "layout", "", "", str(error)),))
    return check(dataset, splits=splits, workers=workers, progress=progress)


@dataclass(frozen=True)
class _Sample:
    """What one worker found out about one sample; counts and digest are None where it cannot be read."""

    faults: tuple[tuple[str, str], ...] = ()
    counts: np.ndarray | None = None
    digest: str | None = None
    size: tuple[int, int] = (0, 0)


def _examine(split: Split, index: int) -> _Sample:
    try:
        image, mask = split.read(index)
        if image.shape[:2] != mask.shape:
            text = (
                f"the image is {image.shape[1]}x{image.shape[0]} but the mask {mask.shape[1]}x{mask.shape[0]}"
            )
            return _Sample((("size-mismatch", text),))
    except (DataError, OSError) as error:
        return _Sample(tuple(_faults(split, index, str(error))))
    faults: tuple[tuple[str, str], ...] = ()
    path = _path(split, "mask_path", index)
    if path is not None and _look(path)[0] in ("JPEG", "MPO"):
        faults = (("lossy-mask", f"{path}: the mask is a JPEG file"),)
    return _Sample(faults, count_ids(mask), _digest(split, index, image), mask.shape)


def _faults(split: Split, index: int, message: str) -> Iterator[tuple[str, str]]:
    """Which file of a sample that cannot be read is at fault: the image, the mask, or both."""
    mask: np.ndarray | None = None
    mask_message = ""
    try:
        mask = split.read_mask(index)
    except (DataError, OSError) as error:
        mask_message = str(error)
        path = _path(split, "mask_path", index)
        yield _mask_code(path), mask_message
    image_path = _path(split, "image_path", index)
    form, size, problem = _look(image_path) if image_path is not None else ("", None, "")
    if mask is None:
        if message != mask_message:
            yield "unreadable-image" if image_path is not None else "unreadable-sample", message
        elif problem:
            yield "unreadable-image", f"{image_path}: {problem}"
    elif form and not problem and size != (mask.shape[1], mask.shape[0]):
        yield "size-mismatch", message
    elif image_path is not None:
        yield "unreadable-image" if problem or not form else "unreadable-sample", message
    else:
        yield "unreadable-sample", message


def _mask_code(path: Path | None) -> str:
    if path is None:
        return "bad-mask"
    form, _, problem = _look(path)
    if form in ("JPEG", "MPO", "WEBP"):
        return "lossy-mask"
    if problem:
        return "unreadable-mask"
    with Image.open(path, formats=FORMATS) as picture:
        return (
            "colour-mask" if picture.mode in ("RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB") else "bad-mask"
        )


def _look(path: Path) -> tuple[str, tuple[int, int] | None, str]:
    """Format, (width, height), and what is wrong with a picture file; never blocks on a pipe or device."""
    form, size = "", None
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return form, size, "not a regular file"
        with Image.open(path, formats=FORMATS) as picture:
            form, size = picture.format or "", picture.size
            if size[0] * size[1] > MAX_DECODED:
                return form, size, "too large"
            picture.load()
    except Exception as error:  # decoders raise nearly anything on damaged files
        return form, size, str(error) or type(error).__name__
    return form, size, ""


def _path(split: Split, kind: str, index: int) -> Path | None:
    """Where a file of the sample lies, for splits that lie in files."""
    find = getattr(split, kind, None)
    return None if find is None else Path(find(index))


def _digest(split: Split, index: int, image: np.ndarray) -> str:
    path = _path(split, "image_path", index)
    if path is not None:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()


def _of_split(name: str, split: Split, labels: RawLabels, samples: list[_Sample]) -> Iterator[Finding]:
    if not samples:
        yield finding("error", "empty-split", name, "", "the split has no images")
    for text in getattr(split, "warnings", ()):
        yield finding("warning", "list", name, "", str(text))
    counted = [np.zeros(256, np.int32) if s.counts is None else s.counts for s in samples]
    found = {int(raw) for row in counted for raw in np.flatnonzero(row)}
    void = sorted(labels.void)
    for index, (sample, row) in enumerate(zip(samples, counted, strict=True)):
        where = split.id(index)
        for code, message in sample.faults:
            yield finding("error", code, name, where, message)
        if sample.counts is None:
            continue
        foreign = undeclared(split, labels, [row])
        if foreign:
            ids = {int(raw) for raw in np.flatnonzero(row)} - labels.declared
            text = ", ".join(f"id {raw} ({row[raw]} pixels)" for raw in sorted(ids))
            text += f"; declared: {ranges(labels.declared)}"
            yield Finding("error", "undeclared-id", name, where, text, remedy(labels, found))
        if row[void].sum() == row.sum():
            yield finding("warning", "all-void", name, where, "every pixel of the mask is void")
        if min(sample.size) == 1:
            text = f"the image is {sample.size[1]}x{sample.size[0]} pixels"
            yield finding("warning", "tiny-image", name, where, text)


def _same_images(dataset: Dataset, samples: Mapping[str, list[_Sample]]) -> Iterator[Finding]:
    first = {
        name: {s.digest: i for i, s in reversed(list(enumerate(of))) if s.digest}
        for name, of in samples.items()
    }
    names = sorted(first, key=lambda name: name != "train")
    for at, name in enumerate(names):
        for other in names[:at]:
            shared = first[name].keys() & first[other].keys()
            if not shared:
                continue
            if other != "train" and first[name].keys() == first[other].keys():
                text = f"holds the same {len(shared)} images as '{other}'"
                yield finding("note", "same-split", name, "", text)
                continue
            for index, sample in enumerate(samples[name]):
                if sample.digest in shared:
                    twin = dataset.splits[other].id(first[other][sample.digest])
                    yield finding(
                        "error" if other == "train" else "warning",
                        "same-image",
                        name,
                        dataset.splits[name].id(index),
                        f"byte-identical to {other}/{twin}",
                    )


def _class_rows(labels: RawLabels, samples: Mapping[str, list[_Sample]]) -> tuple[ClassRow, ...]:
    images: dict[str, np.ndarray] = {}
    pixels: dict[str, np.ndarray] = {}
    for name, of in samples.items():
        rows = [s.counts for s in of if s.counts is not None]
        table = np.stack(rows) if rows else np.zeros((0, 256), np.int64)
        images[name] = (table > 0).sum(axis=0)
        pixels[name] = table.sum(axis=0, dtype=np.int64)
    return tuple(
        ClassRow(
            raw,
            labels.names[raw],
            {name: int(images[name][raw]) for name in samples},
            {name: int(pixels[name][raw]) for name in samples},
        )
        for raw in sorted(labels.names)
    )


def _of_classes(rows: Sequence[ClassRow], names: Sequence[str]) -> Iterator[Finding]:
    for row in rows:
        what = f"class {row.id} '{row.name}'"
        elsewhere = [name for name in names if name != "train" and row.images[name]]
        if not elsewhere and not row.images.get("train"):
            yield finding("warning", "class-missing", "", "", f"{what} is in no image")
        elif "train" in row.images and not row.images["train"]:
            yield finding(
                "warning",
                "class-untrained",
                "train",
                "",
                f"{what} is only in {', '.join(elsewhere)}, not in train",
            )
        elif 0 < row.images.get("train", 0) < RARE:
            count = row.images["train"]
            text = f"{what} is in {count} training image{'s' if count > 1 else ''} only"
            yield finding("warning", "class-rare", "train", "", text)
