"""`everseg report`: everything a run has stored, put together as one page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from everseg.config.fields import RunConfig
from everseg.display import OnceADictionary, Piece
from everseg.engine.run import Prepared, prepare
from everseg.errors import EversegError
from everseg.metrics import step_scores
from everseg.progress import Progress
from everseg.reports import figures, numbers, page, picture_grid
from everseg.reports.baselines import domain_rows, drop_against_single, joint_beside, taught
from everseg.reports.charts import can_draw
from everseg.reports.figures import read_curves
from everseg.reports.provenance import provenance
from everseg.reports.published import Match, matches
from everseg.reports.terminal import drop_text
from everseg.runs.commit import write_bytes
from everseg.runs.folder import RunFolder
from everseg.runs.results import Track, planned_steps, replaced_text, tracks_of
from everseg.scenarios.summary import summarise

NAME = "report.html"
IMAGES = 64
"""Test images looked at for the grid."""
AUTOMATIC_IMAGES = 12
"""The same at the end of a run."""
_SIDES = (320, 240, 160)
"""Longer side of embedded pictures: the first that keeps the page within its limit."""


@dataclass(frozen=True, repr=False)
class ReportFile(OnceADictionary):
    """A report that was just written."""

    path: Path
    bytes: int
    """Size of the page."""
    sentence: str
    """The result in words, as it stands at the top of the page."""
    charts: int
    """How many charts the page has."""
    pictures: int
    """How many test images it shows."""
    notes: tuple[str, ...] = ()
    """What is missing on the page, and why."""

    def shown(self) -> Iterator[Piece]:
        yield self.sentence
        yield f"report: {self.path} ({self.bytes / 1e6:.1f} MB)"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "notes": list(self.notes)}


def write_report(
    folder: RunFolder,
    config: RunConfig,
    *,
    out: Path | None = None,
    images: int = IMAGES,
    limit: int = page.LIMIT,
    progress: Progress | None = None,
) -> ReportFile:
    """Write a run's report.

    Args:
        folder: of a run with at least one finished step; read, never changed.
        config: its configuration; its data may lie elsewhere.
        out: file to write; default RUN/report.html.
        images: test images looked at for the grid; 0 = no pictures.
        limit: bytes of the page at most; pictures are reduced and then left out for it, which the page says.

    Raises:
        CheckpointError: no finished step, something damaged, or the file cannot be written.
    """
    progress = progress or Progress(quiet=True)
    tracks, notes = tracks_of(folder), list[str]()
    prepared = _prepared(folder, config, progress, notes)
    looked = picture_grid.looked(folder, config, prepared, images, progress, notes) if prepared else []
    made = assemble(folder, config, tracks, prepared, notes)
    made.grid_rule = picture_grid.rule(looked, config.seed)
    made.change_legend = picture_grid.change_legend()
    for side, rows in [*((side, 2) for side in _SIDES), (_SIDES[-1], 1), (0, 0)]:
        shown = replace(made, notes=list(made.notes))
        if rows:
            shown.grids = picture_grid.grids(looked, tracks, side, rows, config.seed)
            shown.features = picture_grid.features(folder, 4 * side)
        if (side, rows) != (_SIDES[0], 2):
            what = f"are reduced to {side} pixels" if rows else "are left out"
            shown.notes.append(f"Pictures {what} so that the page stays within {limit / 1e6:g} MB.")
        text = page.render(shown).encode()
        if len(text) <= limit:
            break
    target = out or folder.path / NAME
    write_bytes(target, text)
    charts = [*shown.training, *(c for part in shown.parts for c in part.charts), shown.domain_chart]
    return ReportFile(
        path=target,
        bytes=len(text),
        sentence=shown.sentence,
        notes=tuple(shown.notes),
        charts=sum(1 for chart in charts if chart is not None and chart.svg),
        pictures=sum(len(grid.rows) for grid in shown.grids),
    )


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
    notes += [f"{text[:1].upper()}{text[1:]}." for text in prepared.notes]
    return prepared


def assemble(
    folder: RunFolder, config: RunConfig, tracks: Sequence[Track], prepared: Prepared | None, notes: list[str]
) -> page.Page:
    """Everything a report says.

    Args:
        config: may name other single-task numbers than the stored configuration.
        prepared: the run's data, for the pixels per class; None where they are not at hand.
        notes: what is missing; more may be added.
    """
    stored, steps = folder.config(), planned_steps(folder)
    scenario, several = stored.scenario, bool(stored.data.domains)
    learnt, drop = taught(folder), drop_against_single(folder, config, notes) if several else None
    notes += _state_notes(folder, steps)
    joint = joint_beside(folder, stored, tracks, notes) if len(folder.finished_steps) == len(steps) else None
    curves = read_curves(folder.path / "journal.jsonl")
    result = page.Page(
        name=stored.name,
        sentence=numbers.sentence(
            tracks, joint=scenario.joint, single=scenario.single, taught=learnt, domains=several
        ),
        facts=_facts(stored, folder, steps),
        cards=_domain_cards(tracks, drop) if several or len(tracks) > 1 else _cards(tracks[0]),
        notes=notes,
        parts=[_part(track, len(tracks) > 1, number, joint) for number, track in enumerate(tracks)],
        training=figures.training_charts(curves, "training") if curves else [],
        speed=figures.speed_rows(curves) if curves else [],
        data=numbers.data_rows(steps, folder),
        replaced=replaced_text(folder),
        classes_per_step=_class_data(summarise(prepared.steps, prepared.counts)) if prepared else [],
        provenance=provenance(folder, stored),
        drawn=can_draw(),
        made="Every score is computed from the confusion counts in the run folder (steps/NN/confusion.npz).",
    )
    if several:
        _add_domains(result, folder, stored, tracks, learnt, drop)
    if len(folder.finished_steps) == len(steps):
        _add_published(result, stored, steps, tracks, drop)
    result.tables = _tables(result)
    result.numbers = _numbers(result)
    return result


def _add_domains(
    result: page.Page,
    folder: RunFolder,
    config: RunConfig,
    tracks: Sequence[Track],
    learnt: Mapping[int, str],
    drop: Mapping[str, Any] | None,
) -> None:
    """What only runs over domains have."""
    result.domain_rows = _domain_table(folder, learnt)
    result.domain_groups = numbers.domain_group_rows(tracks)
    result.domain_chart = figures.domains_chart(tracks, "domains")
    said = {
        "table": result.domain_rows,
        "config": {"scenario": config.scenario.model_dump()},
        "relative_drop": drop,
    }
    text = drop_text(said)
    result.drop = text[:1].upper() + text[1:]


def _add_published(
    result: page.Page,
    config: RunConfig,
    steps: Sequence[Mapping[str, Any]],
    tracks: Sequence[Track],
    drop: Mapping[str, Any] | None,
) -> None:
    """Published numbers: those of exactly this setting beside the run's, the others with what differs."""
    domains = {name: domain.dataset for name, domain in config.data.domains.items()}
    mean = None if drop is None else drop["mean"]
    for match in matches(config, learnt_sets(config, steps)):
        rows = (
            numbers.published_rows(match, tracks, _method(config), domains, mean) if match.comparable else []
        )
        (result.comparable if match.comparable else result.others).append(_source(match, rows))


