"""`everseg report`: put everything that a run has stored together as one page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from everseg.config.fields import DataConfig, RunConfig, ScenarioConfig
from everseg.data.base import Dataset
from everseg.display import OnceADictionary, Piece, capital, for_files, percent, points
from everseg.engine.prepare import prepare
from everseg.engine.rescore import sources_of_test
from everseg.errors import CheckpointError, EversegError
from everseg.metrics import defined_mean, step_scores
from everseg.progress import Progress, time_text
from everseg.reports import extension, figures, glossary, memory, numbers, page, picture_grid
from everseg.reports.baselines import domain_rows, drop_against_single, joint_beside
from everseg.reports.charts import can_draw
from everseg.reports.compare.cost import training_seconds
from everseg.reports.figures import curves_of
from everseg.reports.kinds import MEANS, WORDS, Kind, Words, kind_of
from everseg.reports.provenance import provenance
from everseg.reports.published import PLOP_RULE, Match, matches_of
from everseg.reports.terminal import drop_text
from everseg.reports.verdict import verdict
from everseg.runs.commit import write_bytes
from everseg.runs.results import Results, Track
from everseg.runs.run_folder import RunFolder
from everseg.scenarios.steps import Source
from everseg.scenarios.summary import summarise

NAME = "report.html"
IMAGES = 64
"""Number of test images from which those of the grid are chosen."""
AUTOMATIC_IMAGES = 12
"""The same for the report that a run writes at its end."""
_SIDES = (320, 240, 160)
"""Longer sides of embedded pictures, in pixels. The first one that keeps the page within its limit is used."""


@dataclass(frozen=True, repr=False)
class ReportFile(OnceADictionary):
    """A report that `write_report` just wrote."""

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
    results: Results,
    config: RunConfig,
    *,
    out: Path | None = None,
    images: int = IMAGES,
    limit: int = page.LIMIT,
    progress: Progress | None = None,
) -> ReportFile:
    """Write a run's report.

    Args:
        results: results of a run with at least one finished step; its folder is never changed.
        config: the run's configuration; its data may have moved to another folder.
        out: file to write; default RUN/report.html.
        images: number of test images considered for the grid; 0 = no pictures.
        limit: maximum size of the page in bytes. To meet it, pictures are first reduced and then left out; the page
            states this.

    Raises:
        CheckpointError: no finished step, something damaged, or the file cannot be written.
    """
    progress = progress or Progress(quiet=True)
    tracks, notes = results.tracks, list[str]()
    data = _data(results, config.data, config.scenario, config.seed, progress, notes)
    looked = []
    if data is not None:
        looked = picture_grid.looked(
            results, config.data, config.train, data.tests, data.datasets, progress, notes,
            model=config.model, images=images, seed=config.seed,
        )  # fmt: skip
    drop = drop_against_single(results, config, notes) if results.config.data.domains else None
    per_class = [] if data is None else data.classes_per_step
    made = assemble(results, drop, per_class, notes, picture_grid.alternating(looked))
    made.grid_rule = picture_grid.rule(looked, config.seed, made.words)
    features = picture_grid.stored_features(results.folder.path, made.notes)
    made.change_legend = picture_grid.change_legend(made.words)
    for side, rows in [*((side, 2) for side in _SIDES), (_SIDES[-1], 1), (0, 0)]:
        shown = replace(made, notes=list(made.notes))
        if rows:
            shown.grids = picture_grid.grids(looked, tracks, side, rows, config.seed)
            shown.features = picture_grid.features(features, 4 * side)
        if (side, rows) != (_SIDES[0], 2):
            what = f"are reduced to {side} pixels" if rows else "are left out"
            shown.notes.append(f"Pictures {what} so that the page stays within {limit / 1e6:g} MB.")
        text = page.render(shown).encode()
        if len(text) <= limit:
            break
    target = out or results.folder.path / NAME
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


def report_at_the_end(
    results: Results, config: RunConfig, *, quiet: bool = False, rank: int = 0, again: bool = False
) -> None:
    """Write the report of a run that has just finished. A failure prints one warning and never fails the run.

    Args:
        rank: of this process; only the first one writes.
        again: write it even if a report newer than the scores is there.
    """
    progress = Progress(quiet=quiet, rank=rank)
    path = results.folder.path
    if rank or not (again or is_due(results.folder)):
        return
    try:
        made = write_report(results, config, images=AUTOMATIC_IMAGES, progress=progress)
        progress.message(f"report: {made.path}")
    except Exception as error:
        reason = str(error) or type(error).__name__
        progress.message(f"warning: no report ({reason}); everseg report {path} tries again")


def is_due(folder: RunFolder) -> bool:
    """Whether a run has no report yet, or a report older than its last scores."""
    target = folder.path / NAME
    scored = [folder.step(index) / "metrics.json" for index in folder.finished_steps]
    return not target.exists() or any(path.stat().st_mtime > target.stat().st_mtime for path in scored)


@dataclass(frozen=True)
class _Data:
    """The part of a run's data that a report needs."""

    datasets: Mapping[str, Dataset]
    tests: Sequence[Source]
    """What the last step is tested on."""
    classes_per_step: numbers.Rows
    """Images and pixels per class and step; [] where the training images are not at hand."""


