"""Check every file of a data set before training and list all faults."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from everseg.data.base import Dataset, Split
from everseg.data.batches.extra import MapFolder
from everseg.data.batches.index import default_cache_dir, ranges, remedy
from everseg.data.batches.parallel import Progress, map_samples
from everseg.data.datasets.decode import Colour
from everseg.data.datasets.file_names import FileNote
from everseg.data.datasets.listing import LeftOut
from everseg.data.doctor.examine import SIGNATURE, Examined, Job, examine
from everseg.data.doctor.findings import ClassRow, Finding, Level, Report, finding
from everseg.data.mask_values import MaskFile, mixed_kinds, no_data_doubts, palettes_differ, void_doubts
from everseg.data.writing import write_atomically
from everseg.display import counted, percent, share
from everseg.errors import DataError, EversegError, some
from everseg.labels import RawLabels

RARE = 3
"""A class in fewer training images than this is reported."""
ALIKE = 1.5
"""Images are reported as alike whose small grey pictures differ by at most so many grey levels (root mean square)."""


def check(
    dataset: Dataset,
    *,
    splits: Sequence[str] | None = None,
    sample: int | None = None,
    cache: bool = True,
    lock: Mapping[tuple[str, str], tuple[str, str]] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Read every image and mask once, on all cores, and report all faults.

    Errors would stop a run or make its scores meaningless: files that cannot be read, sizes that differ, colour or
    lossy masks, undeclared ids, masks whose objects all carry the ignore value, empty splits, and training images that
    are also in another split, byte for byte. Warnings are: masks that are entirely void, images one pixel wide or high,
    classes in fewer than 3 training images or in none, images that look like a training image, and anything the reader
    had to correct. Images smaller than the crop are fine.

    Args:
        splits: names; None = all.
        sample: number of samples to check per split, drawn with a fixed seed; None = all.
        cache: reuse what an earlier check found about files whose size, times and number, or whose content, have not
            changed; False = read all.
        lock: (split, sample) -> SHA-256 of image and mask when they were known to be good; differences are reported.
        workers: processes; None = all cores.
        progress: called with (done, total) samples over all splits.

    Raises:
        DataError: a split that the data set does not have.
    """
    names = list(dataset.splits) if splits is None else list(splits)
    unknown = [name for name in names if name not in dataset.splits]
    if unknown:
        raise DataError(f"{dataset.name} has no split {unknown}; it has {', '.join(dataset.splits)}")
    findings = [
        finding("warning", "file-left-out", "", "", text)
        if isinstance(text, FileNote)
        else finding("note", "class-left-out", "", "", text)
        for text in dataset.notes
    ]
    samples: dict[str, list[Examined]] = {}
    chosen = {name: _chosen(len(dataset.splits[name]), sample) for name in names}
    done, total = 0, sum(map(len, chosen.values()))

    def advance(reached: int, _: int) -> None:
        if progress:
            progress(done + reached, total)

    for name in names:
        split = dataset.splits[name]
        samples[name] = _in_columns(
            _examined(split, chosen[name], cache, workers, advance), dataset.labels.width
        )
        done += len(chosen[name])
        findings += _of_split(name, split, dataset.labels, samples[name])
        if len(chosen[name]) < len(split):
            text = f"only {len(chosen[name])} of {len(split)} samples were looked at"
            findings.append(finding("note", "sampled", name, "", text))
    width = max((len(s.counts) for of in samples.values() for s in of if s.counts is not None), default=0)
    samples = {name: _in_columns(of, width) for name, of in samples.items()}  # one width over all splits
    findings += _same_images(samples)
    findings += _similar_images(samples)
    rows = _class_rows(dataset.labels, _colours(dataset, samples), samples)
    unread = {sample.counts is None for of in samples.values() for sample in of}
    if unread != {True}:  # where nothing could be read, nothing is known of the classes
        findings += _of_classes(
            rows, names, "is in no image that could be read" if True in unread else "is in no image"
        )
    findings += _of_values(dataset, samples)
    digests = {(name, s.id): s.digests for name in names for s in samples[name] if s.digests[0]}
    findings += _changed(lock or {}, digests)
    findings += _of_maps(dataset, chosen)
    images = {name: len(samples[name]) for name in names}
    void = {
        name: sum(int(s.counts[list(dataset.labels.void)].sum()) for s in of if s.counts is not None)
        for name, of in samples.items()
    }
    return Report(dataset.name, tuple(findings), images, rows, digests, void=void)


