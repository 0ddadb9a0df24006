"""A figure has the same digits wherever it is shown, and one module writes it."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from made_runs import made_run
from parsed_pages import parsed
from rich.console import Console

import everseg
from everseg import display as text
from everseg.reports import terminal
from everseg.reports.compare import tables
from everseg.reports.html import write_report
from everseg.runs.results import Results
from everseg.runs.run_folder import RunFolder

PACKAGE = Path(everseg.__file__).parent


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.3425, "34.2"), (0.342451, "34.2"), (0.34246, "34.2"), (0.3425001, "34.3"), (0.125, "12.5"),
     (0.9995, "100.0"), (0.99949, "99.9"), (1.0, "100.0"), (0.0, "0.0"), (-0.0001, "0.0"),
     (None, "-"), (float("nan"), "-"), (np.float64(0.5), "50.0")],
)  # fmt: skip
def test_a_fraction_as_percent(value: float | None, shown: str) -> None:
    assert text.percent(value) == shown
    assert text.cell(text.in_percent(value)) == shown
    assert tables.text("old", {"mean": value, "sd": None}) == shown
    assert text.figure(text.in_percent(value)) == shown


def test_differences_intervals_spreads_and_seconds() -> None:
    assert [text.points(v) for v in (0.0123, -0.0123, -0.00001, None)] == ["+1.2", "-1.2", "+0.0", "-"]
    assert text.interval([0.1, 0.342451]) == "10.0 – 34.2"
    assert text.interval([-0.1, 0.2], between="to", signed=True) == "-10.0 to +20.0"
    assert text.interval(None) == "-"
    assert text.spread(34.2451, 0.16) == "34.2 ± 0.2"
    assert text.spread(None, None) == "-"
    assert tables.text("time", {"mean": 61.0, "sd": 2.0}) == "1:01 ± 0:02"
    assert tables.text("time", {"mean": None, "sd": None}) == "-"
    assert text.cell(1234) == "1,234"


HARD = (0.34346, 0.12646)
"""Fractions whose percent gets another digit when it is rounded to two digits first."""


def pixels(*ious: float) -> np.ndarray:
    """Counts of classes of these IoUs; class 1 has no true pixel, the errors of the others are taken for it."""
    counts = np.zeros((len(ious) + 1, len(ious) + 1), np.int64)
    for c, iou in zip((0, *range(2, len(ious) + 1)), ious, strict=True):
        counts[c, c] = round(100_000 * iou)
        counts[c, 1] = 100_000 - counts[c, c]
    return counts


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hard")
    first, second = pixels(HARD[0]), pixels(*HARD)
    groups = [(2,), (2, 1)]
    return made_run(
        out, "hard", "demo-ft", [{"default": first}, {"default": second}], groups, background=None
    )


def scores(run: Path) -> dict[str, float]:
    return Results(RunFolder(run)).tracks[0].scores[-1]["miou"]


def test_headline_cards_tables_charts_terminal_and_comparison_show_the_same_digits(run: Path) -> None:
    found = scores(run)
    shown = {group: f"{100 * found[group]:.1f}" for group in ("old", "new", "all")}
    twice = {group: f"{round(100 * found[group], 2):.1f}" for group in shown}
    assert shown != twice, "the example must be one that rounding twice gets wrong"
    results = Results(RunFolder(run))
    page = parsed(write_report(results, results.config, images=0).path)
    cells = {group: set[str]() for group in shown}
    (head,) = re.findall(
        r"to (\d+\.\d) mIoU, the new ones reach (\d+\.\d), all together (\d+\.\d)", page.text
    )
    for group, value in zip(("old", "new", "all"), head, strict=True):
        cells[group].add(value)
    markup = (run / "report.html").read_text()
    for group, value in re.findall(r"<li><span>(Old|New|All)</span><b>([\d.]+)</b>", markup):
        cells[group.lower()].add(value)
    first_table = re.findall(r"<tr>.*?</tr>", markup)[2]
    old, new, _, every = re.findall(r'<td class="n">([\d.]+)</td>', first_table)[:4]
    for group, value in (("old", old), ("new", new), ("all", every)):
        cells[group].add(value)
    made = everseg.compare([run], write=False).to_json()
    (row,) = tables.score_rows(made["tables"][0])
    console = Console(width=200)
    with console.capture() as said:
        console.print(terminal.run_table(everseg.Run(RunFolder(run)).to_json()))
    last = said.get().split("\n")[-3].split()
    for number, group in enumerate(("old", "new", "all")):
        cells[group] |= {row[group], last[number - 5]}
    assert cells == {group: {value} for group, value in shown.items()}


def test_charts_are_labelled_with_the_digits_of_their_tables(run: Path) -> None:
    pytest.importorskip("matplotlib")
    results = Results(RunFolder(run))
    page = parsed(write_report(results, results.config, images=0).path)
    (track,) = results.tracks
    ious = {f"{100 * v:.1f}" for scores in track.scores for v in scores["class_iou"] if v is not None}
    chart = next(text for text in re.findall(r"<svg.*?</svg>", (run / "report.html").read_text(), re.S)
                 if "IoU per class" in text)  # fmt: skip
    labels = set(re.findall(r">(\d+\.\d)<", chart))
    assert labels == ious
    assert ious <= set(re.findall(r"\d+\.\d", page.text))


def test_files_hold_two_digits_of_the_whole_number(run: Path) -> None:
    results = Results(RunFolder(run))
    page = parsed(write_report(results, results.config, images=0).path)
    (row,) = [r for r in csv.DictReader(io.StringIO(page.download("steps.csv"))) if r["step"] == "1"]
    assert float(row["all"]) == round(100 * scores(run)["all"], 2)
    assert json.loads(page.download(".json"))["tables"]["steps"][-1]["all"] == float(row["all"])
    assert everseg.Run(RunFolder(run)).table()[-1]["all"] == float(row["all"])


# ---------------------------------------------------------------- one owner

OWNER = "display.py"
DRAWN = {"reports/charts.py": "positions on an axis of percent, not text"}


def digits_of_shares(source: str) -> list[str]:
    """Where a source file writes a number with a fixed number of digits behind a factor of 100, or rounds one."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FormattedValue) and node.format_spec is not None:
            spec = ast.unparse(node.format_spec)
            if re.search(r"\b100 \*|\* 100\b", ast.unparse(node.value)) or "%" in spec:
                found.append(ast.unparse(node))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "round" and "100 *" in ast.unparse(node):
            found.append(ast.unparse(node))
    return found


