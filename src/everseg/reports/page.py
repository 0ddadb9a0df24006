"""Render the report as one self-contained HTML page: no script, no network, at most 10 MB."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from everseg.display import cell, for_csv, printable
from everseg.reports.embedded import data_uri
from everseg.reports.figures import Chart
from everseg.reports.kinds import Words
from everseg.reports.numbers import Confusion, Rows
from everseg.reports.verdict import Finding, Light

LIMIT = 10_000_000
"""Largest size of a report, in bytes."""


@dataclass
class Place:
    """The number of a class, written on a region of a picture."""

    left: float
    """Fraction of the width, like `top` of the height."""
    top: float
    text: str
    name: str
    """Of the class."""


@dataclass
class Picture:
    """One embedded picture with its alternative text."""

    uri: str
    text: str
    photo: bool = False
    """Whether it is a photograph that was reduced, so that enlarging it may smooth it."""
    note: str = ""
    """What stands below it."""
    shape: float = 1.0
    """Width / height, so that it can be enlarged to the window."""
    places: list[Place] = field(default_factory=list)
    """Names of regions, for pictures whose colours alone do not tell all classes apart."""


@dataclass
class PictureRow:
    """One test image of the grid."""

    title: str
    detail: str
    pictures: list[Picture | None]


@dataclass
class Grid:
    """The qualitative grid of one domain or branch."""

    name: str
    heads: list[str]
    rows: list[PictureRow]
    legend: list[tuple[str, str]]
    ranking: str = ""
    """Over which classes the images are ranked."""


@dataclass
class Part:
    """The results under one name."""

    name: str
    """"" where there is only one."""
    key: str
    steps: Rows
    """Scores after each step, as the files have them."""
    matrix: Rows
    matrix_plain: Rows
    groups: Rows
    """Forgetting per group of classes, as the files have it."""
    turns: Rows
    counts: Rows
    """The confusion counts after the last step, for the files."""
    charts: list[Chart]
    reporting: Rows = field(default_factory=list)
    """Figures by PLOP's reporting rule; [] unless the run has the labels of the PLOP family."""
    rule: str = ""
    """That rule in words."""
    taught: Rows = field(default_factory=list)
    """What an extension taught, with false-positive shares; [] in other runs."""
    shown_steps: Rows = field(default_factory=list)
    """The columns of `steps` that the page shows; [] where scores of old and new classes would mislead."""
    lead: str = ""
    """What these columns mean."""
    shown_groups: Rows = field(default_factory=list)
    """The columns of `groups` that the page shows."""
    compared: Rows = field(default_factory=list)
    """The deployed model and its extension on the new images, class by class; [] in other runs."""
    branches: Rows = field(default_factory=list)
    """What is left of each branch that the deployed model had; [] unless the model has several."""
    confusion: Confusion | None = None
    """The confusion matrix after the last step; None with a single class."""
    joint: str = ""
    """Name of the joint run whose row ends the matrix; "" where none is known."""
    parted: bool = False
    """Whether some of the classes were learnt before others."""
    counts_background: bool = False
    """Whether the means count a background."""
    images: Rows = field(default_factory=list)
    """Scores of single images over all classes; [] where the counts of images are not stored."""
    class_images: Rows = field(default_factory=list)
    """The same class by class."""


@dataclass
class Source:
    """Published numbers, shown beside the run's numbers."""

    title: str
    paper: str
    source: str
    url: str
    conventions: list[str]
    rows: Rows
    differences: list[str] = field(default_factory=list)


@dataclass
class Page:
    """Everything the template shows."""

    name: str
    sentence: str
    facts: list[tuple[str, str]]
    cards: list[tuple[str, str, str]]
    """(label, value, explanation)."""
    notes: list[str]
    parts: list[Part]
    training: list[Chart]
    speed: Rows
    data: Rows
    classes_per_step: Rows
    provenance: Mapping[str, Any]
    drawn: bool
    """Whether there are charts; without matplotlib there are tables only."""
    made: str
    words: Words
    """The sentences that are true for this kind of run."""
    findings: list[Finding] = field(default_factory=list)
    """The verdict, problems first."""
    glossary: list[tuple[str, str]] = field(default_factory=list)
    """The words on the page with their meaning."""
    domain_rows: Rows = field(default_factory=list)
    domain_groups: Rows = field(default_factory=list)
    domain_chart: Chart | None = None
    drop: str = ""
    kept: Rows = field(default_factory=list)
    """Training images kept after each step; [] for a run without memory."""
    kept_text: list[str] = field(default_factory=list)
    """What is kept and how, in sentences."""
    replaced: str = ""
    """Which training samples could not be read and were replaced."""
    comparable: list[Source] = field(default_factory=list)
    others: list[Source] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    grid_rule: str = ""
    change_legend: list[tuple[str, str]] = field(default_factory=list)
    features: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[str, Rows] = field(default_factory=dict)
    """File stem -> rows offered as CSV."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """Offered as JSON."""

    @property
    def worries(self) -> list[Finding]:
        """What the verdict found to worry about."""
        return [one for one in self.findings if one.light is not Light.GREEN]

    @property
    def in_order(self) -> list[Finding]:
        """What the verdict found in order."""
        return [one for one in self.findings if one.light is Light.GREEN]


def _whole(value: Any) -> Any:
    """Make a text printable, and keep a number and its % on one line."""
    return (
        value
        if hasattr(value, "__html__")
        else re.sub(r"(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", str(printable(value)))
    )


def environment() -> Environment:
    """Make the environment that renders the page templates. It escapes every text."""
    found = Environment(
        loader=PackageLoader("everseg.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_whole,
    )
    found.filters["cell"] = cell
    found.tests |= {"is_number": is_number, "column_of": column_of_numbers}
    return found


def render(page: Page) -> str:
    """Render the page as HTML; every text in it is escaped."""
    style = resources.files("everseg.reports").joinpath("templates/report.css").read_text(encoding="utf-8")
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in page.name)
    files = [(f"{name}-{stem}.csv", data_uri("text/csv", csv_text(rows).encode()), stem.replace("-", " "))
             for stem, rows in page.tables.items() if rows]  # fmt: skip
    text = json.dumps(page.numbers, indent=1, ensure_ascii=False)
    files.append((f"{name}.json", data_uri("application/json", text.encode()), f"{name}.json"))
    yaml = data_uri("application/yaml", page.provenance["yaml"].encode())
    return (
        environment()
        .get_template("report.html.j2")
        .render(page=page, style=style, files=files, yaml=(f"{name}.yaml", yaml))
    )


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows that share their keys as CSV; None becomes an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows({key: for_csv(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def is_number(value: Any) -> bool:
    """Whether a cell is a number or empty, so that the page aligns it to the right."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def column_of_numbers(key: str, rows: Rows) -> bool:
    """Whether every cell of a column is a number or empty, so that the page aligns the column to the right."""
    return all(is_number(row.get(key)) for row in rows)