def _of_maps(dataset: Dataset, chosen: Mapping[str, Sequence[int]]) -> list[Finding]:
    """Faults of the further maps (`data.extra`) of training images: missing, unreadable, or of another size."""
    found = []
    for name, folder in dataset.extra.items():
        if "train" not in chosen:
            continue
        try:
            maps = MapFolder(folder, dataset.splits["train"])
        except DataError as error:
            found.append(finding("error", "map", "train", "", f"data.extra.{name}: {error}"))
            continue
        faults = map_samples(_map_fault, (maps, list(chosen["train"])), len(chosen["train"]))
        for index, fault in zip(chosen["train"], faults, strict=True):
            if fault:
                sample = dataset.splits["train"].id(index)
                found.append(finding("error", "map", "train", sample, f"data.extra.{name}: {fault}"))
    return found


def _map_fault(subject: tuple[MapFolder, list[int]], place: int) -> str:
    maps, indices = subject
    try:
        shape = maps.read(indices[place]).shape
        wanted = maps.split.read_mask(indices[place]).shape
    except DataError as error:
        return str(error)
    if shape != wanted:
        return (
            f"{maps.path(indices[place])}: {shape[1]}x{shape[0]} pixels, and its mask {wanted[1]}x{wanted[0]}"
        )
    return ""


def check_source(
    build: Callable[[], Dataset], *, lenient: Callable[[], Dataset] | None = None, **options: Any
) -> Report:
    """Build a data set and check it. Faults that prevent building (unpaired files, a missing folder) become findings.

    Args:
        build: opens the data set.
        lenient: like `build`, but it leaves out files without a partner, so that the other files are still checked.
        options: of `check`.

    Raises:
        ConfigError: from `build`; wrong options are not a fault of the data.
    """
    try:
        return check(build(), **options)
    except DataError as error:
        stopped = finding("error", "layout", "", "", str(error))
    try:
        dataset = lenient() if lenient is not None else None
    except EversegError:
        dataset = None
    if dataset is None:
        return Report("data", (stopped,))
    report = check(dataset, **options)
    unpaired = [replace(f, level="error") for f in report.findings if f.code == "unpaired"]
    others = [f for f in report.findings if f.code != "unpaired"]
    return replace(report, findings=(*(unpaired or [stopped]), *others))


def _chosen(count: int, sample: int | None) -> list[int]:
    if sample is None or sample >= count:
        return list(range(count))
    return sorted(random.Random(0).sample(range(count), sample))


def _examined(
    split: Split, indices: list[int], cache: bool, workers: int | None, progress: Progress
) -> list[Examined]:
    file = cache_file(split)
    known = load_cache(file) if file is not None and cache else {}
    job = Job(split, indices, known)
    found = map_samples(examine, job, len(indices), workers=workers, progress=progress)
    news = any(s.id not in known or known[s.id].stamp != s.stamp for s in found if not s.faults)
    if file is not None and news:
        store_cache(file, list({**known, **{s.id: s for s in found}}.values()))
    return found


def _in_columns(samples: list[Examined], least: int) -> list[Examined]:
    """Bring the counts of all samples to one width: that of the labels, or of the largest id in a mask."""
    width = max([least, *(len(s.counts) for s in samples if s.counts is not None)])
    return [
        s if s.counts is None or len(s.counts) == width else replace(s, counts=_wide(s.counts, width))
        for s in samples
    ]