def test_percent_is_written_by_one_module() -> None:
    found = {
        str(path.relative_to(PACKAGE)): digits_of_shares(path.read_text()) for path in PACKAGE.rglob("*.py")
    }
    assert {name for name, places in found.items() if places} - {OWNER} == set()
    # The served page asks the server for the text of a share; the page that runs in the browser alone has none to ask.
    page = set((PACKAGE / "deploy/templates").glob("*.js"))
    assert {path.name for path in page if re.search(r"\b100 \*|\* 100\b", path.read_text())} <= {"browser.js"}
    factors = {
        str(path.relative_to(PACKAGE))
        for path in (PACKAGE / "reports").rglob("*.py")
        if re.search(r"\b100 \* |\* 100\b", path.read_text())
    }
    assert factors == set(DRAWN)
    assert digits_of_shares('f"{100 * x:.1f}"'), "the search finds what it looks for"
    assert digits_of_shares("round(100 * x, 2)")


def test_reports_and_bundles_format_no_figure_themselves() -> None:
    allowed = {
        "card.py": 1,
        "serve.py": 1,
        "html.py": 1,
        "installation.py": 1,
    }  # millions of weights, seconds in a log, megabytes, memory of a GPU: no scores
    for folder in ("reports", "deploy"):
        for path in (PACKAGE / folder).rglob("*.py"):
            number = len(re.findall(r":[+]?\.\d[f%]\}", path.read_text()))
            assert number <= allowed.get(path.name, 0), f"{path.name} formats numbers; display.py does that"


def test_one_dash_stands_for_what_is_undefined() -> None:
    for folder in ("reports", "deploy"):
        for path in (PACKAGE / folder).rglob("*.py"):
            lines = [
                line for line in path.read_text().splitlines()
                if re.search(r"""(else|return|or)\s+["'][-–—]["']|["'][-–—]["']\s+if""", line) and "isalnum" not in line
            ]  # fmt: skip
            assert lines == [], f"{path.name}: {lines}"
