"""The report and the JSON of a run say what it keeps of its training images."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from parsed_pages import Parsed, parsed
from toy import HERE, settings

import everseg
from everseg.deploy.export import export
from everseg.deploy.extend import extend
from everseg.display import size
from everseg.reports.html import write_report
from everseg.reports.memory import kept_text
from everseg.runs.results import Results
from everseg.runs.run_folder import RunFolder
from saying import must_say


def ran(out: Path, **memory: object) -> everseg.Run:
    """Three steps, red, green and blue, of an iteration each."""
    scenario = {"task": "1-1", "memory": memory}
    return everseg.run(settings(out, scenario=scenario, train={"max_iterations": 1}), quiet=True)


def page(run: everseg.Run) -> Parsed:
    results = Results(RunFolder(run.path))
    return parsed(write_report(results, results.config, images=0).path)


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> everseg.Run:
    return ran(tmp_path_factory.mktemp("copied"), size=6, pseudo=0.2, keep="files", labels="seen")


def test_the_page_tells_the_numbers_that_the_run_folder_holds(copied: everseg.Run) -> None:
    given = page(copied)
    rows = list(csv.DictReader(io.StringIO(given.download("toy-memory.csv"))))
    copies: set[Path] = set()
    for step, row in enumerate(rows):
        final = copied.folder.final(step)
        images = json.loads((final / "memory.json").read_text())["images"]
        for image in images:
            files = image["files"]
            where = copied.folder.final(files["step"])
            copies |= {where / files["image"], where / files["mask"]}
        used = sum(
            (copied.folder.final(i["files"]["step"]) / i["files"][part]).stat().st_size
            for i in images
            for part in ("image", "mask")
        )
        assert {key: int(value) for key, value in row.items()} == {
            "step": step,
            "trained with": 6 if step else 0,
            "kept": 6,
            "with pseudo-labels": sum(len(i["classes"]) > len(i["labelled"]) for i in images),
            "copied": 6,
            "bytes of copies": used,
        }
    assert len(rows) == 3
    assert {path for step in range(3) for path in copied.folder.final(step).glob("memory-*")} >= copies
    assert any(int(row["with pseudo-labels"]) for row in rows), "else the column is not tested"
    must_say(given.text, "6 training images", "at most 6", "'ssul'", "2 of the 4", "'seen'", "20.0 %")
    must_say(given.text, size(int(rows[-1]["bytes of copies"])))
    assert "references" not in " ".join(kept_text(copied.results))
    facts = json.loads(given.download("toy.json"))
    assert facts["memory"] == kept_text(copied.results)
    assert facts["facts"]["memory"] == "6 training images"


def test_the_run_as_json_has_them_too(copied: everseg.Run) -> None:
    told = copied.to_json()["memory"]
    assert [one["step"] for one in told] == [0, 1, 2]
    assert {**told[-1], "bytes": 0, "by_model": 0} == {
        "step": 2, "before": 6, "images": 6, "by_model": 0, "copied": 6, "bytes": 0,
    }  # fmt: skip
    assert told[-1]["bytes"] > 1000


def test_names_alone_are_called_references_and_without_memory_nothing_is_said(tmp_path: Path) -> None:
    run = ran(tmp_path / "names", size=4, mix="append", selection="random")
    given = page(run)
    must_say(
        given.text, "kept for later", "4 training images", "'random'", "'as_stored'", "references", "longer"
    )
    assert "pseudo-labels)" not in given.text
    assert [kept.bytes for kept in run.results.memories] == [0, 0, 0]
    assert [kept.copied for kept in run.results.memories] == [0, 0, 0]
    plain = everseg.run(settings(tmp_path / "plain", train={"max_iterations": 1}), quiet=True)
    assert "memory" not in plain.to_json()
    given = page(plain)
    assert "kept for later" not in given.text
    facts = json.loads(given.download("toy.json"))
    assert facts["memory"] == []
    assert "memory" not in facts["facts"]
    assert "memory" not in facts["tables"]


@pytest.mark.slow
def test_an_extension_counts_the_images_that_came_with_its_bundle(
    copied: everseg.Run, tmp_path: Path
) -> None:
    memory = {"size": 5, "keep": "files"}
    first = settings(tmp_path / "first", scenario={"task": [["red"]], "memory": memory})
    run = everseg.run({**first, "train": {**first["train"], "max_iterations": 1}}, quiet=True)
    bundle = export(run.path, tmp_path / "b", onnx=False, memory=True)
    overrides = [f"out={tmp_path / 'runs'}", "train.max_iterations=1", "data.workers=0"]
    done = extend(bundle.path, data=HERE, add=["green"], overrides=overrides, onnx=False, quiet=True)
    (kept,) = Results(RunFolder(done.run)).memories
    assert (kept.step, kept.before, kept.images, kept.copied) == (1, 5, 5, 5)
    own = {path.name: path.stat().st_size for path in RunFolder(done.run).final(1).glob("memory-*")}
    brought = {path.name: path.stat().st_size for path in RunFolder(done.run).final(0).glob("memory-*")}
    assert max(own.values()) < kept.bytes < sum(own.values()) + sum(brought.values())