def _of_split(name: str, split: Split, labels: RawLabels, samples: list[Examined]) -> Iterator[Finding]:
    if not samples:
        yield finding("error", "empty-split", name, "", "the split has no images")
    for text in getattr(split, "warnings", ()):
        left_out = isinstance(text, LeftOut)
        place = text.sample if left_out else ""
        yield finding("warning", "unpaired" if left_out else "list", name, place, str(text))
    rows = [np.zeros(256, np.int32) if s.counts is None else s.counts for s in samples]
    found = {int(raw) for row in rows for raw in np.flatnonzero(row)}
    for sample in samples:
        yield from _of_sample(name, sample, labels, found)
    yield from _together(name, samples)
    yield from _no_data_images(name, labels, samples)
    present, void = found - set(labels.void), found & set(labels.void)
    if len(present) == 1 and void and len(labels.names) > 1:
        text = f"the only value besides {min(present)} is the ignore value {min(void)}: there is nothing to learn"
        yield finding("error", "binary-mask", name, "", text)
    if name == "train" and len(split) == 1:
        yield finding("error", "one-image", name, "", "a single image")
    elif name == "train" and 0 < len(split) < RARE:
        yield finding("warning", "few-images", name, "", f"{counted(len(split), 'image')} only")


def _of_sample(name: str, sample: Examined, labels: RawLabels, found: set[int]) -> Iterator[Finding]:
    for code, message in sample.faults:
        yield finding("error", code, name, sample.id, message)
    if sample.counts is None:
        return
    row = sample.counts
    foreign = sorted({int(raw) for raw in np.flatnonzero(row)} - labels.declared)
    if foreign:
        text = ", ".join(f"id {raw} ({counted(int(row[raw]), 'pixel')})" for raw in foreign)
        text += f"; declared: {ranges(labels.declared)}"
        yield Finding("error", "undeclared-id", name, sample.id, text, remedy(labels, found))
    if row[sorted(labels.void)].sum() == row.sum():
        yield finding("warning", "all-void", name, sample.id, "every pixel of the mask is void")
    if min(sample.size) == 1:
        text = f"the image is {sample.size[1]}x{sample.size[0]} pixels"
        yield finding("warning", "tiny-image", name, sample.id, text)
    for level, code, message in sample.notes:
        if level != "note":
            yield finding(level, code, name, sample.id, message)


def _together(name: str, samples: list[Examined]) -> Iterator[Finding]:
    """Join all samples with the same note into one finding."""
    noted: dict[str, list[str]] = {}
    for sample in samples:
        for level, code, message in sample.notes:
            if level == "note":
                noted.setdefault(code, []).append(message)
    for code, messages in noted.items():
        messages = list(dict.fromkeys(messages))
        what = "masks" if code == "palette-colours" else "images"
        yield finding("note", code, name, "", f"{len(messages)} {what}: {some(messages, 5)}")


def _no_data_images(name: str, labels: RawLabels, samples: list[Examined]) -> Iterator[Finding]:
    """Name the classes of pixels that GeoTIFF images call "no data"."""
    pixels: dict[int, int] = {}
    held = []
    for sample in samples:
        labelled = {raw: n for raw, n in sample.under_no_data.items() if raw in labels.names}
        held += [sample.id] if labelled else []
        for raw, count in labelled.items():
            pixels[raw] = pixels.get(raw, 0) + count
    total = sum(int(s.counts.sum()) for s in samples if s.counts is not None)
    if held:
        classes = [
            f"{labels.names[raw]} ({share(n / total)} of all pixels)" for raw, n in sorted(pixels.items())
        ]
        text = (
            f"{counted(len(held), 'image', 'has', 'have')} pixels without data (GDAL_NODATA) that the masks label "
            f"as {some(classes, 8)}: "
            f"{some(held, 5)}"
        )
        yield finding("warning", "no-data-image", name, "", text)