def _method(config: RunConfig) -> str:
    kind = "joint" if config.scenario.joint else "single-task" if config.scenario.single else ""
    return f"{kind}, {config.method.name}" if kind else config.method.name


def _state_notes(folder: RunFolder, steps: Sequence[Mapping[str, Any]]) -> list[str]:
    finished = folder.finished_steps
    missing = len(steps) - len(finished)
    if not missing:
        return []
    return [
        f"This run is not finished: {len(finished)} of {len(steps)} steps are. The same command continues it."
    ]


def _facts(config: RunConfig, folder: RunFolder, steps: Sequence[Any]) -> list[tuple[str, str]]:
    scenario, domains = config.scenario, config.data.domains
    task = ("explicit steps" if not isinstance(scenario.task, str) else scenario.task) if not domains else ""
    facts = [
        ("method", _method(config)),
        ("data", ", ".join(domains) if domains else config.data.dataset),
        ("task", task),
        ("protocol", "" if domains else scenario.protocol),
        ("model", config.model.name),
        ("initial weights", config.model.weights or "random"),
        ("steps", f"{len(folder.finished_steps)} of {len(steps)}"),
        ("seed", str(config.seed)),
    ]
    return [(key, value) for key, value in facts if value]


def _cards(track: Track) -> list[tuple[str, str, str]]:
    """The last step in five numbers."""
    miou, plain = track.scores[-1]["miou"], track.scores[-1]["miou_without_background"]
    sequence, last = track.sequence, track.steps[-1]
    shown = [("all", f"mIoU of all classes after step {last}")]
    if miou["old"] is not None:
        joint = len(track.steps) == 1
        old = "the task's old classes" if joint else f"the classes known before step {last}"
        new = "its new classes" if joint else f"the classes added in step {last}"
        shown = [("old", f"mIoU of {old}"), ("new", f"mIoU of {new}"), *shown]
    cards = []
    for key, text in shown:
        without = "" if miou[key] == plain[key] else f"; {numbers.shown(plain[key])} without background"
        cards.append((key.capitalize(), numbers.shown(miou[key]), f"{text}{without}"))
    if len(track.steps) > 1:
        lost = sequence["forgetting"]["mean"]
        cards.append(
            ("Average", numbers.shown(sequence["average_miou"]), "mean over the steps of mIoU of all")
        )
        cards.append(("Forgetting", numbers.shown(lost), "points of mIoU, mean over groups of classes"))
    return cards


