"""`everseg compare`: compare runs, with means over seeds, as HTML, Markdown, CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import commonpath
from pathlib import Path
from typing import Any

import everseg
from everseg.display import OnceADictionary, Piece
from everseg.errors import ConfigError, near_miss
from everseg.files import real_path
from everseg.reports.compare import tables as shown
from everseg.reports.compare.groups import (
    Group,
    Result,
    Table,
    found_folders,
    read,
    settings_apart,
    tables_of,
)
from everseg.reports.compare.statistics import (
    Draws,
    draws_of,
    numbers_of,
    of_differences,
    of_scores,
    over_seeds,
    paired,
    spread,
)
from everseg.reports.published import Match, matches_of
from everseg.runs.commit import write_bytes
from everseg.runs.results import Results


@dataclass(frozen=True)
class Estimate:
    """One number of a group over its seeds. Scores are fractions, times are seconds, memory and data are bytes."""

    mean: float | None
    sd: float | None
    """Sample standard deviation (n - 1); None for fewer than two values."""
    n: int
    """Values that are defined."""
    interval: tuple[float, float] | None
    """Where 95 % of the means lie over resampled test images; None where the runs stored no counts per image."""

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Estimate:
        found = stored.get("interval")
        return cls(stored["mean"], stored["sd"], stored["n"], None if found is None else tuple(found))


@dataclass(frozen=True)
class ComparedGroup:
    """Runs that differ only in their seed."""

    name: str
    """The method, and what tells it from others of that method."""
    joint: bool
    """Whether it is joint training, the upper bound."""
    seeds: tuple[int, ...]
    runs: tuple[Path, ...]
    """Run folder of each seed."""
    values: Mapping[str, tuple[float | None, ...]]
    """Name of a number -> its value in each run."""
    scores: Mapping[str, Estimate]
    """Name of a number -> mean and deviation over the seeds; costs are numbers too (seconds, bytes, counts)."""
    differences: Mapping[str, Estimate] | None
    """Name of a number -> difference of runs with the same seed from the table's base; None for the base."""


@dataclass(frozen=True)
class PublishedNumbers:
    """A published source that used the same conventions as some groups; all numbers are percent."""

    title: str
    paper: str
    source: str
    """Where the numbers were read."""
    url: str
    conventions: tuple[str, ...]
    columns: tuple[str, ...]
    ours: Mapping[str, Mapping[str, Estimate]]
    """Group -> column -> its number in the source's convention."""
    rows: Mapping[str, Mapping[str, float | None]]
    """Published method -> column -> number."""


@dataclass(frozen=True)
class NotComparable:
    """A published source for the same data and task that used other conventions."""

    source: str
    groups: tuple[str, ...]
    because: tuple[str, ...]


@dataclass(frozen=True)
class ComparedTable:
    """Groups with the same data, task, protocol, label convention and test images."""

    title: str
    question: str
    """What a reader compares these groups for."""
    facts: Mapping[str, str]
    """What the runs have in common."""
    reasons: tuple[str, ...]
    """In what it differs from the first table."""
    numbers: tuple[str, ...]
    """Names of the numbers, in their order; those that end in " (no bg)" leave the background out."""
    base: str
    """Group that differences are taken from."""
    groups: tuple[ComparedGroup, ...]
    """The best over all classes (over domains: by the mean of them) first, joint training last."""
    settings: tuple[Mapping[str, str], ...]
    """Rows of settings that differ besides the method."""
    published: tuple[PublishedNumbers, ...]
    not_comparable: tuple[NotComparable, ...]


@dataclass(frozen=True, repr=False, eq=False)
class Comparison(OnceADictionary):
    """The result of `compare`: means over seeds, paired differences, published numbers."""

    tables: tuple[ComparedTable, ...]
    files: tuple[Path, ...]
    """compare.html, .csv, .tex, .md and, for each table with a picture, .svg; () where none was written."""
    notes: tuple[str, ...] = ()
    """Runs that were left out or counted once, and what else to know."""
    _made: Mapping[str, Any] = field(default_factory=dict)
    """Everything as JSON; what stands in the files is made of it."""

    @classmethod
    def of(cls, made: Mapping[str, Any]) -> Comparison:
        """Make a comparison from the result of `collect`."""
        tables = tuple(_typed(table) for table in made["tables"])
        return cls(tables, tuple(map(Path, made["files"])), tuple(made["notes"]), made)

    def shown(self) -> Iterable[Piece]:
        yield from shown.terminal(self._made)
        if self.files:
            yield ", ".join(map(str, self.files))

    def to_json(self) -> dict[str, Any]:
        return dict(self._made)