def _same_images(samples: Mapping[str, list[Examined]]) -> Iterator[Finding]:
    first: dict[str, dict[str, str]] = {}
    for name, of in samples.items():
        first[name] = {}
        twins = []
        for sample in of:
            other = first[name].setdefault(sample.digests[0], sample.id) if sample.digests[0] else sample.id
            if other != sample.id and not _window(sample.id):
                twins.append(f"{sample.id} = {other}")
        if twins:
            text = f"{counted(len(twins), 'image', 'is', 'are')} byte-identical to another of the split: {some(twins)}"
            yield finding("note", "twin-image", name, "", text)
    names = sorted(first, key=lambda name: name != "train")
    for at, name in enumerate(names):
        for other in names[:at]:
            shared = first[name].keys() & first[other].keys() - {""}
            if not shared:
                continue
            if other != "train" and first[name].keys() == first[other].keys():
                text = f"holds the same {counted(len(shared), 'image')} as '{other}'"
                yield finding("note", "same-split", name, "", text)
                continue
            level: Level = "error" if other == "train" else "warning"
            for sample in samples[name]:
                if sample.digests[0] in shared:
                    twin = f"byte-identical to {other}/{first[other][sample.digests[0]]}"
                    yield finding(level, "same-image", name, sample.id, twin)


def _window(sample: str) -> bool:
    """Whether a sample is one window of a picture, so that other samples share its file."""
    return re.fullmatch(r".*@\d+,\d+", sample, re.DOTALL) is not None


def _similar_images(samples: Mapping[str, list[Examined]]) -> Iterator[Finding]:
    """Find images of other splits that look like a training image, for example because it was encoded again."""
    train = [s for s in samples.get("train", []) if _has_content(s)]
    if not train:
        return
    known = {s.digests[0] for s in train}
    table = np.stack([np.frombuffer(s.signature, np.uint8) for s in train]).astype(np.float32)
    squares = (table**2).sum(axis=1)  # (T,), T = training images
    for name, of in samples.items():
        others = [s for s in of if name != "train" and _has_content(s) and s.digests[0] not in known]
        for start in range(0, len(others), 256):  # in parts, so that the distances fit into memory
            part = others[start : start + 256]
            rows = np.stack([np.frombuffer(s.signature, np.uint8) for s in part]).astype(np.float32)
            apart = squares[None] + (rows**2).sum(axis=1)[:, None] - 2 * rows @ table.T  # |a - b|^2, (n, T)
            for sample, nearest in zip(part, apart.argmin(axis=1), strict=True):
                twin = train[nearest]
                exact = float(((_grey(sample) - _grey(twin)) ** 2).mean())  # `apart` is rounded to float32
                if exact <= ALIKE**2:
                    yield finding(
                        "warning", "near-same-image", name, sample.id, f"looks like train/{twin.id}"
                    )


def _grey(sample: Examined) -> np.ndarray:
    return np.frombuffer(sample.signature, np.uint8).astype(np.float64)


def _has_content(sample: Examined) -> bool:
    return len(sample.signature) > 0 and float(_grey(sample).std()) > 4 * ALIKE


