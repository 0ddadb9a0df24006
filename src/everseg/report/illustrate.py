"""The report's pictures: the grid of test images and its rule, and stored feature plots (floor 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from everseg.config.fields import RunConfig
from everseg.engine.run import Prepared
from everseg.errors import CheckpointError, EversegError
from everseg.inference.count import user_builder
from everseg.inference.pictures import palette
from everseg.progress import Progress
from everseg.report.grid import CHANGE_COLOURS, Looked, change, choose, drawn, look
from everseg.report.images import labels, photo, stored_picture
from everseg.report.page import Grid, Picture, PictureRow
from everseg.runs.commit import read_document
from everseg.runs.folder import RunFolder
from everseg.runs.results import Track

MOST_COLUMNS = 4
"""Steps shown in the grid; of more, the first, the last and some between."""
_CHANGE_TEXT = (
    "right", "forgotten: right after an earlier step, wrong now", "learnt: right now for the first time",
    "wrong after every step", "not labelled",
)  # fmt: skip


def looked(
    folder: RunFolder,
    config: RunConfig,
    prepared: Prepared,
    images: int,
    progress: Progress,
    notes: list[str],
) -> list[Looked]:
    """Test images of the last step, drawn with the run's seed, through the steps' models; [] and a note if it fails."""
    if images < 1:
        notes.append("Made without pictures.")
        return []
    finished = folder.finished_steps
    sources = drawn(prepared.steps[finished[-1]].test, images, config.seed)
    steps = shown_steps(finished)
    progress.begin("pictures for the report", len(steps) * sum(len(s.indices) for s in sources))
    try:
        return look(
            folder, config, sources, prepared.datasets, steps, builder=user_builder(config),
            shown=lambda done: progress.update(done, {}, 0.0, 0.0),
        )  # fmt: skip
    except EversegError as error:
        notes.append(f"There are no pictures: {error}")
        return []
    finally:
        progress.end()


def shown_steps(finished: Sequence[int]) -> list[int]:
    """All steps up to MOST_COLUMNS of them, else the first, the last and evenly some between."""
    if len(finished) <= MOST_COLUMNS:
        return list(finished)
    return [finished[i] for i in np.linspace(0, len(finished) - 1, MOST_COLUMNS).round().astype(int)]


def rule(found: Sequence[Looked], seed: int) -> str:
    """How the pictures were chosen, in words."""
    steps = sorted({step for one in found for step in one.predictions})
    through = ", ".join(map(str, steps))
    return (
        f"Chosen by rule, not by hand: {len(found)} test images drawn with seed {seed} went through the models of "
        f"step{'s' if len(steps) > 1 else ''} {through}. Each is ranked by its mean IoU after the last step over the "
        "classes known before that step (all classes where there are none), and the worst, the median and the best "
        "are shown, then some of the rest drawn with the same seed."
    )


def grids(found: Sequence[Looked], tracks: Sequence[Track], side: int, rows: int, seed: int) -> list[Grid]:
    """The chosen images with what every step's model made of them.

    Args:
        side: longer side of the pictures in pixels.
        rows: images per kind; 1 where there are several domains.
    """
    known = {track.name: track for track in tracks}
    found = [one for one in found if one.name in known]
    each = rows if len({one.name for one in found}) == 1 else 1
    old = {name: t.old or list(range(t.space.num_classes)) for name, t in known.items()}
    sizes = {name: t.space.num_classes for name, t in known.items()}
    chosen = choose(found, old, sizes, each, seed)
    steps = sorted({step for one in found for step in one.predictions})
    result = []
    for name in dict.fromkeys(one.name for one in chosen):
        mine = [one for one in chosen if one.name == name]
        present = sorted(
            {c for one in mine for ids in (one.label, *one.predictions.values()) for c in np.unique(ids)}
        )
        space, colours = known[name].space, palette(known[name].space.num_classes)
        legend = [(css(colours[c]), space.names[c]) for c in present if c < space.num_classes]
        heads = ["image", "truth", *(f"after step {step}" for step in steps), "change"]
        result.append(
            Grid(name if len(known) > 1 else "", heads, [_row(one, steps, side) for one in mine], legend)
        )
    return result


def _row(one: Looked, steps: Sequence[int], side: int) -> PictureRow:
    shown: list[Picture | None] = [
        Picture(photo(one.image, side), f"test image {one.id}"),
        Picture(labels(one.label, side), f"true classes of {one.id}"),
    ]
    for step in steps:
        ids = one.predictions.get(step)
        text = f"classes of {one.id} after step {step}"
        shown.append(None if ids is None else Picture(labels(ids, side), text))
    shown.append(
        Picture(labels(change(one), side, CHANGE_COLOURS), f"what changed in {one.id} over the steps")
    )
    score = "" if one.score is None else f"IoU {100 * one.score:.1f}"
    return PictureRow(one.kind.capitalize(), f"{one.id} · {score}", shown)


def change_legend() -> list[tuple[str, str]]:
    """Colours of the last column."""
    return [(css(colour), text) for colour, text in zip(CHANGE_COLOURS, _CHANGE_TEXT, strict=True)]


def css(colour: Sequence[int]) -> str:
    """RGB 0 ... 255 as CSS writes it."""
    return f"rgb({', '.join(str(int(value)) for value in colour)})"


def features(folder: RunFolder, side: int) -> list[dict[str, Any]]:
    """The plots and numbers that `everseg features` left in the run folder."""
    found = []
    for path in sorted((folder.path / "features").glob("*/drift.json")):
        try:
            stored = read_document(path, "before", "after", "pictures", "classes")
            named = {
                str(name): stored_picture(path.with_name(str(name)), side) for name in stored["pictures"]
            }
            rows = [_drift_row(row) for row in stored["classes"]]
        except (CheckpointError, KeyError, TypeError):
            continue
        title = f"Step {stored['before']} against step {stored['after']}"
        pictures = [
            Picture(
                uri, f"{name.removesuffix('.png').replace('_', ' by ')}: {title}; the numbers stand below"
            )
            for name, uri in named.items()
            if uri is not None
        ]
        found.append({"title": title, "pictures": pictures, "rows": rows})
    return found


def _drift_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "domain": row["domain"],
        "class": row["class_name"],
        "pixels": row["pixels"],
        "drift of the centre / spread": row["relative"],
        "nearest-centre accuracy before": 100 * row["accuracy_before"],
        "after": 100 * row["accuracy_after"],
    }
