"""Making a report or a comparison opens each file of a run once."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import safetensors.torch
from toy import HERE, settings

import everseg
from everseg import api
from everseg.runs.run_folder import RunFolder
from saying import must_say

USER_CODE = f"data={HERE}"
WRITING = os.O_WRONLY | os.O_RDWR
_watched: list[tuple[str, Counter[str]]] = []
"""Folder that is watched now -> how often each file in it was opened for reading."""


def _note(path: object) -> None:
    for root, found in _watched:
        name = os.path.realpath(os.fsdecode(path))  # type: ignore[arg-type]
        if name.startswith(f"{root}/"):
            found[name.removeprefix(f"{root}/")] += 1


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    """Sees every open of this process but those of safetensors, which is written in Rust."""
    if event == "open" and _watched and isinstance(arguments[0], str | bytes | os.PathLike):
        _, mode, flags = arguments
        if not (isinstance(mode, str) and set(mode) & set("wax+")) and not (
            isinstance(flags, int) and flags & WRITING
        ):
            _note(arguments[0])


sys.addaudithook(_hook)  # it cannot be taken away again; without a watched folder it does nothing


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, finished: Path) -> Counter[str]:
    whole = safetensors.torch.load_file

    def load_file(path: str | Path) -> object:
        _note(path)
        return whole(path)

    monkeypatch.setattr(safetensors.torch, "load_file", load_file)
    found = Counter[str]()
    monkeypatch.setattr(sys.modules[__name__], "_watched", [(os.path.realpath(finished.parent), found)])
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its features compared, and joint training of the same beside it."""
    out = tmp_path_factory.mktemp("once")
    run = everseg.run(settings(out, train={"max_iterations": 2}), quiet=True).path
    joint = settings(
        out, name="upper", scenario={"joint": True}, method={"name": "ft"}, train={"max_iterations": 2}
    )
    everseg.run(joint, quiet=True)
    api.features(run, overrides=[USER_CODE], quiet=True, pixels=10, images=4)
    return run


def test_a_report_opens_each_file_once(finished: Path, opened: Counter[str]) -> None:
    made = api.report(finished, overrides=[USER_CODE], out=finished / "once.html", images=4, quiet=True)
    assert made.pictures > 0
    assert {name: number for name, number in opened.items() if number > 1} == {}
    step = "toy/steps/01"
    wanted = {"toy/run.json", "toy/scenario.json", "toy/journal.jsonl", "upper/run.json"} | {
        f"{step}/{name}"
        for name in ("metrics.json", "confusion.npz", "final/MANIFEST.json", "final/classes.json")
    }
    assert wanted | {f"{step}/final/model.safetensors"} <= opened.keys()
    assert [name for name in opened if name.endswith(".png")]


def test_pictures_that_are_tried_in_several_sizes_are_read_once(
    finished: Path, opened: Counter[str], tmp_path: Path
) -> None:
    results = everseg.Run(RunFolder(finished)).results
    made = api.write_report(results, results.config, out=tmp_path / "r.html", images=4, limit=1)
    assert made.pictures == 0
    must_say(made.notes, "Pictures", "left out")
    assert {name: number for name, number in opened.items() if number > 1} == {}


def test_a_comparison_opens_each_file_once(finished: Path, opened: Counter[str]) -> None:
    everseg.compare([finished, finished.parent / "upper"], write=False)
    assert {name: number for name, number in opened.items() if number > 1} == {}
    assert "toy/steps/01/images.npz" in opened
    assert "toy/steps/01/final/model.safetensors" in opened, "which parameters were trained"
    assert "toy/steps/01/final/method_state.safetensors" not in opened


def test_weights_that_changed_are_refused_where_pictures_need_them(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "toy"))
    weights = run / "steps" / "01" / "final" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    results = everseg.Run(RunFolder(run)).results
    made = api.write_report(results, results.config, out=tmp_path / "r.html", images=4)
    assert made.pictures == 0
    must_say(made.notes[0], "no pictures:")
    assert "model.safetensors sha256 mismatch" in made.notes[0]


def test_steps_of_different_runs_are_refused_where_pictures_need_them(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "toy"))
    other = everseg.run(settings(tmp_path, name="other", seed=9, train={"max_iterations": 1}), quiet=True)
    shutil.rmtree(run / "steps" / "00" / "final")
    shutil.copytree(other.path / "steps" / "00" / "final", run / "steps" / "00" / "final")
    results = everseg.Run(RunFolder(run)).results
    made = api.write_report(results, results.config, out=tmp_path / "r.html", images=4)
    must_say(made.notes[0], "different runs")
