"""Every command names the real fault of a path: not there, of another kind, or a folder of several of what is meant."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest
from PIL import Image

import everseg
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


LOOPS = [
    ["run", "loop.yaml"], ["show", "loop.yaml"], ["run", "base.yaml"], ["data", "check", "loop.yaml"],
    ["data", "check", "loop.py:x"], ["predict", "bundle", "photos", "-o", "loop"],
    ["predict", "bundle", "photos", "-o", "loop/x"], ["predict", "bundle", "loop", "-o", "out"],
    ["run", "demo-mib", "method=loop.py:X"], ["serve", "bundle", "--model", "loop.py:x"],
    ["export", "runs/signs", "-o", "loop/x"], ["compare", "loop"], ["report", "loop"], ["history", "loop"],
    ["run", "data\0.yaml"], ["predict", "bundle", "photos", "-o", "a\0"], ["data", "init", "a\0"], ["report", "\0"],
]  # fmt: skip
"""Words with a loop of links or a NUL, for which Python raises what is no error of the operating system."""


@pytest.mark.parametrize("words", LOOPS, ids=lambda words: repr(" ".join(words)))
def test_a_loop_of_links_and_a_nul_are_an_error_for_people(call, here, words):
    for name in ("loop", "loop.yaml", "loop.py"):
        Path(name).symlink_to(name)
    Path("base.yaml").write_text("base: loop.yaml\n")
    code, _, err = call(*words)
    assert code in (2, 3, 4), err
    assert "fault of everseg" not in err


def test_only_one_function_asks_where_a_path_really_is():
    """`Path.resolve` raises RuntimeError for a loop of links, ValueError for a NUL. Strict, it is caught."""
    found = []
    for path in sorted(Path(everseg.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "resolve"
            )
            if called and not node.args and not node.keywords and "__file__" not in ast.unparse(node):
                found.append(f"{path.name}: {ast.unparse(node)}")
    assert found == ["files.py: Path(path).resolve()"]
