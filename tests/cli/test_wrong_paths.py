"""Every command names the real fault of a path: not there, of another kind, or a folder of several of what is meant."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from everseg.runs.place import what_is
from saying import must_say

FIXTURES = Path(__file__).parents[1] / "fixtures"
OF_RUNS = ("eval", "report", "features", "export")
OF_BUNDLES = ("serve", "history", "rollback", "extend")
MORE = {"extend": ["--data", "data.yaml", "--add", "b"], "predict": ["photos", "-o", "out"]}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one of everything that a path may lead to."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURES / "run-format-1", tmp_path / "runs/signs")
    shutil.copytree(FIXTURES / "bundle-format-1", tmp_path / "bundle")
    for folder in ("photos", "empty"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (8, 8)).save("photos/a.png")
    (tmp_path / "data.yaml").write_text("images: photos\nclasses: [a, b]\n")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "facts"),
    [
        ("NO_SUCH", ["does not exist"]),
        ("runs/sings", ["does not exist", "runs/signs"]),
        ("photos", ["holds neither a run"]),
        ("photos/a.png", ["a file"]),
        ("empty", ["an empty folder"]),
        ("runs", ["folder of runs", "runs/signs"]),
    ],
)
def test_a_path_that_is_nothing_of_everseg_is_called_what_it_is(call, here, path, facts):
    for command in (*OF_RUNS, *OF_BUNDLES, "predict"):
        code, _, err = call(command, path, *MORE.get(command, ()))
        assert code in (2, 3, 4), (command, err)
        must_say(err, path, *facts)
        assert "everseg export" in err or "run folder" in err, (command, "no way out", err)
        assert "--out" not in err, (command, "another fault than the real one", err)
    assert what_is(Path(path)).startswith(tuple(facts[:1])) or facts[0] in what_is(Path(path))


def test_another_kind_of_folder_is_named_with_what_makes_the_right_one(call, here):
    for command in OF_BUNDLES:
        err = call(command, "runs/signs", *MORE.get(command, ()))[2]
        must_say(err, "runs/signs is a run folder", "everseg export runs/signs")
    for command in ("report", "features"):
        must_say(call(command, "bundle")[2], "bundle is a bundle", "run folder")
    for data, facts in (
        ("photos", "data init photos"),
        ("runs/nothing", "does not exist"),
        ("photos/a.png", ".yaml"),
    ):
        for line in (["data", "check", data], ["data", "weights", data]):
            must_say(call(*line)[2], data, facts)
    must_say(call("export", "bundle")[2], "a bundle already")
    must_say(call("export", "runs/signs/steps/01/final")[2], "--out", "model folder")