def _of_values(dataset: Dataset, samples: Mapping[str, list[Examined]]) -> Iterator[Finding]:
    """Find what the masks of all splits together say against the way they are read."""
    counts: dict[str, np.ndarray] = {}
    indexed: list[MaskFile] = []
    plain: list[MaskFile] = []
    for name, of in samples.items():
        for s in of:
            if s.counts is None:
                continue
            # The windows of a picture are one mask.
            place = f"{name}/{s.id.rpartition('@')[0] if _window(s.id) else s.id}"
            counts[place] = counts.get(place, np.zeros(len(s.counts), np.int64)) + s.counts
            held = s.stored.values() if s.palette else np.flatnonzero(s.counts).tolist()
            kind = "indexed" if s.palette else "ids"
            (indexed if s.palette else plain).append(
                MaskFile(place, kind, dict.fromkeys(held, 1), palette=s.palette)
            )
    if differ := palettes_differ(indexed):
        yield finding("error", "palettes-differ", "", "", differ)
    if not counts:
        return
    if all(getattr(split, "void_share", None) is not None for split in dataset.splits.values()):
        for doubt in mixed_kinds(plain, indexed):
            yield finding("error", "palettes-differ", "", "", doubt.found)
    named = [
        (
            None if s.no_data in dataset.labels.void else s.no_data,
            {int(i): int(s.counts[i]) for i in np.flatnonzero(s.counts)},
        )
        for name, of in samples.items()
        for s in of
        if s.counts is not None and not getattr(dataset.splits[name], "no_data_stated", True)
    ]
    for doubt in no_data_doubts(named):
        (raw,) = doubt.values
        text = f"{doubt.found}, which the description makes {dataset.labels.names.get(raw, 'undeclared')}"
        yield finding("error", "no-data", "", "", text)
    total = np.sum(list(counts.values()), axis=0)
    names, void = dataset.labels.names, list(dataset.labels.void)
    lost = float(total[void].sum() / max(1, total.sum()))
    held = np.flatnonzero(total).tolist()
    if len(held) == 1 and not lost and len(names) > 1:
        text = f"every pixel of every mask is '{names.get(held[0], f'id {held[0]}')}'"
        yield finding("error", "one-value", "", "", text)
    stated = [getattr(split, "void_share", None) for split in dataset.splits.values()]
    allowed = max((one for one in stated if one is not None), default=None)
    if allowed and lost > allowed:
        text = (
            f"{percent(lost)} % of the pixels are without annotation; void_share states {percent(allowed)} %"
        )
        yield finding("error", "void-share", "", "", text)
    by_colour = any(getattr(split, "colours", {}) for split in dataset.splits.values())
    if allowed == 0 and 255 in void and not by_colour:
        rows = [(place, {int(i): int(row[i]) for i in np.flatnonzero(row)}) for place, row in counts.items()]
        for doubt in void_doubts(rows):
            yield finding("error", "void-share", "", "", doubt.found)


def _colours(dataset: Dataset, samples: Mapping[str, list[Examined]]) -> dict[int, list[Colour]]:
    """Raw id -> the colours it has in the masks: those of the description, or of the masks' own palettes."""
    found: dict[int, list[Colour]] = {}
    for name, of in samples.items():
        for raw, colours in getattr(dataset.splits[name], "colours", {}).items():
            found.setdefault(raw, []).extend(colours)
        for sample in of:
            for raw, place in sample.stored.items():
                own = tuple(sample.palette[3 * place : 3 * place + 3])
                if len(own) == 3:
                    found.setdefault(raw, []).append((own[0], own[1], own[2]))
    return {raw: list(dict.fromkeys(colours)) for raw, colours in found.items()}


def _class_rows(
    labels: RawLabels, colours: Mapping[int, list[Colour]], samples: Mapping[str, list[Examined]]
) -> tuple[ClassRow, ...]:
    images: dict[str, np.ndarray] = {}
    pixels: dict[str, np.ndarray] = {}
    for name, of in samples.items():
        rows = [s.counts for s in of if s.counts is not None]
        table = np.stack(rows) if rows else np.zeros((0, labels.width), np.int64)
        images[name] = (table > 0).sum(axis=0)
        pixels[name] = table.sum(axis=0, dtype=np.int64)
    return tuple(
        ClassRow(
            raw,
            labels.names[raw],
            {name: int(images[name][raw]) for name in samples},
            {name: int(pixels[name][raw]) for name in samples},
            tuple(colours.get(raw, ())),
        )
        for raw in sorted(labels.names)
    )


def _of_classes(rows: Sequence[ClassRow], names: Sequence[str], missing: str) -> Iterator[Finding]:
    for row in rows:
        what = f"class {row.id} '{row.name}'"
        elsewhere = [name for name in names if name != "train" and row.images[name]]
        if not elsewhere and not row.images.get("train"):
            hint = "; do the ids of the masks start at 1, without a background?" if row.id == 0 else ""
            yield finding("warning", "class-missing", "", "", f"{what} {missing}{hint}")
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
            text = f"{what} is in {counted(count, 'training image')} only"
            yield finding("warning", "class-rare", "train", "", text)