def _data(
    results: Results,
    data: DataConfig,
    scenario: ScenarioConfig,
    seed: int,
    progress: Progress,
    notes: list[str],
) -> _Data | None:
    """Open the run's data, at least the test images; None, with a note, if they are missing or have changed."""
    last = results.steps[-1]
    try:
        prepared = prepare(data, scenario, progress, seed=seed)
    except (EversegError, OSError) as error:
        try:
            datasets, tests, told_names = sources_of_test(results, data, scenario)
        except (EversegError, OSError):
            notes.append(
                f"The data are not at hand, so there are no pictures and no pixels per class: {error}"
            )
            return None
        notes.append(
            f"Of the data only the test images are at hand, so there are no pixels per class: {error}"
        )
        notes += _sentences(told_names)
        return _Data(datasets, tests, [])
    # The one step of an extension has the number that follows the bundle's steps.
    step = next((step for step in prepared.steps if step.index == last.index), None)
    if step is None or dict(step.spaces) != last.spaces:
        notes.append("The data have other classes now than in the run, so there are no pictures.")
        return None
    notes += _sentences(prepared.notes)
    told = _class_data(summarise(prepared.steps, prepared.counts))
    return _Data(prepared.datasets, step.test, told)


def _sentences(notes: Sequence[str]) -> list[str]:
    return [f"{capital(text)}." for text in notes]


def assemble(
    results: Results,
    drop: Mapping[str, Any] | None,
    classes_per_step: numbers.Rows,
    notes: list[str],
    alternating: Mapping[str, float] | None = None,
) -> page.Page:
    """Collect the content of a report.

    Args:
        drop: the result of `drop_against_single` for a run over domains; None for others, and where it is unknown.
        classes_per_step: images and pixels per class; [] if the data are not available.
        notes: what is missing; this function may add notes.
        alternating: what `picture_grid.alternating` found in the pictures; None without pictures.
    """
    stored, tracks = results.config, results.tracks
    kind, several = kind_of(results), bool(stored.data.domains)
    extends = kind in (Kind.EXTENSION, Kind.REFINEMENT)
    notes += [*_state_notes(results), *filter(None, [results.journal_faults])]
    joint = joint_beside(results, notes) if results.is_complete() else None
    curves = curves_of(results.journal)
    try:
        images = results.steps[-1].images
    except EversegError as error:  # every other number is of the counts over all images
        images = {}
        notes.append(f"There are no scores of single images: {error}")
    result = page.Page(
        name=stored.name,
        sentence="" if extends else numbers.sentence(kind, tracks, taught=results.taught, domains=several),
        facts=_facts(results),
        cards=_domain_cards(tracks, drop) if several or len(tracks) > 1 else _cards(kind, tracks[0]),
        notes=notes,
        parts=[
            _part(
                track,
                len(tracks) > 1,
                number,
                joint,
                kind,
                _before(results, track) if extends else None,
                images.get(track.name),
            )
            for number, track in enumerate(tracks)
        ],
        training=figures.training_charts(curves, "training") if curves else [],
        speed=figures.speed_rows(curves) if curves else [],
        data=numbers.data_rows(results),
        kept=memory.kept_rows(results),
        kept_text=memory.kept_text(results),
        replaced=results.replaced,
        classes_per_step=classes_per_step,
        provenance=provenance(results),
        drawn=can_draw(),
        words=WORDS[kind],
        findings=verdict(results, kind, curves, alternating),
        glossary=glossary.words(results, kind, curves.terms if curves else [], joint=joint is not None),
        made="Every score is computed from the confusion counts in the run folder (steps/NN/confusion.npz).",
    )
    if extends:
        _add_extension(result, results)
    if figures_there := results.plop_figures:
        result.parts[0].reporting = numbers.reporting_rows(figures_there)
        result.parts[0].rule = PLOP_RULE
    if joint is not None:
        result.cards += _joint_cards(tracks, *joint)
    if several:
        _add_domains(result, results, drop)
    if results.is_complete():
        _add_published(result, results, drop)
    result.tables = _tables(result)
    result.numbers = _numbers(result)
    return result


