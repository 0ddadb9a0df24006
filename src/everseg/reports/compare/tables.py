"""Write a comparison as terminal tables, HTML, Markdown, CSV and LaTeX, all from the result of `compare`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from everseg.display import (
    UNDEFINED,
    figure,
    for_latex,
    for_markdown,
    interval,
    percent,
    printable,
    share,
    spread,
)
from everseg.display import table as terminal_table
from everseg.metrics import LEVEL, RESAMPLES
from everseg.reports.charts import can_draw, file_of
from everseg.reports.compare.answer import winners
from everseg.reports.compare.columns import WITHOUT, best, column
from everseg.reports.compare.cost import BYTES, COSTS, IMAGES, MEMORY, PARAMETERS, STEP_TIME, TIME, TRAINED
from everseg.reports.compare.wording import text
from everseg.reports.embedded import data_uri
from everseg.reports.figures import Chart, old_new_chart, seeds_chart
from everseg.reports.page import csv_text, environment

Json = Mapping[str, Any]


def heading(name: str) -> str:
    """Name of a column with the direction in which its number gets better, if it is a number of a comparison."""
    try:
        return f"{name} {column(name).arrow}"
    except KeyError:
        return name


def conventions(table: Json) -> list[tuple[str, dict[str, str]]]:
    """Group the numbers of a table by background convention: title, and column -> number.

    If leaving the background out changes nothing (no background class, or results per domain), there is only one
    convention. Of the costs, the training time stands with the scores.
    """
    counted = {n: n for n in table["numbers"] if not n.endswith(WITHOUT) and n not in COSTS[1:]}
    without = {n.removesuffix(WITHOUT): n for n in table["numbers"] if n.endswith(WITHOUT)}
    same = all(
        group["values"][n] == group["values"][column]
        for group in table["groups"]
        for column, n in without.items()
    )
    if same:
        return [("", counted)]
    return [("background counted", counted), ("background left out of the means", without)]


def score_rows(
    table: Json, columns: Mapping[str, str] | None = None, *, sign: str = "±"
) -> list[dict[str, str]]:
    """Make one row per group: its number of runs and its numbers (default: all of them)."""
    columns = columns or {n: n for n in table["numbers"]}
    return [
        {
            "method": _named(group),
            "runs": str(len(group["seeds"])),
            **{column: text(n, group["scores"][n], sign=sign) for column, n in columns.items()},
        }
        for group in table["groups"]
    ]


def difference_rows(
    table: Json, columns: Mapping[str, str] | None = None, *, sign: str = "±"
) -> list[dict[str, str]]:
    """Make one row per group except the base: mean difference of runs with the same seed; [] without pairs."""
    columns = columns or {n: n for n in table["numbers"]}
    rows = []
    for group in table["groups"]:
        differences = group["differences"]
        pairs = max((d["n"] for d in differences.values()), default=0) if differences else 0
        if pairs:
            shown = {c: text(n, differences[n], signed=True, sign=sign) for c, n in columns.items()}
            rows.append({f"minus {table['base']}": group["name"], "pairs": str(pairs), **shown})
    return rows


def interval_rows(
    table: Json, columns: Mapping[str, str] | None = None, *, dash: str = "–"
) -> list[dict[str, str]]:
    """Make one row per group and one per difference: the interval of the mean over resampled test images; may be []."""
    columns = columns or {n: n for n in table["numbers"]}
    told = [(group["name"], group["scores"], False) for group in table["groups"]]
    told += [
        (f"{group['name']} minus {table['base']}", group["differences"], True)
        for group in table["groups"]
        if group["differences"]
    ]
    known = {c: n for c, n in columns.items() if any(spreads[n]["interval"] for _, spreads, _ in told)}
    return [
        {
            "method": name,
            **{c: interval(spreads[n]["interval"], between=dash, signed=signed) for c, n in known.items()},
        }
        for name, spreads, signed in told
        if any(spreads[n]["interval"] for n in known.values())
    ]


@dataclass(frozen=True)
class Cell:
    """One cell of the leaderboard."""

    text: str
    best: bool = False
    """Whether no group but joint training has a better mean."""


@dataclass(frozen=True)
class Leaderboard:
    """All groups of a table in one table: scores in both background conventions, and costs."""

    numbers: tuple[str, ...]
    rows: tuple[tuple[Json, tuple[Cell, ...]], ...]
    """Each group with a cell per number, the best group first."""

    @property
    def explained(self) -> list[tuple[str, str]]:
        """Heading and explanation of every column; those without background share one."""
        shown = [(heading(n), column(n).says) for n in self.numbers if not n.endswith(WITHOUT)]
        left_out = [heading(n) for n in self.numbers if n.endswith(WITHOUT)]
        return [*shown, *([(", ".join(left_out), NO_BACKGROUND)] if left_out else [])]


NO_BACKGROUND = "the same with the background left out of the means; the columns before count it as a class"
_LEADING = ("base", "old", "new", "all")


def leaderboard(table: Json) -> Leaderboard:
    """Put everything that a reader compares methods by into one table."""
    (_, counted), *others = conventions(table)
    without = [columns[name] for _, columns in others for name in _LEADING if name in columns]
    shown = [name for name in counted.values() if name not in COSTS]
    costs = [name for name in (STEP_TIME, MEMORY, TRAINED, IMAGES, TIME) if name in table["numbers"]]
    numbers = (*shown, *without, *costs)
    leaders = {
        n: best((g["scores"][n]["mean"] for g in table["groups"] if not g["joint"]), n)
        for n in numbers
        if n != IMAGES  # most methods keep none
    }
    return Leaderboard(
        numbers,
        tuple(
            (group, tuple(_cell_of(group, n, leaders.get(n)) for n in numbers)) for group in table["groups"]
        ),
    )


def _cell_of(group: Json, number: str, leader: float | None) -> Cell:
    score = group["scores"][number]
    shown = text(number, score)
    if number == IMAGES:
        return Cell(_kept(group))
    if number == TRAINED and score["mean"] is not None:
        shown += f" ({share(score['mean'] / group['scores'][PARAMETERS]['mean'])})"
    alone = {"mean": leader, "sd": None}
    # Means that are shown with the same digits are equally good.
    is_best = (
        leader is not None
        and not group["joint"]
        and text(number, {**score, "sd": None}) == text(number, alone)
    )
    return Cell(shown, is_best)


def _kept(group: Json) -> str:
    """Say what data of earlier steps a group keeps."""
    if group["joint"]:
        return "all"
    images, copied = group["scores"][IMAGES], group["scores"].get(BYTES)
    if not images["mean"]:
        return "none"
    told = text(IMAGES, images)
    return told if copied is None or copied["mean"] is None else f"{told}, {text(BYTES, copied)}"


def cost_rows(table: Json) -> list[dict[str, str]]:
    """Make one row per group of what it cost, the training time of all steps aside, which stands with the scores.

    [] if nothing is known of the costs.
    """
    board = leaderboard(table)
    if not set(board.numbers) & set(COSTS[1:]):
        return []
    return [
        {
            "method": group["name"],
            **{n: cell.text for n, cell in zip(board.numbers, cells, strict=True) if n in COSTS[1:]},
        }
        for group, cells in board.rows
    ]


INTERVALS = (
    f"{percent(LEVEL, digits=0)} % intervals over test images, bootstrap of {RESAMPLES} draws, of the means over "
    "seeds"
)
"""What `interval_rows` are."""


def published_rows(source: Json, *, sign: str = "±") -> list[dict[str, str]]:
    """Make rows of the groups' numbers in the columns and convention of a source, followed by the source's numbers."""
    ours = [
        {"method": f"{row['group']} (here, {max(row[c]['n'] for c in source['columns'])} runs)",
         **{c: spread(row[c]["mean"], row[c]["sd"], sign=sign) for c in source["columns"]}}
        for row in source["ours"]
    ]  # fmt: skip
    theirs = [
        {
            "method": row["method"],
            **{c: figure(row[c]) for c in source["columns"]},
        }
        for row in source["rows"]
    ]
    return [*ours, *theirs]


def terminal(made: Json) -> list[Any]:
    """Show a comparison as terminal tables with lines of text between them."""
    pieces: list[Any] = []
    for table in made["tables"]:
        if table["reasons"]:
            pieces.append(
                "Not in the same table as the first run, because these differ:\n  "
                + "\n  ".join(table["reasons"])
            )
        for convention, columns in conventions(table):
            labels = table["facts"].get("labels")
            what = ", ".join(filter(None, [table["title"], convention, labels and f"label policy {labels}"]))
            title = f"{what}: mIoU in percent after the last step, "
            pieces.append(
                _terminal(score_rows(table, columns), f"{title}mean ± sample standard deviation over seeds")
            )
            if rows := difference_rows(table, columns):
                pieces.append(_terminal(rows, f"Runs with the same seed minus {table['base']}, in points"))
            if rows := interval_rows(table, columns):
                pieces.append(_terminal(rows, INTERVALS))
        if rows := cost_rows(table):
            pieces.append(
                _terminal(rows, "Cost of the later steps, and the data of earlier ones that is kept")
            )
        for source in table["published"]:
            pieces.append(
                _terminal(published_rows(source), f"{source['title']} ({'; '.join(source['conventions'])})")
            )
        if table["not_comparable"]:
            lines = [f"  {one['source']}: {'; '.join(one['because'])}" for one in table["not_comparable"]]
            pieces.append("\n".join(["Published for this task, but not comparable:", *lines]))
    return pieces


def _terminal(rows: Sequence[Mapping[str, str]], title: str) -> Any:
    columns = list(map(heading, rows[0]))
    return terminal_table(
        columns, [list(row.values()) for row in rows], title=title, right="|".join(columns[1:])
    )


def csv(made: Json) -> str:
    """Write one CSV row per table, group and number; scores are fractions, times are seconds."""
    rows = []
    for number, table in enumerate(made["tables"], 1):
        for group in table["groups"]:
            for name in table["numbers"]:
                score, difference = group["scores"][name], (group["differences"] or {}).get(name)
                rows.append(
                    {
                        "table": number, "task": table["title"], "labels": table["facts"].get("labels"),
                        "group": group["name"], "number": name, "better": column(name).better,
                        "mean": score["mean"], "sd": score["sd"], "n": score["n"],
                        **_ends("", score),
                        "against": "" if difference is None else table["base"],
                        "difference": difference and difference["mean"],
                        "difference_sd": difference and difference["sd"],
                        "pairs": difference and difference["n"],
                        **_ends("difference_", difference),
                        "seeds": " ".join(map(str, group["seeds"])),
                        "values": " ".join("" if v is None else repr(v) for v in group["values"][name]),
                    }
                )  # fmt: skip
    return csv_text(rows)


def _ends(prefix: str, spread: Json | None) -> dict[str, float | None]:
    low, high = (spread and spread["interval"]) or (None, None)
    return {f"{prefix}low": low, f"{prefix}high": high}


def latex(made: Json) -> str:
    """Write plain LaTeX `tabular`s that need no package. Each is a paragraph with a comment above it."""
    parts = [
        f"% everseg {made['everseg']} compare; mIoU in percent, mean \\pm sample standard deviation over seeds"
    ]
    for table in made["tables"]:
        facts = "; ".join(f"{key}: {value}" for key, value in table["facts"].items())
        shown = []
        for convention, columns in conventions(table):
            title = f"{facts}{convention and '; ' + convention}"
            shown.append((title, score_rows(table, columns, sign="@")))
            shown.append((f"{title}; paired differences", difference_rows(table, columns, sign="@")))
            shown.append((f"{title}; {INTERVALS}", interval_rows(table, columns, dash="to")))
        shown.append((f"{facts}; cost", cost_rows(table)))
        for title, rows in (
            *shown,
            *((source["title"], published_rows(source, sign="@")) for source in table["published"]),
        ):
            if rows:
                parts.append(f"% {_one_line(title)}\n{_tabular(rows)}")
    return "\n\n".join(parts) + "\n"


def _tabular(rows: Sequence[Mapping[str, str]]) -> str:
    head = " & ".join(for_latex(heading(name)) for name in rows[0])
    lines = [" & ".join(_cell(v) for v in row.values()) + r" \\" for row in rows]
    columns = "l" + "r" * (len(rows[0]) - 1)
    body = "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\hline", head + r" \\", r"\hline", *lines, r"\hline"]
    )
    return body + "\n\\end{tabular}"


_NUMBER = re.compile(r"[+-]?[\d.:]+( s)?( (@|to) [+-]?[\d.:]+( s)?)?")


def _cell(value: str) -> str:
    if value == UNDEFINED:
        return "--"
    if not _NUMBER.fullmatch(value):
        return for_latex(value)
    return value.replace("-", "$-$").replace("@", r"$\pm$")


def _one_line(value: str) -> str:
    return " ".join(printable(value).split())


def markdown(made: Json, pictures: Sequence[str | None]) -> str:
    """Write the leaderboards as Markdown, for a page of documentation.

    Args:
        pictures: for each table the name of its picture's file; None = no picture.
    """
    parts = []
    for table, picture in zip(made["tables"], pictures, strict=True):
        board = leaderboard(table)
        facts = "; ".join(f"{key}: {value}" for key, value in table["facts"].items())
        head = ["method", *map(heading, board.numbers), "runs"]
        rows = [head, ["---", *["---:"] * (len(head) - 1)]]
        for group, cells in board.rows:
            shown = [
                f"**{for_markdown(cell.text)}**" if cell.best else for_markdown(cell.text) for cell in cells
            ]
            rows.append([_named(group, for_markdown), *shown, str(len(group["seeds"]))])
        parts.append(f"### {for_markdown(table['title'])}")
        parts.append(f"{for_markdown(facts)}.")
        parts += [f"![{for_markdown(PICTURE)}]({picture})"] if picture else []
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
        parts.append(f"{READING} {' '.join(HOW_TO_READ)}")
        parts.append(
            "\n".join(f"* **{for_markdown(name)}**: {for_markdown(says)}." for name, says in board.explained)
        )
    if made["notes"]:
        parts.append("\n".join(f"* {for_markdown(note)}" for note in made["notes"]))
    return "\n\n".join(parts) + "\n"


PICTURE = "Old classes against new ones, a dot per method; its area is the training time of a later step"
READING = "↑ more is better, ↓ less is better."
HOW_TO_READ = (
    "Mean ± sample standard deviation over seeds; one run has no ±.",
    "Scores are mIoU in percent.",
    "The best mean of each column is bold, joint training aside, which sees all images at once; differences smaller "
    "than the ± decide nothing.",
)


def _named(group: Json, escape: Callable[[object], str] = str) -> str:
    return escape(group["name"]) + (" (upper bound)" if group["joint"] else "")


def pictures(made: Json) -> list[str | None]:
    """Draw the picture of each table as the text of an SVG file; None where there is nothing to draw."""
    return [
        None if chart is None or chart.svg is None else file_of(chart.svg, _style())
        for chart in (_picture(table, f"picture{n}") for n, table in enumerate(made["tables"]))
    ]


def _picture(table: Json, key: str) -> Chart | None:
    return old_new_chart(table, key, counted=len(conventions(table)) > 1)


def _style() -> str:
    return resources.files("everseg.reports").joinpath("templates/report.css").read_text(encoding="utf-8")


def page_title(made: Json) -> str:
    """Say which data the comparison is about, and which question it answers."""
    tables = made["tables"]
    names = list(dict.fromkeys(table["title"] for table in tables))
    more = f" ({len(tables)} tables)" if len(tables) > len(names) else ""
    return f"{'; '.join(names)}{more}: {tables[0]['question']}"


MOST_OPEN = 12
"""With more groups than this, the tables of details are folded."""


def html(made: Json) -> str:
    """Render one self-contained page in the style of the report. All text in it is escaped."""
    tables = [
        {
            **table,
            "conventions": [
                (
                    title,
                    score_rows(table, columns),
                    difference_rows(table, columns),
                    interval_rows(table, columns),
                )
                for title, columns in conventions(table)
            ],
            "sources": [{**source, "shown": published_rows(source)} for source in table["published"]],
            "board": leaderboard(table),
            "winners": winners(table),
            "picture": _picture(table, f"picture{number}"),
            "chart": seeds_chart(table, f"table{number}", counted=len(conventions(table)) > 1),
            "members": [
                {
                    "method": group["name"],
                    "seed": seed,
                    "run": path,
                    "report": f"everseg report {shlex.quote(path)}",
                }
                for group in table["groups"]
                for seed, path in zip(group["seeds"], group["runs"], strict=True)
            ],
        }
        for number, table in enumerate(made["tables"])
    ]
    files = [
        ("compare.csv", data_uri("text/csv", csv(made).encode())),
        ("compare.tex", data_uri("text/x-tex", latex(made).encode())),
    ]
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            made=made,
            tables=tables,
            style=_style(),
            heading=heading,
            reading=(READING, *HOW_TO_READ),
            title=page_title(made),
            files=files,
            drawn=can_draw(),
            resamples=RESAMPLES,
            level=percent(LEVEL, digits=0),
            most_open=MOST_OPEN,
        )
    )