def _changed(
    lock: Mapping[tuple[str, str], tuple[str, str]], digests: Mapping[tuple[str, str], tuple[str, str]]
) -> Iterator[Finding]:
    for place, before in lock.items():
        now = digests.get(place)
        if now is not None and now != before:
            what = " and ".join(
                kind for kind, a, b in zip(("image", "mask"), before, now, strict=True) if a != b
            )
            yield finding(
                "warning", "changed-file", *place, f"{what} changed since the lock file was written"
            )


FORMAT = 4
"""Version of the cached files; part of their name."""


def cache_file(split: Split) -> Path | None:
    """Path of the stored findings about a split; None for splits that are not files on disk."""
    decoding, root = getattr(split, "decoding", None), getattr(split, "root", None)
    if decoding is None or root is None:
        return None
    key = json.dumps([FORMAT, split.name, str(root), decoding()])
    return default_cache_dir() / "check" / f"{hashlib.sha256(key.encode()).hexdigest()}.npz"


def load_cache(file: Path) -> dict[str, Examined]:
    """Read the stored findings, by sample id; empty if the file is missing or damaged."""
    try:
        data = file.read_bytes()
    except OSError:
        return {}
    checksum, body = data[:32], data[32:]
    if hashlib.sha256(body).digest() != checksum:
        warnings.warn(f"Results of the last check in {file} are damaged; all files are read.", stacklevel=2)
        return {}
    with np.load(io.BytesIO(body), allow_pickle=False) as stored:
        palettes, texts = json.loads(stored["texts"].tobytes())
        counts, sizes, signatures, stamps = (stored[k] for k in ("counts", "sizes", "signatures", "stamps"))
    return {
        name: Examined(
            name,
            (),
            tuple((level, code, message) for level, code, message in notes),
            counts[i],
            (int(sizes[i, 0]), int(sizes[i, 1])),
            (image, mask),
            bytes.fromhex(palettes[palette]),
            dict(held),
            own,
            dict(under),
            signatures[i].tobytes(),
            tuple(stamps[i].tolist()) if stamps[i].any() else (),
        )
        for i, (name, notes, image, mask, palette, held, own, under) in enumerate(texts)
    }


def _wide(counts: np.ndarray | None, width: int) -> np.ndarray:
    """Pixels per raw id in so many columns; zeros where nothing was counted."""
    row = np.zeros(width, np.int32)
    if counts is not None:
        row[: len(counts)] = counts
    return row


def store_cache(file: Path, samples: Sequence[Examined]) -> None:
    """Store the findings about samples without faults. If the file cannot be written, nothing is stored."""
    healthy = [s for s in samples if not s.faults and s.counts is not None and s.digests[1]]
    if not healthy:
        return
    palettes = {palette: number for number, palette in enumerate(dict.fromkeys(s.palette for s in healthy))}
    rows = [
        [
            s.id,
            s.notes,
            *s.digests,
            palettes[s.palette],
            sorted(s.stored.items()),
            s.no_data,
            sorted(s.under_no_data.items()),
        ]
        for s in healthy
    ]
    texts = json.dumps([[palette.hex() for palette in palettes], rows]).encode()
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        texts=np.frombuffer(texts, np.uint8),
        counts=np.stack(
            [_wide(s.counts, max(len(h.counts) for h in healthy if h.counts is not None)) for s in healthy]
        ),
        sizes=np.array([s.size for s in healthy], np.int64),
        signatures=np.stack([np.frombuffer(s.signature, np.uint8) for s in healthy]).reshape(
            -1, SIGNATURE**2
        ),
        # All samples of a split have as many files; a sample without a stamp gets zeros.
        stamps=np.array([s.stamp or (0,) * max(len(h.stamp) for h in healthy) for s in healthy], np.int64),
    )
    body = buffer.getvalue()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, hashlib.sha256(body).digest() + body)
    except OSError:  # the check itself has finished; the class index warns if the cache cannot be written
        return