def _domain_cards(tracks: Sequence[Track], drop: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    cards = []
    for track in tracks[:6]:
        value, lost = track.scores[-1]["miou"]["all"], track.sequence["forgetting"]["mean"]
        text = f"mIoU after step {track.steps[-1]}"
        text += "" if lost is None else f"; forgetting {numbers.shown(lost)}"
        cards.append((track.name, numbers.shown(value), text))
    if drop is not None:
        cards.append(("Relative drop", f"{100 * drop['mean']:+.1f} %", f"against {drop['source']}"))
    return cards


def _part(
    track: Track, several: bool, number: int, joint: tuple[str, Mapping[str, Track]] | None
) -> page.Part:
    key = f"part{number}"
    bound = joint[1][track.name] if joint else None
    charts = [
        figures.steps_chart(track, f"{key}-steps"),
        figures.classes_chart(track, f"{key}-classes"),
        figures.flow_chart(track, f"{key}-flow"),
    ]
    return page.Part(
        name=track.name if several else "",
        key=key,
        steps=numbers.step_rows(track),
        matrix=numbers.matrix_rows(track, joint=bound),
        matrix_plain=numbers.matrix_rows(track, "_without_background", bound),
        joint=joint[0] if joint else "",
        groups=numbers.group_rows(track),
        turns=numbers.turn_rows(track),
        charts=[chart for chart in charts if chart is not None],
    )


def _domain_table(folder: RunFolder, learnt: Mapping[int, str]) -> numbers.Rows:
    rows = []
    for index in folder.finished_steps:
        counts, spaces = folder.counts(index), folder.spaces(index)
        for name, branch in folder.paths(index).items():
            space = spaces[branch]
            scores = step_scores(counts[name], [len(group) for group in space.groups], space.background)
            rows.append({"index": index, "name": name, "miou": scores["miou"]})
    return domain_rows(rows, learnt)


def learnt_sets(config: RunConfig, steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Data sets in the order in which domains were learnt whole; [] of mixed runs."""
    if not config.data.domains or any(s.classes or s.add for s in config.scenario.steps or []):
        return []
    order = [source.get("domain") or source["dataset"] for step in steps for source in step["train"]]
    return [config.data.domains[name].dataset for name in dict.fromkeys(order) if name in config.data.domains]


def _source(match: Match, rows: numbers.Rows) -> page.Source:
    entry = match.published
    return page.Source(
        entry.title,
        entry.paper,
        entry.source,
        entry.url,
        numbers.conventions(match),
        rows,
        list(match.differences),
    )


def _class_data(per_step: Sequence[Mapping[str, Any]]) -> numbers.Rows:
    """Images and pixels per class and step, from what `summarise` gives."""
    return [
        {"step": step["index"], "class": name, "images": entry["images"], "pixels": entry["pixels"]}
        for step in per_step
        for name, entry in step["classes"].items()
    ]


def _tables(made: page.Page) -> dict[str, numbers.Rows]:
    """File stem -> rows for the CSV downloads."""
    found = {"domains": made.domain_rows, "domain-forgetting": made.domain_groups, "data": made.data,
             "classes-per-step": made.classes_per_step, "speed": made.speed}  # fmt: skip
    for part in made.parts:
        stem = f"{part.name}-" if part.name else ""
        found |= {f"{stem}steps": part.steps, f"{stem}step-matrix": part.matrix,
                  f"{stem}step-matrix-no-background": part.matrix_plain,
                  f"{stem}forgetting": part.groups, f"{stem}confusion-rises": part.turns}  # fmt: skip
        found |= {f"{stem}{chart.key.rpartition('-')[2]}": chart.rows for chart in part.charts if chart.rows}
    for number, one in enumerate(made.comparable, 1):
        found[f"published-{number}"] = one.rows
    return {stem: rows for stem, rows in found.items() if rows}


def _numbers(made: page.Page) -> dict[str, Any]:
    """Everything as JSON: the tables, the published sources with their conventions, where it comes from."""
    kept = {key: value for key, value in made.provenance.items() if key != "yaml"}
    return {
        "name": made.name,
        "sentence": made.sentence,
        "facts": dict(made.facts),
        "notes": made.notes,
        "replaced": made.replaced,
        "tables": made.tables,
        "published": [asdict(one) for one in (*made.comparable, *made.others)],
        "provenance": kept,
    }
