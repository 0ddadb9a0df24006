"""What a run records of the command it was started with, and how that is shown."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from everseg.runs import command

REPORTER = """
import atexit, json, sys
def tell():
    from everseg.runs import command
    sys.stderr.write("GIVEN " + json.dumps(command.given()))
atexit.register(tell)
"""
SCRIPT = "import sys\nfrom everseg.cli.main import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
"""As installers write console scripts."""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-m", "everseg", "list", "methods"], '["everseg", "list", "methods"]'),
        (["-m", "everseg.cli", "list", "methods"], '["everseg", "list", "methods"]'),
        (["bin/everseg", "list", "methods"], '["everseg", "list", "methods"]'),
        (["-c", "import everseg"], "null"),
        (["train.py", "run"], "null"),
    ],
)
def test_every_way_to_the_command_line_is_recorded_as_everseg(
    words: list[str], expected: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(REPORTER)
    (tmp_path / "train.py").write_text("import everseg\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "everseg").write_text(SCRIPT)
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith(f"GIVEN {expected}")


@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [
        ("everseg.__main__", "/x/everseg/__main__.py", True),
        ("pytest.__main__", "/x/pytest/__main__.py", False),
        ("ipykernel_launcher", "/x/ipykernel_launcher.py", False),
        (None, "/usr/bin/everseg", True),
        (None, "C:/Scripts/everseg.exe", True),
        (None, "C:/Scripts/everseg-script.py", True),
        (None, "my_everseg.py", False),
        (None, None, False),
    ],
)
def test_what_a_main_module_is(name: str | None, file: str | None, expected: bool) -> None:
    module = ModuleType("__main__")
    module.__spec__ = None if name is None else ModuleSpec(name, None)
    if file is not None:
        module.__file__ = file
    assert command._is_command_line(module) is expected


@pytest.mark.parametrize(
    ("recorded", "shown"),
    [
        (["everseg", "run", "demo-mib", "name=two words"], "everseg run demo-mib 'name=two words'"),
        (["cli.py", "run", "x.yaml"], "everseg run x.yaml"),
        (["__main__.py", "run", "x.yaml"], "everseg run x.yaml"),
        (["__main__.py", "--debug", "demo"], "everseg --debug demo"),
        (["everseg.exe", "run", "x.yaml"], "everseg run x.yaml"),
        (["__main__.py", "tests/test_api.py", "-q"], None),
        (["ipykernel_launcher.py", "-f", "k.json"], None),
        (["-c"], None),
        ([], None),
        (None, None),
    ],
)
def test_a_recorded_command_is_runnable_as_it_is_shown(recorded: list[str] | None, shown: str | None) -> None:
    assert command.text(recorded) == shown
    if shown is not None and recorded is not None:
        assert shlex.split(shown) == ["everseg", *recorded[1:]]