def _typed(table: Mapping[str, Any]) -> ComparedTable:
    """Convert one table of `collect` to the public types."""
    groups = tuple(
        ComparedGroup(
            name=group["name"],
            joint=group["joint"],
            seeds=tuple(group["seeds"]),
            runs=tuple(map(Path, group["runs"])),
            values={name: tuple(values) for name, values in group["values"].items()},
            scores=_estimates(group["scores"]),
            differences=None if group["differences"] is None else _estimates(group["differences"]),
        )
        for group in table["groups"]
    )
    published = tuple(
        PublishedNumbers(
            **{key: source[key] for key in ("title", "paper", "source", "url")},
            conventions=tuple(source["conventions"]),
            columns=tuple(source["columns"]),
            ours={
                row["group"]: _estimates({column: row[column] for column in source["columns"]})
                for row in source["ours"]
            },
            rows={row["method"]: {c: row[c] for c in source["columns"]} for row in source["rows"]},
        )
        for source in table["published"]
    )
    return ComparedTable(
        title=table["title"],
        question=table["question"],
        facts=table["facts"],
        reasons=tuple(table["reasons"]),
        numbers=tuple(table["numbers"]),
        base=table["base"],
        groups=groups,
        settings=tuple(table["settings"]),
        published=published,
        not_comparable=tuple(
            NotComparable(one["source"], tuple(one["groups"]), tuple(one["because"]))
            for one in table["not_comparable"]
        ),
    )


def _estimates(numbers: Mapping[str, Any]) -> dict[str, Estimate]:
    return {name: Estimate.of(stored) for name, stored in numbers.items()}


