"""Domains stand in the order in which they were taught, wherever they are listed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from made_runs import counts, made_run
from parsed_pages import parsed

import everseg
from everseg.reports.compare import tables
from everseg.reports.html import write_report
from everseg.runs.results import Results
from everseg.runs.run_folder import RunFolder

TAUGHT = ["dusk", "day"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Dusk was taught first; the configuration, and the tests of the last step, name day first."""
    tested = [{"dusk": counts(0.5, 0.6)}, {"day": counts(0.7, 0.8), "dusk": counts(0.4, 0.5)}]
    path = made_run(tmp_path, "turned", "camvid-day-dusk-ft", tested, [(3,), (3,)], background=None)
    document = json.loads((path / "scenario.json").read_text())
    document["steps"][1]["train"] = document["steps"][1]["train"][:1]  # day alone
    (path / "scenario.json").write_text(json.dumps(document))
    assert list(RunFolder(path).config().data.domains) == ["day", "dusk"]
    return path


def test_in_python_and_json(run: Path) -> None:
    found = everseg.Run(RunFolder(run))
    assert [track.name for track in found.results.tracks] == TAUGHT
    assert [row.name for row in found.steps] == ["dusk", *TAUGHT]
    assert [list(row)[2:4] for row in found.table()] == [TAUGHT, TAUGHT]
    for key in ("domains", "miou"):
        assert list(getattr(found.sequence, key)) == TAUGHT
    assert list(found.sequence.forgetting.domains) == TAUGHT


def test_in_the_report(run: Path) -> None:
    results = Results(RunFolder(run))
    page = parsed(write_report(results, results.config, images=0).path)
    document = json.loads(page.download(".json"))
    assert document["facts"]["data"] == "dusk, day"
    assert [list(row)[2:4] for row in document["tables"]["domains"]] == [TAUGHT, TAUGHT]
    assert [row["domain"] for row in document["tables"]["domain-forgetting"]] == TAUGHT
    markup = (run / "report.html").read_text()
    assert re.findall(r"<li><span>(day|dusk)</span><b>", markup) == TAUGHT, "cards"
    assert re.findall(r"<h2>(day|dusk)</h2>", markup) == TAUGHT, "parts"
    assert re.findall(r"</i>(day|dusk)</li>", markup) in ([], TAUGHT), "legend, where there are charts"


def test_in_a_comparison(run: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    (table,) = everseg.compare([run], write=False).to_json()["tables"]
    assert (table["title"], table["facts"]["data"]) == ("dusk, day", "dusk, day")
    assert table["numbers"][:2] == ["mIoU dusk", "mIoU day"]
    assert list(tables.score_rows(table)[0])[2:4] == ["mIoU dusk", "mIoU day"]
    _, out, _ = call("compare", run)
    assert out.index("dusk") < out.index("day")