def _add_extension(result: page.Page, results: Results) -> None:
    """Say what an extension taught, and leave out what the new images say nothing about."""
    told = [extension.Told.of(results, track.name) for track in results.tracks]
    result.sentence = extension.sentence(told[0])
    result.cards = extension.cards(told[0])
    result.notes += extension.notes(told[0], results.config.method.name)
    result.parts[0].branches = extension.kept_rows(told[0])
    for part, one, track in zip(result.parts, told, results.tracks, strict=True):
        part.taught, part.compared = numbers.taught_rows(one.taught), extension.rows(one)
        if one.hidden or one.step.others or not one.taught:
            part.steps = part.shown_steps = []
        if one.hidden or one.step.others:
            # Pixels without a label may show old classes: only what the new classes are taken for is known.
            part.charts = figures.flow_charts(track, part.key, result.words, [new.name for new in one.taught])
            part.confusion, part.counts = None, []
            part.images = part.class_images = []


def _add_domains(result: page.Page, results: Results, drop: Mapping[str, Any] | None) -> None:
    """Add the parts that only runs over domains have."""
    result.domain_rows = _domain_table(results)
    if kind_of(results) is Kind.DOMAINS:
        result.domain_groups = numbers.domain_group_rows(results.tracks)
    result.domain_chart = figures.domains_chart(results.tracks, "domains")
    said = {
        "table": result.domain_rows,
        "config": {"scenario": results.config.scenario.model_dump()},
        "relative_drop": drop,
    }
    text = drop_text(said)
    result.drop = capital(text)


def _add_published(result: page.Page, results: Results, drop: Mapping[str, Any] | None) -> None:
    """Add published numbers: those of the same setting beside the run's, the others with their differences."""
    mean = None if drop is None else drop["mean"]
    for match in matches_of(results):
        rows = (
            numbers.published_rows(
                match, results, _method(results.config.method.name, results.config.scenario), mean
            )
            if match.comparable
            else match.rows
        )
        (result.comparable if match.comparable else result.others).append(_source(match, rows))


def _method(name: str, scenario: ScenarioConfig) -> str:
    kind = "joint" if scenario.joint else "single-task" if scenario.single else ""
    return f"{kind}, {name}" if kind else name


def _state_notes(results: Results) -> list[str]:
    if results.is_complete():
        return []
    finished, planned = len(results.steps), len(results.planned)
    return [
        f"This run is not finished: only {finished} of {planned} steps are. The same command continues it."
    ]


def _facts(results: Results) -> list[tuple[str, str]]:
    config = results.config
    scenario, domains, kind = config.scenario, config.data.domains, kind_of(results)
    task = ("explicit steps" if not isinstance(scenario.task, str) else scenario.task) if not domains else ""
    facts = [
        ("kind of run", str(kind)),
        ("method", config.method.name),
        ("data", ", ".join(results.in_order(domains)) if domains else config.data.dataset),
        ("task", task),
        ("protocol", "" if domains or kind in (Kind.FIRST, Kind.REFINEMENT) else scenario.protocol),
        ("label policy", results.policy),
        ("model", config.model.name),
        (
            "initial weights",
            extension.start(results) if scenario.bundle is not None else config.model.weights or "random",
        ),
        ("steps", f"{len(results.steps)} of {len(results.planned)}"),
        ("memory", _memory(results)),
        ("training time", _duration(results)),
        ("seed", str(config.seed)),
    ]
    return [(key, value) for key, value in facts if value]


