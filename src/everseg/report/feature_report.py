"""`everseg features`: what a step did to the encoder's features, as tables and pictures (floor 6)."""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from everseg.config.fields import RunConfig
from everseg.data.batches.loader import normalised_batches
from everseg.distributed import derive_seed
from everseg.engine.prepare import Prepared, prepare
from everseg.errors import ConfigError, DataError
from everseg.inference.count import user_builder, views_of
from everseg.labels import LabelSpace
from everseg.progress import Progress
from everseg.report.feature_plots import pictures
from everseg.report.features import TAP, Pixels, class_drift, draw_pixels, mean_drift
from everseg.report.tables import percent, table
from everseg.runs.commit import write_bytes, write_json, writing
from everseg.runs.folder import RunFolder
from everseg.scenarios.steps import Source


def compare(
    folder: RunFolder,
    config: RunConfig,
    *,
    before: int | None = None,
    after: int | None = None,
    out: Path | None = None,
    limit: int = 200,
    images: int = 200,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare the encoder's features after two steps of a run on the later step's test images; write tables and PNGs.

    Args:
        config: the run's configuration; its data may lie elsewhere.
        before: earlier finished step; default the one before `after`.
        after: later finished step; default the last one.
        out: folder for the files; default RUN/features/before-K-after-L.
        limit: most pixels per class and domain.
        images: most images per source, drawn with the seed.
        seed: of the draws and of t-SNE.

    Returns:
        What drift.json holds, and `path`, the folder.

    Raises:
        ConfigError: steps not finished or in the wrong order, no common branch, matplotlib or scikit-learn missing.
        DataError: the data have other classes than the run had.
    """
    before, after = _checked(folder, before, after, limit, images)
    progress = progress or Progress(quiet=True)
    spaces, known = folder.spaces(after), folder.spaces(before)
    left_out = _left_out(folder, before, after)
    if left_out:
        progress.message(f"note: left out, not known yet after step {before}: {', '.join(left_out)}")
    prepared = prepare(config, progress)
    if after >= len(prepared.steps) or dict(prepared.steps[after].spaces) != spaces:
        raise DataError(f"the data have other classes now than when {folder.path} was trained; restore them")
    sources = [_some_images(s, images, seed) for s in prepared.steps[after].test if s.branch in known]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    builder = user_builder(config)
    first, second = (folder.load_final(index, builder)[0].to(device) for index in (before, after))
    progress.begin(f"features of steps {before} and {after}", sum(len(s.indices) for s in sources))
    pixels = draw_pixels(
        (first, second),
        sources,
        spaces,
        lambda source: _batches(source, prepared, config, device),
        limit=limit,
        seed=seed,
        shown=lambda done: progress.update(done, {}, 0.0, 0.0),
    )
    progress.end()
    progress.message(f"projecting {len(pixels.label)} pixels")
    files = pictures(pixels, run=config.name, steps=(before, after), seed=seed)
    result: dict[str, Any] = {
        "run": config.name,
        "before": before,
        "after": after,
        "features": TAP,
        "channels": pixels.before.shape[1],
        "seed": seed,
        **_numbers(pixels, {source.name: source.branch for source in sources}, known),
        "left_out": left_out,
        "pictures": list(files),
    }
    target = out or folder.path / "features" / f"before-{before}-after-{after}"
    _write(target, result, files)
    return {**result, "path": str(target)}


def _numbers(pixels: Pixels, branches: Mapping[str, str], known: Mapping[str, LabelSpace]) -> dict[str, Any]:
    """Drift per class and domain, and its means.

    Args:
        branches: domain -> branch.
        known: branch -> label space before; other classes are new.
    """
    rows = class_drift(pixels)
    return {
        "branches": dict(branches),
        "classes": [
            {**asdict(row), "new": row.class_name not in known[branches[row.domain]].names} for row in rows
        ],
        "means": {
            domain: mean_drift([row for row in rows if row.domain == domain])
            for domain in dict.fromkeys(row.domain for row in rows)
        },
    }


def _checked(
    folder: RunFolder, before: int | None, after: int | None, limit: int, images: int
) -> tuple[int, int]:
    """The two steps; what cannot be done is refused here, all of it at once, before any work."""
    problems = []
    finished = folder.finished_steps
    after = finished[-1] if after is None and finished else after or 0
    before = max(after - 1, 0) if before is None else before
    listing = ", ".join(map(str, finished)) or "none yet"
    if len(finished) < 2 or {before, after} - set(finished):
        problems.append(
            f"--before {before} --after {after}: two finished steps are needed; those of {folder.path} are {listing}"
        )
    elif before >= after:
        problems.append(f"--before {before} --after {after}: the first must be the earlier step")
    problems += [
        f"--{name} {value}: at least 1 is expected"
        for name, value in (("pixels", limit), ("images", images))
        if value < 1
    ]
    for package in ("matplotlib", "sklearn"):
        try:
            importlib.import_module(package)
        except ImportError:
            problems.append(f"features need {package}: pip install 'everseg[plot]'")
    if problems:
        raise ConfigError(problems)
    return before, after


def _left_out(folder: RunFolder, before: int, after: int) -> list[str]:
    """Branches that only the later step knows; it must not be all of them."""
    known, spaces = folder.spaces(before), folder.spaces(after)
    left_out = [branch for branch in spaces if branch not in known]
    if len(left_out) == len(spaces):
        raise ConfigError(
            f"steps {before} and {after} of {folder.path} have no branch in common: "
            f"they know {', '.join(known)} and {', '.join(spaces)}"
        )
    return left_out


def _some_images(source: Source, most: int, seed: int) -> Source:
    """At most so many of its images, drawn, in their order."""
    if len(source.indices) <= most:
        return source
    stream = np.random.default_rng(derive_seed(seed, source.name, source.split))
    drawn = np.sort(stream.choice(len(source.indices), most, replace=False))
    return replace(source, indices=tuple(source.indices[i] for i in drawn.tolist()))


def _batches(
    source: Source, prepared: Prepared, config: RunConfig, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Sequence[str]]]:
    """The images of a source as the model is tested on them."""
    views = views_of([source], prepared.datasets)
    for loaded, batch in normalised_batches(views, config.data, device, batch=config.train.eval_batch):
        yield batch.image, loaded.label, loaded.ids


def _write(target: Path, result: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(result["classes"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(result["classes"])
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_bytes(target / name, data)
    write_bytes(target / "drift.csv", text.getvalue().encode())
    write_json(target / "drift.json", result)


def drift_table(result: Mapping[str, Any]) -> Table:
    """One row per domain and class, and the mean over the classes of each domain.

    Args:
        result: what `compare` gives.
    """
    numbers = ["pixels", "distance", "of spread", "cosine", "accuracy before", "after", "falls by"]
    rows: list[list[object]] = []
    for domain, mean in result["means"].items():
        mine = [row for row in result["classes"] if row["domain"] == domain]
        for row in mine:
            name = f"{row['class_name']} (new)" if row["new"] else row["class_name"]
            rows.append([domain, name, row["pixels"], *_cells(row)])
        rows.append([domain, "mean of classes", sum(row["pixels"] for row in mine), *_cells(mean)])
    title = (
        f"{result['run']}: drift of the class centres from step {result['before']} to step {result['after']} "
        "(encoder features of the same pixels; accuracy in percent of the nearest centre before)"
    )
    return table(["domain", "class", *numbers], rows, title=title, right="|".join(numbers))


def _cells(row: Mapping[str, Any]) -> list[str]:
    values = [row[key] for key in ("distance", "relative", "cosine")]
    before, after = row["accuracy_before"], row["accuracy_after"]
    return [
        *("-" if value is None else f"{value:.3f}" for value in values),
        *(percent(value) for value in (before, after, before - after)),
    ]
