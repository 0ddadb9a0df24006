"""The cases of `scripts/real`, each on the real engine, which the script starts and ends by itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