def _duration(results: Results) -> str:
    """Say how long the training took: seconds, m:ss min or h:mm:ss h; "" if it is not known."""
    try:
        seconds = training_seconds(results)
    except CheckpointError:  # a note says what the journal lacks
        return ""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    text = time_text(seconds)
    return f"{text} {'h' if text.count(':') == 2 else 'min'}"


def _memory(results: Results) -> str:
    kept = results.memories
    return f"{kept[-1].images} training images" if kept else ""


def _cards(kind: Kind, track: Track) -> list[tuple[str, str, str]]:
    """Summarise the last step in five numbers."""
    miou, plain = track.scores[-1]["miou"], track.scores[-1]["miou_without_background"]
    sequence, last = track.sequence, track.steps[-1]
    after = f" after step {last}" if kind is Kind.SEQUENCE else ""
    shown = [("all", f"mIoU of all classes{after}")]
    if kind is not Kind.FIRST and miou["old"] is not None:
        joint = kind is Kind.JOINT
        old = "the task's old classes" if joint else f"the classes known before step {last}"
        new = "its new classes" if joint else f"the classes added in step {last}"
        shown = [("old", f"mIoU of {old}"), ("new", f"mIoU of {new}"), *shown]
    cards = []
    for key, text in shown:
        without = "" if miou[key] == plain[key] else f"; {percent(plain[key])} without background"
        cards.append((key.capitalize(), percent(miou[key]), f"{text}{without}"))
    if len(track.steps) > 1:
        lost = sequence["forgetting"]["mean"]
        cards.append(("Average", percent(sequence["average_miou"]), "mean over the steps of mIoU of all"))
        cards.append(("Forgetting", percent(lost), "points of mIoU, mean over groups of classes"))
    return cards


def _joint_cards(own: Sequence[Track], name: str, joint: Mapping[str, Track]) -> list[tuple[str, str, str]]:
    """Name the upper bound beside the run's own numbers, and say so if it is none."""
    bound, reached = (
        defined_mean(track.scores[-1]["miou"]["all"] for track in tracks) for tracks in (joint.values(), own)
    )
    text = "mIoU of all classes, mean over domains" if len(joint) > 1 else "mIoU of all classes"
    text += f": the upper bound, measured in {name}"
    if bound is not None and reached is not None and reached > bound:
        text += f". This run is above it: {numbers.BEYOND}"
    return [("Joint", percent(bound), text)]


