"""The scores of a run as Python gives them: after each step, over the sequence of steps, and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, overload

from everseg.display import OnceADictionary, Piece, Result, Table, figure, for_files, percent, points, table
from everseg.engine.rescore import Scores, without_absent
from everseg.reports import terminal


@dataclass(frozen=True, repr=False)
class RunStep(OnceADictionary, Scores):
    """The scores of one finished step on one domain; in runs on one data set on its branch. Fractions in [0, 1]."""

    index: int
    """Of the step."""
    name: str
    """The domain; in runs on one data set the branch."""
    classes: tuple[str, ...]
    """The classes that the step taught, without background. In joint training these are all classes."""

    def shown(self) -> Iterator[Piece]:
        yield from self.tables(f"step {self.index}" + ("" if self.name == "default" else f", {self.name}"))

    def to_json(self) -> dict[str, Any]:
        first = {"index": self.index, "name": self.name, "branch": self.branch, "classes": list(self.classes)}
        rest = {key: value for key, value in asdict(self).items() if key != "new_classes"}
        return {**first, **without_absent(rest), **first}


@dataclass(frozen=True)
class Change:
    """How much IoU was lost or gained over the sequence, as fractions. What no pixel decides is None."""

    mean: float | None
    """Over the groups of classes that an earlier step taught; over domains the mean of their means."""
    groups: tuple[float | None, ...] = ()
    """Of each group of classes, in the order in which they were taught; () over domains."""
    classes: tuple[float | None, ...] = ()
    """Of each class, in the order of the model's outputs; only of forgetting, and () over domains."""
    domains: Mapping[str, float | None] = field(default_factory=dict)
    """Domain -> its mean; {} in runs on one data set."""

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Change:
        """Make a change from an entry of `Results.sequence`."""
        groups, classes = tuple(stored.get("groups", ())), tuple(stored.get("classes", ()))
        return cls(stored["mean"], groups, classes, stored.get("domains", {}))

    def to_json(self) -> dict[str, Any]:
        each = {"groups": list(self.groups), "classes": list(self.classes), "domains": dict(self.domains)}
        return {"mean": self.mean, **{key: value for key, value in each.items() if value}}


@dataclass(frozen=True)
class RelativeDrop:
    """The last step's mIoU against that of models trained on one domain each, as fractions; negative = worse."""

    mean: float
    domains: Mapping[str, float]
    """Domain -> relative difference."""
    baselines: Mapping[str, float]
    """Domain -> mIoU of its single-task model."""
    source: str
    """Where the baselines come from: a run beside this one, or `scenario.single_task`."""


@dataclass(frozen=True, repr=False)
class SequenceScores(OnceADictionary):
    """What was learnt and what was forgotten over the steps of a run, as fractions; see `metrics.sequence_scores`."""

    average_miou: float | None
    """Mean over the steps of the mIoU over all classes known then."""
    forgetting: Change
    """What was lost since the best earlier step; negative = improved."""
    backward_transfer: Change
    """What changed since the step that taught it; negative = forgotten."""
    average_miou_without_background: float | None = None
    """None over domains, as the next two."""
    forgetting_without_background: Change | None = None
    backward_transfer_without_background: Change | None = None
    step_matrix: tuple[tuple[float | None, ...], ...] = ()
    """mIoU of each group of classes (columns) after each step (rows); () over domains."""
    step_matrix_without_background: tuple[tuple[float | None, ...], ...] = ()
    domains: Mapping[str, SequenceScores] = field(default_factory=dict)
    """Domain -> its own sequence; {} in runs on one data set."""
    miou: Mapping[str, float | None] = field(default_factory=dict)
    """Domain -> mIoU of all its classes after the last step that tested it; {} in runs on one data set."""
    relative_drop: RelativeDrop | None = None
    """Over domains; None as long as a domain has no baseline."""

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> SequenceScores:
        """Make scores from `Results.sequence`; over domains with `relative_drop` in addition."""
        made: dict[str, Any] = {}
        for key, value in stored.items():
            if key.startswith(("forgetting", "backward_transfer")):
                made[key] = Change.of(value)
            elif key.startswith("step_matrix"):
                made[key] = tuple(map(tuple, value))
            elif key == "domains":
                made[key] = {name: cls.of(each) for name, each in value.items()}
            elif key == "relative_drop":
                made[key] = None if value is None else RelativeDrop(**value)
            else:
                made[key] = value
        return cls(**made)

    def shown(self) -> Iterator[Piece]:
        if self.domains:
            drops = {} if self.relative_drop is None else self.relative_drop.domains
            columns = ["domain", "mIoU", "forgetting", "backward transfer", "relative drop"]
            rows = [
                [name, percent(self.miou[name]), percent(self.forgetting.domains[name]),
                 points(self.backward_transfer.domains[name]), points(drops.get(name))]
                for name in self.domains
            ]  # fmt: skip
        else:
            columns = ["step", *(f"group {number + 1}" for number in range(len(self.step_matrix[0])))]
            total = len(self.step_matrix)
            rows = [
                [f"{number} of {total}", *map(percent, row)] for number, row in enumerate(self.step_matrix, 1)
            ]
        title = "After the last step" if self.domains else "mIoU of each group of classes after each step"
        yield table(columns, rows, title=f"{title}, in percent", right="|".join(columns[not self.domains :]))
        yield from filter(None, [terminal.sequence_text(self.to_json())])

    def to_json(self) -> dict[str, Any]:
        if self.domains:
            return {
                "domains": {name: each.to_json() for name, each in self.domains.items()},
                "miou": dict(self.miou),
                "average_miou": self.average_miou,
                "forgetting": self.forgetting.to_json(),
                "backward_transfer": self.backward_transfer.to_json(),
                "relative_drop": None if self.relative_drop is None else asdict(self.relative_drop),
            }
        told = {}
        for suffix in ("", "_without_background"):
            for key in ("average_miou", "step_matrix", "forgetting", "backward_transfer"):
                value = getattr(self, key + suffix)
                matrix = [list(row) for row in value] if key == "step_matrix" else None
                told[key + suffix] = matrix or (value.to_json() if isinstance(value, Change) else value)
        return told


@dataclass(frozen=True, repr=False)
class RunTable(Result, Sequence[Mapping[str, Any]]):
    """The result of a run as a table: a sequence with one mapping per step, column -> value. mIoU is in percent."""

    rows: tuple[Mapping[str, Any], ...]
    """The rows, with numbers rounded to two digits."""
    drawn: Table
    """The same for people. Each number is rounded once, so that it is the same as in the report."""

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], title: str) -> RunTable:
        """Make the table of a run from rows with unrounded numbers, None = undefined."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        texts = [column for column in columns if any(isinstance(row[column], str) for row in rows)]
        cells = [
            [row[column] if isinstance(row[column], int | str) else figure(row[column]) for column in columns]
            for row in rows
        ]
        numbers = "|".join(column for column in columns if column not in texts)
        return cls(tuple(for_files(rows)), table(columns, cells, title=title, right=numbers))

    @overload
    def __getitem__(self, at: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Mapping[str, Any], ...]: ...
    def __getitem__(self, at: int | slice) -> Mapping[str, Any] | tuple[Mapping[str, Any], ...]:
        return self.rows[at]

    def __len__(self) -> int:
        return len(self.rows)

    def shown(self) -> Iterator[Piece]:
        yield self.drawn

    def to_json(self) -> list[dict[str, Any]]:
        return [dict(row) for row in self.rows]
