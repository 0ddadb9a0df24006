"""`everseg report`: everything a run has stored, put together as one page (floor 6)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from everseg.config.fields import RunConfig
from everseg.engine.run import Prepared, prepare
from everseg.errors import EversegError
from everseg.progress import Progress
from everseg.report import illustrate, page
from everseg.report.assemble import assemble
from everseg.runs.commit import write_bytes
from everseg.runs.folder import RunFolder
from everseg.runs.results import tracks_of

NAME = "report.html"
IMAGES = 64
"""Test images looked at for the grid."""
AUTOMATIC_IMAGES = 12
"""The same at the end of a run."""
_SIDES = (320, 240, 160)
"""Longer side of embedded pictures: the first that keeps the page within its limit."""


def write_report(
    folder: RunFolder,
    config: RunConfig,
    *,
    out: Path | None = None,
    images: int = IMAGES,
    limit: int = page.LIMIT,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a run's report.

    Args:
        folder: of a run with at least one finished step; read, never changed.
        config: its configuration; its data may lie elsewhere.
        out: file to write; default RUN/report.html.
        images: test images looked at for the grid; 0 = no pictures.
        limit: bytes of the page at most; pictures are reduced and then left out for it, which the page says.

    Returns:
        path, bytes, sentence, notes (what is missing and why), charts and pictures (how many there are).

    Raises:
        CheckpointError: no finished step, something damaged, or the file cannot be written.
    """
    progress = progress or Progress(quiet=True)
    tracks, notes = tracks_of(folder), list[str]()
    prepared = _prepared(folder, config, progress, notes)
    looked = illustrate.looked(folder, config, prepared, images, progress, notes) if prepared else []
    made = assemble(folder, config, tracks, prepared, notes)
    made.grid_rule = illustrate.rule(looked, config.seed)
    made.change_legend = illustrate.change_legend()
    for side, rows in [*((side, 2) for side in _SIDES), (_SIDES[-1], 1), (0, 0)]:
        shown = replace(made, notes=list(made.notes))
        if rows:
            shown.grids = illustrate.grids(looked, tracks, side, rows, config.seed)
            shown.features = illustrate.features(folder, 4 * side)
        if (side, rows) != (_SIDES[0], 2):
            what = f"are reduced to {side} pixels" if rows else "are left out"
            shown.notes.append(f"Pictures {what} so that the page stays within {limit / 1e6:g} MB.")
        text = page.render(shown).encode()
        if len(text) <= limit:
            break
    target = out or folder.path / NAME
    write_bytes(target, text)
    charts = [*shown.training, *(c for part in shown.parts for c in part.charts), shown.domain_chart]
    return {
        "path": str(target),
        "bytes": len(text),
        "sentence": shown.sentence,
        "notes": shown.notes,
        "charts": sum(1 for chart in charts if chart is not None and chart.svg),
        "pictures": sum(len(grid.rows) for grid in shown.grids),
    }


def is_due(folder: RunFolder) -> bool:
    """Whether a run has no report yet, or an older one than its last scores."""
    target = folder.path / NAME
    scored = [folder.step(index) / "metrics.json" for index in folder.finished_steps]
    return not target.exists() or any(path.stat().st_mtime > target.stat().st_mtime for path in scored)


def _prepared(folder: RunFolder, config: RunConfig, progress: Progress, notes: list[str]) -> Prepared | None:
    """The data as the run had them; None, with a note, where they are not at hand or others now."""
    try:
        prepared = prepare(config, progress)
    except (EversegError, OSError) as error:
        notes.append(f"The data are not at hand, so there are no pictures and no pixels per class: {error}")
        return None
    last = folder.finished_steps[-1]
    if last >= len(prepared.steps) or dict(prepared.steps[last].spaces) != folder.spaces(last):
        notes.append("The data have other classes now than in the run, so there are no pictures.")
        return None
    return prepared