def _domain_cards(tracks: Sequence[Track], drop: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    cards = []
    for track in tracks[:6]:
        value, lost = track.scores[-1]["miou"]["all"], track.sequence["forgetting"]["mean"]
        text = f"mIoU after step {track.steps[-1]}"
        text += "" if lost is None else f"; forgetting {percent(lost)}"
        cards.append((track.name, percent(value), text))
    if drop is not None:
        cards.append(("Relative drop", f"{points(drop['mean'])} %", f"against {drop['source']}"))
    return cards


def _lead(words: Words, shown: numbers.Rows) -> str:
    """Explain the columns of the table of scores, and no others."""
    columns = set(shown[0])
    both = any(column.endswith("(no background)") for column in columns)
    said = [
        words.scores,
        words.parted if "old" in columns else "",
        words.base if "base" in columns else "",
        MEANS if both else "",
    ]
    return " ".join(filter(None, said)) if words.scores else ""


def _before(results: Results, track: Track) -> dict[str, float | None]:
    """Map each class that the new images label to its IoU with the deployed model."""
    return {one.name: one.before for one in results.steps[-1].old_on_new(track.name) if one.pixels}


def _part(
    track: Track,
    several: bool,
    number: int,
    joint: tuple[str, Mapping[str, Track]] | None,
    kind: Kind,
    before: Mapping[str, float | None] | None,
    images: np.ndarray | None,
) -> page.Part:
    """Put the results under one name together.

    Args:
        before: in extensions the IoU per class of the deployed model.
        images: counts of each test image after the last step (`StepResults.images`), if they are stored.
    """
    key = f"part{number}"
    bound = joint[1][track.name] if joint else None
    charts = [
        figures.steps_chart(track, f"{key}-steps"),
        figures.classes_chart(track, f"{key}-classes", WORDS[kind], joint=bound, before=before),
        *figures.flow_charts(track, key, WORDS[kind]),
    ]
    rows = numbers.step_rows(track)
    return page.Part(
        name=track.name if several else "",
        key=key,
        steps=rows,
        shown_steps=(shown := numbers.shown_step_rows(rows, track, parted=bool(WORDS[kind].parted))),
        lead=_lead(WORDS[kind], shown),
        matrix=numbers.matrix_rows(track, joint=bound),
        matrix_plain=numbers.matrix_rows(track, "_without_background", bound),
        joint=joint[0] if joint else "",
        groups=(group_rows := numbers.group_rows(track)),
        shown_groups=numbers.shown_group_rows(group_rows),
        turns=numbers.turn_rows(track),
        counts=numbers.count_rows(track),
        confusion=numbers.confusion(track),
        parted=not WORDS[kind].together and len(track.space.groups) > 1,
        counts_background=track.counts_background,
        images=numbers.image_rows(images),
        class_images=numbers.class_image_rows(images, track),
        charts=[chart for chart in charts if chart is not None],
    )


def _domain_table(results: Results) -> numbers.Rows:
    scores: dict[int, dict[str, float | None]] = {}
    for step in results.steps:
        for name, branch in step.branch_of.items():
            space = step.spaces[branch]
            sizes = [len(group) for group in space.groups]
            miou = step_scores(step.counts[name], sizes, space.background)["miou"]
            scores.setdefault(step.index, {})[name] = miou["all"]
    return domain_rows(scores, results)


def _source(match: Match, rows: numbers.Rows) -> page.Source:
    entry = match.published
    return page.Source(
        entry.title,
        entry.paper,
        entry.source,
        entry.url,
        match.conventions,
        rows,
        list(match.differences),
    )


def _class_data(per_step: Sequence[Mapping[str, Any]]) -> numbers.Rows:
    """Make rows of images and pixels per class and step from the result of `summarise`."""
    return [
        {"step": step["index"], "class": name, "images": entry["images"], "pixels": entry["pixels"]}
        for step in per_step
        for name, entry in step["classes"].items()
    ]


def _tables(made: page.Page) -> dict[str, numbers.Rows]:
    """Map file stems to rows for the CSV downloads."""
    found = {"domains": made.domain_rows, "domain-forgetting": made.domain_groups, "data": made.data,
             "memory": made.kept, "classes-per-step": made.classes_per_step, "speed": made.speed}  # fmt: skip
    for part in made.parts:
        stem = f"{part.name}-" if part.name else ""
        found |= {f"{stem}steps": part.steps, f"{stem}step-matrix": part.matrix,
                  f"{stem}step-matrix-no-background": part.matrix_plain,
                  f"{stem}new-classes": part.taught, f"{stem}before-after": part.compared,
                  f"{stem}branches": part.branches, f"{stem}forgetting": part.groups,
                  f"{stem}confusion-rises": part.turns,
                  f"{stem}confusion-counts": part.counts,
                  f"{stem}images": part.images, f"{stem}images-per-class": part.class_images,
                  f"{stem}plop-rule": part.reporting}  # fmt: skip
        found |= {f"{stem}{chart.key.rpartition('-')[2]}": chart.rows for chart in part.charts if chart.rows}
    for number, one in enumerate(made.comparable, 1):
        found[f"published-{number}"] = one.rows
    return {stem: for_files(rows) for stem, rows in found.items() if rows}


def _numbers(made: page.Page) -> dict[str, Any]:
    """Give the report as JSON: tables, published sources with their conventions, and provenance."""
    kept = {key: value for key, value in made.provenance.items() if key != "yaml"}
    return {
        "name": made.name,
        "sentence": made.sentence,
        "facts": dict(made.facts),
        "notes": made.notes,
        "verdict": [asdict(one) for one in made.findings],
        "replaced": made.replaced,
        "tables": made.tables,
        "published": [
            {**asdict(one), "rows": for_files(one.rows)} for one in (*made.comparable, *made.others)
        ],
        "memory": list(made.kept_text),
        "provenance": kept,
    }
