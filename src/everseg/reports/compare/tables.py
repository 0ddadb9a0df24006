"""Write a comparison as terminal tables, HTML, CSV and LaTeX, all from the result of `compare`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from everseg.display import UNDEFINED, figure, in_percent, interval, percent, printable, spread
from everseg.display import table as terminal_table
from everseg.progress import time_text
from everseg.reports.charts import can_draw
from everseg.reports.compare.statistics import LEVEL, RESAMPLES
from everseg.reports.embedded import data_uri
from everseg.reports.figures import seeds_chart
from everseg.reports.page import csv_text, environment

Json = Mapping[str, Any]
_TEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
        "|": r"\textbar{}", '"': "''", "\n": " "}  # fmt: skip


WITHOUT = " (no bg)"
"""End of the names of numbers without background."""


def text(number: str, found: Json | None, *, signed: bool = False, sign: str = "±") -> str:
    """Format mean and standard deviation: percent with one digit, or minutes and seconds; a dash if unknown."""
    if found is None or found["mean"] is None:
        return UNDEFINED
    mean, sd = found["mean"], found["sd"]
    if number == "time":
        return f"{spread(mean, sd, sign=sign, signed=True)} s" if signed else _duration(mean, sd, sign)
    signed = signed or number == "relative drop"
    return spread(in_percent(mean), in_percent(sd), sign=sign, signed=signed)


def _duration(mean: float, sd: float | None, sign: str) -> str:
    return time_text(mean) + ("" if sd is None else f" {sign} {time_text(sd)}")


def conventions(table: Json) -> list[tuple[str, dict[str, str]]]:
    """Group the numbers of a table by background convention: title, and column -> number.

    If leaving the background out changes nothing (no background class, or results per domain), there is only one
    convention.
    """
    counted = {n: n for n in table["numbers"] if not n.endswith(WITHOUT)}
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
            "method": group["name"] + (" (upper bound)" if group["joint"] else ""),
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
            pieces.append("Not in one table with the first, because of\n  " + "\n  ".join(table["reasons"]))
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
        for source in table["published"]:
            pieces.append(
                _terminal(published_rows(source), f"{source['title']} ({'; '.join(source['conventions'])})")
            )
        if table["not_comparable"]:
            lines = [f"  {one['source']}: {'; '.join(one['because'])}" for one in table["not_comparable"]]
            pieces.append("\n".join(["Published for this task, but not comparable:", *lines]))
    return pieces


def _terminal(rows: Sequence[Mapping[str, str]], title: str) -> Any:
    columns = list(rows[0])
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
                        "group": group["name"], "number": name,
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
        for title, rows in (
            *shown,
            *((source["title"], published_rows(source, sign="@")) for source in table["published"]),
        ):
            if rows:
                parts.append(f"% {_one_line(title)}\n{_tabular(rows)}")
    return "\n\n".join(parts) + "\n"


def _tabular(rows: Sequence[Mapping[str, str]]) -> str:
    head = " & ".join(map(tex, rows[0]))
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
        return tex(value)
    return value.replace("-", "$-$").replace("@", r"$\pm$")


def _one_line(value: str) -> str:
    return " ".join(printable(value).split())


def tex(value: object) -> str:
    """Escape text for LaTeX. Letters beyond ASCII stay as they are (UTF-8)."""
    return "".join(_TEX.get(letter, letter) for letter in printable(value))


def html(made: Json) -> str:
    """Render one self-contained page in the style of the report. All text in it is escaped."""
    style = resources.files("everseg.reports").joinpath("templates/report.css").read_text(encoding="utf-8")
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
            "chart": seeds_chart(table, f"table{number}"),
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
            style=style,
            files=files,
            drawn=can_draw(),
            resamples=RESAMPLES,
            level=percent(LEVEL, digits=0),
        )
    )