def compare(
    runs: Sequence[str | Path],
    *,
    against: str | None = None,
    out: str | Path | None = None,
    write: bool = True,
) -> Comparison:
    """Compare finished runs: mean and standard deviation over seeds, paired differences, published numbers.

    Runs that differ only in their seed form a group. Groups share a table only if they have the same data, task,
    protocol, label convention and test images, and prepare the test images in the same way. Other groups get separate
    tables, and the comparison states the reason.

    Args:
        runs: run folders, or folders that contain runs, such as the folder of a sweep.
        against: group (method) that the paired differences refer to; default fine-tuning (ft), else the first that is
            not joint training.
        out: folder of compare.html, compare.csv, compare.tex, compare.md and compare.svg; default the folder
            that holds the runs.
        write: whether to write these files.

    Raises:
        ConfigError: no finished run, or no group of that name.
        CheckpointError: a damaged run, or a file that cannot be written.
    """
    made, results = collect(runs, against)
    if write:
        folder = Path(out) if out is not None else _parent([result.path for result in results])
        drawings = shown.pictures(made)
        names = [
            None if drawing is None else f"compare{f'-{number}' if number > 1 else ''}.svg"
            for number, drawing in enumerate(drawings, 1)
        ]
        texts = {
            "compare.html": shown.html(made),
            "compare.csv": shown.csv(made),
            "compare.tex": shown.latex(made),
            "compare.md": shown.markdown(made, names),
            **{name: drawing for name, drawing in zip(names, drawings, strict=True) if name and drawing},
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out: {folder} cannot be made ({error.strerror})") from None
        for name, text in texts.items():
            write_bytes(folder / name, text.encode())
            made["files"].append(str(folder / name))
    return Comparison.of(made)


def collect(runs: Sequence[str | Path], against: str | None = None) -> tuple[dict[str, Any], list[Result]]:
    """Collect the content of a comparison as JSON, and its runs.

    Args:
        runs: as for `compare`; `against` too.

    Returns:
        `tables` (groups with values, mean, sample standard deviation, n and interval over test images per number as
        fractions, times in seconds, sizes in bytes; paired differences; published sources; reasons), `notes`, `files`
        (none yet); and the finished runs.
    """
    found = [Results(folder) for folder in found_folders(runs)]
    finished = [one for one in found if one.is_complete(one.config)]
    notes = [
        f"{one.folder.path} is left out because it is not finished. Its command finishes it."
        for one in found
        if one not in finished
    ]
    if not finished:
        raise ConfigError([note.rstrip(".") for note in notes], "no finished run to compare")
    results = [read(one) for one in finished]
    tables, more = tables_of(results)
    names = dict.fromkeys(group.name for table in tables for group in table.groups)
    if against is not None and against not in names:
        raise ConfigError(
            f"--against: no group '{against}'{near_miss(against, names)} (one of {', '.join(names)})"
        )
    made: dict[str, Any] = {
        "everseg": everseg.__version__,
        "tables": [_table(table, against) for table in tables],
        "notes": notes + more,
        "files": [],
    }
    return made, results


def _parent(paths: Sequence[Path]) -> Path:
    """Find the folder that contains all runs."""
    given = paths[0].parent
    return (
        given
        if all(path.parent == given for path in paths)
        else Path(commonpath([real_path(p) for p in paths]))
    )


def _table(table: Table, against: str | None) -> dict[str, Any]:
    base = next((group for group in table.groups if group.name == against), None)
    taught = [group for group in table.groups if not group.is_joint]
    base = base or next(
        (group for group in taught if group.name == "ft"), next(iter(taught), table.groups[0])
    )
    numbers = numbers_of(table)
    run = table.groups[0].runs[0]
    data = run.config.data
    comparable, others = _published(table)
    draws = {id(run): draws_of(run) for run in table.runs}
    return {
        "title": ", ".join(run.results.in_order(data.domains))
        or f"{data.dataset} {_task(run.config.scenario.task)}",
        "question": _question(table),
        "facts": _facts(run),
        "reasons": table.reasons,
        "numbers": numbers,
        "base": base.name,
        "groups": ranked([_group(group, base, numbers, draws) for group in table.groups]),
        "settings": settings_apart(table, base),
        "published": comparable,
        "not_comparable": others,
    }


def ranked(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort groups by their mean over everything learnt, the best first; joint training, the upper bound, comes last."""

    def key(group: Mapping[str, Any]) -> tuple[bool, float]:
        scores = group["scores"]
        found = next((scores[name]["mean"] for name in ("all", "mIoU mean") if name in scores), None)
        return group["joint"], -(found if found is not None else -1.0)

    return sorted(groups, key=key)


def _question(table: Table) -> str:
    """Say what a reader compares these runs for."""
    taught = [group for group in table.groups if not group.is_joint]
    if all(len(run.results.planned) < 2 for group in taught for run in group.runs):
        return "which model segments best?"
    config = table.groups[0].config
    more_classes = any(step.add for step in config.scenario.steps or ())
    new = "classes" if not config.data.domains else "domains and classes" if more_classes else "domains"
    return f"which method learns new {new} and keeps the old ones?"


def _task(task: Any) -> str:
    return task if isinstance(task, str) else "explicit steps"


def _facts(run: Result) -> dict[str, str]:
    scenario, data = run.config.scenario, run.config.data
    seen = {"crop": f"crop {data.crop}", "resize": f"resize {data.size[0]}x{data.size[1]}"}
    facts = {
        "data": ", ".join(run.results.in_order(data.domains)) or data.dataset,
        "task": "" if data.domains else _task(scenario.task),
        "protocol": "" if data.domains else scenario.protocol,
        "labels": run.policy,
        "test images": f"{scenario.test_split}, {seen.get(data.evaluation, 'whole')}",
    }
    return {key: value for key, value in facts.items() if value}


def _group(group: Group, base: Group, numbers: Sequence[str], draws: Mapping[int, Draws]) -> dict[str, Any]:
    return {
        "name": group.name,
        "joint": group.is_joint,
        "seeds": group.seeds,
        "runs": [str(run.path) for run in group.runs],
        "values": {number: [run.scores.get(number) for run in group.runs] for number in numbers},
        "scores": {
            n: {**over_seeds(group, n).to_json(), "interval": of_scores(group, draws, n)} for n in numbers
        },
        "differences": None
        if group is base
        else {
            n: {**paired(group, base, n).to_json(), "interval": of_differences(group, base, draws, n)}
            for n in numbers
        },
    }


def _published(table: Table) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split the published sources into comparable ones, with the groups' numbers, and others, with the reason."""
    sources: dict[str, dict[str, Any]] = {}
    others: dict[str, dict[str, Any]] = {}
    for group in table.groups:
        for match in matches_of(group.runs[0].results):
            entry = match.published
            if not match.comparable:
                others.setdefault(
                    entry.title,
                    {
                        "source": entry.title,
                        "groups": [],
                        "because": list(match.differences),
                        "conventions": match.conventions,
                        "rows": match.rows,
                    },
                )
                others[entry.title]["groups"].append(group.name)
                continue
            source = sources.setdefault(
                entry.title,
                {"title": entry.title, "paper": entry.paper, "source": entry.source, "url": entry.url,
                 "columns": list(entry.columns), "conventions": match.conventions, "ours": [],
                 "rows": match.rows},
            )  # fmt: skip
            source["ours"].append(_ours(group, match))
    return list(sources.values()), list(others.values())


def _ours(group: Group, match: Match) -> dict[str, Any]:
    """Give a group's mean, sd and n in percent, in the columns and background convention of a source."""
    per_run = [match.own(run.results, run.scores.get("relative drop")) for run in group.runs]
    columns: Mapping[str, Any] = {
        column: spread(numbers[column] for numbers in per_run).to_json() for column in match.published.columns
    }
    return {"group": group.name, **columns}
