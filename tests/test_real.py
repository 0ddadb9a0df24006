"""The cases of `scripts/real`, each on the real engine, which the script starts and ends by itself."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from everseg.cli.main import app

SCRIPTS = sorted((Path(__file__).parents[1] / "scripts" / "real").glob("*_cases.py"))


def test_there_are_scripts_and_each_says_what_it_does() -> None:
    assert SCRIPTS
    for script in SCRIPTS:
        done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0
        assert script.name in done.stdout


@pytest.mark.real
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_case_goes_well_on_the_real_engine(script: Path) -> None:
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=3600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_camvid_months_are_commands_that_exist_and_tables_of_their_answers(tmp_path, monkeypatch) -> None:
    """Every command that the script types is one that the command line takes; no command is run here."""
    spec = importlib.util.spec_from_file_location("extend_camvid", SCRIPTS[0].with_name("extend_camvid.py"))
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # its dataclasses look themselves up there
    spec.loader.exec_module(script)
    typed: list[list[str]] = []

    def answer(self, *words: str, keep: str = ""):
        typed.append(list(words))
        if words[0] == "eval":
            one = {"classes": ["background", "sky", "car"], "class_iou": [None, 0.5, 0.25]}
            return script.Told({"branches": {"any": one}}, 1.0, 1.0)
        kept = {"share": 0.5, "how": "measured"}
        forms = [{"name": "PyTorch", "latency": 0.01234}]
        return script.Told({"taught": [{"name": "car"}], "kept": kept, "forms": forms}, 60.0, 30.0)

    monkeypatch.setattr(script.Field, "everseg", answer)
    monkeypatch.setattr(script.Field, "megabytes", lambda self, bundle: "3.05")
    field = script.Field(tmp_path)
    assert script.words(field)[1] == ["quick", "60 (30)", "50.0", "car 25.0, sign -", "37.5"]
    assert script.months(field)[-1][2:] == [
        "50.0",
        "25.0",
        "37.5",
        "37.5",
        "50.0 (measured)",
        "60 (30)",
        "3.05",
    ]
    assert script.small(field)[1:] == [["default", "PyTorch", "0.0123"], ["dusk", "PyTorch", "0.0123"]]
    command = typer.main.get_command(app)
    for words in typed:
        with command.make_context("everseg", words) as context:
            name, verb, rest = command.resolve_command(context, words)
            verb.make_context(name, rest, parent=context)
    assert {words[0] for words in typed} == {"run", "export", "extend", "eval", "bench"}
